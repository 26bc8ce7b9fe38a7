"""A checkpoint: a PEFT adapter as PEFT writes it, and beside it what a resume needs.

    checkpoint-100/
      adapter_model.safetensors   adapter_config.json      what PEFT, vLLM and brie load
      optimizer.safetensors       trainer_state.json       what `brie train --resume` loads
      manifest.json                                        sizes and SHA-256 of the others

It appears whole or not at all, and is read back only if the manifest agrees.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from brie_mlx import files
from brie_mlx.config import Config
from brie_mlx.errors import RunError
from brie_mlx.lora import Adapter
from brie_mlx.recipe import Recipe
from brie_mlx.training.optimizer import AdamW
from brie_mlx.weights import load_adapter, read_tensors, to_bytes, write_adapter

_STATE = "trainer_state.json"
_MOMENTS = ("mean", "square")


@dataclass
class Progress:
    """How far a run has come. `*_since_log` collect what the next row of metrics will report."""

    step: int = 0
    num_tokens: int = 0
    loss_since_log: float = 0.0
    steps_since_log: int = 0
    best_step: int | None = None
    best_eval_loss: float | None = None


def checkpoint_bytes(adapter: Adapter) -> int:
    """Return about how large a checkpoint is: the adapter and two moments of it, float32."""
    return 3 * 4 * adapter.num_parameters + 200_000


def save(run: Path, progress: Progress, adapter: Adapter, optimizer: AdamW) -> Path:
    """Write the checkpoint of a step and return its folder. Raises RunError, with the old state intact."""
    path = run / f"checkpoint-{progress.step}"
    with files.new_folder(path, needed=checkpoint_bytes(adapter)) as folder:
        write_adapter(folder, adapter)
        moments = {
            f"{name}.{key}": tensor
            for name in _MOMENTS
            for key, tensor in Adapter(adapter.config, getattr(optimizer, name)).to_peft().items()
        }
        files.write(folder / "optimizer.safetensors", to_bytes(moments))
        files.write(folder / _STATE, files.to_json(asdict(progress)))
    return path


def load(folder: Path, base: Config, recipe: Recipe) -> tuple[Progress, Adapter, AdamW]:
    """Return (progress, adapter, optimizer) of a checkpoint. Raises RunError or AdapterError."""
    adapter = load_adapter(folder, base)
    optimizer = AdamW(recipe, adapter.layers)
    tensors = read_tensors(folder / "optimizer.safetensors", kind=RunError)
    for name in _MOMENTS:
        mine = {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
        setattr(optimizer, name, Adapter.from_peft(adapter.config, mine, base).layers)
    return Progress(**files.read_json(folder / _STATE)), adapter, optimizer


def step_of(folder: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(run: Path) -> list[Path]:
    """Return a run's checkpoints, oldest first."""
    found = [path for path in run.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d{1,9}", path.name)]
    return sorted(found, key=step_of)


def newest_good(run: Path) -> Path | None:
    """Return the newest checkpoint if it is whole, None if there is none.

    Raises RunError when the newest is damaged, naming the newest good one and how to go on from it.
    """
    found = checkpoints(run)
    if not found:
        return None
    problems = files.damage(found[-1])
    if not problems:
        return found[-1]
    good = next((path for path in reversed(found[:-1]) if not files.damage(path)), None)
    way = (
        f"move {found[-1]} away, then run again: it goes on from {good}"
        if good
        else f"start again in another folder than {run}"
    )
    raise RunError(f"{found[-1]} is damaged.", problems=problems, hint=way)


def rotate(run: Path, limit: int | None, *, keep: Iterable[int]) -> list[Path]:
    """Remove the oldest checkpoints over `limit`, never the newest nor those of the steps in `keep`; return them."""
    if limit is None:
        return []
    found = checkpoints(run)
    kept = {*keep, step_of(found[-1])} if found else set()
    spare = [path for path in found if step_of(path) not in kept]
    removed = spare[: max(0, len(found) - limit)]
    for path in removed:
        aside = path.with_name(f".{path.name}.0.tmp")  # renamed first: half a checkpoint never carries the name
        path.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    return removed
