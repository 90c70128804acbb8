"""Allowance: the limits of a key, or of one person behind it, and what of them is used. Pure.

The caller passes the time: `second` on a monotonic clock for the minute, `day` since the Unix epoch
in UTC for the day.
"""

from gateway.keys.policy import (
    CONCURRENCY,
    NO_LIMITS,
    REQUESTS_PER_MINUTE,
    TOKENS_PER_DAY,
    TOKENS_PER_MINUTE,
    Limits,
)
from gateway.keys.windows import SlidingWindow

SECONDS_PER_DAY = 86_400

UNLIMITED = 1 << 62
"""A limit that nothing reaches, so that the common case is one comparison."""


class Allowance:
    """Limits and their use."""

    __slots__ = ("concurrency", "day", "day_tokens", "limits", "requests", "running", "tokens", "tokens_per_day")

    def __init__(self, limits: Limits = NO_LIMITS, day: int = 0) -> None:
        self.running = 0
        self.day = day
        self.day_tokens = 0
        """Tokens of `day`, with those that requests in flight have reserved."""
        self.requests: SlidingWindow | None = None
        self.tokens: SlidingWindow | None = None
        self.change(limits)

    def __repr__(self) -> str:
        return f"<Allowance {self.running} running, {self.requests}, {self.tokens}, {self.day_tokens} today>"

    def change(self, limits: Limits) -> None:
        """Apply other limits. What is used stays used."""
        self.limits = limits
        self.concurrency = UNLIMITED if limits.concurrency is None else limits.concurrency
        self.tokens_per_day = UNLIMITED if limits.tokens_per_day is None else limits.tokens_per_day
        self.requests = _changed(self.requests, limits.requests_per_minute)
        self.tokens = _changed(self.tokens, limits.tokens_per_minute)

    def turn_to(self, day: int) -> None:
        """Begin a new day, if `day` is another one."""
        if day != self.day:
            self.day = day
            self.day_tokens = 0

    def advance(self, second: int) -> None:
        """Drop what is too old to count at `second`."""
        for window in (self.requests, self.tokens):
            if window is not None:
                window.advance(second)

    @property
    def is_idle(self) -> bool:
        """True if nothing is counted, so that a new allowance would be the same."""
        windows = [window.used for window in (self.requests, self.tokens) if window is not None]
        return not (self.running or self.day_tokens or any(windows))

    def begin(self, second: int) -> str | None:
        """Count a request that begins, or return the name of the limit that refuses it."""
        if self.running >= self.concurrency:
            return CONCURRENCY
        if self.requests is not None and self.requests.take(1, second) is None:
            return REQUESTS_PER_MINUTE
        self.running += 1
        return None

    def used(self) -> dict[str, int]:
        """Return what is used of each limit, by its name, after a call of `advance`."""
        found = {TOKENS_PER_DAY: self.day_tokens, CONCURRENCY: self.running}
        for name, window in ((REQUESTS_PER_MINUTE, self.requests), (TOKENS_PER_MINUTE, self.tokens)):
            if window is not None:
                found[name] = window.used
        return found

    def seconds_until(self, limit: str, tokens: int, second: int, now: float) -> int:
        """Return after how many seconds `limit` would admit a request of `tokens`, at least 1.

        `now` is in Unix time. For `concurrency`, which no clock frees, the answer is 1.
        """
        seconds = 1
        if limit == REQUESTS_PER_MINUTE and self.requests is not None:
            seconds = self.requests.seconds_until_fits(1, second)
        elif limit == TOKENS_PER_MINUTE and self.tokens is not None:
            seconds = self.tokens.seconds_until_fits(tokens, second)
        elif limit == TOKENS_PER_DAY:
            seconds = seconds_to_midnight(now)
        return max(1, seconds)


def _changed(window: SlidingWindow | None, limit: int | None) -> SlidingWindow | None:
    if limit is None:
        return None
    if window is None:
        return SlidingWindow(limit)
    window.limit = limit
    return window


def seconds_to_midnight(now: float) -> int:
    """Return the whole seconds, rounded up, from `now` in Unix time to the next midnight in UTC."""
    return SECONDS_PER_DAY - int(now) % SECONDS_PER_DAY
