"""Pieces of work side by side. MLX computes one operation at a time on a CPU, elementwise ones on one core.

So on a CPU each worker is a thread with a stream of its own, and the BLAS has its share of the cores in each. On a
GPU there is one worker, the caller's own thread. Results come in the order of the pieces, whoever is done
first, so that sums over them are the same to the bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import mlx.core as mx

from brie_mlx import device
from brie_mlx.data.rows import Example
from brie_mlx.training import windows
from brie_mlx.training.windows import MicroBatch

Result = TypeVar("Result")

LEAST_TOKENS = 512
"""A worker's part of the budget: smaller pieces would waste the products on overhead."""

_here = threading.local()


def count() -> int:
    """Return how many pieces are computed side by side on this device."""
    return device.cores() if device.is_cpu() else 1


def each_piece(work: Callable[[MicroBatch], Result], rows: Sequence[Example], budget: int) -> Iterator[Result]:
    """Cut rows into pieces and yield work(piece) for each, in an order that depends on rows, budget and cores alone.

    The pieces in work at any time have at most `budget` tokens together; a row too long for its worker's part
    has the machine to itself. `work` must evaluate what it returns.
    """
    workers = min(count(), max(1, budget // LEAST_TOKENS))
    part = max(1, budget // workers)
    fair = -(-sum(len(row.ids) for row in rows) // workers)
    pieces = list(windows.cut(rows, min(part, fair)))
    yield from map(work, [piece for piece in pieces if piece.ids.size > part])
    small = [piece for piece in pieces if piece.ids.size <= part]
    if len(small) == 1:
        yield work(small[0])
    elif small:
        yield from _side_by_side(work, small, workers)


def _side_by_side(work: Callable[[MicroBatch], Result], pieces: Sequence[MicroBatch], workers: int) -> Iterator[Result]:
    if workers == 1:
        yield from map(work, pieces)
        return
    with device.blas_threads(max(1, count() // workers)), ThreadPoolExecutor(workers, initializer=_open_stream) as pool:
        longest_first = sorted(range(len(pieces)), key=lambda at: -pieces[at].ids.size)
        futures = {at: pool.submit(_on_stream, work, pieces[at]) for at in longest_first}
        try:
            for at in range(len(pieces)):
                yield futures[at].result()
        finally:
            for future in futures.values():
                future.cancel()


def _open_stream() -> None:
    _here.stream = mx.new_stream(mx.default_device())


def _on_stream(work: Callable[[MicroBatch], Result], piece: MicroBatch) -> Result:
    with mx.stream(_here.stream):
        return work(piece)
