"""An event loop that skips waits: when nothing is ready, its clock jumps to the next timer."""

import asyncio
import selectors
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

GRACE_SECONDS = 0.002
"""Real seconds to wait for loopback I/O before the clock jumps."""


_monotonic = time.monotonic


class _Selector(selectors.DefaultSelector):
    """Reports to `skipped` the seconds that it did not wait."""

    skipped = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= GRACE_SECONDS:
            return super().select(timeout)
        ready = super().select(GRACE_SECONDS)
        if not ready:
            self.skipped += timeout - GRACE_SECONDS
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For tests whose clients and servers all run in this loop: no thread, no other process.

    Every timer still fires in order and at its time by `loop.time()`.
    """

    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        return _monotonic() + self._skipping.skipped


@contextmanager
def virtual_clock() -> Iterator[None]:
    """Make `time.monotonic` the clock of the running loop, for code that reads it directly."""
    with patch("time.monotonic", asyncio.get_running_loop().time):
        yield
