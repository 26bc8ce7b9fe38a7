"""Train the same windows with brie and with mlx-lm's trainer, in turns, and account for brie's time.

    python bench/training.py                                        # the full depth; a quarter of an hour and more
    python bench/training.py --layers 4 --windows 2 --repeats 3     # says "4 of 24 layers"

Same weights (random), same rows, same recipe, same BLAS. A measurement is a process: it loads, trains some
windows, of which the first warms up and does not count, and leaves. Each trainer's own clock counts.

brie is `training.loop.train` on a plan from the recipe. mlx-lm is `mlx_lm.tuner.trainer.train` as
`mlx_lm lora` calls it, with mask_prompt on: rows pass through its CacheDataset, unsorted as chat rows are, and
its `iterate_batches`, called a window at a time so that both train the same eight rows. Its clock leaves out
making the batches; brie's leaves out nothing, and brie clips gradients, which mlx-lm does not.

Memory is MLX's peak without the base's weights, so that adapter and optimizer count on both sides.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import numpy as np
import pieces
from common import Check, Limits

from brie_mlx import device
from brie_mlx.chat import IGNORED
from brie_mlx.config import Config
from brie_mlx.recipe import TARGET_MODULES, Recipe
from brie_mlx.training import loop
from brie_mlx.training.plan import Plan, make_plan


@dataclass(frozen=True)
class Run:
    """What a measurement gives."""

    seconds: list[float]
    """Of each window after the first."""
    peak_bytes: int
    """Above the base's weights."""


# --- brie --------------------------------------------------------------------------------------


def brie_recipe(model: Path, rows: Path, **settings: Any) -> Recipe:
    """Return the recipe of a measurement: rows in the file's order, one rate, a row of metrics a step."""
    plain: dict[str, Any] = {"valid": None, "shuffle": False, "lr_scheduler_type": "constant"}
    return Recipe(model=str(model), data=str(rows), logging_steps=1, save_steps=0, **{**plain, **settings})


def train_brie(model: Path, rows: Path, windows: int, checkpointing: bool) -> Run:
    """Train some windows as `brie train` does."""
    plan = make_plan(brie_recipe(model, rows, max_steps=windows, gradient_checkpointing=checkpointing))
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        loop.train(plan, Path(folder) / "run", listener=clock)
    return Run(clock.seconds[1:], mx.get_peak_memory() - common.weights_bytes(model))


class Clock:
    """A listener that keeps each window's tokens and seconds, by the loop's own clock."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.seconds: list[float] = []

    def started(self, plan: Plan, step: int) -> None:  # noqa: ARG002
        """Forget what loading took."""
        mx.reset_peak_memory()

    def stepped(self, step: int, loss: float, learning_rate: float, tokens_per_second: float) -> None:
        """Do nothing: the rows of metrics say it."""

    def recorded(self, row: dict[str, Any]) -> None:
        """Take a window's time from its row of metrics."""
        self.tokens.append(row["num_tokens"] - sum(self.tokens))
        self.seconds.append(self.tokens[-1] / row["tokens_per_second"])

    def saved(self, folder: Path) -> None:
        """Do nothing."""


# --- mlx-lm ------------------------------------------------------------------------------------


def train_mlx_lm(model: Path, rows: Path, windows: int, checkpointing: bool) -> Run:
    """Train some windows as `mlx_lm lora` does."""
    import mlx.optimizers as optimizers
    from mlx_lm.tuner import trainer
    from mlx_lm.utils import load_model

    recipe = Recipe()
    base, _ = load_model(model)
    mx.reset_peak_memory()
    _attach_lora(base, recipe)
    stopwatch = _Stopwatch(recipe.gradient_accumulation_steps)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trainer.train(
            model=base,
            optimizer=optimizers.AdamW(learning_rate=recipe.learning_rate, weight_decay=recipe.weight_decay),
            train_dataset=_Rows([json.loads(line) for line in rows.open()]),
            args=_training_args(recipe, windows, checkpointing, Path(folder)),
            iterate_batches=_window_batches,
            training_callback=stopwatch,
        )
    return Run(stopwatch.seconds[1:], mx.get_peak_memory() - common.weights_bytes(model))


def _attach_lora(base: Any, recipe: Recipe) -> None:
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    np.random.seed(0)
    base.freeze()
    keys = {f"{group}.{name}" for name in TARGET_MODULES for group in ("self_attn", "mlp")}
    scale = recipe.lora_alpha / recipe.r
    settings = {"rank": recipe.r, "scale": scale, "dropout": recipe.lora_dropout, "keys": keys}
    linear_to_lora_layers(base, len(base.layers), settings)


def _training_args(recipe: Recipe, windows: int, checkpointing: bool, folder: Path) -> Any:
    """Return its settings, reported on once a window; at max_seq_length no row is cut, and padding is least."""
    from mlx_lm.tuner.trainer import TrainingArgs

    steps = recipe.gradient_accumulation_steps
    return TrainingArgs(
        batch_size=recipe.per_device_train_batch_size,
        iters=windows * steps,
        steps_per_report=steps,
        steps_per_save=windows * steps + 1,
        max_seq_length=recipe.max_length,
        adapter_file=str(folder / "adapters.safetensors"),
        grad_checkpoint=checkpointing,
        grad_accumulation_steps=steps,
    )


class _Rows:
    """Encoded rows with the face of mlx-lm's ChatDataset: a row is a dict, `process` gives ids and the answer's start.

    So its CacheDataset takes a row's number of keys for its length, as it does for chat rows, and does not sort.
    """

    def __init__(self, rows: Sequence[dict[str, list[int]]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: int) -> dict[str, list[int]]:
        return self.rows[at]

    def process(self, row: dict[str, list[int]]) -> tuple[list[int], int]:
        """Return (ids, tokens before the answer)."""
        return row["input_ids"], row["labels"].count(IGNORED)


def _window_batches(dataset: _Rows, **settings: Any) -> Iterator[Any]:
    """Yield mlx-lm's own batches, of one window's rows after the other's."""
    from mlx_lm.tuner.datasets import CacheDataset
    from mlx_lm.tuner.trainer import iterate_batches

    window = Recipe().window
    for start in range(0, len(dataset), window):
        rows = CacheDataset(_Rows(dataset.rows[start : start + window]))
        yield from iterate_batches(dataset=rows, **{**settings, "loop": False})


class _Stopwatch:
    """A TrainingCallback that keeps each window's seconds, by mlx-lm's own clock."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.seconds: list[float] = []

    def on_train_loss_report(self, report: Mapping[str, float]) -> None:
        """Note a window."""
        self.seconds.append(self.steps / report["iterations_per_second"])

    def on_val_loss_report(self, report: Mapping[str, float]) -> None:
        """Do nothing: there is no validation."""


# --- both --------------------------------------------------------------------------------------

MLX_LM, BRIE, BRIE_AGAIN, MLX_LM_AGAIN = "mlx-lm", "brie", "brie, checkpointing", "mlx-lm, checkpointing"
SYSTEMS: dict[str, tuple[Callable[[Path, Path, int, bool], Run], bool]] = {
    MLX_LM: (train_mlx_lm, False),
    BRIE: (train_brie, False),
    BRIE_AGAIN: (train_brie, True),
    MLX_LM_AGAIN: (train_mlx_lm, True),
}


HEADER = ("", "examples/s", "tokens/s", "s a window", "fastest", "slowest", "GB above weights")


def measure(model: Path, rows: Path, windows: int, repeats: int) -> tuple[dict[str, list[Run]], list[Limits]]:
    """Let the systems take turns, with the device's limits before and after each round."""
    runs: dict[str, list[Run]] = {name: [] for name in SYSTEMS}
    seen = [common.alone(common.limits)]
    for at, name in enumerate(common.in_turns(SYSTEMS, repeats), start=1):
        train, checkpointing = SYSTEMS[name]
        runs[name].append(common.alone(train, model, rows, windows, checkpointing))
        if at % len(SYSTEMS) == 0:
            seen.append(common.alone(common.limits))
    return runs, seen


def figures(runs: Sequence[Run], lengths: Sequence[Sequence[int]]) -> dict[str, float]:
    """Return a system's medians; `lengths` are those of the rows in the windows that count."""
    seconds = statistics.median(statistics.mean(run.seconds) for run in runs)
    rows, tokens = (statistics.mean(map(count, lengths)) for count in (len, sum))
    return {
        "examples_per_second": rows / seconds,
        "tokens_per_second": tokens / seconds,
        "seconds_per_window": seconds,
        "fastest_seconds": min(statistics.mean(run.seconds) for run in runs),
        "slowest_seconds": max(statistics.mean(run.seconds) for run in runs),
        "peak_above_weights_gb": statistics.median(run.peak_bytes for run in runs) / 1e9,
    }


def checks(systems: Mapping[str, Mapping[str, float]], share: float) -> list[Check]:
    """Return the ratios that issue 3 asks for."""

    def ratio(figure: str, one: str, other: str) -> float:
        return systems[one][figure] / systems[other][figure]

    speed, memory = "examples_per_second", "peak_above_weights_gb"
    return [
        Check("examples/s, brie to mlx-lm", ratio(speed, BRIE, MLX_LM), 2.0),
        Check("examples/s, brie with checkpointing to mlx-lm", ratio(speed, BRIE_AGAIN, MLX_LM), 1.3),
        Check("examples/s, both with checkpointing", ratio(speed, BRIE_AGAIN, MLX_LM_AGAIN)),
        Check("memory, brie to mlx-lm", ratio(memory, BRIE, MLX_LM), 0.5, at_most=True),
        Check("memory, brie with checkpointing to mlx-lm", ratio(memory, BRIE_AGAIN, MLX_LM), 0.2, at_most=True),
        Check("memory, both with checkpointing", ratio(memory, BRIE_AGAIN, MLX_LM_AGAIN)),
        Check("brie's share of the best matrix product", 100 * share, 40 if device.is_cpu() else 60, unit="%"),
    ]


def share_of_limit(config: Config, lengths: Sequence[Sequence[int]], seconds: float, limit: Limits) -> float:
    """Return the least operations of the windows that count, over what the device would do in their time."""
    least = [
        common.window_flops(config, window, sum(round(common.SUPERVISED * length) for length in window))
        for window in lengths
    ]
    return statistics.mean(least) / seconds / 1e9 / limit.product_gflops


def padding_share(lengths: Sequence[Sequence[int]]) -> float:
    """Return the share of padding in mlx-lm's batches: pairs as long as their longer row."""
    size = Recipe().per_device_train_batch_size
    pairs = [window[at : at + size] for window in lengths for at in range(0, len(window), size)]
    return 1 - sum(map(sum, pairs)) / sum(len(pair) * max(pair) for pair in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print tables and JSON."""
    parser = common.arguments(__doc__)
    parser.add_argument("--windows", type=int, default=3, help="windows of a measurement; the first does not count")
    asked = parser.parse_args(arguments)
    if asked.windows < 2 or asked.repeats < 1:
        parser.error("--windows needs at least 2, --repeats at least 1")
    config = common.shape(asked.layers, asked.vocabulary)
    model, lengths = common.model_folder(config), common.window_lengths(asked.windows, asked.mean_tokens)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        common.write_rows(rows, [length for window in lengths for length in window], vocabulary=asked.vocabulary)
        runs, seen = measure(model, rows, asked.windows, asked.repeats)
        common.say("brie, piece by piece")
        parts = common.alone(pieces.account, model, rows, window=asked.windows - 1, repeats=asked.repeats)
    report(asked, Config.from_dict(config), lengths[1:], runs, seen, parts)


def report(
    asked: argparse.Namespace,
    config: Config,
    lengths: Sequence[Sequence[int]],
    runs: Mapping[str, Sequence[Run]],
    seen: Sequence[Limits],
    parts: Mapping[str, float],
) -> None:
    """Print what was measured; `lengths` are those of the windows that count."""
    systems = {name: figures(runs[name], lengths) for name in SYSTEMS}
    limit = common.best_of(seen)
    share = share_of_limit(config, lengths, systems[BRIE]["seconds_per_window"], limit)
    asks = checks(systems, share)
    account = pieces.with_rest(parts, statistics.median(run.seconds[-1] for run in runs[BRIE]))
    rows = {
        "mean_tokens": statistics.mean(length for window in lengths for length in window),
        "padding_in_mlx_lm": padding_share(lengths),
    }
    common.show_about(asked)
    print(f"{rows['mean_tokens']:.0f} tokens a row; {rows['padding_in_mlx_lm']:.0%} of mlx-lm's batches is padding")
    common.show("Training, real tokens only", HEADER, [[name, *system.values()] for name, system in systems.items()])
    common.show(
        "The device, before and after each round",
        ("", "GFLOP/s of a matrix product", "GB/s of reading"),
        [(at, *dataclasses.astuple(one)) for at, one in enumerate(seen)],
    )
    pieces.show(account)
    common.show_checks(asks)
    common.print_json(
        {
            **common.about(asked),
            "rows": rows,
            "systems": systems,
            "limits": [dataclasses.asdict(one) for one in seen],
            "share_of_limit": share,
            "account_seconds": account,
            "targets": {check.name: check.value for check in asks},
        }
    )


if __name__ == "__main__":
    main()
