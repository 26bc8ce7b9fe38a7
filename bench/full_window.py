"""Train two full windows on the shipped rows at Qwen2.5-0.5B's full depth, with random weights of its shape.

    python bench/full_window.py --tokenizer FOLDER     a folder with Qwen's tokenizer.json

The shape decides the cost, not the values. It goes through brie's own plan and loop, and prints seconds a
window, the peak memory, and the share of what this device's matrix product does. Without --tokenizer the
rows are encoded with a synthetic vocabulary of the same size: more tokens, the same cost of each.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common

# isort: split
import mlx.core as mx

from brie_mlx.config import Config
from brie_mlx.recipe import Recipe
from brie_mlx.training import windows
from brie_mlx.training.loop import train
from brie_mlx.training.plan import Plan, make_plan
from brie_mlx.training.progress import PlainListener


class Clock(PlainListener):
    """Notes when the run started, and when each step was done."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def started(self, plan: Plan, step: int) -> None:
        """Start the clock when the weights are loaded."""
        super().started(plan, step)
        self.times.append(time.perf_counter())

    def stepped(self, *_: Any) -> None:
        """Note a step."""
        self.times.append(time.perf_counter())


def flops(plan: Plan, step: int) -> float:
    """Return the unavoidable operations of a step's window."""
    rows = _rows(plan, step)
    return common.window_flops(plan.config, [len(row.ids) for row in rows], sum(row.num_supervised for row in rows))


def main() -> None:
    """Measure and print."""
    parser = common.arguments(__doc__, repeats=1)
    parser.add_argument("--tokenizer", type=Path, help="a folder with tokenizer.json")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--checkpointing", action="store_true", help="compute each layer twice, to hold less")
    asked = parser.parse_args()
    config = common.shape(asked.layers, asked.vocabulary)
    made = common.model_folder(config)
    with tempfile.TemporaryDirectory() as work:
        base = Path(work) / "base"
        shutil.copytree(made, base, symlinks=True)
        if asked.tokenizer:
            shutil.copy(asked.tokenizer / "tokenizer.json", base / "tokenizer.json")
        recipe = Recipe(model=str(base), valid=None, max_steps=asked.windows, warmup_steps=0, logging_steps=1)
        plan = make_plan(replace(recipe, gradient_checkpointing=asked.checkpointing))
        limit, clock = [common.limits()], Clock()
        mx.reset_peak_memory()
        train(plan, Path(work) / "run", listener=clock)
    limit.append(common.limits())
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    best = common.best_of(limit).product_gflops * 1e9
    figures = {
        "layers": Config.from_dict(config).num_hidden_layers,
        "gradient_checkpointing": asked.checkpointing,
        "seconds_per_window": seconds,
        "tokens_per_second": sum(len(row.ids) for step in range(1, asked.windows + 1) for row in _rows(plan, step))
        / sum(seconds),
        "peak_above_weights_gb": (mx.get_peak_memory() - common.weights_bytes(made)) / 1e9,
        "best_product_gflops": best / 1e9,
        "share_of_best_product": sum(flops(plan, step + 1) for step in range(asked.windows)) / sum(seconds) / best,
    }
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    print(json.dumps(figures))


def _rows(plan: Plan, step: int) -> list[Any]:
    return [plan.train.rows[row] for row in windows.window_rows(plan.recipe, len(plan.train.rows), step)]


if __name__ == "__main__":
    main()
