"""What can go wrong, as one tree; the command line prints these without a traceback.

    BrieError                 exit 1: the sentence says what was wrong and what to do next
    +-- RecipeError           a setting that is unknown, of the wrong type or out of range
    +-- DataError             rows that cannot be trained on, as file:line:field
    +-- ModelError            a base model that is missing, broken or of another kind
    +-- AdapterError          an adapter that is missing, broken or made for another base
    +-- RunError              a run's folder, its checkpoints, or the disk under them
    +-- NumbersError          a loss or a gradient that is not a finite number
    +-- DeviceError           a device that cannot do what was asked
    Stopped                   exit 130 or 143: a signal asked the run to stop, and it did, in order

`assert` is for our own mistakes; everything a user can cause is one of these.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20


class BrieError(Exception):
    """A mistake or mishap with a way out.

    `message` is one sentence with the value that was found and what was expected, `problems` the
    single findings (the first 20 are shown, then a count), `hint` the next command or remedy.
    """

    def __init__(self, message: str, *, problems: Sequence[str] = (), hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.problems = list(problems)
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.message]
        lines += [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  ... and {len(self.problems) - SHOWN} more")
        if self.hint:
            lines.append(f"  try: {self.hint}")
        return "\n".join(lines)


class RecipeError(BrieError):
    """A setting that is unknown, of the wrong type or out of range."""


class DataError(BrieError):
    """Rows that cannot be trained on; each problem is file:line:field."""


class ModelError(BrieError):
    """A base model that is missing, broken, or of a kind that brie does not implement."""


class AdapterError(BrieError):
    """An adapter that is missing, broken, or made for another base."""


class RunError(BrieError):
    """A run's folder, its checkpoints, or the disk under them."""


class NumbersError(BrieError):
    """A loss or gradient that is not finite; raised before anything is updated."""


class DeviceError(BrieError):
    """A device or backend that cannot do what was asked."""


class Stopped(Exception):
    """A signal asked for the end. `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
