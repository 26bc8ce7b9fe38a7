"""What a run will do, known before any weight is loaded: rows, steps, checkpoints, learning rates.

`brie train --dry-run` prints it; the loop follows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from brie_mlx import lora, weights
from brie_mlx.chat import Tokenizer
from brie_mlx.config import Config, LoraConfig
from brie_mlx.data.rows import Examples, read_examples
from brie_mlx.errors import AdapterError
from brie_mlx.recipe import TARGET_MODULES, Recipe
from brie_mlx.training import windows
from brie_mlx.training.optimizer import learning_rate
from brie_mlx.weights import Place

_LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")


@dataclass(frozen=True)
class Plan:
    """A recipe with its inputs found, read and counted."""

    recipe: Recipe
    base: Place
    config: Config
    lora: LoraConfig
    adapter: Place | None
    train: Examples
    valid: Examples | None

    @property
    def steps(self) -> int:
        """Optimizer steps in all."""
        return windows.total_steps(self.recipe, len(self.train.rows))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the rows."""
        return windows.steps_per_epoch(self.recipe, len(self.train.rows))

    def saves_at(self, step: int) -> bool:
        """Tell whether a checkpoint is due after this step."""
        return step == self.steps or (bool(self.recipe.save_steps) and step % self.recipe.save_steps == 0)

    def evaluates_at(self, step: int) -> bool:
        """Tell whether an evaluation is due after this step."""
        every = self.recipe.eval_steps
        return self.valid is not None and (step == self.steps or (bool(every) and step % every == 0))

    def logs_at(self, step: int) -> bool:
        """Tell whether a row of metrics is due after this step."""
        return step == self.steps or step % self.recipe.logging_steps == 0

    @property
    def num_trainable(self) -> int:
        """Trainable numbers in the adapter."""
        return lora.num_parameters(self.lora, self.config)

    def learning_rates(self) -> dict[int, float]:
        """Return the rate at the steps where the schedule turns, and at a few between."""
        warmup, steps = self.recipe.warmup_steps, self.steps
        shown = {1, warmup // 2, warmup, warmup + 1, *(self.checkpoint_steps()), steps}
        return {
            step: learning_rate(self.recipe, step=step, total=steps) for step in sorted(shown) if 1 <= step <= steps
        }

    def checkpoint_steps(self) -> list[int]:
        """Return the steps that leave a checkpoint."""
        every = self.recipe.save_steps
        return sorted({*(range(every, self.steps, every) if every else ()), self.steps})

    def to_dict(self) -> dict[str, Any]:
        """Return the plan's figures, for `--json`."""
        train, valid = self.train, self.valid
        return {
            "rows": len(train.rows),
            "valid_rows": len(valid.rows) if valid else 0,
            "steps": self.steps,
            "steps_per_epoch": self.steps_per_epoch,
            "checkpoints": self.checkpoint_steps(),
            "learning_rate": {str(step): rate for step, rate in self.learning_rates().items()},
            "num_tokens": train.num_tokens,
            "num_supervised_tokens": train.num_supervised,
            "supervised_share": train.num_supervised / train.num_tokens,
            "longest_row_tokens": max(len(row.ids) for row in train.rows),
            "rows_truncated": train.num_truncated,
            "supervised_tokens_cut": train.num_supervised_cut,
            "trainable_parameters": self.num_trainable,
        }


def make_plan(recipe: Recipe, *, weights_too: bool = True) -> Plan:
    """Find and read what a recipe names. Raises ModelError, AdapterError or DataError.

    `weights_too=False` needs only the base's config and tokenizer, as for a dry run.
    """
    base = weights.find_model(recipe.model, recipe.revision, weights=weights_too)
    config = weights.read_config(base.folder)
    adapter = weights.find_adapter(recipe.adapter) if recipe.adapter else None
    lora_config = LoraConfig.from_recipe(recipe, base=recipe.model, revision=recipe.revision)
    if adapter:
        lora_config = replace(
            weights.read_adapter_config(adapter.folder), base_model_name_or_path=recipe.model, revision=recipe.revision
        )
        recipe = _with_adapter_settings(recipe, lora_config)
    tokenizer = Tokenizer.read(base.folder) if (base.folder / "tokenizer.json").is_file() else None

    def read(path: str) -> Examples:
        return read_examples(
            Path(path),
            tokenizer,
            vocab_size=config.vocab_size,
            max_length=min(recipe.max_length, config.max_position_embeddings),
            supervise=recipe.supervise,
        )

    return Plan(
        recipe, base, config, lora_config, adapter, read(recipe.data), read(recipe.valid) if recipe.valid else None
    )


def _with_adapter_settings(recipe: Recipe, config: LoraConfig) -> Recipe:
    """Return the recipe with the settings of its adapter; raise AdapterError where it asks for others."""
    default, problems = Recipe(), []
    theirs: dict[str, Any] = {name: getattr(config, name) for name in _LORA_FIELDS}
    if isinstance(theirs["target_modules"], str) or not set(theirs["target_modules"]) <= set(TARGET_MODULES):
        theirs["target_modules"] = recipe.target_modules  # a pattern: adapter_config.json alone can hold it
    for name, value in theirs.items():
        asked = getattr(recipe, name)
        same = set(asked) == set(value) if name == "target_modules" else asked == value
        if not same and asked != getattr(default, name):
            problems.append(f"{name} = {asked!r}, but the adapter has {value!r}")
    if problems:
        raise AdapterError(
            "The recipe and the adapter it starts from disagree.", problems=problems, hint="leave these settings out"
        )
    return replace(recipe, **theirs)
