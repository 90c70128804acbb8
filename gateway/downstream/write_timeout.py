"""When a client that takes no byte of its answer is given up. Pure: the door has the clock and the transport."""

import math

NEVER = math.inf


class WriteTimeout:
    """Looks four times within `seconds` whether what waits for the client has become less.

    `deadline` is when to look next, in seconds of the door's clock; `NEVER` while nothing waits.
    """

    __slots__ = ("_seconds", "_taken_at", "_unsent", "deadline")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._unsent = 0
        self._taken_at = 0.0
        self.deadline = NEVER

    def watch(self, size: int, now: float) -> None:
        """`size` bytes wait for the client."""
        if size and self.deadline == NEVER:
            self._taken_at = now
            self._check_progress(size, now)

    def add(self, size: int) -> None:
        """So many more were written, although the client does not take what waits already."""
        self._unsent += size

    def clear(self) -> None:
        """What waits is little enough."""
        self.deadline = NEVER

    def has_expired(self, size: int, now: float) -> bool:
        """Whether the client, for whom `size` bytes wait now, has taken nothing for `seconds`."""
        self.deadline = NEVER
        if size == 0:
            return False
        if size < self._unsent:
            self._taken_at = now
        elif now - self._taken_at >= self._seconds:
            return True
        self._check_progress(size, now)
        return False

    def _check_progress(self, size: int, now: float) -> None:
        self._unsent = size
        self.deadline = now + self._seconds / 4
