"""An event loop that skips waits: when nothing is ready, its clock jumps to the next timer.

Otherwise the clock counts the turns of the loop, so a slow or busy machine delays nothing in it.
"""

import asyncio
import select
import selectors
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

GRACE_SECONDS = 0.001
"""Real seconds to wait for other threads before the clock jumps."""
STEP_SECONDS = 1e-4
"""Seconds by which the clock advances in each turn of the loop: about what a turn takes."""
READ_SECONDS = 1e-6
"""Seconds by which it advances each time that it is read, so that no two times are the same."""
LATEST_SECONDS = 15.0
REAL_PATIENCE_SECONDS = 20.0
"""Real seconds after which the clock jumps although a thread of the executor is still at work."""


class _Loopback:
    """A TCP connection of this process to itself. Packets arrive in order, so one that has arrived shows that all
    packets sent before it have.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._near = socket.create_connection(listener.getsockname())
            self._far, _ = listener.accept()
        self._near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._arrivals = select.poll()
        self._arrivals.register(self._far, select.POLLIN)

    def settle(self) -> None:
        """Wait until what was sent over the loopback device has arrived."""
        self._near.send(b"\0")
        self._arrivals.poll(REAL_PATIENCE_SECONDS * 1000)
        self._far.recv(1)

    def close(self) -> None:
        self._near.close()
        self._far.close()


class _Selector(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.jobs = 0
        """Calls in progress in threads of the executor."""
        self._loopback = _Loopback()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        self.now += STEP_SECONDS
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        self._loopback.settle()
        ready = super().select(REAL_PATIENCE_SECONDS if self.jobs else min(timeout, GRACE_SECONDS))
        if not ready:
            self.now += timeout
        return ready

    def close(self) -> None:
        super().close()
        self._loopback.close()


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """For tests whose clients and servers all run in this loop: no thread but those of its executor, no other process.

    Every timer still fires in order and at its time by `loop.time()`.
    """

    def __init__(self) -> None:
        self._skipping = _Selector()
        super().__init__(self._skipping)

    def time(self) -> float:
        self._skipping.now += READ_SECONDS
        return self._skipping.now

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Run `func` in a thread. The clock stands still until it returns."""

        def ended(_: object) -> None:
            self._skipping.jobs -= 1

        self._skipping.jobs += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(ended)
        return future


@contextmanager
def virtual_clock() -> Iterator[None]:
    """Make `time.monotonic` the clock of the running loop, for code that reads it directly."""
    with patch("time.monotonic", asyncio.get_running_loop().time):
        yield


def is_virtual() -> bool:
    """Return whether the running loop skips waits."""
    return isinstance(asyncio.get_running_loop(), VirtualTimeLoop)


def within(seconds: float) -> float:
    """Return the bound for something that has to happen within `seconds`.

    In virtual time it is exact. In real time a busy machine may be late by as much as
    `LATEST_SECONDS`, which should be less than the deadlines that are not meant.
    """
    return seconds if is_virtual() else seconds + LATEST_SECONDS
