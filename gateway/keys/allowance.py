"""Allowance: the limits of a key, or of one person behind it, and what of them is used. Pure.

The caller passes the time: `second` on a monotonic clock for the minute, `day` since the Unix epoch
in UTC for the day.
"""

from math import ceil

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

WARNING_SHARE = 0.8
"""Share of the tokens of a day from which answers have a warning."""

UNLIMITED = 1 << 62
"""A limit that nothing reaches, so that the common case is one comparison."""


class Allowance:
    """Limits and their use."""

    __slots__ = (
        "concurrency", "day", "day_limit", "day_others", "day_tokens", "is_shared", "limits", "requests", "running",
        "running_others", "tokens", "tokens_per_day", "warned_from",
    )  # fmt: skip

    def __init__(self, limits: Limits = NO_LIMITS, day: int = 0, *, is_shared: bool = False) -> None:
        self.is_shared = is_shared
        """True if other replicas use the same limits. Then nothing may be used before `set_quota` says so."""
        self.day_others = 0
        """Tokens of `day` that other replicas have used, as it was last told."""
        self.running_others = 0
        """Requests that run at other replicas, as it was last told."""
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
        """Requests that may run here: the limit, or the quota of a shared one."""
        self.tokens_per_day = UNLIMITED if limits.tokens_per_day is None else limits.tokens_per_day
        """Tokens that may be used here: the limit, or the quota of a shared one."""
        self.day_limit = self.tokens_per_day
        self.warned_from = ceil(WARNING_SHARE * self.day_limit)
        """Tokens of the day from which answers have a warning."""
        self.requests = self._changed(self.requests, limits.requests_per_minute)
        self.tokens = self._changed(self.tokens, limits.tokens_per_minute)
        if self.is_shared:
            for name, used in self.shared_use().items():
                self.set_quota(name, used)

    def turn_to(self, day: int) -> None:
        """Begin a new day, if `day` is another one."""
        if day != self.day:
            self.day = day
            self.day_tokens = self.day_others = 0
            if self.is_shared and self.limits.tokens_per_day is not None:
                self.tokens_per_day = 0

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

    def used_by_all(self) -> dict[str, int]:
        """Return what this and the other replicas have used of each limit, after a call of `advance`."""
        found = self.used()
        found[TOKENS_PER_DAY] += self.day_others
        found[CONCURRENCY] += self.running_others
        for name, window in ((REQUESTS_PER_MINUTE, self.requests), (TOKENS_PER_MINUTE, self.tokens)):
            if window is not None:
                found[name] += window.others
        return found

    # Limits that replicas share

    def share(self) -> None:
        """Share the limits with other replicas from now on."""
        self.is_shared = True
        for window in (self.requests, self.tokens):
            if window is not None:
                window.is_shared = True
        for name, used in self.shared_use().items():
            self.set_quota(name, used)

    def shared_use(self) -> dict[str, int]:
        """Return what is used of each limit that is set, after a call of `advance`."""
        used = self.used()
        return {name: used[name] for name in self.limits.given()}

    def quota(self, limit: str) -> int:
        """Return how much of a limit, by its name, may be used here."""
        if limit == CONCURRENCY:
            return self.concurrency
        if limit == TOKENS_PER_DAY:
            return self.tokens_per_day
        window = self.requests if limit == REQUESTS_PER_MINUTE else self.tokens
        return 0 if window is None else window.quota

    def set_quota(self, limit: str, quota: int, others: int | None = None) -> None:
        """Set how much of a limit may be used here, and how much the other replicas have used, unless it is None."""
        if limit == CONCURRENCY:
            self.concurrency = quota
            self.running_others = self.running_others if others is None else others
        elif limit == TOKENS_PER_DAY:
            self.tokens_per_day = quota
            self.day_others = self.day_others if others is None else others
        else:
            window = self.requests if limit == REQUESTS_PER_MINUTE else self.tokens
            if window is not None:
                window.quota = quota
                window.others = window.others if others is None else others

    def has_room(self, requests: int, tokens: int, second: int) -> bool:
        """Return whether `lacking` is empty."""
        if requests and (
            self.running >= self.concurrency or (self.requests is not None and self.requests.lacks(1, second))
        ):
            return False
        return not tokens or (
            self.day_tokens + tokens <= self.tokens_per_day
            and (self.tokens is None or not self.tokens.lacks(tokens, second))
        )

    def needs(self, requests: int, tokens: int) -> dict[str, int]:
        """Return what a request takes of each limit that is set, by name. For `requests` see `lacking`."""
        amounts = {
            CONCURRENCY: requests,
            REQUESTS_PER_MINUTE: requests,
            TOKENS_PER_MINUTE: tokens,
            TOKENS_PER_DAY: tokens,
        }
        return {name: amounts[name] for name in self.limits.given() if amounts[name]}

    def lacking(self, requests: int, tokens: int, second: int) -> dict[str, int]:
        """Return what a request needs of the limits whose quotas are used up, by name.

        `requests` is 1 before the request is admitted, 0 afterwards.
        """
        found = {}
        if requests:
            if self.running >= self.concurrency:
                found[CONCURRENCY] = 1
            if self.requests is not None and self.requests.lacks(1, second):
                found[REQUESTS_PER_MINUTE] = 1
        if tokens:
            if self.tokens is not None and self.tokens.lacks(tokens, second):
                found[TOKENS_PER_MINUTE] = tokens
            if self.day_tokens + tokens > self.tokens_per_day:
                found[TOKENS_PER_DAY] = tokens
        return found

    def _changed(self, window: SlidingWindow | None, limit: int | None) -> SlidingWindow | None:
        if limit is None:
            return None
        if window is None:
            window = SlidingWindow(limit)
            window.is_shared = self.is_shared
        window.change(limit)
        return window

    # Answers

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


def seconds_to_midnight(now: float) -> int:
    """Return the whole seconds, rounded up, from `now` in Unix time to the next midnight in UTC."""
    return SECONDS_PER_DAY - int(now) % SECONDS_PER_DAY
