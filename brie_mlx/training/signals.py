"""Ctrl-C and SIGTERM, turned into a question the loop can ask between two pieces of work."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stop:
    """`requested` is the number of the signal that came, or None. A second signal leaves at once."""

    def __init__(self) -> None:
        self.requested: int | None = None

    def __call__(self, number: int, _: FrameType | None) -> None:
        """Note the signal; at the second one, end the process with 128 + its number."""
        if self.requested is not None:
            os._exit(128 + number)
        self.requested = number


@contextlib.contextmanager
def watch() -> Iterator[Stop]:
    """Catch SIGINT and SIGTERM while a run goes on; outside the main thread, do nothing."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
