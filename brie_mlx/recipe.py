"""The recipe: every setting that shapes a run, in one place, with its default.

Names are those of transformers' TrainingArguments and peft's LoraConfig. TOML comes in, JSON goes
out; a run's folder holds the result as recipe.json.

    recipe = Recipe.read(Path("recipe.toml")).override({"num_train_epochs": "3"})
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from brie_mlx.errors import RecipeError

TARGET_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One run. The defaults are those of the model card that brie reproduces."""

    model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    """The base: a repository on the Hub, or a folder."""
    revision: str | None = None
    """The base's branch, tag or commit on the Hub; None is its main branch."""
    data: str = "data/train.jsonl"
    """Training rows, JSON lines."""
    valid: str | None = "data/valid.jsonl"
    """Rows for the evaluation loss; None leaves evaluation out."""
    adapter: str | None = None
    """An adapter to start from; its own r, alpha, modules and dropout then count."""

    max_length: int = 2048
    """Tokens of a row that are kept; the rest is cut off at its end."""
    supervise: Literal["assistant", "all"] = "assistant"
    """Which tokens are learnt: the assistant's turns, or all of the rendered text."""
    shuffle: bool = True
    """Draw a new order of the rows each epoch, the one that the Trainer draws for this seed."""

    r: int = 8
    """LoRA's rank."""
    lora_alpha: float = 16
    """LoRA's scale is lora_alpha / r."""
    lora_dropout: float = 0.05
    """Share of a LoRA branch's inputs set to zero in training."""
    target_modules: tuple[str, ...] = TARGET_MODULES
    """The projections that get a LoRA branch."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead."""

    num_train_epochs: float = 2
    """Passes over the training rows."""
    max_steps: int = -1
    """Optimizer steps in all, if positive; num_train_epochs then does not count."""
    per_device_train_batch_size: int = 2
    """Rows in a batch."""
    gradient_accumulation_steps: int = 4
    """Batches in an optimizer step; a step's window is batch times this many rows."""
    learning_rate: float = 2e-4
    """The peak of the schedule."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    """The schedule after warm-up: down to 0 in a line or half a cosine, or level."""
    warmup_steps: int = 20
    """Steps from 0 up to the peak (none for "constant")."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay."""
    adam_beta1: float = 0.9
    """AdamW's decay of the gradient's mean."""
    adam_beta2: float = 0.999
    """AdamW's decay of the gradient's square."""
    adam_epsilon: float = 1e-8
    """AdamW's guard against division by zero."""
    max_grad_norm: float = 1.0
    """The gradient is scaled down to this L2 norm; 0 leaves it as it is."""
    seed: int = 42
    """Every random choice is a function of this number and of its place in the run."""

    logging_steps: int = 10
    """Steps between rows in metrics.jsonl."""
    eval_steps: int = 50
    """Steps between evaluations; there is one at the last step too. 0 leaves only that one."""
    save_steps: int = 100
    """Steps between checkpoints; there is one at the last step too. 0 leaves only that one."""
    save_total_limit: int | None = None
    """Checkpoints to keep: the newest, and always the best; None keeps all."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The base's type in memory: auto is the file's own, and float32 on a CPU. LoRA is float32 always."""
    micro_batch_tokens: int = 2048
    """Tokens computed at a time. Less saves memory; the gradient stays the same."""
    gradient_checkpointing: bool = False
    """Compute each layer twice to hold only its input; the gradient stays the same."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r}: {expected}" for name, expected, good in self._bounds() if not good
        ]
        unknown = [name for name in self.target_modules if name not in TARGET_MODULES]
        if unknown or not self.target_modules:
            problems.append(
                f"target_modules = {list(self.target_modules)!r}: expected some of {', '.join(TARGET_MODULES)}"
            )
        if problems:
            raise RecipeError("The recipe has settings out of range.", problems=problems, hint="brie train --help")

    def _bounds(self) -> list[tuple[str, str, bool]]:
        whole = (
            "r",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "micro_batch_tokens",
        )
        steps = ("warmup_steps", "eval_steps", "save_steps", "seed")
        fractions = ("lora_dropout", "adam_beta1", "adam_beta2")
        positive = ("lora_alpha", "adam_epsilon")
        at_least_zero = ("learning_rate", "weight_decay", "max_grad_norm")
        rules = [(name, "expected at least 1", getattr(self, name) >= 1) for name in whole]
        rules += [(name, "expected at least 0", getattr(self, name) >= 0) for name in steps]
        rules += [(name, "expected 0 or more, below 1", 0 <= getattr(self, name) < 1) for name in fractions]
        rules += [(name, "expected a number above 0", 0 < getattr(self, name) < math.inf) for name in positive]
        rules += [(name, "expected a number, 0 or more", 0 <= getattr(self, name) < math.inf) for name in at_least_zero]
        rules += [("max_length", "expected at least 2", self.max_length >= 2)]
        rules += [("seed", "expected less than 2**31", self.seed < 2**31)]
        rules += [("max_steps", "expected a positive number, or -1", self.max_steps >= 1 or self.max_steps == -1)]
        rules += [("num_train_epochs", "expected a number above 0", 0 < self.num_train_epochs < math.inf)]
        limit = self.save_total_limit
        rules += [("save_total_limit", "expected at least 1, or none", limit is None or limit >= 1)]
        return rules

    @property
    def window(self) -> int:
        """Rows in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @classmethod
    def read(cls, path: Path) -> Recipe:
        """Return the recipe in a TOML file; raise RecipeError with every problem in it."""
        try:
            values = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise RecipeError(f"{path} does not exist") from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(f"{path} is not a TOML file: {error}") from None
        return cls.from_dict(values, source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str = "the recipe") -> Recipe:
        """Return the recipe with these settings; raise RecipeError naming unknown and mistyped ones."""
        return cls()._with(values, source=source)

    def override(self, assignments: Mapping[str, str]) -> Recipe:
        """Return a copy with settings given as text, as in `-o key=value`."""
        values = {name: _parse(_FIELDS[name], text) if name in _FIELDS else text for name, text in assignments.items()}
        return self._with(values, source="-o")

    def _with(self, values: Mapping[str, Any], *, source: str) -> Recipe:
        problems, good = [], {}
        for name, value in values.items():
            if name not in _FIELDS:
                near = difflib.get_close_matches(name, _FIELDS, n=1)
                problems.append(f"{name}: unknown" + (f"; did you mean {near[0]}?" if near else ""))
                continue
            try:
                good[name] = _convert(_FIELDS[name], value)
            except ValueError as error:
                problems.append(f"{name} = {value!r}: expected {error}")
        if problems:
            raise RecipeError(
                f"{source} has settings that brie cannot use.", problems=problems, hint="brie train --help"
            )
        return dataclasses.replace(self, **good)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings in order, ready for JSON."""
        return {**dataclasses.asdict(self), "target_modules": list(self.target_modules)}


_FIELDS: dict[str, Any] = typing.get_type_hints(Recipe)


def _parse(kind: Any, text: str) -> Any:
    """Read a command line's text as a list, a number, true or false, or none; leave words as they are."""
    if text.lower() in ("none", "null") and type(None) in typing.get_args(kind):
        return None
    if typing.get_origin(kind) is tuple:
        return [part.strip() for part in text.strip("[]").replace('"', "").split(",") if part.strip()]
    if kind is str or str in typing.get_args(kind):
        return text
    for read in (int, float, {"true": True, "false": False}.__getitem__):
        try:
            return read(text.lower())
        except (ValueError, KeyError):
            continue
    return text


def _convert(kind: Any, value: Any) -> Any:
    """Return `value` as `kind`; raise ValueError with what was expected."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"one of {', '.join(map(str, arguments))}")
        return value
    if origin is types.UnionType:
        if value is None:
            return None
        return _convert(next(argument for argument in arguments if argument is not type(None)), value)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise ValueError("a list of names")
        return tuple(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if type(value) is not kind:
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(words[kind])
    return value
