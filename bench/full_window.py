"""Train two full windows of the card's recipe at Qwen2.5-0.5B's full shape, and say what they cost.

Weights are random (the shape decides the cost, not the values), rows are the ones in data/. Printed:
seconds a window, peak memory, and the share of what this device's own matrix product does, measured
before and after.

    python bench/full_window.py --tokenizer FOLDER --windows 2 --layers 24
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

import brie_mlx  # noqa: F401  (first: it puts the BLAS under mlx)
from brie_mlx import device, nano
from brie_mlx.chat import Tokenizer
from brie_mlx.config import Config, LoraConfig
from brie_mlx.data.rows import read_examples
from brie_mlx.lora import Adapter
from brie_mlx.qwen import Qwen
from brie_mlx.recipe import Recipe
from brie_mlx.training import optimizer, windows
from brie_mlx.training.loss import Dropout, loss_sum

QWEN_05B: dict[str, Any] = {
    **nano.NANO,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
}


def matmul_limit(size: int = 2048, repeats: int = 5) -> float:
    """Return the best GFLOP/s of a float32 matrix product on this device."""
    a, b = (mx.random.normal((size, size), key=mx.random.key(at)) for at in (0, 1))
    mx.eval(a, b)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        mx.eval(a @ b)
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


def window_flops(config: Config, tokens: int, supervised: int, lengths: list[int]) -> float:
    """Return the matrix products of a window that cannot be avoided, in floating-point operations.

    Each base weight takes part in two of them, forward and towards the input; the head only where a token
    is supervised; attention over half of each example's square, forward and twice that back.
    """
    weights = sum(out * size for out, size in config.module_shapes().values()) * config.num_hidden_layers
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.hidden_size * config.num_hidden_layers * sum(length**2 for length in lengths)
    return 4 * (weights * tokens + head * supervised) + 3 * attention


def train_window(model: Qwen, adapter: Adapter, recipe: Recipe, rows: list[Any], step: int) -> float:
    """Make one optimizer step on a window's rows and return its seconds."""
    began = time.perf_counter()
    dropout = Dropout(recipe.lora_dropout, seed=recipe.seed, step=step, num_layers=len(adapter.layers))
    update, sums = optimizer.AdamW(recipe, adapter.layers), None
    for batch in windows.cut(rows, recipe.micro_batch_tokens):

        def loss(layers: Any, batch: windows.MicroBatch = batch) -> mx.array:
            checkpointing = recipe.gradient_checkpointing
            return loss_sum(
                layers, adapter=adapter, model=model, batch=batch, dropout=dropout, checkpoint=checkpointing
            )

        _, slope = mx.value_and_grad(loss)(adapter.layers)
        sums = slope if sums is None else tree_map(mx.add, sums, slope)
        mx.eval(sums)
    assert sums is not None
    count = sum(row.num_supervised for row in rows)
    gradients, _ = optimizer.clip(tree_map(lambda slope: slope / count, sums), recipe.max_grad_norm)
    adapter.layers = update.update(adapter.layers, gradients, rate=recipe.learning_rate, step=step)
    mx.eval(adapter.layers)
    return time.perf_counter() - began


def main() -> None:
    """Measure and print a table and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokenizer", type=Path, default=Path("models/nano"), help="a folder with tokenizer.json")
    parser.add_argument("--data", type=Path, default=Path("data/train.jsonl"))
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--checkpointing", action="store_true")
    arguments = parser.parse_args()

    recipe = Recipe(gradient_checkpointing=arguments.checkpointing)
    config = Config.from_dict({**QWEN_05B, "num_hidden_layers": arguments.layers})
    model = nano.random_model(config, seed=0)
    mx.eval(model.parameters())
    weights_bytes = mx.get_active_memory()
    adapter = Adapter.fresh(LoraConfig.from_recipe(recipe), config, seed=recipe.seed)
    tokenizer = Tokenizer.read(arguments.tokenizer)
    data = read_examples(
        arguments.data,
        tokenizer,
        vocab_size=config.vocab_size,
        max_length=recipe.max_length,
        supervise=recipe.supervise,
    )
    limits, seconds, flops, tokens = [matmul_limit()], [], [], []
    mx.reset_peak_memory()
    for step in range(1, arguments.windows + 1):
        rows = [data.rows[row] for row in windows.window_rows(recipe, len(data.rows), step)]
        lengths = [len(row.ids) for row in rows]
        tokens.append(sum(lengths))
        flops.append(window_flops(config, tokens[-1], sum(row.num_supervised for row in rows), lengths))
        seconds.append(train_window(model, adapter, recipe, rows, step))
        limits.append(matmul_limit())
    limit = statistics.median(limits)
    figures = {
        "device": device.describe(),
        "layers": f"{arguments.layers} of 24",
        "gradient_checkpointing": arguments.checkpointing,
        "tokens_per_window": tokens,
        "seconds_per_window": [round(value, 2) for value in seconds],
        "tokens_per_second": round(sum(tokens) / sum(seconds), 1),
        "weights_gb": round(weights_bytes / 1e9, 2),
        "peak_above_weights_gb": round((mx.get_peak_memory() - weights_bytes) / 1e9, 2),
        "matmul_limit_gflops": round(limit, 1),
        "share_of_limit": round(sum(flops) / sum(seconds) / limit / 1e9, 3),
    }
    for name, value in figures.items():
        print(f"{name:>24}  {value}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
