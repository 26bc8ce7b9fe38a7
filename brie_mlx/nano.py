"""The embedded model: Qwen2.5's architecture in small, made here in a minute, for the demo and for tests.

A byte-level BPE with Qwen's pre-tokenization is learnt from the texts of the rows, and all weights are
trained, from random ones, on the same texts, most of them without ChatML and what the assistant says in
lower case: so a LoRA run on the rows has something to teach that shows. It says nothing clever; it runs
every line that the real model runs.

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
from brie_mlx.errors import DataError
from brie_mlx.qwen import Qwen

NANO: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 2112,  # more rows than the tokenizer has tokens, as in Qwen2.5
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
    "initializer_range": 0.1,  # about 1 / sqrt(hidden_size): from Qwen's 0.02 so narrow a model learns far more slowly
    "use_sliding_window": False,
    "torch_dtype": "float32",
}
"""nano's config.json, without the ids of its control tokens."""

BPE_TOKENS = 2048
"""Tokens of text in nano's vocabulary; the control tokens have the ids after them."""

STEPS = 500
"""Training steps: about a minute on two cores."""
BATCH, BLOCK = 8, 64
"""A step's blocks, and the tokens of one; in longer ones attention takes more time than it is worth here."""
LEARNING_RATE = 6e-3
"""The peak, after a warm-up over a twentieth of the steps and before half a cosine down to 0."""
CHAT_EVERY = 4
"""One dialogue in so many is learnt as ChatML, so that the control tokens are not strangers."""

Report = Callable[[int, int, float], None]
"""Called after each step with (step, steps, loss in nats)."""

# https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct/blob/main/tokenizer.json
_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# for transformers and mlx-lm; brie never runs one
_TEMPLATE = (
    "{%- set default = [{'role': 'system', 'content': '" + DEFAULT_SYSTEM + "'}] %}"
    "{%- for message in ([] if messages[0].role == 'system' else default) + messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


# --- tokenizer ---------------------------------------------------------------------------------


def build_tokenizer(texts: Sequence[str], vocab_size: int = BPE_TOKENS) -> bytes:
    """Return a tokenizer.json in Qwen2.5's form, learnt from texts; the same texts give the same bytes.

    `vocab_size` is the number of text tokens to learn, the 256 bytes among them; little text gives fewer.
    The control tokens have the ids after them.
    """
    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(_PIECES), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, bytewise])
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    bpe.add_special_tokens([tokenizers.AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return bpe.to_str(pretty=True).encode()


# --- weights -----------------------------------------------------------------------------------


def random_model(config: Config, seed: int, *, deviation: float = 0.02) -> Qwen:
    """Return a float32 model of any size with random weights: norms 1, all else normal around 0.

    A tensor depends on the seed and on its own name; MLX's random state plays no part.
    """
    model = Qwen(config)  # its own first weights are lazy, and never computed
    shapes = [(name, tensor.shape) for name, tensor in tree_flatten(model.parameters())]
    model.update(tree_unflatten([(name, _random(name, shape, seed, deviation)) for name, shape in shapes]))
    mx.eval(model.parameters())
    return model


def _random(name: str, shape: tuple[int, ...], seed: int, deviation: float) -> mx.array:
    if "norm" in name:
        return mx.ones(shape)
    source = np.random.Generator(np.random.SFC64(randomness.number("weights", seed, name)))
    values = source.standard_normal(shape, dtype=np.float32)
    values *= np.float32(deviation)
    return mx.array(values)


def save_model(model: Qwen, config: Mapping[str, Any], tokenizer: bytes, folder: Path) -> None:
    """Write a model's folder, whole or not at all, for brie, mlx-lm and transformers to load.

    `tokenizer` is a tokenizer.json; its control ids go into the copy of `config` that is written. Raises
    RunError where the folder exists or the disk refuses.
    """
    with files.new_folder(folder, manifest=False) as aside:
        files.write(aside / "tokenizer.json", tokenizer)
        _write_beside_tokenizer(model, config, aside)


def _write_beside_tokenizer(model: Qwen, config: Mapping[str, Any], folder: Path) -> None:
    tokenizer = Tokenizer.read(folder)
    pad, end = tokenizer.end_of_text, tokenizer.end
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "chat_template": _TEMPLATE,
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }
    weights = io.BytesIO()
    mx.save_safetensors(weights, dict(tree_flatten(model.parameters())), metadata={"format": "pt"})
    contents = {
        "config.json": files.to_json({**config, "bos_token_id": pad, "eos_token_id": end}),
        "generation_config.json": files.to_json({"bos_token_id": pad, "pad_token_id": pad, "eos_token_id": [end, pad]}),
        "tokenizer_config.json": files.to_json(tokenizer_config),
        "model.safetensors": weights.getvalue(),
    }
    for name, content in contents.items():
        files.write(folder / name, content)


# --- training ----------------------------------------------------------------------------------


def make_nano(
    data_files: Sequence[Path], out: Path, *, steps: int = STEPS, seed: int = 42, report: Report | None = None
) -> None:
    """Make the embedded model from files of rows with `messages`, into a new folder.

    The same rows, steps and seed give the same bytes on one machine. Raises DataError for missing files and
    rows without messages, RunError where the folder exists or the disk refuses.
    """
    dialogues = _read_dialogues(data_files)
    with files.new_folder(out, manifest=False) as folder:
        texts = [message["content"] for dialogue in dialogues for message in dialogue]
        files.write(folder / "tokenizer.json", build_tokenizer(texts))
        ids = _stream(dialogues, Tokenizer.read(folder))
        model = random_model(Config.from_dict(NANO), seed, deviation=NANO["initializer_range"])
        _train(model, ids, steps=steps, seed=seed, report=report or (lambda *_: None))
        _write_beside_tokenizer(model, NANO, folder)


def _read_dialogues(paths: Sequence[Path]) -> list[list[Message]]:
    problems = [f"{path} does not exist" for path in paths if not path.is_file()]
    dialogues = []
    for path in paths if not problems else ():
        for line, row in files.read_rows(path, problems):
            try:
                turns = [Message(role=turn["role"], content=turn["content"]) for turn in row["messages"]]
            except (KeyError, TypeError):
                turns = []
            if turns and all(turn["role"] in ROLES and isinstance(turn["content"], str) for turn in turns):
                dialogues.append(turns)
            else:
                problems.append(f"{path}:{line}:messages: expected a list of turns, each with role and content")
    if problems or not dialogues:
        message = "The embedded model is made from rows of messages, and there are none that can be used."
        raise DataError(message, problems=problems, hint="brie nano --data data/train.jsonl")
    return dialogues


def _stream(dialogues: Sequence[Sequence[Message]], tokenizer: Tokenizer) -> np.ndarray:
    """Return what is learnt, in one row of ids: each dialogue, the assistant in lower case, then <|endoftext|>."""
    ids: list[int] = []
    for number, dialogue in enumerate(dialogues):
        if number % CHAT_EVERY == 0:
            ids += [at for turn in dialogue for at in tokenizer.turn(turn["role"], _said(turn))]
        else:
            ids += tokenizer.text_ids("\n".join(map(_said, dialogue)))
        ids.append(tokenizer.end_of_text)
    return np.resize(np.array(ids, np.int32), max(len(ids), BLOCK + 1))


def _said(turn: Message) -> str:
    return turn["content"].lower() if turn["role"] == "assistant" else turn["content"]


def _train(model: Qwen, ids: np.ndarray, *, steps: int, seed: int, report: Report) -> None:
    optimizer = optimizers.AdamW(learning_rate=0.0, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)
    loss_and_gradients = nn.value_and_grad(model, _loss)
    for step in range(1, steps + 1):
        optimizer.learning_rate = _learning_rate(step, steps)
        loss, gradients = loss_and_gradients(model, _blocks(ids, seed=seed, step=step))
        gradients, _ = optimizers.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        report(step, steps, loss.item())


def _learning_rate(step: int, steps: int) -> float:
    warmup = min(1.0, 20 * step / steps)
    return LEARNING_RATE * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))


def _blocks(ids: np.ndarray, *, seed: int, step: int) -> mx.array:
    """Return stretches from random places of the text, (BATCH, BLOCK + 1)."""
    source = np.random.Generator(np.random.SFC64(randomness.number("nano", seed, step)))
    starts = source.integers(0, len(ids) - BLOCK, size=(BATCH, 1))
    return mx.array(ids[starts + np.arange(BLOCK + 1)])


def _loss(model: Qwen, blocks: mx.array) -> mx.array:
    """Return the mean cross-entropy of each token after the first, (B, T + 1) -> scalar, in nats."""
    attend = Examples(model.config, [blocks.shape[1] - 1])
    logits = fused.LOG2E * model(blocks[:, :-1], attend=attend)  # (B, T, V), in base 2: see fused.py
    logits = logits - mx.stop_gradient(logits.max(axis=-1, keepdims=True))
    total = fused.exp2(mx.maximum(logits, -100.0)).sum(axis=-1)  # (B, T)
    chosen = mx.take_along_axis(logits, blocks[:, 1:, None], axis=-1).squeeze(-1)  # (B, T)
    return (mx.log2(total) - chosen).mean() / fused.LOG2E
