"""A checkpoint to the folder that goes to the Hub: PEFT's two files, checked by loading them back.

PEFT fails silently: a key it does not know is a warning, and the adapter does nothing. So the written
folder is loaded through PEFT itself where it is installed, on the real base: no key may be missing,
the logits must differ from the base's and equal brie's.

    export_peft(Path("runs/brie/checkpoint-290"), Path("exports/brie"))
"""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
import numpy as np

from brie_mlx import files, randomness, weights
from brie_mlx.attend import Examples
from brie_mlx.config import Config
from brie_mlx.errors import AdapterError
from brie_mlx.lora import Adapter
from brie_mlx.weights import Place

TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit."""
_PROBE_TOKENS = 32


@dataclass(frozen=True)
class Export:
    """What was written and what the check of it found."""

    folder: Path
    base_model: str
    num_tensors: int
    check: str
    """One sentence: how the folder was checked, with figures."""


def export_peft(checkpoint: Path, out: Path, *, base_model: str | None = None, model: str | None = None) -> Export:
    """Write the publishable folder of a checkpoint and check it; nothing stays behind if the check fails.

    `base_model` is the base's name on the Hub, needed where the run's base was a local folder; `model` is where
    the base lies, if not where the checkpoint says. Raises AdapterError, ModelError or RunError.
    """
    settings = weights.read_adapter_config(weights.find_adapter(str(checkpoint)).folder)
    base = weights.find_model(model or settings.base_model_name_or_path or "", settings.revision)
    config = weights.read_config(base.folder)
    adapter = weights.load_adapter(checkpoint, config)
    if not any(mx.any(parts["lora_B"]).item() for layer in adapter.layers for parts in layer.values()):
        raise AdapterError(
            f"{checkpoint} changes nothing: every lora_B is zero", hint="export a checkpoint of a trained run"
        )
    name = _hub_name(base_model, base, settings.base_model_name_or_path)
    public = Adapter(replace(adapter.config, base_model_name_or_path=name), adapter.layers)
    with files.new_folder(out, manifest=False) as folder:
        weights.write_adapter(folder, public)
        check = _check(folder, public, base, config)
    return Export(out, name, len(public.to_peft()), check)


def _hub_name(asked: str | None, base: Place, recorded: str | None) -> str:
    """Return the base's name on the Hub; a folder of this machine must never be published as one."""
    if asked and not weights.is_repo_id(asked):
        raise AdapterError(f"--base-model {asked} is not the name of a repository", hint="--base-model OWNER/NAME")
    if asked:
        return asked
    if base.is_local or not recorded:
        raise AdapterError(
            f"The base was the folder {base.folder}, which nobody else can load",
            hint="name the base on the Hub: --base-model OWNER/NAME",
        )
    return recorded


def _check(folder: Path, adapter: Adapter, base: Place, config: Config) -> str:
    """Load what was written the way its users do; raise AdapterError if it is not what was meant."""
    read = weights.load_adapter(folder, config).to_peft()
    wrong = [key for key, tensor in adapter.to_peft().items() if not mx.array_equal(read[key], tensor)]
    if wrong:
        raise AdapterError(f"{folder} does not read back as it was written.", problems=wrong)
    by_name = f"{len(read)} tensors read back equal, by name, shape and value"
    missing = [name for name in ("torch", "transformers", "peft") if importlib.util.find_spec(name) is None]
    if missing:
        return f"{by_name}; not through PEFT itself, which needs {' and '.join(missing)} here"
    if config.quantization:
        return f"{by_name}; not through PEFT, since the base here is quantized"
    difference, change = compare_with_peft(folder, base.folder, adapter)
    if not difference <= TOLERANCE or not change > 10 * difference:
        raise AdapterError(
            f"PEFT does not see the adapter as brie does: logits differ by {difference:.1e} of the largest "
            f"(at most {TOLERANCE:.0e} expected), and from the base's by {change:.1e}"
        )
    return f"{by_name}; through PEFT, logits within {difference:.1e} of brie's, {change:.1e} from the base's"


def compare_with_peft(folder: Path, base: Path, adapter: Adapter) -> tuple[float, float]:
    """Return (PEFT's logits from brie's, PEFT's logits from the bare base's), as shares of the largest logit."""
    import peft
    import torch
    import transformers

    ours = weights.load_model(base, dtype="float32")
    draw = np.random.default_rng(randomness.number("probe")).integers(0, ours.config.vocab_size, (1, _PROBE_TOKENS))
    logits = ours(mx.array(draw), attend=Examples(ours.config, [_PROBE_TOKENS]), lora=adapter.branches())
    ids = torch.tensor(draw)
    with torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        plain = model(ids).logits.numpy()
        tuned = peft.PeftModel.from_pretrained(model, str(folder))(ids).logits.numpy()
    _refuse_missing_keys([str(warning.message) for warning in said])
    largest = float(np.abs(tuned).max())
    return float(np.abs(tuned - np.array(logits)).max()) / largest, float(np.abs(tuned - plain).max()) / largest


def _refuse_missing_keys(warned: list[str]) -> None:
    about_keys = [text.splitlines()[0][:300] for text in warned if "missing adapter keys" in text.lower()]
    if about_keys:
        raise AdapterError("PEFT does not find all of the adapter.", problems=about_keys)
