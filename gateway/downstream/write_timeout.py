"""Timeout for clients that do not read their response.

Pure: the protocol owns the clock and the transport.
"""

import math

NEVER = math.inf


class WriteTimeout:
    """Check, four times within `seconds`, that the number of unsent bytes decreases.

    `deadline` is the time of the next check, in seconds of the event loop's clock; `NEVER` while
    nothing waits.
    """

    __slots__ = ("_progress_at", "_seconds", "_unsent", "deadline")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._unsent = 0
        self._progress_at = 0.0
        self.deadline = NEVER

    def watch(self, size: int, now: float) -> None:
        """Begin to watch if `size` unsent bytes wait for the client and no check is due yet."""
        if size and self.deadline == NEVER:
            self._progress_at = now
            self._check_progress(size, now)

    def add(self, size: int) -> None:
        """Add `size` bytes that were written while others were unsent."""
        self._unsent += size

    def clear(self) -> None:
        """Stop watching: few enough bytes are unsent."""
        self.deadline = NEVER

    def has_expired(self, size: int, now: float) -> bool:
        """Return whether the client has taken no byte for `seconds`.

        `size` is the number of bytes that are unsent at `now`.
        """
        self.deadline = NEVER
        if size == 0:
            return False
        if size < self._unsent:
            self._progress_at = now
        elif now - self._progress_at >= self._seconds:
            return True
        self._check_progress(size, now)
        return False

    def _check_progress(self, size: int, now: float) -> None:
        self._unsent = size
        self.deadline = now + self._seconds / 4
