"""The loss of a micro-batch and its gradient: a sum over supervised tokens, in float32.

The head runs only where a token is supervised, a chunk at a time, and its gradient is computed in the
forward pass, where the exponentials are at hand: neither logits nor softmax are kept or made twice.
Dropout is drawn from keys that are inputs, so a checkpointed layer draws the same masks again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

from brie_mlx import fused, randomness
from brie_mlx.attend import Examples
from brie_mlx.config import MODULES
from brie_mlx.lora import Adapter, Layer, Product, branch
from brie_mlx.qwen import Block, Qwen
from brie_mlx.training.windows import MicroBatch

HEAD_CHUNK = 128
"""Supervised tokens whose logits exist at a time."""


def loss_sum(
    layers: Sequence[Layer],
    *,
    adapter: Adapter,
    model: Qwen,
    batch: MicroBatch,
    dropout: Dropout | None,
    checkpoint: bool,
) -> mx.array:
    """Return the summed cross-entropy of a micro-batch's supervised tokens, a float32 scalar.

    `layers` are the LoRA weights to differentiate by, `adapter` gives their scales. `checkpoint` keeps only
    each layer's input for the backward pass.
    """
    attend = Examples(model.config, batch.lengths)
    x = model.model.embed_tokens(batch.ids)  # (1, T, D)
    for at, layer in enumerate(model.model.layers):

        def run(x: mx.array, weights: Layer, keys: mx.array, at: int = at, layer: Block = layer) -> mx.array:
            product = dropout.by(keys, batch.lengths) if dropout else None
            return layer(x, at, attend, branch(weights, adapter.scales(at), product))

        keys = dropout.keys(batch.places, at) if dropout else mx.array(0)
        x = (mx.checkpoint(run) if checkpoint else run)(x, layers[at], keys)
    hidden = model.model.norm(x)[0, batch.positions]  # (N, D)
    return head_loss(model.head, hidden, batch.targets)


class Dropout:
    """The masks of one optimizer step, a function of (seed, step, place in the window, layer, module)."""

    def __init__(self, share: float, *, seed: int, step: int, num_layers: int) -> None:
        self.share = share
        self._key = lambda place: mx.random.key(randomness.number("dropout", seed, step, place))
        self._num_layers = num_layers

    def keys(self, places: Sequence[int], layer: int) -> mx.array:
        """Return the keys of one layer, (examples, modules, 2)."""
        shape = (self._num_layers, len(MODULES), 2)
        splits = [mx.random.split(self._key(place), shape[0] * shape[1]).reshape(shape)[layer] for place in places]
        return mx.stack(splits)

    def by(self, keys: mx.array, lengths: Sequence[int]) -> Product:
        """Return the product with dropout of a layer's modules, (name, x (1, T, in), A (R, in)) -> (1, T, R)."""
        keep = 1 - self.share
        keys = mx.stop_gradient(keys)  # mx.checkpoint asks for the gradient of all its inputs

        def product(name: str, x: mx.array, a: mx.array) -> mx.array:
            module = MODULES.index(name)
            masks = [
                mx.random.bernoulli(keep, (length, x.shape[-1]), key=keys[at, module])
                for at, length in enumerate(lengths)
            ]
            return (1 / keep) * fused.dropped_product(x[0], a, mx.concatenate(masks))[None]

        return product


def head_loss(head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array) -> mx.array:
    """Return the summed cross-entropy of head(hidden) against targets: (N, D), (N,) -> scalar, float32.

    With p = softmax(logits), d loss / d logits = p - onehot(target); d hidden follows through the head at
    once. The idea is Liger's fused linear cross-entropy, https://arxiv.org/abs/2410.10989.
    """

    @mx.custom_function
    def both(hidden: mx.array) -> tuple[mx.array, mx.array]:
        parts = [
            _chunk_loss(head, hidden[at : at + HEAD_CHUNK], targets[at : at + HEAD_CHUNK])
            for at in range(0, hidden.shape[0], HEAD_CHUNK)
        ]
        return sum((loss for loss, _ in parts), mx.array(0.0)), mx.concatenate([gradient for _, gradient in parts])

    @both.vjp
    def backward(_: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return (cotangents[0] * outputs[1]).astype(hidden.dtype)

    loss, _ = cast("tuple[mx.array, mx.array]", both(hidden))
    return loss


def _chunk_loss(head: Callable[[mx.array], mx.array], hidden: mx.array, targets: mx.array) -> tuple[mx.array, mx.array]:
    """Return (summed loss, d loss / d hidden) of some rows, (C, D) and (C,)."""
    logits = fused.scaled(hidden, fused.LOG2E, head)  # (C, V), float32, in base 2
    top = logits.max(axis=-1, keepdims=True)
    weights = fused.exp2(mx.maximum(logits - top, -100.0))  # below, products are denormal and tens of times slower
    total = weights.sum(axis=-1, keepdims=True)
    chosen = mx.take_along_axis(logits, targets[:, None], axis=-1)
    loss = (mx.log2(total) + top - chosen).sum() / fused.LOG2E
    slope = weights.at[mx.arange(targets.size)[:, None], targets[:, None]].add(-total)  # total * d loss / d logits
    gradient: mx.array = mx.vjp(head, [hidden], [slope.astype(hidden.dtype)])[1][0]
    return loss, gradient / total
