"""How brie's costs grow: time with tokens, memory with a row's length and the number of rows, and a large start.

    python bench/growth.py                                   # the full depth; a quarter of an hour
    python bench/growth.py --layers 4 --dataset-rows 10000   # says "4 of 24 layers"

1. Seconds a window against its tokens, rows shortened and lengthened together: a line, by least squares.
2. Peak memory against the length of a row that has the machine to itself: a line, and the row that fits.
3. Peak memory against the number of rows in the file: flat.
4. A large file: seconds from the end of reading to the first step, and what its rows hold in memory. The model
   is nano's shape, so that the step itself hides nothing.
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
import numpy as np
from common import Check
from training import Clock, brie_recipe

from brie_mlx import nano
from brie_mlx.training import loop
from brie_mlx.training.plan import Plan, make_plan

SCALES = (0.25, 0.5, 0.75, 1.0)
"""Row lengths of part 1, as shares of --mean-tokens."""
MEMORIES_GB = (8, 16)
DISTINCT_ROWS = 1000
"""Rows that are drawn for a large file; then they come again."""


@dataclass(frozen=True)
class Run:
    """A training run: each window's tokens and seconds, and what it took."""

    tokens: list[int]
    seconds: list[float]
    peak_bytes: int
    """Of MLX, above the base's weights."""
    resident_bytes: int
    """Of the process, at its end."""


def train_brie(model: Path, rows: Path, settings: dict[str, Any]) -> Run:
    """Train as `brie train` does."""
    plan, clock = make_plan(brie_recipe(model, rows, **settings)), Clock()
    with tempfile.TemporaryDirectory() as folder:
        loop.train(plan, Path(folder) / "run", listener=clock)
    peak = mx.get_peak_memory() - common.weights_bytes(model)
    return Run(clock.tokens, clock.seconds, peak, resident_bytes())


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    command = ["ps", "-o", "rss=", "-p", str(os.getpid())]
    return 1024 * int(subprocess.run(command, capture_output=True, check=True).stdout)


# --- a line through points ---------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """y = start + slope * x by least squares, and the share of y's variance that it explains."""

    start: float
    slope: float
    r_squared: float

    @classmethod
    def through(cls, x: Sequence[float], y: Sequence[float]) -> Line:
        """Fit."""
        slope, start = np.polyfit(x, y, 1)
        left = np.asarray(y) - start - slope * np.asarray(x)
        return cls(float(start), float(slope), float(1 - np.var(left) / np.var(y)))

    def where(self, y: float) -> float:
        """Return the x that gives this y."""
        return (y - self.start) / self.slope


# --- 1) time and tokens ------------------------------------------------------------------------


def time_by_tokens(model: Path, folder: Path, mean_tokens: int, repeats: int, vocabulary: int) -> dict[str, Any]:
    """Time windows of several sizes in turns, in one run, after one that warms up."""
    order = [SCALES if turn % 2 == 0 else SCALES[::-1] for turn in range(repeats)]
    means = [mean_tokens, *(round(mean_tokens * scale) for scales in order for scale in scales)]
    lengths = [common.window_lengths(1, mean)[0] for mean in means]
    rows = folder / "time.jsonl"
    common.write_rows(rows, itertools.chain(*lengths), vocabulary=vocabulary)
    run = common.alone(train_brie, model, rows, {"max_steps": len(means)})
    pairs = list(zip(run.tokens[1:], run.seconds[1:], strict=True))
    sizes = sorted({tokens for tokens, _ in pairs})
    points = [(size, statistics.median(seconds for tokens, seconds in pairs if tokens == size)) for size in sizes]
    line = Line.through(*zip(*points, strict=True))
    common.show(
        "1) Seconds a window against its tokens",
        ("", "tokens", "seconds", "line"),
        [("", tokens, seconds, line.start + line.slope * tokens) for tokens, seconds in points],
    )
    print(f"  seconds = {line.start:.2f} + {1000 * line.slope:.3f} a thousand tokens, R^2 = {line.r_squared:.4f}")
    return {"points": points, "line": asdict(line)}


# --- 2) memory and a row's length --------------------------------------------------------------


def memory_by_length(model: Path, folder: Path, lengths: Sequence[int], vocabulary: int) -> dict[str, Any]:
    """Train one row alone, of each length, with and without checkpointing."""
    alone = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1}
    found: dict[str, Any] = {}
    table = []
    for checkpointing, name in ((False, "plain"), (True, "checkpointing")):
        peaks = []
        for length in lengths:
            common.say(f"a row of {length}, {name}")
            rows = folder / f"{length}.jsonl"
            common.write_rows(rows, [length], vocabulary=vocabulary)
            settings = {**alone, "max_length": length, "gradient_checkpointing": checkpointing}
            peaks.append(common.alone(train_brie, model, rows, settings).peak_bytes)
        line = Line.through(lengths, peaks)
        fits = {f"{memory} GB": longest_row(line, memory, model) for memory in MEMORIES_GB}
        found[name] = {
            "peak_bytes": dict(zip(map(str, lengths), peaks, strict=True)),
            "line": asdict(line),
            "fits": fits,
        }
        table.append([name, *(peak / 1e9 for peak in peaks), line.slope / 1e6, f"{line.r_squared:.4f}", *fits.values()])
    header = ["", *(f"{length:,}" for length in lengths), "MB a token", "R^2", *(f"row in {m} GB" for m in MEMORIES_GB)]
    common.show("2) Peak GB above the weights against a row's tokens", header, table)
    print("  A row fits where the line and the weights together stay below; the model's own limit is the most.")
    return found


def longest_row(line: Line, memory_gb: float, model: Path) -> int:
    """Return the most tokens of a row that trains in this memory, by the line."""
    room = memory_gb * 1e9 - common.weights_bytes(model)
    return max(0, min(int(line.where(room)), common.QWEN_05B["max_position_embeddings"]))


# --- 3) memory and the number of rows ----------------------------------------------------------


def memory_by_rows(model: Path, folder: Path, counts: Sequence[int], mean_tokens: int, vocabulary: int) -> list[Any]:
    """Train the same first window out of files of several sizes."""
    found = []
    for count in counts:
        common.say(f"{count} rows")
        rows = large_file(folder / "rows.jsonl", count, mean_tokens, vocabulary)
        run = common.alone(train_brie, model, rows, {"max_steps": 1})
        found.append({"rows": count, "peak_bytes": run.peak_bytes, "resident_bytes": run.resident_bytes})
    common.show(
        "3) Memory against the number of rows",
        ("rows", "peak GB above the weights", "GB of the process"),
        [(f"{each['rows']:,}", each["peak_bytes"] / 1e9, each["resident_bytes"] / 1e9) for each in found],
    )
    return found


def large_file(path: Path, count: int, mean_tokens: int, vocabulary: int) -> Path:
    """Write so many rows, the same ones again and again; every such file begins alike."""
    windows = DISTINCT_ROWS // len(common.window_lengths(1)[0])
    common.write_rows(path, itertools.chain(*common.window_lengths(windows, mean_tokens)), vocabulary=vocabulary)
    lines = path.read_bytes().splitlines(keepends=True)
    with open(path, "wb") as file:
        file.writelines(itertools.islice(itertools.cycle(lines), count))
    return path


# --- 4) a large start --------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """How a file of rows becomes a first step."""

    rows: int
    file_bytes: int
    reading_seconds: float
    seconds_to_first_step: float
    """From the end of reading until the loop begins."""
    seconds_to_first_loss: float
    """From the end of reading until the first step is done."""
    held_bytes: int
    """What the process grew by in reading."""
    array_bytes: int
    """What of it are the examples' own arrays."""


class _Bell(Clock):
    """A clock that also notes when the loop begins."""

    def started(self, plan: Plan, step: int) -> None:
        """Note it."""
        super().started(plan, step)
        self.began = time.perf_counter()


def start(model: Path, rows: Path, few: Path) -> Start:
    """Read a file and make one step, after reading a few rows, which loads what any reading needs."""
    make_plan(brie_recipe(model, few))
    gc.collect()
    before, began = resident_bytes(), time.perf_counter()
    plan = make_plan(brie_recipe(model, rows, max_steps=1, shuffle=True))
    read, bell = time.perf_counter(), _Bell()
    gc.collect()
    held = resident_bytes() - before
    with tempfile.TemporaryDirectory() as folder:
        loop.train(plan, Path(folder) / "run", listener=bell)
    done = time.perf_counter()
    arrays = sum(row.ids.nbytes + row.labels.nbytes for row in plan.train.rows)
    size = rows.stat().st_size
    return Start(len(plan.train.rows), size, read - began, bell.began - read, done - read, held, arrays)


def large_start(folder: Path, count: int, mean_tokens: int, vocabulary: int) -> Start:
    """Start on a large file."""
    common.say(f"a start on {count} rows")
    model = common.model_folder({**nano.NANO, "vocab_size": vocabulary})
    few = large_file(folder / "few.jsonl", 8, mean_tokens, vocabulary)
    rows = large_file(folder / "large.jsonl", count, mean_tokens, vocabulary)
    found = common.alone(start, model, rows, few)
    common.show(
        f"4) A start on {found.rows:,} rows",
        ("", "measured"),
        [(name.replace("_", " "), each) for name, each in asdict(found).items()],
    )
    return found


# --- all ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print tables and JSON."""
    parser = common.arguments(__doc__)
    parser.add_argument("--row-lengths", type=int, nargs="+", default=[1024, 2048, 3072, 4096], help="of part 2")
    parser.add_argument("--dataset-rows", type=int, default=100_000, help="of part 4")
    asked = parser.parse_args(arguments)
    common.show_about(asked)
    model = common.model_folder(common.shape(asked.layers, asked.vocabulary))
    mean, vocabulary, most = asked.mean_tokens, asked.vocabulary, asked.dataset_rows
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        by_tokens = time_by_tokens(model, folder, mean, asked.repeats, vocabulary)
        by_length = memory_by_length(model, folder, asked.row_lengths, vocabulary)
        by_rows = memory_by_rows(model, folder, [8, most // 100, most // 10], mean, vocabulary)
        begun = large_start(folder, most, mean, vocabulary)
    checks = [
        Check("R^2 of a window's time by its tokens", by_tokens["line"]["r_squared"], unit=""),
        Check("peak memory, most rows to fewest", by_rows[-1]["peak_bytes"] / by_rows[0]["peak_bytes"]),
        Check("from the end of reading to the first step", begun.seconds_to_first_step, 10, at_most=True, unit=" s"),
        Check("memory held by the rows", begun.held_bytes / 1e6, 200, at_most=True, unit=" MB"),
    ]
    common.show_checks(checks)
    figures = {"time_by_tokens": by_tokens, "memory_by_row_length": by_length, "memory_by_rows": by_rows}
    common.print_json({**common.about(asked), **figures, "start": asdict(begun)})


if __name__ == "__main__":
    main()
