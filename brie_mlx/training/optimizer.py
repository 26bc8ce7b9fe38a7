"""The update: learning rate by step, clipping, and AdamW as torch has it.

rate = learning_rate(recipe, step=1, total=290)      # 0.0: the first step of a warm-up
weights = optimizer.update(weights, gradients, rate=rate, step=1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from brie_mlx.lora import Layer
from brie_mlx.recipe import Recipe


def learning_rate(recipe: Recipe, *, step: int, total: int) -> float:
    """Return the rate of optimizer step `step` (from 1) of `total`, as transformers' schedules give it."""
    done, warmup, kind = step - 1, recipe.warmup_steps, recipe.lr_scheduler_type
    if kind == "constant":
        return recipe.learning_rate
    if done < warmup:
        return recipe.learning_rate * done / warmup
    if kind == "constant_with_warmup":
        return recipe.learning_rate
    progress = (done - warmup) / max(1, total - warmup)
    share = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return recipe.learning_rate * max(0.0, share)


def clip(gradients: list[Layer], max_norm: float) -> tuple[list[Layer], mx.array]:
    """Return the gradients scaled to an L2 norm of at most `max_norm` (0: as they are), and the norm before."""
    norm = mx.sqrt(sum((gradient.square().sum() for _, gradient in tree_flatten(gradients)), mx.array(0.0)))
    if max_norm == 0:
        return gradients, norm
    factor = mx.minimum(1.0, max_norm / (norm + 1e-6))  # torch.nn.utils.clip_grad_norm_
    return tree_map(lambda gradient: gradient * factor, gradients), norm


class AdamW:
    """AdamW as torch has it: bias-corrected, decay decoupled. https://arxiv.org/abs/1711.05101

    Its state is the two moments, in the same places as the weights; the step count is the run's own.
    """

    def __init__(self, recipe: Recipe, layers: Sequence[Layer]) -> None:
        self.recipe = recipe
        self.mean: list[Layer] = tree_map(mx.zeros_like, list(layers))
        self.square: list[Layer] = tree_map(mx.zeros_like, list(layers))

    def update(self, layers: Sequence[Layer], gradients: Sequence[Layer], *, rate: float, step: int) -> list[Layer]:
        """Return the weights after optimizer step `step` (from 1) at learning rate `rate`."""
        first, second = self.recipe.adam_beta1, self.recipe.adam_beta2
        self.mean = tree_map(lambda m, g: first * m + (1 - first) * g, self.mean, list(gradients))
        self.square = tree_map(lambda v, g: second * v + (1 - second) * g.square(), self.square, list(gradients))
        size, spread = rate / (1 - first**step), math.sqrt(1 - second**step)
        keep, epsilon = 1 - rate * self.recipe.weight_decay, self.recipe.adam_epsilon
        moved: list[Layer] = tree_map(
            lambda w, m, v: keep * w - size * m / (v.sqrt() / spread + epsilon), list(layers), self.mean, self.square
        )
        return moved
