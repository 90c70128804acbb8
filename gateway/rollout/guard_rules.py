"""What the guard of the roll-out looks at: samples made of exchanges, and rules that make yes or no of them. Pure: no I/O, no clock."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Protocol

from msgspec import Struct

from gateway.config import GuardRule
from gateway.rollout.sequential_test import SequentialTest
from gateway.telemetry.exchange import Exchange

PAIRS = 1000
"""Samples of a fresh switch for which those of the side that was left are divided evenly, where there are so many."""
LEAST_TOKENS = 8
"""Of an answer whose gaps are looked at."""
SLACK = {"time_to_first_token": 0.05, "inter_token_latency": 0.005}
"""Seconds above the other side's p95 that never count: no person notices."""
P95 = 0.95
EXPECTED_FAILURES = 0.01

_UNSERVED = frozenset({"backend_unavailable", "model_not_found"})


class Sample(Struct, frozen=True, gc=False):
    """What one exchange tells of its side. Times are in seconds; None: it tells nothing of that."""

    arrived: float
    errors: bool | None
    truncated: bool | None
    empty: bool | None
    time_to_first_token: float | None
    inter_token_latency: float | None
    has_left: bool = False
    """The client left before the first piece: that would have come later than after `time_to_first_token`."""


def sample_of(exchange: Exchange, arrived: float) -> Sample | None:
    """None for what says nothing of the backend that the roll-out chose."""
    if exchange.chosen != exchange.backend:
        return Sample(arrived, True, False, None, None, None)  # a fallback had to serve it
    outcome, first = exchange.outcome, exchange.time_to_first_token if exchange.stream else None
    waited = None if exchange.moved else first  # one that moved brings the wait of the side that was left
    if outcome == "ok":
        usage, gap = exchange.usage, None
        if first is not None and usage is not None and usage.completion_tokens >= LEAST_TOKENS:
            gap = (exchange.duration - first) / (usage.completion_tokens - 1)
        return Sample(arrived, False, False, exchange.empty, waited, gap)
    if outcome in ("upstream_error", "timeout") or exchange.code in _UNSERVED:
        return Sample(arrived, True, exchange.phase == "streaming", None, waited, None)
    if outcome == "cancelled" and exchange.stream and not exchange.moved:
        return Sample(arrived, None, None, None, exchange.duration if first is None else first, None, first is None)
    return None


class Rule(Protocol):
    """Makes yes or no of samples; None: it says nothing."""

    name: GuardRule
    expected: float
    margin: float

    def judge(self, sample: Sample) -> bool | None:
        """One of the side under test."""

    def count(self, others: Sequence[Sample]) -> tuple[int, int]:
        """How many of the other side say something, and how many of these a yes."""


class ShareRule:
    """Of what went wrong or not."""

    def __init__(self, name: GuardRule, margin: float) -> None:
        self.name = name
        self.expected = EXPECTED_FAILURES
        self.margin = margin
        self._value: Callable[[Sample], bool | None] = attrgetter(name)

    def judge(self, sample: Sample) -> bool | None:
        return self._value(sample)

    def count(self, others: Sequence[Sample]) -> tuple[int, int]:
        hits = [hit for hit in map(self._value, others) if hit is not None]
        return len(hits), sum(hits)


class TimeRule:
    """Of what took longer than the p95 of the other side. `bound` is that, in seconds; None while too little is known."""

    def __init__(self, name: GuardRule, ratio: float, not_before: float, least: int) -> None:
        self.name = name
        self.expected = 1 - P95
        self.margin = 0.0
        self.bound: float | None = None
        self._ratio = ratio
        self._not_before = not_before
        self._least = least
        self._past: Sequence[Sample] | deque[Sample] = ()
        self._until_look = 0
        self._value: Callable[[Sample], float | None] = attrgetter(name)

    def learn_from(self, past: deque[Sample]) -> None:
        """Take the bound from `past`, whatever is in it at the time; ever more seldom, as it changes ever less."""
        self._past = past
        self._look()

    def fix(self, past: Sequence[Sample]) -> None:
        self.bound = p95(past, self.name) if len(past) >= self._least else None

    def judge(self, sample: Sample) -> bool | None:
        hit = self._is_above(sample, True)
        if (
            self._until_look <= 0
        ):  # here, so that the bound is older than all that it judges, and the same for both sides of a round
            self._look()
        return hit

    def count(self, others: Sequence[Sample]) -> tuple[int, int]:
        self._until_look -= len(others)
        hits = [hit for sample in others if (hit := self._is_above(sample, False)) is not None]
        return len(hits), sum(hits)

    def _is_above(self, sample: Sample, is_tested: bool) -> bool | None:
        seconds = self._value(sample)
        if seconds is None or self.bound is None or sample.arrived < self._not_before:
            return None
        is_above = seconds > self.limit(is_tested)
        return (is_above or None) if sample.has_left else is_above

    def limit(self, is_tested: bool) -> float:
        """Seconds above which a sample counts; the bound has to be there."""
        assert self.bound is not None
        return max(self.bound * self._ratio, self.bound + SLACK[self.name]) if is_tested else self.bound

    def judge_past(self, samples: Iterable[Sample]) -> list[bool]:
        """Of the other side, from the time before a switch."""
        bound = self.bound
        return [] if bound is None else [(self._value(sample) or 0) > bound for sample in samples]

    def _look(self) -> None:
        if self._past:
            self.fix(
                [sample for sample in self._past if getattr(sample, self.name) is not None and not sample.has_left]
            )
            self._until_look = len(self._past) if self.bound is not None else self._least


class Trial:
    """One rule on one tier. `stock` has what the side that was left did, for a switch; None: the other side's samples come as they are."""

    def __init__(self, rule: Rule, stock: deque[bool] | None) -> None:
        self.rule = rule
        self.stock = stock
        self._share = 1 if stock is None else max(1, len(stock) // PAIRS)
        self.comparison = SequentialTest(rule.margin, rule.expected)

    def __repr__(self) -> str:
        return f"<Trial {self.rule.name} {self.comparison}>"

    @property
    def is_over(self) -> bool:
        return self.stock is not None and len(self.stock) < self._share

    def take(self, sample: Sample, others: Sequence[Sample]) -> None:
        """One of the side under test, and those of the other that came since the last."""
        if others:
            self.comparison.add_others(*self.rule.count(others))
        hit = self.rule.judge(sample)
        if hit is None or self.is_over:
            return
        if self.stock is not None:
            for _ in range(self._share):
                self.comparison.add_other(self.stock.popleft())
        self.comparison.add_tested(hit)

    def begin_anew(self) -> None:
        self.comparison = SequentialTest(self.rule.margin, self.rule.expected)


def p95(samples: Iterable[Sample], name: str) -> float | None:
    """Of a time, in seconds; None without any."""
    times = sorted(
        seconds for sample in samples if not sample.has_left and (seconds := getattr(sample, name)) is not None
    )
    return times[min(len(times) - 1, int(P95 * len(times)))] if times else None
