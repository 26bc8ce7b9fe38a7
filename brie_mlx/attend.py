"""What a token may attend to: its own example in training, what was read before in decoding.

Each way is an `Attend` that the layers of qwen.py call with their queries, keys and values; it rotates them
by their positions, and keeps what later tokens need. The letters are those of qwen.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import mlx.core as mx

from brie_mlx import device, fused
from brie_mlx.config import Config


class Attend(Protocol):
    """What the new tokens may look at. Rotates queries and keys by their positions."""

    def __call__(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """(B, H, T, Dh), (B, K, T, Dh), (B, K, T, Dh) -> (B, H, T, Dh)."""
        ...


class Examples:
    """Rows laid end to end in one long row: each token sees its own example, up to itself.

    Positions count from 0 in each example, so where a window is cut changes nothing.
    """

    def __init__(self, config: Config, lengths: Sequence[int]) -> None:
        self.config = config
        self.lengths = list(lengths)

    def __call__(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:  # noqa: ARG002
        """Attend causally inside each example; T is the sum of the lengths, the same in each of B rows."""
        outputs, start = [], 0
        for length in self.lengths:
            here = slice(start, start + length)
            start += length
            rotated, keys = (rotate(self.config, x[:, :, here], 0) for x in (q, k))
            outputs.append(fused.causal_attention(rotated, keys, v[:, :, here]))
        return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]


class Cache:
    """Keys and values of the tokens seen so far, for B rows that all grow to the right.

    Rows of different length end at the same slot; `starts[b]` is row b's first. RoPE is relative, so
    the slot serves as the position. Space grows in blocks, so that one step copies nothing.
    """

    BLOCK = 256

    def __init__(self, config: Config, *, starts: Sequence[int] = (0,)) -> None:
        self.config = config
        self.starts = list(starts)
        self.length = 0
        self.keys: list[mx.array | None] = [None] * config.num_hidden_layers
        self.values: list[mx.array | None] = [None] * config.num_hidden_layers

    def advance(self, new: int) -> None:
        """Count the tokens of a finished forward pass."""
        self.length += new

    def trim(self, length: int) -> None:
        """Forget all slots from `length` on."""
        self.length = min(self.length, length)

    def __call__(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Append k and v, then attend to everything each token may see."""
        new = q.shape[2]
        end = self.length + new
        q, k = (rotate(self.config, x, self.length) for x in (q, k))
        keys = self.keys[layer] = self._append(self.keys[layer], k)
        values = self.values[layer] = self._append(self.values[layer], v)
        return _attention(self.config, q, keys[:, :, :end], values[:, :, :end], mask=self._mask(new))

    def _append(self, old: mx.array | None, x: mx.array) -> mx.array:
        B, K, T, Dh = x.shape
        end = self.length + T
        if old is None or old.shape[2] < end:
            room = -(-end // self.BLOCK) * self.BLOCK - (0 if old is None else old.shape[2])
            fresh = mx.zeros((B, K, room, Dh), x.dtype)
            old = fresh if old is None else mx.concatenate([old, fresh], axis=2)
        old[:, :, self.length : end] = x
        return old

    def _mask(self, new: int) -> mx.array | str | None:
        if not any(self.starts):
            return "causal" if new > 1 else None
        slots = mx.arange(self.length + new)
        causal = slots[None, :] <= mx.arange(self.length, self.length + new)[:, None]  # (T, S)
        own = slots[None, :] >= mx.array(self.starts)[:, None]  # (B, S)
        return causal[None, None] & own[:, None, None]  # (B, 1, T, S)


class RowCache:
    """Keys and values of rows that come and go, each with a length of its own.

    Every row lies from slot 0, so that a slot is a position: a row joins in the place of another without moving
    or rotating anything, nothing is copied in a step, and attention costs what the longest live row costs. All
    tokens of a pass are written at once, before any is looked at: MLX would copy a cache that is still to be read.

    A pass has a token a row, (T, 1): first the last token of each row, which attend together; then the earlier
    ones of rows that read several, row by row, which attend on their own.
    """

    def __init__(self, config: Config, rows: int, *, dtype: mx.Dtype) -> None:
        self.config = config
        shape = (rows, config.num_key_value_heads, Cache.BLOCK, config.head_dim)
        self.keys = [mx.zeros(shape, dtype) for _ in range(config.num_hidden_layers)]
        self.values = [mx.zeros(shape, dtype) for _ in range(config.num_hidden_layers)]

    def plan(self, reads: Sequence[range]) -> None:
        """Say which positions each row reads in the next pass; all rows from the first have at least one."""
        self.reads = list(reads)
        last = [span[-1] for span in reads]
        rows = [row for row, span in enumerate(reads) for _ in span[:-1]]
        earlier = [position for span in reads for position in span[:-1]]
        self.rows = mx.array([*range(len(reads)), *rows])  # (T,), the row and the position of each token
        self.positions = mx.array([*last, *earlier])
        self.length = 1 + max(last)
        self._make_room(self.length)
        own = mx.arange(self.length) <= self.positions[: len(reads), None]  # (B, S)
        self.mask = mx.where(own, 0.0, -mx.inf)[:, None, None]  # (B, 1, 1, S)

    def copy(self, beginning: Cache, row: int) -> None:
        """Let a row begin with what another cache of one row holds."""
        seen = slice(0, beginning.length)
        self._make_room(beginning.length)
        for ours, theirs in zip(self.keys + self.values, beginning.keys + beginning.values, strict=True):
            ours[row, :, seen] = cast(mx.array, theirs)[0, :, seen]

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Put rows in the place of others."""
        if not sources:
            return
        arrays, seen = self.keys + self.values, slice(0, self.length)
        taken = [mx.take(array[:, :, seen], mx.array([*sources]), axis=0) for array in arrays]
        mx.eval(taken)  # before the cache is written, which would be copied otherwise
        for array, moved in zip(arrays, taken, strict=True):
            array[mx.array([*targets]), :, seen] = moved

    def _make_room(self, length: int) -> None:
        rows, heads, slots, size = self.keys[0].shape
        if length > slots:
            room = -(-(length - slots) // Cache.BLOCK) * Cache.BLOCK
            fresh = mx.zeros((rows, heads, room, size), self.keys[0].dtype)
            self.keys = [mx.concatenate([array, fresh], axis=2) for array in self.keys]
            self.values = [mx.concatenate([array, fresh], axis=2) for array in self.values]

    def __call__(self, layer: int, q: mx.array, k: mx.array, v: mx.array) -> mx.array:
        """Write k and v, then attend, (T, H, 1, Dh), (T, K, 1, Dh), (T, K, 1, Dh) -> (T, H, 1, Dh)."""
        q, k = (rotate(self.config, x, self.positions) for x in (q, k))
        keys, values = self.keys[layer], self.values[layer]
        keys[self.rows, :, self.positions] = k[:, :, 0]
        values[self.rows, :, self.positions] = v[:, :, 0]
        start = len(self.reads)
        live, seen = slice(0, start), slice(0, self.length)
        outputs = [_attention_by_row(self.config, q[live], keys[live, :, seen], values[live, :, seen], mask=self.mask)]
        for row, span in enumerate(self.reads):
            if len(span) > 1:
                own, seen = slice(row, row + 1), slice(0, span[-1])
                here = q[start : (start := start + len(span) - 1)].swapaxes(0, 2)  # (1, H, T, Dh)
                y = _attention(self.config, here, keys[own, :, seen], values[own, :, seen], mask="causal")
                outputs.append(y.swapaxes(0, 2))
        return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def rotate(config: Config, x: mx.array, offset: int | mx.array) -> mx.array:
    """Apply RoPE to (B, heads, T, Dh), the first token at position `offset`. https://arxiv.org/abs/2104.09864

    An array gives each row an offset of its own, (B,).
    """
    return mx.fast.rope(x, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=offset)


def _attention(config: Config, q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | str | None) -> mx.array:
    """Grouped-query attention; each key head serves H / K query heads."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=config.head_dim**-0.5, mask=mask)


def _attention_by_row(config: Config, q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array) -> mx.array:
    """Attend with a query a row: (B, H, 1, Dh), (B, K, S, Dh), (B, K, S, Dh), (B, 1, 1, S) -> (B, H, 1, Dh)."""
    if not device.is_cpu():
        return _attention(config, q, k, v, mask=mask.astype(q.dtype))
    # On a CPU, MLX's own makes a product for each head and takes exp: more than twice the time of this
    grouped = mx.unflatten(q[:, :, 0], 1, (k.shape[1], -1))  # (B, K, H / K, Dh)
    scores = fused.scaled(grouped, config.head_dim**-0.5 * fused.LOG2E, lambda q: q @ k.swapaxes(2, 3)) + mask
    weights = fused.exp2(scores - scores.max(axis=-1, keepdims=True))  # (B, K, H / K, S)
    mixed = (weights @ v.astype(weights.dtype)) / weights.sum(axis=-1, keepdims=True)
    return mixed.reshape(q.shape).astype(q.dtype)
