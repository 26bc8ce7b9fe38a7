"""Randomness as a function: what is drawn depends on a name, a seed and a place, never on what came before.

So a resumed run is the same run, and any answer can be made again.

    key = mx.random.key(number("dropout", 42, step))
"""

from __future__ import annotations

import hashlib

import numpy as np


def number(*place: str | int) -> int:
    """Return 64 bits that depend on each part of `place`, and on nothing else."""
    digest = hashlib.sha256("/".join(map(repr, place)).encode()).digest()
    return int.from_bytes(digest[:8], "little")


def order(rows: int, *, seed: int, epoch: int) -> list[int]:
    """Return the order in which the Trainer visits `rows` rows in an epoch counted from 0.

    It is torch.randperm of a generator seeded with seed + epoch: a Fisher-Yates shuffle that takes raw
    32-bit numbers of a Mersenne Twister modulo what is left.
    """
    draws = np.random.RandomState(seed + epoch).randint(0, 2**32, size=max(rows - 1, 0), dtype=np.uint32)
    places = list(range(rows))
    for at, draw in enumerate(draws.tolist()):
        other = at + draw % (rows - at)
        places[at], places[other] = places[other], places[at]
    return places
