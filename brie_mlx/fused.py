"""Functions whose gradient is written by hand, where autodiff would keep or compute too much.

Each keeps only its inputs (and what its comment says) for the backward pass and computes the rest again:
attention never holds its T x T probabilities, SwiGLU no intermediate, a LoRA branch one byte a mask.

On a CPU MLX's exp costs several times its power of two (bench/LOG.md), so exponents are in base 2 here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx

from brie_mlx import device

LOG2E = math.log2(math.e)
BLOCK = 256
"""Query tokens whose scores exist at a time; keys after a block are never looked at."""


def exp2(x: mx.array) -> mx.array:
    """Return 2 ** x, by what is fastest on this device."""
    return mx.power(2.0, x) if device.is_cpu() else mx.exp(x * (1 / LOG2E))


def scaled(x: mx.array, factor: float, apply: Callable[[mx.array], mx.array]) -> mx.array:
    """Return factor * apply(x) in float32 for a linear `apply`: scale x where that loses nothing, else the result."""
    if x.dtype == mx.float32:
        return apply(x * factor)
    return apply(x).astype(mx.float32) * factor


# --- attention ---------------------------------------------------------------------------------


def causal_attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    """Attend causally, H / K query heads to a key head: (B, H, T, Dh), (B, K, T, Dh), (B, K, T, Dh) -> (B, H, T, Dh).

    The backward pass computes each block's probabilities again, as in https://arxiv.org/abs/2205.14135
    """
    return cast("mx.array", _attention(q, k, v))


@mx.custom_function
def _attention(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
    if not device.is_cpu():
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask="causal")
    outputs = []
    for rows, seen in _blocks(q.shape[2]):
        weights, total = _weights(_grouped(q, k.shape[1])[..., rows, :], k[:, :, seen], rows)
        outputs.append(_mix(weights, v[:, :, seen]) / total)  # (B, K, G, rows, Dh)
    return mx.concatenate(outputs, axis=3).reshape(q.shape).astype(q.dtype)


@_attention.vjp
def _attention_backward(
    inputs: Sequence[mx.array], slope: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """With P the probabilities and D = rowsum(dO * O): dV = P' dO, dS = P * (dO V' - D), dQ = dS K, dK = dS' Q."""
    q, k, v = inputs
    heads, scale = k.shape[1], q.shape[-1] ** -0.5
    q, slope, output = (_grouped(x, heads) for x in (q, slope, output))  # (B, K, G, T, Dh)
    dq, dk, dv = [], mx.zeros(k.shape), mx.zeros(v.shape)
    for rows, seen in _blocks(q.shape[3]):
        weights, total = _weights(q[..., rows, :], k[:, :, seen], rows)  # (B, K, G, rows, S), (B, K, G, rows, 1)
        upward = slope[..., rows, :] / total
        offset = (upward * output[..., rows, :]).sum(axis=-1, keepdims=True)
        scores = weights * (_mix(upward, v[:, :, seen].swapaxes(2, 3)) - offset)  # d loss / d scores
        scores = scores.astype(q.dtype)
        dq.append(_mix(scores, k[:, :, seen]) * scale)
        dk = dk.at[:, :, seen].add(_gather(scores, q[..., rows, :]) * scale)
        dv = dv.at[:, :, seen].add(_gather(weights.astype(q.dtype), upward.astype(q.dtype)))
    shape = inputs[0].shape
    return mx.concatenate(dq, axis=3).reshape(shape).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _blocks(length: int) -> list[tuple[slice, slice]]:
    """Return (the tokens of a block, the tokens they may see) for each block of queries."""
    return [(slice(at, min(at + BLOCK, length)), slice(0, min(at + BLOCK, length))) for at in range(0, length, BLOCK)]


def _grouped(x: mx.array, heads: int) -> mx.array:
    B, H, T, Dh = x.shape
    return x.reshape(B, heads, H // heads, T, Dh)  # (B, K, G, T, Dh)


def _weights(q: mx.array, k: mx.array, rows: slice) -> tuple[mx.array, mx.array]:
    """Return each key's weight for a block of queries, not yet divided by their total, and the total, float32."""
    scores = scaled(q, q.shape[-1] ** -0.5 * LOG2E, lambda q: _mix(q, k.swapaxes(2, 3)))  # (B, K, G, rows, S)
    future = mx.arange(k.shape[2])[None, :] > mx.arange(rows.start, rows.stop)[:, None]  # (rows, S)
    scores = scores + mx.where(future, -mx.inf, 0.0)
    weights = exp2(scores - scores.max(axis=-1, keepdims=True))
    return weights, weights.sum(axis=-1, keepdims=True)


def _mix(x: mx.array, y: mx.array) -> mx.array:
    """Return x y for all queries of a key head in one product: (B, K, G, T, S), (B, K, S, N) -> (B, K, G, T, N)."""
    return (x.flatten(2, 3) @ y.astype(x.dtype)).reshape(*x.shape[:-1], y.shape[-1])


def _gather(x: mx.array, y: mx.array) -> mx.array:
    """Return x' y summed over the queries of a key head: (B, K, G, T, S), (B, K, G, T, N) -> (B, K, S, N)."""
    return x.flatten(2, 3).swapaxes(2, 3) @ y.flatten(2, 3)


# --- SwiGLU ------------------------------------------------------------------------------------


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Return gate * sigmoid(gate) * up, elementwise."""
    return cast("mx.array", _silu_product(gate, up))


@mx.custom_function
def _silu_product(gate: mx.array, up: mx.array) -> mx.array:
    return _pointwise(_swiglu)(gate, up)


@_silu_product.vjp
def _swiglu_backward(inputs: Sequence[mx.array], slope: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, up = inputs
    return _pointwise(_swiglu_gradient)(gate, up, slope)


def _sigmoid(x: mx.array) -> mx.array:
    return 1 / (1 + exp2(x * -LOG2E))


def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return gate * _sigmoid(gate) * up


def _swiglu_gradient(gate: mx.array, up: mx.array, slope: mx.array) -> tuple[mx.array, mx.array]:
    sigmoid = _sigmoid(gate)
    silu = gate * sigmoid
    return slope * up * (sigmoid + silu * (1 - sigmoid)), slope * silu


@functools.cache
def _pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function as one kernel; on a CPU as it is, where compiling gains nothing."""
    return function if device.is_cpu() else mx.compile(function, shapeless=True)


# --- LoRA --------------------------------------------------------------------------------------


def dropped_product(x: mx.array, a: mx.array, mask: mx.array) -> mx.array:
    """Return (x * mask) a' for a mask of booleans: (T, in), (R, in), (T, in) -> (T, R). Keeps x and a byte a mask."""
    return cast("mx.array", _dropped(x, a, mask))


@mx.custom_function
def _dropped(x: mx.array, a: mx.array, mask: mx.array) -> mx.array:
    return (x * mask) @ a.T


@_dropped.vjp
def _dropped_backward(inputs: Sequence[mx.array], slope: mx.array, _: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    x, a, mask = inputs
    return (slope @ a) * mask, slope.T @ (x * mask), mx.zeros_like(mask)
