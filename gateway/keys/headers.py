"""Answer headers that tell a client its limits, in OpenAI's names and formats. Pure.

`x-ratelimit-limit-requests`, `-remaining-` and `-reset-` are about the requests of a minute, and
those of `tokens` about the tokens of a minute, or of the day if the key has no limit for the minute.
A reset is the time after which everything is free again if nothing else is sent, such as `1s` or
`6m0s` (https://platform.openai.com/docs/guides/rate-limits, section on headers). Of a key and a
person behind it, the one with less left is shown.
"""

import time

from gateway.keys.allowance import SECONDS_PER_DAY, Allowance, seconds_to_midnight
from gateway.keys.policy import Limits
from gateway.keys.windows import SECONDS, SlidingWindow

WARNING_SHARE = 0.8
"""Share of the tokens of a day from which answers have a warning."""

_LINES = {
    kind: b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n" % ((kind,) * 3)
    for kind in (b"requests", b"tokens")
}
_REQUESTS, _TOKENS = _LINES[b"requests"], _LINES[b"tokens"]
_BOTH = _REQUESTS + _TOKENS


def duration(seconds: int) -> bytes:
    """Return whole seconds as OpenAI writes a time: `1s`, `6m0s`, `2h0m5s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return b"%dh%dm%ds" % (hours, minutes, rest)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest


_DURATIONS = [duration(seconds) for seconds in range(SECONDS + 2)]
"""The times of windows."""


def utc_midnight(now: float) -> str:
    """Return the next midnight in UTC after `now` in Unix time, such as `2026-11-30T00:00:00Z`."""
    return time.strftime("%Y-%m-%dT00:00:00Z", time.gmtime(now - now % SECONDS_PER_DAY + SECONDS_PER_DAY))


def utc_date(now: float) -> str:
    """Return the date in UTC of `now` in Unix time, such as `2026-11-29`."""
    return time.strftime("%Y-%m-%d", time.gmtime(now))


def limit_lines(own: Allowance, person: Allowance | None, second: int, now: float) -> bytes:
    """Return the header lines for the limits of a key and of a person; empty without such limits.

    `second` is on the clock of the windows, `now` in Unix time.
    """
    requests, tokens, day = own.requests, own.tokens, own
    if person is not None:
        requests, tokens = _tighter(requests, person.requests, second), _tighter(tokens, person.tokens, second)
        day = _tighter_day(own, person)
    if requests is not None and tokens is not None:
        lines = _BOTH % (
            requests.limit,
            requests.remaining(),
            _DURATIONS[requests.seconds_until_empty(second)],
            tokens.limit,
            tokens.remaining(),
            _DURATIONS[tokens.seconds_until_empty(second)],
        )
    else:
        lines = b"" if requests is None else _window_lines(_REQUESTS, requests, second)
        if tokens is not None:
            lines += _window_lines(_TOKENS, tokens, second)
    limit = day.limits.tokens_per_day
    if limit is None:
        return lines
    if tokens is None:
        used = day.day_tokens + day.day_others
        reset = duration(seconds_to_midnight(now) if used else 0)
        lines += _TOKENS % (limit, max(0, limit - used), reset)
    return lines if day.day_tokens + day.day_others < WARNING_SHARE * limit else lines + warning(day, now)


def has_lines(limits: Limits) -> bool:
    """Return whether answers have header lines for `limits`."""
    given = limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day
    return given != (None, None, None)


def warning(day: Allowance, now: float) -> bytes:
    """Return the header line that says how much of a day's tokens is used."""
    text = b"x-gateway-budget-warning: %d of %d tokens a day are used; the budget is renewed at %b\r\n"
    return text % (day.day_tokens + day.day_others, day.day_limit, utc_midnight(now).encode())


def plain_lines(limits: Limits) -> bytes | None:
    """Return the lines with places for the remaining requests and tokens of the minute.

    They hold for an answer to a request that was counted in the same second. None if `limits` lack
    one of the two.
    """
    if limits.requests_per_minute is None or limits.tokens_per_minute is None:
        return None
    given = (b"requests", limits.requests_per_minute), (b"tokens", limits.tokens_per_minute)
    return b"".join(
        b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %b\r\n"
        % (kind, limit, kind, kind, _DURATIONS[SECONDS + 1])
        for kind, limit in given
    )


def _window_lines(template: bytes, window: SlidingWindow, second: int) -> bytes:
    return template % (window.limit, window.remaining(), _DURATIONS[window.seconds_until_empty(second)])


def _tighter(one: SlidingWindow | None, other: SlidingWindow | None, second: int) -> SlidingWindow | None:
    if one is None or other is None:
        return other if one is None else one
    one.advance(second)
    other.advance(second)
    return other if other.remaining() < one.remaining() else one


def _tighter_day(own: Allowance, person: Allowance) -> Allowance:
    of_key, of_person = own.limits.tokens_per_day, person.limits.tokens_per_day
    if of_person is None:
        return own
    if of_key is None or of_person - person.day_tokens - person.day_others < of_key - own.day_tokens - own.day_others:
        return person
    return own
