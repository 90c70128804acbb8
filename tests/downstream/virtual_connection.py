"""Event loop whose time a test lets pass, and a transport in memory."""

import asyncio
from typing import Any, cast

TURNS = 20


class VirtualLoop(asyncio.SelectorEventLoop):
    """Event loop whose time passes only by `advance`."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__()

    def time(self) -> float:
        return self._now

    def settle(self) -> None:
        """Run everything that is due."""
        for _ in range(TURNS):
            self.call_soon(self.stop)
            self.run_forever()

    def advance(self, seconds: float) -> None:
        """Let time pass in steps of a second, or of what is left."""
        while seconds > 0:
            self._now += min(1.0, seconds)
            seconds -= 1.0
            self.settle()

    @property
    def has_timer(self) -> bool:
        return any(not handle.cancelled() for handle in cast("Any", self)._scheduled)


class Transport(asyncio.Transport):
    """Transport in memory. `unsent` is the number of bytes that the client has not taken."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.data = b""
        self.unsent = 0
        self.is_paused = self.is_closed = self.is_aborted = False

    def write(self, data: Any) -> None:
        self.data += data

    def close(self) -> None:
        self.is_closed = True

    def abort(self) -> None:
        self.is_closed = self.is_aborted = True

    def is_closing(self) -> bool:
        return self.is_closed

    def can_write_eof(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return self.unsent

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False
