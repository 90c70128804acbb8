"""How many requests may be sent a second time: a share of those that came of late, so that retries never become a storm. Synchronous."""

SHARE = 0.1
LEAST = 3
"""So many in any case: a share of few requests is none."""
SECONDS = 10


class RetryBudget:
    """Retries over the last `SECONDS` seconds, each kept in a count of its own."""

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
        """A request came. `now` is on a monotonic clock, in seconds."""
        second = int(now)
        if second != self._second:
            self._turn(second)
        self._requests[second % SECONDS] += 1

    def has_room(self, now: float) -> bool:
        """Whether one more may be sent a second time."""
        self._turn(int(now))
        return sum(self._retries) < self.allowed()

    def spend(self, now: float) -> None:
        """One was."""
        self._turn(int(now))
        self._retries[self._second % SECONDS] += 1

    def _turn(self, second: int) -> None:
        """Forget what is too old."""
        for passed in range(max(self._second, second - SECONDS) + 1, second + 1):
            self._requests[passed % SECONDS] = self._retries[passed % SECONDS] = 0
        self._second = second
