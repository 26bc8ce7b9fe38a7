"""A run's folder: recipe.json, run.json, metrics.jsonl, and the checkpoints.

A new run never moves into a folder that holds one; a resumed run takes its recipe from there, and
refuses rows or a base that have changed since, because it would no longer be the same run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import brie_mlx
from brie_mlx import device, files
from brie_mlx.errors import RunError
from brie_mlx.recipe import Recipe
from brie_mlx.training.plan import Plan
from brie_mlx.weights import shard_paths

METRICS = "metrics.jsonl"


def read_recipe(run: Path) -> Recipe:
    """Return the recipe of a run that exists; raise RunError if the folder holds none."""
    if not (run / "recipe.json").is_file():
        raise RunError(f"{run} holds no run to resume", hint=f"brie train --out {run}")
    return Recipe.from_dict(files.read_json(run / "recipe.json"), source=str(run / "recipe.json"))


def check_vacant(run: Path) -> None:
    """Raise RunError where a new run would meet something that is there already."""
    if run.exists() and (not run.is_dir() or any(path for path in run.iterdir() if not path.name.startswith("."))):
        hint = f"brie train --resume --out {run}, or another folder with --out"
        raise RunError(f"{run} already holds something, and nothing is overwritten", hint=hint)


def create(run: Path, plan: Plan) -> None:
    """Make a run's folder. Raises RunError where one is already, or where the disk is too small."""
    check_vacant(run)
    with files.disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    check_space(run, plan)
    files.replace(run / "recipe.json", files.to_json(plan.recipe.to_dict()))
    files.replace(run / "run.json", files.to_json(identity(plan) | {"made_with": made_with()}))


def check_space(run: Path, plan: Plan) -> None:
    """Raise RunError if the checkpoints still to come do not fit on the disk."""
    each = 3 * 4 * plan.num_trainable + 200_000
    left = sum(not (run / f"checkpoint-{step}").exists() for step in plan.checkpoint_steps())
    limit = plan.recipe.save_total_limit
    needed = each * (left if limit is None else min(left, limit + 2))
    if files.free_bytes(run) < needed:
        message = f"{run} has too little space for {left} checkpoints: {files.space(run, needed)}"
        raise RunError(message, hint="free some space, set save_total_limit, or name another disk with --out")


def identity(plan: Plan) -> dict[str, Any]:
    """Return what a run's numbers depend on besides its recipe: the base's weights and the rows, by content."""
    base = {
        "name": plan.base.name,
        "revision": plan.base.revision,
        "bytes": {path.name: path.stat().st_size for path in shard_paths(plan.base.folder)},
    }
    return {
        "base": base,
        "train_sha256": plan.train.sha256,
        "valid_sha256": plan.valid.sha256 if plan.valid else None,
        "adapter_sha256": files.sha256(plan.adapter.folder / "adapter_model.safetensors") if plan.adapter else None,
    }


def made_with() -> dict[str, str]:
    """Return versions and device, for the record."""
    return {"brie": brie_mlx.__version__, "mlx": version("mlx"), "device": device.describe()}


def check_same(run: Path, plan: Plan) -> None:
    """Raise RunError if rows or base differ from those the run started with."""
    recorded, now = files.read_json(run / "run.json"), identity(plan)
    words = {
        "base": f"the base {plan.recipe.model}",
        "train_sha256": plan.recipe.data,
        "valid_sha256": str(plan.recipe.valid),
        "adapter_sha256": f"the adapter {plan.recipe.adapter}",
    }
    changed = [
        f"{what} is not what the run started with" for name, what in words.items() if recorded.get(name) != now[name]
    ]
    if changed:
        hint = "bring them back, or start a new run with another --out"
        raise RunError(f"{run} cannot go on as the same run.", problems=changed, hint=hint)


class Metrics:
    """metrics.jsonl: whole lines, appended as they come, so that anyone may read along."""

    def __init__(self, run: Path) -> None:
        self.path = run / METRICS

    def append(self, row: dict[str, Any]) -> None:
        """Add a row in one write."""
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        with files.disk_errors(self.path, needed=len(line)), open(self.path, "ab", buffering=0) as file:
            file.write(line)

    def push(self) -> None:
        """Push the rows to the disk, before a checkpoint that comes after them."""
        if self.path.exists():
            with files.disk_errors(self.path), open(self.path, "rb+") as file:
                os.fsync(file.fileno())

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole rows; a last line cut short by a crash is left out."""
        return read_metrics(self.path)

    def keep(self, wanted: Callable[[dict[str, Any]], bool]) -> None:
        """Rewrite the file with the rows that are wanted, in one step."""
        lines = [json.dumps(row) + "\n" for row in self.rows() if wanted(row)]
        if self.path.exists():
            files.replace(self.path, "".join(lines).encode())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl, a last line cut short left out."""
    if not path.exists():
        return []
    whole, _, _ = path.read_bytes().rpartition(b"\n")
    return [json.loads(line) for line in whole.split(b"\n") if line]
