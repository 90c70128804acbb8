"""Answer headers that tell a client its limits, in OpenAI's names and formats. Pure.

`x-ratelimit-limit-requests`, `-remaining-` and `-reset-` are about the requests of a minute, and
those of `tokens` about the tokens of a minute, or of the day if the key has no limit for the minute.
A reset is the time after which everything is free again if nothing else is sent, such as `1s` or
`6m0s` (https://platform.openai.com/docs/guides/rate-limits, section on headers). Of a key and a
person behind it, the one with less left is shown.
"""

import time
from collections.abc import Callable

from gateway.keys.allowance import SECONDS_PER_DAY, Allowance, seconds_to_midnight
from gateway.keys.policy import Limits
from gateway.keys.windows import SECONDS, SlidingWindow

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
_RESET = _DURATIONS[SECONDS + 1]
"""Time until a window is empty that has just counted."""
_COUNTED_REQUESTS, _COUNTED_TOKENS = (lines.replace(b"%b", _RESET) for lines in (_REQUESTS, _TOKENS))


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
    return lines if day.day_tokens + day.day_others < day.warned_from else lines + warning(day, now)


def has_lines(limits: Limits) -> bool:
    """Return whether answers have header lines for `limits`."""
    given = limits.requests_per_minute, limits.tokens_per_minute, limits.tokens_per_day
    return given != (None, None, None)


def warning(day: Allowance, now: float) -> bytes:
    """Return the header line that says how much of a day's tokens is used."""
    text = b"x-gateway-budget-warning: %d of %d tokens a day are used; the budget is renewed at %b\r\n"
    return text % (day.day_tokens + day.day_others, day.day_limit, utc_midnight(now).encode())


def plain_lines(own: Allowance, day_reset: Callable[[int], bytes]) -> Callable[[int], bytes] | None:
    """Return a function that renders the lines of `own` at a second, without a warning; None without such limits.

    They hold for an answer to a request that was counted in the same second, so the windows are
    not looked through. `day_reset` returns the time to the end of the day.
    """
    requests, tokens, day = own.requests, own.tokens, own.limits.tokens_per_day
    request_lines = b"" if requests is None else _fixed(_COUNTED_REQUESTS, requests.limit)
    if tokens is not None:
        if requests is None:
            return _renderer_of(tokens, _fixed(_COUNTED_TOKENS, tokens.limit))
        return _renderer_of_both(requests, tokens, request_lines + _fixed(_COUNTED_TOKENS, tokens.limit))
    if day is not None:
        return _renderer_of_day(own, day, requests, request_lines, day_reset)
    return None if requests is None else _renderer_of(requests, request_lines)


def person_lines(
    own: Allowance, person: Allowance, second: int, day_reset: Callable[[int], bytes], wall: Callable[[], float]
) -> bytes:
    """Return what `limit_lines` does, for an answer to a request that was counted in the same second."""
    requests, tokens = own.requests, own.tokens
    if person.requests is not None and (requests is None or person.requests.remaining() < requests.remaining()):
        requests = person.requests
    if person.tokens is not None and (tokens is None or person.tokens.remaining() < tokens.remaining()):
        tokens = person.tokens
    lines = b"" if requests is None else _COUNTED_REQUESTS % (requests.limit, requests.remaining())
    if tokens is not None:
        lines += _COUNTED_TOKENS % (tokens.limit, tokens.remaining())
    day = _tighter_day(own, person)
    limit = day.limits.tokens_per_day
    if limit is not None and tokens is None:
        lines += _TOKENS % (limit, max(0, limit - day.day_tokens - day.day_others), day_reset(second))
    return lines if day.day_tokens + day.day_others < day.warned_from else lines + warning(day, wall())


def _fixed(template: bytes, limit: int) -> bytes:
    """Return the lines of a window that has just counted, with one place for what is left."""
    return template.replace(b"%d", b"%d" % limit, 1)


def _renderer_of(window: SlidingWindow, lines: bytes) -> Callable[[int], bytes]:
    def render(second: int) -> bytes:
        left = window.limit - window.used - window.others
        return lines % (left if left > 0 else 0)  # noqa: FURB136 - `max` takes three times as long

    return render


def _renderer_of_both(requests: SlidingWindow, tokens: SlidingWindow, lines: bytes) -> Callable[[int], bytes]:
    def render(second: int) -> bytes:
        left = requests.limit - requests.used - requests.others
        left_tokens = tokens.limit - tokens.used - tokens.others
        return lines % (left if left > 0 else 0, left_tokens if left_tokens > 0 else 0)  # noqa: FURB136

    return render


def _renderer_of_day(
    own: Allowance,
    limit: int,
    requests: SlidingWindow | None,
    request_lines: bytes,
    day_reset: Callable[[int], bytes],
) -> Callable[[int], bytes]:
    lines = _TOKENS.replace(b"%d", b"%d" % limit, 1)
    of_requests = None if requests is None else _renderer_of(requests, request_lines)

    def render(second: int) -> bytes:
        left = limit - own.day_tokens - own.day_others
        of_day = lines % (left if left > 0 else 0, day_reset(second))  # noqa: FURB136
        return of_day if of_requests is None else of_requests(second) + of_day

    return render


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
