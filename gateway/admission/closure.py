"""The time in which a backend admits nothing, since its engine does not have the GPU yet.

Pure: the caller passes the time, in seconds of one monotonic clock.
"""


class Closure:
    """Clock of the time for which all queues of a backend are closed.

    That time does not count toward `queue_timeout`, as the time of a model load does not.
    """

    __slots__ = ("_expected_until", "_seconds", "_since")

    def __init__(self) -> None:
        self._since: float | None = None
        self._seconds = 0.0
        self._expected_until: float | None = None

    def __repr__(self) -> str:
        return f"<Closure {'closed' if self.is_closed else 'open'}, {self._seconds:.1f} s before>"

    @property
    def is_closed(self) -> bool:
        return self._since is not None

    def close(self, now: float, expected_seconds: float | None = None) -> None:
        """Close the queues, or go on with them closed. `expected_seconds` is None if it is unknown for how long."""
        if self._since is None:
            self._since = now
        self._expected_until = None if expected_seconds is None else now + expected_seconds

    def open(self, now: float) -> None:
        """Open the queues. Without effect if they are open."""
        self._seconds, self._since = self.seconds(now), None
        self._expected_until = None

    def seconds(self, now: float) -> float:
        """Return for how long the queues have been closed in total."""
        return self._seconds + (0.0 if self._since is None else now - self._since)

    def seconds_left(self, now: float) -> float | None:
        """Return for how much longer they are expected to be closed; 0 if they are open, None if unknown."""
        if self._since is None:
            return 0.0
        return None if self._expected_until is None else max(0.0, self._expected_until - now)
