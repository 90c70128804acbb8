"""Figures of the last minutes by tier and backend, for the console. No I/O; the clock is passed in.

Every `STEP` seconds a sample reads the counts of the histograms, which the relay fills anyway, and
derives rates and percentiles over the last `WINDOW` seconds from the differences. A token or a
request costs nothing here, apart from one dict look-up for each finished request. While there is no
traffic and nobody asks, no sample is taken.
"""

import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from operator import add
from typing import Any, Protocol

from msgspec import Struct

from gateway.telemetry.exchange import Exchange
from gateway.telemetry.metrics import INTER_TOKEN_LATENCY, TIME_TO_FIRST_TOKEN, Histogram, Metrics

STEP = 2.0
"""Seconds between two samples."""
WINDOW = 10.0
"""Seconds that one sample looks back."""
KEPT = 150
"""Samples that are kept: five minutes."""
MAX_ERRORS, MAX_CLIENT_ERRORS = 30, 10
"""Last failed requests that are kept: those that the gateway or a backend failed, and those that
the client itself caused, which would otherwise displace the first."""


class Timer(Protocol):
    def cancel(self) -> None: ...


Side = tuple[str, str]
"""A tier and a backend. The tier `ALL` stands for all tiers together."""

ALL = ""
_STEPS = round(WINDOW / STEP)


class Figures(Struct, frozen=True, gc=False):
    """Rates per second and percentiles in seconds over the last `WINDOW` seconds.

    A percentile is None if there was nothing to measure.
    """

    requests: float
    """Requests that ended."""
    errors: float
    """Requests that ended with an error that the client did not cause."""
    tokens: float
    """Completion tokens, counted as they arrive in streams, and at the end of plain answers."""
    time_to_first_token_p50: float | None = None
    time_to_first_token_p95: float | None = None
    inter_token_latency_p50: float | None = None
    inter_token_latency_p95: float | None = None


FIGURES = Figures.__struct_fields__
NOTHING = Figures(0.0, 0.0, 0.0)


class Counts(Struct, frozen=True, gc=False):
    """Cumulative counts of one side."""

    requests: int = 0
    errors: int = 0
    plain_tokens: int = 0
    first_tokens: tuple[int, ...] = (0,) * (len(TIME_TO_FIRST_TOKEN) + 1)
    gaps: tuple[int, ...] = (0,) * (len(INTER_TOKEN_LATENCY) + 1)

    def combined(self, other: "Counts", operation: Callable[[int, int], int]) -> "Counts":
        return Counts(
            operation(self.requests, other.requests),
            operation(self.errors, other.errors),
            operation(self.plain_tokens, other.plain_tokens),
            tuple(map(operation, self.first_tokens, other.first_tokens)),
            tuple(map(operation, self.gaps, other.gaps)),
        )

    def plus(self, other: "Counts") -> "Counts":
        """Return the counts of both sides together."""
        return self.combined(other, add)

    def figures(self, seconds: float) -> Figures:
        """Return the figures, if these are the counts of a period of `seconds`."""
        first, gaps = Histogram(TIME_TO_FIRST_TOKEN), Histogram(INTER_TOKEN_LATENCY)
        first.counts, gaps.counts = list(self.first_tokens), list(self.gaps)
        tokens = self.plain_tokens + sum(self.first_tokens) + sum(self.gaps)
        return Figures(
            round(self.requests / seconds, 3),
            round(self.errors / seconds, 3),
            round(tokens / seconds, 2),
            *(_rounded(histogram.quantile(share)) for histogram in (first, gaps) for share in (0.5, 0.95)),
        )


_ZERO = Counts()


class OtherReplicas(Protocol):
    """Counts and loads of other replicas, as far as they are known."""

    def counts(self) -> Mapping[Side, Counts]: ...

    def loads(self) -> Mapping[str, tuple[int, int]]: ...


class _Ended:
    """Finished requests of one side so far."""

    __slots__ = ("errors", "plain_tokens", "requests")

    def __init__(self) -> None:
        self.requests = self.errors = self.plain_tokens = 0


class LiveFigures:
    """Current figures and their course over the last minutes, and the last errors.

    `loads` returns the numbers of requests that run and wait, by backend. `call_later` is that of
    the event loop. `clock` is in Unix time.
    """

    def __init__(
        self,
        metrics: Metrics,
        loads: Callable[[], Mapping[str, tuple[int, int]]],
        call_later: Callable[[float, Callable[[], None]], Timer],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._metrics = metrics
        self._loads = loads
        self._call_later = call_later
        self._clock = clock
        self._timer: Timer | None = None
        self._is_wanted = False
        """True if somebody has asked since the last sample."""
        self._ended: dict[Side, _Ended] = {}
        self._past: dict[Side, deque[Counts]] = {}
        """Counts at the last samples, the latest at the end."""
        self._current: dict[Side, Figures] = {}
        """Figures of the sides that had traffic within the window."""
        self._samples: deque[tuple[float, dict[Side, Figures], Mapping[str, tuple[int, int]]]] = deque(maxlen=KEPT)
        self._errors: deque[dict[str, Any]] = deque(maxlen=MAX_ERRORS)
        self._client_errors: deque[dict[str, Any]] = deque(maxlen=MAX_CLIENT_ERRORS)
        self.number = 0
        """Number of samples taken so far."""
        self.others: OtherReplicas | None = None
        """Replicas whose requests the figures cover as well."""

    def __repr__(self) -> str:
        return f"<LiveFigures after {self.number} samples, {len(self._current)} sides with traffic>"

    # Input

    def observe(self, exchanges: Sequence[Exchange]) -> None:
        """Count finished exchanges, and keep those that failed."""
        if self._timer is None:
            self._begin()
        for exchange in exchanges:
            side = (exchange.tier, exchange.backend)
            ended = self._ended.get(side)
            if ended is None:
                ended = self._ended[side] = _Ended()
            ended.requests += 1
            outcome = exchange.outcome
            if outcome == "ok":
                if exchange.time_to_first_token is None and exchange.usage is not None:
                    ended.plain_tokens += exchange.usage.completion_tokens
            elif outcome != "cancelled":
                is_own = outcome == "client_error"
                ended.errors += not is_own
                (self._client_errors if is_own else self._errors).append(self._error(exchange))

    def _error(self, exchange: Exchange) -> dict[str, Any]:
        return {
            "at": _timestamp(self._clock()),
            "request_id": exchange.request_id,
            "endpoint": exchange.endpoint,
            "tier": exchange.tier,
            "backend": exchange.backend,
            "status": exchange.status,
            "code": exchange.code,
            "reason": exchange.reason,
            "outcome": exchange.outcome,
            "seconds": exchange.duration,
        }

    def want(self) -> None:
        """Take samples from now on, at least one: somebody asks for the figures."""
        self._is_wanted = True
        if self._timer is None:
            self._begin()

    def close(self) -> None:
        """Take no further sample."""
        if self._timer is not None:
            self._timer.cancel()

    def _begin(self) -> None:
        """Begin to take samples. What happened before, at an unknown time, is left out."""
        self._past = {side: deque([counts], maxlen=_STEPS + 1) for side, counts in self._read().items()}
        self._timer = self._call_later(STEP, self.sample)

    def sample(self) -> None:
        """Take a sample, and another one later if there is a reason for it."""
        current: dict[Side, Figures] = {}
        totals: dict[str, Counts] = {}
        for side, counts in self._read().items():
            past = self._past.get(side)
            if past is None:
                past = self._past[side] = deque([_ZERO], maxlen=_STEPS + 1)
            past.append(past[-1] if counts == past[-1] else counts)
            if past[0] is past[-1]:
                continue
            moved = past[-1].combined(past[0], _increase)
            current[side] = moved.figures(WINDOW)
            backend = side[1]
            totals[backend] = totals[backend].combined(moved, add) if backend in totals else moved
        for backend, moved in totals.items():
            current[ALL, backend] = moved.figures(WINDOW)
        loads = self._all_loads()
        self._current = current
        self._samples.append((self._clock(), current, loads))
        self.number += 1
        is_needed = self._is_wanted or bool(current) or any(running or waiting for running, waiting in loads.values())
        self._timer = self._call_later(STEP, self.sample) if is_needed else None
        self._is_wanted = False

    def _read(self) -> dict[Side, Counts]:
        """Return the cumulative counts of all sides."""
        counts = self.own_counts()
        if self.others is not None:
            for side, more in self.others.counts().items():
                counts[side] = counts[side].plus(more) if side in counts else more
        return counts

    def _all_loads(self) -> Mapping[str, tuple[int, int]]:
        own = self._loads()
        if self.others is None:
            return own
        others = self.others.loads()
        return {
            name: (running + others.get(name, (0, 0))[0], waiting + others.get(name, (0, 0))[1])
            for name, (running, waiting) in own.items()
        }

    def own_counts(self) -> dict[Side, Counts]:
        """Return the cumulative counts of all sides, of this replica alone."""
        first, gaps = self._metrics.time_to_first_token.find, self._metrics.gaps.find
        sides = {(tier, backend) for tier, backend in (*self._metrics.time_to_first_token.keys(), *self._ended)}
        return {side: _counts(self._ended.get(side), first(side), gaps(side)) for side in sides}

    def keep(self, tiers: Container[str], backends: Container[str]) -> None:
        """Drop the counts of all other tiers and backends, which the settings no longer have."""
        for known in (self._ended, self._past):
            for side in [side for side in known if side[0] not in tiers or side[1] not in backends]:
                known.pop(side)

    # Output

    def figures(self, tier: str, backend: str) -> dict[str, float | None]:
        """Return the current figures of a tier on a backend, of all tiers there with `ALL`."""
        return _as_dict(self._current.get((tier, backend), NOTHING))

    def series(self, tier: str, backends: Iterable[str], last: int = KEPT) -> dict[str, Any]:
        """Return the course of the figures: `at` in Unix time, and a list of each figure by backend.

        `tier` may be `ALL`; `last` limits the number of samples. The running and waiting requests
        are those of the whole backend.
        """
        samples = list(self._samples)[-last:] if last else []
        by_backend: dict[str, dict[str, list[float | None]]] = {}
        for backend in backends:
            figures = [sides.get((tier, backend), NOTHING) for _, sides, _ in samples]
            series = {name: [getattr(point, name) for point in figures] for name in FIGURES}
            loads = [load.get(backend, (0, 0)) for *_, load in samples]
            series["running"], series["waiting"] = [load[0] for load in loads], [load[1] for load in loads]
            by_backend[backend] = series
        return {"at": [round(at, 1) for at, *_ in samples], "backends": by_backend}

    def errors(self) -> list[dict[str, Any]]:
        """Return the last failed requests, the latest first. No text of a request or an answer is in them."""
        return sorted([*self._errors, *self._client_errors], key=lambda error: str(error["at"]), reverse=True)


def _increase(now: int, before: int) -> int:
    """Return the difference; 0 if the count has begun anew, as that of a tier that came back does."""
    return max(0, now - before)


def _counts(ended: _Ended | None, first: Histogram | None, gaps: Histogram | None) -> Counts:
    return Counts(
        *((ended.requests, ended.errors, ended.plain_tokens) if ended else (0, 0, 0)),
        tuple(first.counts) if first else _ZERO.first_tokens,
        tuple(gaps.counts) if gaps else _ZERO.gaps,
    )


def _as_dict(figures: Figures) -> dict[str, float | None]:
    return {name: getattr(figures, name) for name in FIGURES}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
