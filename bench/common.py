"""What the benchmarks share: models, rows, a process for each measurement, this machine's limits, and tables.

Weights are random: the shape decides the cost, not the values. Both systems load the same folder, read the
same file of rows, and run on the same BLAS, which is why this module comes before mlx.

    python -c "import common; print(common.alone(common.limits))"      # in bench/
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np

from brie_mlx import device, nano, randomness  # before mlx: it puts a fast BLAS under it
from brie_mlx.chat import CONTROL, IGNORED
from brie_mlx.config import Config
from brie_mlx.recipe import Recipe

# isort: split
import mlx.core as mx
from mlx.utils import tree_map

MODELS = Path(__file__).parents[1] / "models"
DEPTH = 24
VOCABULARY = 151_936
MEAN_TOKENS = 775
LONGEST = 2048
SUPERVISED = 0.85

QWEN_05B: dict[str, Any] = {
    **nano.NANO,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32768,
}
"""Qwen2.5-0.5B. https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/config.json"""

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def alone(task: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
    """Return task(...) from a process of its own: its peak memory is its own, and nothing is warm."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task, *args, **kwargs).result()


def in_turns(systems: Iterable[str], repeats: int) -> Iterator[str]:
    """Yield the systems' names `repeats` times over, forth and back, and tell stderr: A B B A A B."""
    order = list(systems)
    for turn in range(repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            say(f"{turn + 1} of {repeats}: {name}")
            yield name


def say(text: str) -> None:
    """Tell whoever waits what is being measured."""
    print(text, file=sys.stderr, flush=True)


# --- the model ---------------------------------------------------------------------------------


def compute_type() -> mx.Dtype:
    """Return the type that the base is measured in: the file's own where there is a GPU, float32 on a CPU."""
    return device.compute_type("auto", mx.bfloat16)


def shape(layers: int = DEPTH, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Return Qwen2.5-0.5B's config.json, with its depth or vocabulary cut."""
    return {**QWEN_05B, "num_hidden_layers": layers, "vocab_size": vocabulary}


def model_folder(config: Mapping[str, Any]) -> Path:
    """Return the folder of a random model of this shape, made if it is not there: models/bench-..."""
    sizes = "x".join(str(config[name]) for name in ("num_hidden_layers", "hidden_size", "vocab_size"))
    folder = MODELS / f"bench-{sizes}-{str(compute_type()).removeprefix('mlx.core.')}"
    if not folder.is_dir():
        say(f"making {folder.name}")
        alone(_make_model, dict(config), folder)
    return folder


def _make_model(config: dict[str, Any], folder: Path) -> None:
    model = nano.random_model(Config.from_dict(config), seed=0)
    model.update(tree_map(lambda weight: weight.astype(compute_type()), model.parameters()))
    nano.save_model(model, config, _tokenizer(config["vocab_size"] - len(CONTROL)), folder)


def _tokenizer(size: int) -> bytes:
    """Return a tokenizer.json with `size` tokens of text: it costs what a learnt one of its size costs to load."""
    raw = json.loads(nano.build_tokenizer([""], 256))
    alphabet = list(raw["model"]["vocab"])
    tokens, merges = list(alphabet), []
    for left, right in itertools.product(list(alphabet) + [a + b for a in alphabet for b in alphabet], alphabet):
        if len(tokens) == size:
            break
        tokens.append(left + right)
        merges.append([left, right])
    raw["model"] |= {"vocab": {token: number for number, token in enumerate(tokens)}, "merges": merges}
    for number, added in enumerate(raw["added_tokens"], start=size):
        added["id"] = number
    return json.dumps(raw).encode()


def weights_bytes(folder: Path) -> int:
    """Return the base's bytes in memory, which are those of its file."""
    return (folder / "model.safetensors").stat().st_size


# --- the rows ----------------------------------------------------------------------------------


def row_length(share: float) -> int:
    """Return the tokens that this share of all rows stays below: five in eight short, most others long, some cut."""
    if share < 0.625:
        return int(250 + 400 * share / 0.625)
    return int(900 + 600 * (share - 0.625) / 0.325) if share < 0.95 else LONGEST


def window_lengths(windows: int, mean_tokens: int = MEAN_TOKENS) -> list[list[int]]:
    """Return each window's row lengths: one from each equal part of the distribution, in a drawn order."""
    rows = Recipe().window
    parts = [[(row + (at + 0.5) / windows) / rows for row in range(rows)] for at in range(windows)]
    lengths = [[max(8, row_length(share) * mean_tokens // MEAN_TOKENS) for share in part] for part in parts]
    return [[drawn[at] for at in randomness.order(rows, seed=0, epoch=at)] for at, drawn in enumerate(lengths)]


def write_rows(path: Path, lengths: Iterable[int], *, vocabulary: int = VOCABULARY) -> None:
    """Write encoded rows of these lengths, ids drawn from the whole vocabulary, the answer at the end of each."""
    source = np.random.Generator(np.random.SFC64(randomness.number("bench")))
    with open(path, "w") as file:
        for length in lengths:
            ids = source.integers(0, vocabulary, size=length).tolist()
            before = length - round(SUPERVISED * length)
            row = {"input_ids": ids, "labels": [IGNORED] * before + ids[before:]}
            file.write(json.dumps(row, separators=(",", ":")) + "\n")


# --- what this machine can do ------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The best that was seen of this device."""

    product_gflops: float
    """Of a matrix product in the base's type."""
    read_gb_per_second: float
    """Of reading memory."""


def limits() -> Limits:
    """Measure the best matrix product and the best memory read."""
    sizes = (1024, 2048, 4096) if device.is_cpu() else (4096, 8192)
    return Limits(max(map(_product_gflops, sizes)), max(_read_rates()))


def best_of(runs: Sequence[Limits]) -> Limits:
    """Return the best of each."""
    return Limits(max(run.product_gflops for run in runs), max(run.read_gb_per_second for run in runs))


def best_seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest of some runs, after one that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds[1:])


def _product_gflops(size: int) -> float:
    a, b = (mx.random.normal((size, size), key=mx.random.key(at)).astype(compute_type()) for at in (0, 1))
    mx.eval(a, b)
    return 2 * size**3 / best_seconds(lambda: mx.eval(a @ b)) / 1e9


def _read_rates(rows: int = 2**15, columns: int = 2**13) -> Iterator[float]:
    """Yield GB/s of a matrix-vector product over 1 GiB of float32, and on a CPU of NumPy's maximum on all cores."""
    matrix, vector = mx.ones((rows, columns)), mx.ones((columns,))
    mx.eval(matrix, vector)
    yield matrix.nbytes / best_seconds(lambda: mx.eval(matrix @ vector)) / 1e9
    if device.is_cpu():
        parts = np.array_split(np.array(matrix, copy=False), device.cores())
        with ThreadPoolExecutor(device.cores()) as pool:
            yield matrix.nbytes / best_seconds(lambda: list(pool.map(np.max, parts))) / 1e9


def window_flops(config: Config, lengths: Sequence[int], supervised: int) -> float:
    """Return the matrix products of a window that cannot be avoided, in floating-point operations.

    Each base weight takes part in two of them, forward and towards the input; the head only where a token
    is supervised; attention over half of each example's square, forward and twice that back.
    """
    weights = sum(out * size for out, size in config.module_shapes().values()) * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * config.num_hidden_layers * sum(length**2 for length in lengths)
    return 4 * (weights * sum(lengths) + head * supervised) + 3 * attention


# --- what is printed ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Check:
    """A measured figure beside what is asked of it."""

    name: str
    value: float
    target: float | None = None
    at_most: bool = False
    unit: str = "x"

    def cells(self) -> list[str]:
        """Return the figure as a row of a table."""
        value = f"{self.value:.2f}{self.unit}"
        if self.target is None:
            return [self.name, value, "", ""]
        met = self.value <= self.target if self.at_most else self.value >= self.target
        return [
            self.name,
            value,
            f"{'<=' if self.at_most else '>='} {self.target:g}{self.unit}",
            "yes" if met else "no",
        ]


def arguments(doc: str | None, *, repeats: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options that all benchmarks have; the defaults are the full measurement."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=DEPTH, help="cut the depth")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="cut the vocabulary")
    parser.add_argument("--mean-tokens", type=int, default=MEAN_TOKENS, help="shorten the rows")
    parser.add_argument("--repeats", type=int, default=repeats, help="medians of so many")
    return parser


def about(asked: argparse.Namespace) -> dict[str, Any]:
    """Return what the figures hold for."""
    return {
        "device": device.describe(),
        "type": str(compute_type()).removeprefix("mlx.core."),
        "layers": f"{asked.layers} of {DEPTH} layers",
        "vocabulary": asked.vocabulary,
        "medians_of": asked.repeats,
    }


def show_about(asked: argparse.Namespace) -> None:
    """Print what the figures hold for."""
    print("; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in about(asked).items()))


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table, the first column to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for row in cells:
        first, *rest = (
            text.rjust(width) if at else text.ljust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  " + "  ".join([first, *rest]).rstrip())


def _cell(value: object) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def show_checks(checks: Iterable[Check]) -> None:
    """Print figures beside their targets."""
    show("Targets", ("", "measured", "target", "met"), [check.cells() for check in checks])


def print_json(figures: Mapping[str, Any]) -> None:
    """Print everything as one line, numbers to four places that count."""
    print("\n" + json.dumps(_rounded(figures)))


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
