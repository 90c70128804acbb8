"""Retry budget: limits retries to a share of recent requests, so that they never become a storm.

Synchronous.
"""

SHARE = 0.1
LEAST = 5
"""Number of retries that are always allowed. A share of few requests would be none.

As many failures in a row eject a server (`outlier_detection.py`), so they are all retried.
"""
SECONDS = 10


class RetryBudget:
    """Budget for retries over the last `SECONDS` seconds, with one count per second."""

    __slots__ = ("_requests", "_retries", "_second")

    def __init__(self) -> None:
        self._second = 0
        self._requests = [0] * SECONDS
        self._retries = [0] * SECONDS

    def __repr__(self) -> str:
        return f"<RetryBudget {sum(self._retries)} of {self.allowed()} used>"

    def allowed(self) -> int:
        return max(LEAST, int(SHARE * sum(self._requests)))

    def count(self, now: float) -> None:
        """Count a request. `now` is monotonic time in seconds."""
        second = int(now)
        if second != self._second:
            self._advance(second)
        self._requests[second % SECONDS] += 1

    def has_room(self, now: float) -> bool:
        """Return whether one more retry is allowed."""
        self._advance(int(now))
        return sum(self._retries) < self.allowed()

    def spend(self, now: float) -> None:
        """Count a retry."""
        self._advance(int(now))
        self._retries[self._second % SECONDS] += 1

    def _advance(self, second: int) -> None:
        """Drop the counts that are too old."""
        for passed in range(max(self._second, second - SECONDS) + 1, second + 1):
            self._requests[passed % SECONDS] = self._retries[passed % SECONDS] = 0
        self._second = second
