"""The window: the rows of one optimizer step, and how they are cut into pieces that fit in memory.

How a window is cut must not change its gradient: nothing is padded, each example keeps its place in
the window (dropout is drawn by place), and losses are summed, to be divided once by the window's
number of supervised tokens.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from brie_mlx import randomness
from brie_mlx.chat import IGNORED
from brie_mlx.data.rows import Example
from brie_mlx.recipe import Recipe


def steps_per_epoch(recipe: Recipe, rows: int) -> int:
    """Return the windows in one pass over the rows; the last may be partial and is a full step."""
    return math.ceil(rows / recipe.window)


def total_steps(recipe: Recipe, rows: int) -> int:
    """Return the optimizer steps of the run."""
    if recipe.max_steps > 0:
        return recipe.max_steps
    return math.ceil(recipe.num_train_epochs * steps_per_epoch(recipe, rows))


def window_rows(recipe: Recipe, rows: int, step: int) -> list[int]:
    """Return the row numbers of optimizer step `step`, counted from 1."""
    epoch, at = divmod(step - 1, steps_per_epoch(recipe, rows))
    return list(
        _order(rows, recipe.seed if recipe.shuffle else None, epoch)[at * recipe.window : (at + 1) * recipe.window]
    )


@functools.lru_cache(maxsize=2)
def _order(rows: int, seed: int | None, epoch: int) -> Sequence[int]:
    return range(rows) if seed is None else randomness.order(rows, seed=seed, epoch=epoch)


@dataclass(frozen=True)
class MicroBatch:
    """Whole examples laid end to end, T tokens, N of them with a successor to learn."""

    ids: mx.array
    """(1, T)"""
    lengths: list[int]
    """Tokens of each example."""
    places: list[int]
    """Place of each example in its window."""
    positions: mx.array
    """(N,) where in T a supervised token is predicted: one before it."""
    targets: mx.array
    """(N,) the supervised ids."""

    @classmethod
    def of(cls, examples: Sequence[Example], places: Sequence[int]) -> MicroBatch:
        """Lay examples end to end."""
        next_labels = np.concatenate([np.append(example.labels[1:], IGNORED) for example in examples])
        positions = np.flatnonzero(next_labels != IGNORED)
        return cls(
            ids=mx.array(np.concatenate([example.ids for example in examples])[None]),
            lengths=[len(example.ids) for example in examples],
            places=list(places),
            positions=mx.array(positions.astype(np.int32)),
            targets=mx.array(next_labels[positions].astype(np.int32)),
        )


def cut(examples: Sequence[Example], budget: int) -> Iterator[MicroBatch]:
    """Cut a window into micro-batches of at most `budget` tokens; a longer example is one by itself."""
    piece: list[int] = []
    for place, example in enumerate(examples):
        if piece and sum(len(examples[at].ids) for at in piece) + len(example.ids) > budget:
            yield MicroBatch.of([examples[at] for at in piece], piece)
            piece = []
        piece.append(place)
    if piece:
        yield MicroBatch.of([examples[at] for at in piece], piece)
