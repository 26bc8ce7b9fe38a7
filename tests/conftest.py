"""What the tests share: small random bases with a tokenizer, adapters that do something, the reference runs."""

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import brie_mlx  # noqa: F401  (before mlx: it puts the BLAS under it)

# isort: split
import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner, Result

from brie_mlx import nano
from brie_mlx.config import Config, LoraConfig
from brie_mlx.lora import Adapter
from brie_mlx.qwen import Qwen

REFERENCE = Path(__file__).parent / "reference"
SHARED = Path(__file__).parents[2] / "shared"

TEXT = (
    "The hammer is not a thing with properties; it is what the hand forgets while the nail goes in. "
    "Élan, Dasein, 間 and 🜁 are words too.\nShe asked whether grief has a grammar, and he said: only tenses. "
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tests reach nothing but loopback; whoever tries finds out at once."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        host = address[0] if isinstance(address, tuple) else address
        if self.family != socket.AF_UNIX and host not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test tried to reach {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    return nano.build_tokenizer([TEXT] * 4, 400)


def small_config(**changes: Any) -> dict[str, Any]:
    """Return the config.json of a very small Qwen2."""
    sizes = {"vocab_size": 416, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return {**nano.NANO, **sizes, "max_position_embeddings": 512, **changes}


def lively(config: Config, *, seed: int = 0) -> Qwen:
    """Return a random model whose biases and norms matter too."""
    model = nano.random_model(config, seed)
    for block in model.model.layers:
        for number, name in enumerate(("q_proj", "k_proj", "v_proj")):
            key = mx.random.key(seed + number)
            block.self_attn[name].bias = 0.3 * mx.random.normal(block.self_attn[name].bias.shape, key=key)
            block.self_attn[name].weight *= 8
        block.input_layernorm.weight += 0.2 * mx.random.normal((config.hidden_size,), key=mx.random.key(seed + 9))
    return model


@pytest.fixture(scope="session")
def make_base(tokenizer_json: bytes) -> Callable[..., Path]:
    """Write a small random base into a folder, config settings as keywords."""

    def make(folder: Path, **changes: Any) -> Path:
        raw = small_config(**changes)
        nano.save_model(lively(Config.from_dict(raw)), raw, tokenizer_json, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, make_base: Callable[..., Path]) -> Path:
    """A small random base, for tests that only read it."""
    return make_base(tmp_path_factory.mktemp("base") / "small")


def warm_adapter(config: Config, *, seed: int = 1, **settings: Any) -> Adapter:
    """Return an adapter whose B is not zero, so that it changes what a model says."""
    adapter = Adapter.fresh(LoraConfig(**{"base_model_name_or_path": "someone/base", **settings}), config, seed=seed)
    for at, layer in enumerate(adapter.layers):
        for number, parts in enumerate(layer.values()):
            key = mx.random.key(1000 * seed + 10 * at + number)
            parts["lora_B"] = 0.1 * mx.random.normal(parts["lora_B"].shape, key=key)
    return adapter


def tensors_of(path: Path) -> dict[str, mx.array]:
    """Return the arrays of a safetensors file."""
    loaded: Any = mx.load(str(path))
    return dict(loaded)


def relative(ours: Any, theirs: Any) -> float:
    """Return the largest difference as a share of the largest entry."""
    ours, theirs = np.array(ours), np.array(theirs)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def dialogue(*turns: str) -> dict[str, Any]:
    """Return a row of messages, the user first."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[at % 2], "content": text} for at, text in enumerate(turns)]}


@pytest.fixture
def brie() -> Callable[..., Result]:
    """Run the command with arguments; a traceback is a failure."""
    from brie_mlx.cli import main

    def run(*arguments: Any, **settings: Any) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments], **settings)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
