"""Qwen2.5's forward pass and its cache.

    B rows   T new tokens   S cached and new tokens   D hidden size   F feed-forward size
    H query heads   K key and value heads   Dh head size   V vocabulary   R LoRA rank

Attributes are the checkpoint's keys, so `model.layers.0.self_attn.q_proj.weight` is where its name
says. A model holds base weights only: adapters come with the call (`lora`, see lora.py), and so does
what a token may attend to (`attend`): `Examples` for training, `Cache` for decoding.

    logits = model(ids, attend=Cache(model.config))          # (B, T) -> (B, T, V)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from brie_mlx import fused
from brie_mlx.config import Config

Project = Any
"""A LoRA branch: (module name in its layer, input) -> what to add to the projection, or None."""


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
        """Attend causally inside each example; B is 1 and T the sum of the lengths."""
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


def rotate(config: Config, x: mx.array, offset: int) -> mx.array:
    """Apply RoPE to (B, heads, T, Dh), the first token at position `offset`. https://arxiv.org/abs/2104.09864"""
    return mx.fast.rope(x, config.head_dim, traditional=False, base=config.rope_theta, scale=1.0, offset=offset)


def _attention(config: Config, q: mx.array, k: mx.array, v: mx.array, *, mask: mx.array | str | None) -> mx.array:
    """Grouped-query attention; each key head serves H / K query heads."""
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=config.head_dim**-0.5, mask=mask)


class Attention(nn.Module):
    """Self-attention with biased q, k, v and a plain output."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, H, K, Dh = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.heads = (H, K)
        self.q_proj = nn.Linear(D, H * Dh, bias=True)
        self.k_proj = nn.Linear(D, K * Dh, bias=True)
        self.v_proj = nn.Linear(D, K * Dh, bias=True)
        self.o_proj = nn.Linear(H * Dh, D, bias=False)

    def __call__(self, x: mx.array, layer: int, attend: Attend, lora: Project) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        H, K = self.heads
        q = _split(_project(self.q_proj, "self_attn.q_proj", x, lora), H)  # (B, H, T, Dh)
        k = _split(_project(self.k_proj, "self_attn.k_proj", x, lora), K)  # (B, K, T, Dh)
        v = _split(_project(self.v_proj, "self_attn.v_proj", x, lora), K)  # (B, K, T, Dh)
        y = attend(layer, q, k, v).swapaxes(1, 2).flatten(2)  # (B, T, D)
        return _project(self.o_proj, "self_attn.o_proj", y, lora)


def _split(x: mx.array, heads: int) -> mx.array:
    return mx.unflatten(x, -1, (heads, -1)).swapaxes(1, 2)  # (B, T, heads * Dh) -> (B, heads, T, Dh)


def _project(linear: nn.Module, name: str, x: mx.array, lora: Project) -> mx.array:
    y = linear(x)
    branch = None if lora is None else lora(name, x)
    return y if branch is None else y + branch.astype(y.dtype)


class MLP(nn.Module):
    """SwiGLU feed-forward. https://arxiv.org/abs/2002.05202"""

    def __init__(self, config: Config) -> None:
        super().__init__()
        D, F = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(D, F, bias=False)
        self.up_proj = nn.Linear(D, F, bias=False)
        self.down_proj = nn.Linear(F, D, bias=False)

    def __call__(self, x: mx.array, lora: Project) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        gate = _project(self.gate_proj, "mlp.gate_proj", x, lora)  # (B, T, F)
        up = _project(self.up_proj, "mlp.up_proj", x, lora)  # (B, T, F)
        return _project(self.down_proj, "mlp.down_proj", fused.swiglu(gate, up), lora)


class Block(nn.Module):
    """Attention and feed-forward, each on a normalised input and added to the stream."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, layer: int, attend: Attend, lora: Project) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.self_attn(self.input_layernorm(x), layer, attend, lora)
        return x + self.mlp(self.post_attention_layernorm(x), lora)


class Body(nn.Module):
    """Embedding, layers, last norm: all of the model but its head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen(nn.Module):
    """A Qwen2.5 of any size, tied or untied, plain or quantized."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def hidden(self, ids: mx.array, *, attend: Attend, lora: Sequence[Project] | None = None) -> mx.array:
        """Return the normalised last hidden states, (B, T) -> (B, T, D); `lora` holds a branch a layer."""
        x = self.model.embed_tokens(ids)
        for at, layer in enumerate(self.model.layers):
            x = layer(x, at, attend, lora[at] if lora else None)
        return self.model.norm(x)

    def head(self, hidden: mx.array) -> mx.array:
        """Return logits, (..., D) -> (..., V)."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.as_linear(hidden) if tied else self.lm_head(hidden)

    def __call__(self, ids: mx.array, *, attend: Attend, lora: Sequence[Project] | None = None) -> mx.array:
        """Return logits, (B, T) -> (B, T, V)."""
        return self.head(self.hidden(ids, attend=attend, lora=lora))
