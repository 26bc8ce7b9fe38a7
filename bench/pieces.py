"""Where brie's time in a window goes: each piece alone, at the window's own shapes, side by side as brie does it.

Every piece is run as the loop runs the whole (`workers.each_piece`), forward and backward, over all layers and
with their own weights. The sum of the pieces need not be the window's time: what is left is the rest (bias and
residual sums, gradients of branches that meet, the update, waiting), and the pieces' own noise.

    python bench/pieces.py --layers 4
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import common
import mlx.core as mx
import mlx.nn as nn

from brie_mlx import fused, weights
from brie_mlx.attend import Examples
from brie_mlx.config import LoraConfig
from brie_mlx.data.rows import read_examples
from brie_mlx.lora import Adapter, Product, branch
from brie_mlx.recipe import Recipe
from brie_mlx.training import workers
from brie_mlx.training.loss import HEAD_CHUNK, Dropout, head_loss
from brie_mlx.training.windows import MicroBatch

Work = Callable[[MicroBatch], None]


class Pieces:
    """The pieces of a window's work, each a function of a micro-batch that computes it for all layers."""

    def __init__(self, model: Path) -> None:
        self.model = weights.load_model(model)
        self.config, self.recipe = self.model.config, Recipe()
        lora = LoraConfig.from_recipe(self.recipe)
        self.adapter = Adapter.fresh(lora, self.config, seed=0)
        self.dropout = Dropout(self.recipe.lora_dropout, seed=0, step=1, num_layers=self.config.num_hidden_layers)
        widest = max(max(shape) for shape in self.config.module_shapes().values())
        most = max(self.recipe.max_length * widest, HEAD_CHUNK * self.config.vocab_size)
        self.noise = mx.random.normal((most,), key=mx.random.key(0))
        self.noise = self.noise.astype(self.model.model.norm.weight.dtype)
        mx.eval(self.noise, self.adapter.layers)

    def some(self, *shape: int) -> mx.array:
        """Return normal numbers of any shape, at no cost."""
        return self.noise[: math.prod(shape)].reshape(shape)

    def each_layer(self) -> range:
        """Return the layers' numbers."""
        return range(self.config.num_hidden_layers)

    def base_products(self, batch: MicroBatch) -> None:
        """Multiply by the seven projections, forward and towards the input."""
        tokens = batch.ids.size
        for layer in self.model.model.layers:
            done = []
            for name, (out, size) in self.config.module_shapes().items():
                group, projection = name.split(".")
                x, slope = self.some(1, tokens, size), self.some(1, tokens, out)
                done.append(mx.vjp(layer[group][projection], [x], [slope]))
            mx.eval(done)

    def lora(self, batch: MicroBatch) -> None:
        """Multiply by A and B, and their gradients."""
        self._branches(batch, None)

    def lora_with_dropout(self, batch: MicroBatch) -> None:
        """Do the same and draw the masks."""
        self._branches(batch, self.dropout)

    def _branches(self, batch: MicroBatch, dropout: Dropout | None) -> None:
        tokens = batch.ids.size
        for at in self.each_layer():
            product = dropout.by(dropout.keys(batch.places, at), batch.lengths) if dropout else None
            layer, scales, done = self.adapter.layers[at], self.adapter.scales(at), []
            for name, (out, size) in self.config.module_shapes().items():
                run = functools.partial(_branch, name, scales, product)
                ends = [self.some(1, tokens, size), layer[name]["lora_A"], layer[name]["lora_B"]]
                done.append(mx.vjp(run, ends, [self.some(1, tokens, out).astype(mx.float32)]))
            mx.eval(done)

    def attention(self, batch: MicroBatch) -> None:
        """Attend inside each example, RoPE included."""
        config, tokens = self.config, batch.ids.size
        attend = Examples(config, batch.lengths)
        q = self.some(1, config.num_attention_heads, tokens, config.head_dim)
        k = self.some(1, config.num_key_value_heads, tokens, config.head_dim)
        for at in self.each_layer():
            mx.eval(mx.vjp(lambda q, k, v, at=at: attend(at, q, k, v), [q, k, k], [q]))

    def swiglu(self, batch: MicroBatch) -> None:
        """Multiply gate and up, and their gradients."""
        wide = self.some(1, batch.ids.size, self.config.intermediate_size)
        for _ in self.each_layer():
            mx.eval(mx.vjp(fused.swiglu, [wide, wide], [wide]))

    def norms(self, batch: MicroBatch) -> None:
        """Normalise twice a layer, forward and backward."""
        x = self.some(1, batch.ids.size, self.config.hidden_size)
        norm = nn.RMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        for _ in range(2 * self.config.num_hidden_layers + 1):
            _forth_and_back(norm, x, x)

    def head(self, batch: MicroBatch) -> None:
        """Compute the loss and its gradient by the hidden states."""
        hidden = self.some(batch.targets.size, self.config.hidden_size)
        loss = mx.value_and_grad(lambda hidden: head_loss(self.model.head, hidden, batch.targets))
        mx.eval(loss(hidden))

    def head_products(self, batch: MicroBatch) -> None:
        """Multiply by the head, forward and back, a chunk at a time."""
        for at in range(0, batch.targets.size, HEAD_CHUNK):
            rows = min(HEAD_CHUNK, batch.targets.size - at)
            hidden, slope = (self.some(rows, size) for size in (self.config.hidden_size, self.config.vocab_size))
            _forth_and_back(self.model.head, hidden, slope)


def _branch(
    name: str, scales: Mapping[str, float], product: Product | None, x: mx.array, a: mx.array, b: mx.array
) -> mx.array:
    added = branch({name: {"lora_A": a, "lora_B": b}}, scales, product)(name, x)
    assert added is not None
    return added


def _forth_and_back(function: Callable[[mx.array], mx.array], x: mx.array, slope: mx.array) -> None:
    mx.eval(mx.vjp(function, [x], [slope]))


def account(model: Path, rows: Path, *, window: int, repeats: int) -> dict[str, float]:
    """Return the seconds of each piece of window number `window` (from 0) of a file of rows."""
    pieces = Pieces(model)
    data = read_examples(
        rows, None, vocab_size=pieces.config.vocab_size, max_length=pieces.recipe.max_length, supervise="assistant"
    )
    size = pieces.recipe.window
    part = data.rows[window * size : (window + 1) * size]

    def seconds(work: Work) -> float:
        def evaluated(batch: MicroBatch) -> None:
            work(batch)

        times = []
        for _ in range(repeats + 1):
            began = time.perf_counter()
            list(workers.each_piece(evaluated, part, pieces.recipe.micro_batch_tokens))
            times.append(time.perf_counter() - began)
        return statistics.median(times[1:])

    lora, head, head_products = seconds(pieces.lora), seconds(pieces.head), seconds(pieces.head_products)
    return {
        "base products": seconds(pieces.base_products),
        "LoRA products": lora,
        "dropout masks": seconds(pieces.lora_with_dropout) - lora,
        "attention": seconds(pieces.attention),
        "SwiGLU": seconds(pieces.swiglu),
        "norms": seconds(pieces.norms),
        "head products": head_products,
        "head softmax": head - head_products,
    }


def with_rest(parts: Mapping[str, float], seconds: float) -> dict[str, float]:
    """Return the pieces of a window that took so long, the rest, and the whole."""
    return {**parts, "rest": seconds - sum(parts.values()), "window": seconds}


def show(parts: Mapping[str, float]) -> None:
    """Print the pieces and their shares of the whole, the last of them."""
    whole = [*parts.values()][-1]
    common.show(
        "brie's time in a window, each piece measured alone",
        ("", "seconds", "share"),
        [(name, value, f"{value / whole:.0%}") for name, value in parts.items()],
    )


def main() -> None:
    """Measure the pieces of one window, without the window itself."""
    asked = common.arguments(__doc__).parse_args()
    model = common.model_folder(common.shape(asked.layers, asked.vocabulary))
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        common.write_rows(rows, common.window_lengths(1, asked.mean_tokens)[0], vocabulary=asked.vocabulary)
        parts = common.alone(account, model, rows, window=0, repeats=asked.repeats)
    show({**parts, "together": sum(parts.values())})
    common.print_json({**common.about(asked), "account_seconds": parts})


if __name__ == "__main__":
    main()
