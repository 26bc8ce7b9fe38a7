"""Weights and adapters: find them here or on the Hub, check them strictly, load them, write adapters.

Only named files are fetched and only safetensors are read; a shard's name cannot leave its folder.
Everything that does not fit is listed at once.

    place = find_model("Qwen/Qwen2.5-0.5B-Instruct")
    model = load_model(place.folder)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import safetensors.numpy
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from brie_mlx import device, files
from brie_mlx.config import Config, LoraConfig
from brie_mlx.errors import AdapterError, BrieError, ModelError
from brie_mlx.lora import Adapter
from brie_mlx.qwen import Qwen

_MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_UNUSED = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Place:
    """Where a model or an adapter lies: the name it was asked by, its folder, its commit on the Hub."""

    name: str
    folder: Path
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        """Tell whether the name is a folder of this machine, which nobody else can load."""
        return self.revision is None


# --- finding -----------------------------------------------------------------------------------


def find_model(name: str, revision: str | None = None, *, weights: bool = True) -> Place:
    """Return where a base model lies, downloading it from the Hub if it is not here yet.

    `weights=False` asks for config and tokenizer only. Raises ModelError with the ways on.
    """
    patterns = _MODEL_FILES if weights else _MODEL_FILES[:2]
    return _find(name, revision, patterns=patterns, whole=lambda folder: _has_model(folder, weights), kind=ModelError)


def find_adapter(name: str, revision: str | None = None) -> Place:
    """Return where an adapter lies, a folder or a repository on the Hub. Raises AdapterError."""

    def whole(folder: Path) -> bool:
        return all((folder / file).is_file() for file in _ADAPTER_FILES)

    return _find(name, revision, patterns=_ADAPTER_FILES, whole=whole, kind=AdapterError)


def _has_model(folder: Path, weights: bool) -> bool:
    here = all((folder / name).is_file() for name in ("config.json", "tokenizer.json"))
    return here and (not weights or all(path.is_file() for path in shard_paths(folder)))


def _find(
    name: str, revision: str | None, *, patterns: tuple[str, ...], whole: Callable[[Path], bool], kind: type[BrieError]
) -> Place:
    path = Path(name).expanduser()
    if path.is_dir():
        return Place(name, path)
    what = "model" if kind is ModelError else "adapter"
    if not is_repo_id(name):
        raise kind(f"{what} folder {name} does not exist", hint="name a folder, or a repository of the Hub: OWNER/NAME")
    import huggingface_hub

    cached = _cached(name, revision, patterns)
    if cached and whole(cached):
        return Place(name, cached, cached.name)
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # the library's errors have no common root, and offline ones are of many kinds
        raise kind(
            f"{name} is not on this machine, and the Hub did not give it: {_first_line(error)}",
            hint=f"connect once to download it; or --{what} DIR with a copy; or `make demo`, which needs no download",
        ) from None
    return Place(name, folder, folder.name)


def is_repo_id(name: str) -> bool:
    """Tell whether a name is one of a repository on the Hub, OWNER/NAME."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils._validators import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1 and not name.startswith((".", "~")) and not Path(name).exists()


def _cached(name: str, revision: str | None, patterns: tuple[str, ...]) -> Path | None:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(patterns), local_files_only=True
            )
        )
    except (OSError, ValueError):
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


# --- the base ----------------------------------------------------------------------------------


def read_config(folder: Path) -> Config:
    """Return the model's config; raise ModelError if it is missing, broken or of another architecture."""
    return Config.from_dict(files.read_json(folder / "config.json", kind=ModelError))


def load_model(folder: Path, *, dtype: str = "auto") -> Qwen:
    """Return the model with its weights in memory; raise ModelError that lists all that does not fit.

    dtype: "auto" (the file's own type; float32 on a CPU), "float32", "bfloat16", "float16".
    """
    config = read_config(folder)
    tensors = _read_shards(folder)
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    model = Qwen(config)
    if config.quantization:
        group_size, bits = config.quantization
        nn.quantize(model, group_size, bits, class_predicate=lambda path, _: f"{path}.scales" in tensors)
    _check(tensors, dict(tree_flatten(model.parameters())), folder)
    own = tensors["model.norm.weight"].dtype
    kind = device.compute_type(dtype, own)
    floats = {name: mx.issubdtype(tensor.dtype, mx.floating) for name, tensor in tensors.items()}
    model.load_weights([(name, tensor.astype(kind) if floats[name] else tensor) for name, tensor in tensors.items()])
    model.freeze()
    mx.eval(model.parameters())
    return model


def _check(tensors: Mapping[str, mx.array], expected: Mapping[str, mx.array], folder: Path) -> None:
    problems = [f"{name}: missing" for name in expected if name not in tensors]
    problems += [f"{name}: unknown" for name in tensors if name not in expected]
    problems += [
        f"{name}: shape {tensors[name].shape}, expected {expected[name].shape}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if problems:
        raise ModelError(
            f"The weights in {folder} do not fit its config.json.", problems=problems, hint="download the model again"
        )


def shard_paths(folder: Path) -> list[Path]:
    """Return the model's weight files: those of its index, or the single one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    listed = files.read_json(index, kind=ModelError).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ModelError(f"{index} has no weight_map")
    names = sorted({str(name) for name in listed.values()})
    strays = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if strays:
        raise ModelError(f"{index} names files outside its folder or of another kind.", problems=strays)
    return [folder / name for name in names]


def _read_shards(folder: Path) -> dict[str, mx.array]:
    tensors: dict[str, mx.array] = {}
    problems = []
    for path in shard_paths(folder):
        loaded = read_tensors(path, kind=ModelError)
        problems += [f"{name}: twice, again in {path.name}" for name in loaded if name in tensors]
        tensors |= loaded
    if problems:
        raise ModelError(f"The shards in {folder} overlap.", problems=problems)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(_UNUSED)}


def read_tensors(path: Path, *, kind: type[BrieError]) -> dict[str, mx.array]:
    """Return a safetensors file's arrays. Its header is checked by the format's own reader before MLX maps it."""
    if not path.is_file():
        raise kind(f"{path} does not exist", hint="check the folder's name, or download it again")
    try:
        with safe_open(path, framework="numpy") as header:
            names = list(header.keys())
    except (SafetensorError, OSError, ValueError) as error:
        size = path.stat().st_size
        raise kind(
            f"{path} ({size:,} bytes) is broken: {error}", hint="it may be cut short: download or copy it again"
        ) from None
    loaded: Any = mx.load(str(path), format="safetensors")
    return {name: loaded[name] for name in names}


# --- adapters ----------------------------------------------------------------------------------


def read_adapter_config(folder: Path) -> LoraConfig:
    """Return the settings of the adapter in a folder. Raises AdapterError."""
    return LoraConfig.from_peft(files.read_json(folder / "adapter_config.json", kind=AdapterError))


def load_adapter(folder: Path, base: Config) -> Adapter:
    """Return the PEFT adapter in a folder, fitted to a base; raise AdapterError that lists all that does not fit."""
    damaged = files.damage(folder) if (folder / files.MANIFEST).exists() else []
    if damaged:
        raise AdapterError(
            f"{folder} is not what was saved.", problems=damaged, hint="use another checkpoint of the run"
        )
    config = read_adapter_config(folder)
    adapter = Adapter.from_peft(config, read_tensors(folder / "adapter_model.safetensors", kind=AdapterError), base)
    broken = [name for name, tensor in adapter.to_peft().items() if not mx.isfinite(tensor).all().item()]
    if broken:
        raise AdapterError(f"The adapter in {folder} holds numbers that are not finite.", problems=broken)
    return adapter


def to_bytes(tensors: Mapping[str, mx.array]) -> bytes:
    """Return a safetensors file with the metadata that PEFT writes."""
    return safetensors.numpy.save({name: np.array(tensor) for name, tensor in tensors.items()}, {"format": "pt"})


def write_adapter(folder: Path, adapter: Adapter) -> None:
    """Write PEFT's two files into a folder."""
    files.write(folder / "adapter_model.safetensors", to_bytes(adapter.to_peft()))
    files.write(folder / "adapter_config.json", files.to_json(adapter.config.to_peft()))
