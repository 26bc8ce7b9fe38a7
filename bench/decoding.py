"""Decode one stream with brie and with mlx-lm, in turns, beside what the memory allows; and start both cold.

    python bench/decoding.py                       # the full depth; some minutes
    python bench/decoding.py --layers 4 --repeats 3

Same weights (random), same prompt of ids, likeliest word, same BLAS; a measurement is a process, and a few tokens
warm it up. brie is `decode.generate` with its Decoder, mlx-lm is `stream_generate`: ids and text on both sides,
timed where the caller gets them. The rate is that of the tokens after the first. A token cannot come faster than
its weights are read: all of them, since the embedding is the head too.

A cold start is a command's whole life with one token: `brie generate` and `mlx_lm generate`, the files in the
system's cache, on nano's shape and on the full one. Many rows at once are not measured here.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import mlx.core as mx
import numpy as np
from common import Check

from brie_mlx import nano, weights
from brie_mlx.chat import Decoder, Tokenizer
from brie_mlx.generation.decode import generate
from brie_mlx.generation.sampling import Sampling

PROMPT_TOKENS = 64
WARM_UP = 4
QUESTION = "What is bad faith?"
# mlx_lm in a process that has loaded the same BLAS
MLX_LM_COMMAND = "import brie_mlx, runpy; runpy.run_module('mlx_lm', run_name='__main__', alter_sys=True)"


@dataclass(frozen=True)
class Run:
    """What one decoding gives."""

    ids: list[int]
    seconds_to_first: float
    tokens_per_second: float
    """Of the tokens after the first."""

    @classmethod
    def of(cls, tokens: Iterable[int]) -> Run:
        """Take tokens as they come."""
        ids, times = [], [time.perf_counter()]
        for number in tokens:
            ids.append(number)
            times.append(time.perf_counter())
        return cls(ids, times[1] - times[0], (len(ids) - 1) / (times[-1] - times[1]))


def prompt_ids(vocabulary: int) -> list[int]:
    """Return the ids that both read."""
    return np.random.Generator(np.random.SFC64(0)).integers(0, vocabulary, size=PROMPT_TOKENS).tolist()


# --- the two -----------------------------------------------------------------------------------


def decode_brie(model: Path, tokens: int) -> Run:
    """Decode with brie."""
    base, tokenizer = weights.load_model(model), Tokenizer.read(model)
    prompt = prompt_ids(base.config.vocab_size)

    def stream(most: int) -> Iterable[int]:
        decoder = Decoder(tokenizer)
        for number in generate(base, prompt, sampling=Sampling(temperature=0, max_tokens=most), stops=()):
            decoder.feed(number)
            yield number

    list(stream(WARM_UP))
    return Run.of(stream(tokens))


def decode_mlx_lm(model: Path, tokens: int) -> Run:
    """Decode with mlx-lm, which is told of no id that stops."""
    from mlx_lm import load, stream_generate

    base, tokenizer, *_ = load(str(model))
    tokenizer.eos_token_ids = set()
    prompt = prompt_ids(base.args.vocab_size)

    def stream(most: int) -> Iterable[int]:
        for response in stream_generate(base, tokenizer, mx.array(prompt), max_tokens=most):
            yield response.token

    list(stream(WARM_UP))
    return Run.of(stream(tokens))


SYSTEMS: dict[str, Callable[[Path, int], Run]] = {"mlx-lm": decode_mlx_lm, "brie": decode_brie}


def one_stream(model: Path, tokens: int, repeats: int) -> tuple[dict[str, list[Run]], common.Limits]:
    """Let the two take turns; return their runs and the best limits of before and after."""
    runs: dict[str, list[Run]] = {name: [] for name in SYSTEMS}
    seen = [common.alone(common.limits)]
    for name in common.in_turns(SYSTEMS, repeats):
        runs[name].append(common.alone(SYSTEMS[name], model, tokens))
    return runs, common.best_of([*seen, common.alone(common.limits)])


def agreed(runs: dict[str, list[Run]]) -> int:
    """Return how many tokens both begin with alike."""
    pairs = list(zip(*(each[0].ids for each in runs.values()), strict=True))
    return next((at for at, (one, other) in enumerate(pairs) if one != other), len(pairs))


# --- cold --------------------------------------------------------------------------------------


def commands(model: Path) -> dict[str, list[str]]:
    """Return what is started, by system."""
    said = ["--model", str(model), "--prompt", QUESTION, "--max-tokens", "1"]
    return {
        "mlx-lm": [sys.executable, "-c", MLX_LM_COMMAND, "generate", *said, "--temp", "0"],
        "brie": [sys.executable, "-m", "brie_mlx.generate", *said, "--temperature", "0"],
    }


def cold_start(model: Path, repeats: int) -> dict[str, float]:
    """Return each command's median seconds, after one run of each that fills the system's cache."""
    started = commands(model)
    seconds: dict[str, list[float]] = {name: [] for name in started}
    for name in common.in_turns(started, repeats + 1):
        began = time.perf_counter()
        subprocess.run(started[name], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


# --- all ---------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print tables and JSON."""
    parser = common.arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer")
    asked = parser.parse_args(arguments)
    common.show_about(asked)
    model = common.model_folder(common.shape(asked.layers, asked.vocabulary))
    small = common.model_folder(nano.NANO)
    runs, limit = one_stream(model, asked.tokens, asked.repeats)
    allowed = limit.read_gb_per_second * 1e9 / common.weights_bytes(model)
    rates = {name: statistics.median(run.tokens_per_second for run in each) for name, each in runs.items()}
    firsts = {name: statistics.median(run.seconds_to_first for run in each) for name, each in runs.items()}
    colds = {"nano": cold_start(small, asked.repeats), "the full shape": cold_start(model, asked.repeats)}
    common.show(
        f"One stream, {PROMPT_TOKENS} tokens read and {asked.tokens} decoded",
        ("", "tokens/s", "share of the limit", "s to the first"),
        [(name, rate, f"{rate / allowed:.0%}", firsts[name]) for name, rate in rates.items()],
    )
    print(f"  {limit.read_gb_per_second:.1f} GB/s of reading allows {allowed:.1f} tokens/s")
    print(f"  both begin with the same {agreed(runs)} of {asked.tokens} tokens")
    common.show(
        "Cold, seconds of a command with one token",
        ("", *SYSTEMS),
        [(on, *each.values()) for on, each in colds.items()],
    )
    checks = [
        Check("tokens/s, brie to mlx-lm", rates["brie"] / rates["mlx-lm"], 1.1),
        Check("brie's share of what reading allows", 100 * rates["brie"] / allowed, 75, unit="%"),
        *(
            Check(f"cold on {on}, brie to mlx-lm", each["brie"] / each["mlx-lm"], 0.5, at_most=True)
            for on, each in colds.items()
        ),
    ]
    common.show_checks(checks)
    figures = {"tokens_per_second": rates, "seconds_to_first_token": firsts, "cold_seconds": colds}
    shares = {"limits": asdict(limit), "limit_tokens_per_second": allowed, "same_first_tokens": agreed(runs)}
    common.print_json(
        {**common.about(asked), **figures, **shares, "targets": {check.name: check.value for check in checks}}
    )


if __name__ == "__main__":
    main()
