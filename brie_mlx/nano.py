"""The embedded model: Qwen2.5's architecture in small, made here in a minute, for the demo and for tests.

A byte-level BPE with Qwen's pre-tokenization is learnt from the rows' texts, and all weights are trained
from random ones on the same texts, without ChatML, so that a LoRA run has the form of a dialogue left to
learn. It says nothing clever; it runs every line that the real model runs.

    make_nano([Path("data/train.jsonl")], Path("models/nano"))
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optimizers
import numpy as np
import tokenizers
from mlx.utils import tree_flatten, tree_unflatten
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from brie_mlx import files, fused, randomness
from brie_mlx.attend import Examples
from brie_mlx.chat import CONTROL, DEFAULT_SYSTEM, ROLES, Message, Tokenizer
from brie_mlx.config import Config
from brie_mlx.errors import DataError, RunError
from brie_mlx.qwen import Qwen

NANO: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 2112,  # as in Qwen2.5, more rows than the tokenizer has tokens
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "initializer_range": 0.1,
    "use_sliding_window": False,
    "use_cache": True,
    "torch_dtype": "float32",
}
"""nano's config.json, but for the ids of its control tokens."""

BPE_TOKENS = 2048
"""Tokens of text; the control tokens come after them."""

STEPS = 300
BATCH = 8
BLOCK = 64
"""Tokens of a training block; longer ones cost more attention than they teach here."""
PEAK = 6e-3
REPORT_EVERY = 10

# https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/tokenizer.json
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

Report = Callable[[int, int, float], None]
"""Called now and then in training with (step, steps, loss)."""


# --- tokenizer ---------------------------------------------------------------------------------


def build_tokenizer(texts: Sequence[str], vocab_size: int = BPE_TOKENS) -> bytes:
    """Return a tokenizer.json in Qwen2.5's form, learnt from texts; the same texts give the same bytes.

    `vocab_size` counts the tokens of text, at least the 256 bytes; little text gives fewer. The control
    tokens have the ids after them.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_only])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return bpe.to_str(pretty=True).encode()


# --- weights -----------------------------------------------------------------------------------


def random_model(config: Config, seed: int, *, deviation: float = 0.02) -> Qwen:
    """Return a float32 model with seeded random weights: norms 1, all else normal with this `deviation`.

    Each tensor depends on the seed and its own name only; MLX's random state plays no part.
    """
    model = Qwen(config)  # its own initial weights are lazy, and never computed
    weights = [(name, _random(name, old.shape, seed, deviation)) for name, old in tree_flatten(model.parameters())]
    model.update(tree_unflatten(weights))
    return model


def _random(name: str, shape: tuple[int, ...], seed: int, deviation: float) -> mx.array:
    if "norm" in name:
        return mx.ones(shape)
    source = np.random.Generator(np.random.SFC64(randomness.number("weights", seed, name)))
    values = source.standard_normal(shape, dtype=np.float32)
    values *= np.float32(deviation)
    return mx.array(values)


def save_model(model: Qwen, config: Mapping[str, Any], tokenizer: bytes, folder: Path) -> None:
    """Write a new model folder, whole or not at all, that brie, mlx-lm and transformers load.

    Raises RunError when the folder exists or the disk refuses.
    """
    with files.new_folder(folder) as aside:
        files.write(aside / "tokenizer.json", tokenizer)
        _write_model(model, config, aside)


def _write_model(model: Qwen, config: Mapping[str, Any], folder: Path) -> None:
    """Write all but the tokenizer.json, which is there, and whose control ids go into the rest."""
    tokenizer = Tokenizer.read(folder)
    ids = {"bos_token_id": tokenizer.end_of_text, "pad_token_id": tokenizer.end_of_text}
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "chat_template": _TEMPLATE, "clean_up_tokenization_spaces": False}
    stops = sorted(tokenizer.stops, reverse=True)
    files.write(
        folder / "config.json",
        files.to_json({**config, "bos_token_id": ids["bos_token_id"], "eos_token_id": tokenizer.end}),
    )
    files.write(folder / "generation_config.json", files.to_json({**ids, "eos_token_id": stops}))
    files.write(
        folder / "tokenizer_config.json",
        files.to_json({**settings, **names, "model_max_length": config["max_position_embeddings"]}),
    )
    weights = io.BytesIO()
    mx.save_safetensors(weights, dict(tree_flatten(model.parameters())), metadata={"format": "pt"})
    files.write(folder / "model.safetensors", weights.getvalue())


# --- training ----------------------------------------------------------------------------------


def make_nano(
    data_files: Sequence[Path], out: Path, *, steps: int = STEPS, seed: int = 42, report: Report | None = None
) -> None:
    """Make a new model folder from the texts of rows. The same rows, steps and seed give the same bytes on a machine.

    Raises DataError when a file is missing or has a bad row, RunError when `out` exists or the disk refuses.
    """
    if out.exists():
        raise RunError(f"{out} exists already, and nothing is overwritten", hint="name another folder")
    dialogues = _read_dialogues(data_files)
    texts = [message["content"] for dialogue in dialogues for message in dialogue]
    with files.new_folder(out) as folder:
        files.write(folder / "tokenizer.json", build_tokenizer(texts))
        model = random_model(Config.from_dict(NANO), seed, deviation=NANO["initializer_range"])
        _train(model, _running_text(dialogues, Tokenizer.read(folder)), steps=steps, seed=seed, report=report)
        _write_model(model, NANO, folder)


def _read_dialogues(paths: Sequence[Path]) -> list[list[Message]]:
    problems = [f"{path} does not exist" for path in paths if not path.is_file()]
    dialogues = []
    for path in paths:
        for line, row in files.read_rows(path, problems) if path.is_file() else ():
            turns = row.get("messages")
            if isinstance(turns, list) and turns and all(map(_is_turn, turns)):
                dialogues.append([Message(role=turn["role"], content=turn["content"]) for turn in turns])
            else:
                problems.append(f"{path}:{line}:messages: expected turns with a role and a text")
    if problems or not dialogues:
        raise DataError("There are no rows to learn from.", problems=problems, hint="brie nano --data FILE")
    return dialogues


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str)


def _running_text(dialogues: Sequence[Sequence[Message]], tokenizer: Tokenizer) -> np.ndarray:
    """Return the ids of all texts, one after another, at least a block of them."""
    texts = (message["content"] for dialogue in dialogues for message in dialogue)
    ids = [number for text in texts for number in (*tokenizer.text_ids(text), tokenizer.end_of_text)]
    return np.resize(np.array(ids, np.int32), max(len(ids), BLOCK + 1))


def _train(model: Qwen, ids: np.ndarray, *, steps: int, seed: int, report: Report | None) -> None:
    optimizer = optimizers.AdamW(learning_rate=0.0, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    loss_and_gradients = nn.value_and_grad(model, _loss)
    for step in range(1, steps + 1):
        optimizer.learning_rate = _learning_rate(step, steps)
        loss, gradients = loss_and_gradients(model, _blocks(ids, seed=seed, step=step))
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        if report and (step % REPORT_EVERY == 0 or step == steps):
            report(step, steps, loss.item())


def _learning_rate(step: int, steps: int) -> float:
    warmup = min(1.0, step / (0.05 * steps))
    return PEAK * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def _blocks(ids: np.ndarray, *, seed: int, step: int) -> mx.array:
    """Return blocks from random places of the text, (BATCH, BLOCK + 1)."""
    source = np.random.Generator(np.random.SFC64(randomness.number("nano", seed, step)))
    starts = source.integers(0, len(ids) - BLOCK, size=(BATCH, 1))
    return mx.array(ids[starts + np.arange(BLOCK + 1)])


def _loss(model: Qwen, blocks: mx.array) -> mx.array:
    """Return the mean cross-entropy of each token after the first, (B, T + 1) -> scalar, in nats."""
    attend = Examples(model.config, [blocks.shape[1] - 1])
    logits = fused.LOG2E * model(blocks[:, :-1], attend=attend)  # (B, T, V), in base 2
    logits = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = fused.exp2(mx.maximum(logits, -100.0)).sum(axis=-1)  # (B, T)
    chosen = mx.take_along_axis(logits, blocks[:, 1:, None], axis=-1).squeeze(-1)  # (B, T)
    return (mx.log2(total) - chosen).mean() / fused.LOG2E
