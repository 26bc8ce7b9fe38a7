"""Qwen2.5's forward pass.

    B rows   T new tokens   S cached and new tokens   D hidden size   F feed-forward size
    H query heads   K key and value heads   Dh head size   V vocabulary   R LoRA rank

Attributes are the checkpoint's keys, so `model.layers.0.self_attn.q_proj.weight` is where its name
says. A model holds base weights only: adapters come with the call (`lora`, see lora.py), and so does
what a token may attend to (`attend`, see attend.py).

    logits = model(ids, attend=Cache(model.config))          # (B, T) -> (B, T, V)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from brie_mlx import fused
from brie_mlx.attend import Attend
from brie_mlx.config import Config

Project = Callable[[str, mx.array], mx.array | None]
"""A LoRA branch: (module name in its layer, input) -> what to add to the projection, None where it adds nothing."""


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

    def __call__(self, x: mx.array, layer: int, attend: Attend, lora: Project | None) -> mx.array:
        """(B, T, D) -> (B, T, D)."""
        H, K = self.heads
        q = _split(_project(self.q_proj, "self_attn.q_proj", x, lora), H)  # (B, H, T, Dh)
        k = _split(_project(self.k_proj, "self_attn.k_proj", x, lora), K)  # (B, K, T, Dh)
        v = _split(_project(self.v_proj, "self_attn.v_proj", x, lora), K)  # (B, K, T, Dh)
        y = attend(layer, q, k, v).swapaxes(1, 2).flatten(2)  # (B, T, D)
        return _project(self.o_proj, "self_attn.o_proj", y, lora)


def _split(x: mx.array, heads: int) -> mx.array:
    return mx.unflatten(x, -1, (heads, -1)).swapaxes(1, 2)  # (B, T, heads * Dh) -> (B, heads, T, Dh)


def _project(linear: nn.Module, name: str, x: mx.array, lora: Project | None) -> mx.array:
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

    def __call__(self, x: mx.array, lora: Project | None) -> mx.array:
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

    def __call__(self, x: mx.array, layer: int, attend: Attend, lora: Project | None) -> mx.array:
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
