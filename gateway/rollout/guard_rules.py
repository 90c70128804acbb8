"""Samples and rules of the guard: what an exchange says about its side, and what counts as bad.

Pure: no I/O, no clock.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Protocol

from msgspec import Struct

from gateway.config import GuardRule
from gateway.rollout.sequential_test import SequentialTest
from gateway.telemetry.exchange import Exchange

PAIRS = 1000
"""Samples of a fresh switch among which those from before it are divided evenly, if there are
enough."""
MIN_TOKENS = 8
"""Completion tokens from which on an answer has an inter-token latency."""
SLACK = {"time_to_first_token": 0.05, "inter_token_latency": 0.005}
"""Seconds above the other side's p95 that never count: no person notices them."""
P95 = 0.95
EXPECTED_FAILURES = 0.01
"""First guess of the other side's share of failures."""

_UNSERVED = frozenset({"backend_unavailable", "model_not_found"})


class Sample(Struct, frozen=True, gc=False):
    """Verdict of one exchange on its side. Times are in seconds; None: it says nothing."""

    arrived: float
    errors: bool | None
    truncated: bool | None
    empty: bool | None
    time_to_first_token: float | None
    inter_token_latency: float | None
    has_left: bool = False
    """True if the client left before the first token, which would have taken longer than
    `time_to_first_token`."""


def sample_of(exchange: Exchange, arrived: float) -> Sample | None:
    """Return the sample of `exchange`; None if it says nothing about the roll-out's choice."""
    if exchange.chosen != exchange.backend:
        return Sample(arrived, True, False, None, None, None)  # a fallback had to serve it
    outcome, first = exchange.outcome, exchange.time_to_first_token if exchange.stream else None
    waited = None if exchange.moved else first  # a request that moved had waited in the other backend's queue
    if outcome == "ok":
        usage, gap = exchange.usage, None
        if first is not None and usage is not None and usage.completion_tokens >= MIN_TOKENS:
            gap = (exchange.duration - first) / (usage.completion_tokens - 1)
        return Sample(arrived, False, False, exchange.empty, waited, gap)
    if outcome in ("upstream_error", "timeout") or exchange.code in _UNSERVED:
        return Sample(arrived, True, exchange.phase == "streaming", None, waited, None)
    if outcome == "cancelled" and exchange.stream and not exchange.moved:
        return Sample(arrived, None, None, None, exchange.duration if first is None else first, None, first is None)
    return None


class Rule(Protocol):
    """Judges samples: yes, no, or None if a sample says nothing."""

    name: GuardRule
    expected: float
    margin: float

    def judge(self, sample: Sample) -> bool | None:
        """Judge a sample of the side under test."""

    def count(self, others: Sequence[Sample]) -> tuple[int, int]:
        """Return how many samples of the other side say something, and how many say yes."""


class ShareRule:
    """Judges whether something went wrong."""

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
    """Judges whether a time is above the other side's p95.

    `bound` is that p95, in seconds; None while too few samples are known.
    """

    def __init__(self, name: GuardRule, ratio: float, not_before: float, min_samples: int) -> None:
        self.name = name
        self.expected = 1 - P95
        self.margin = 0.0
        self.bound: float | None = None
        self._ratio = ratio
        self._not_before = not_before
        self._min_samples = min_samples
        self._past: Sequence[Sample] | deque[Sample] = ()
        self._until_update = 0
        self._value: Callable[[Sample], float | None] = attrgetter(name)

    def learn_from(self, past: deque[Sample]) -> None:
        """Take the bound from `past`, now and as it fills up; less often the less it changes."""
        self._past = past
        self._update_bound()

    def set_bound(self, past: Sequence[Sample]) -> None:
        self.bound = p95(past, self.name) if len(past) >= self._min_samples else None

    def judge(self, sample: Sample) -> bool | None:
        hit = self._is_above(sample, True)
        # Updated here, so that the bound is older than all samples that it judges, and the same for
        # both sides of a round.
        if self._until_update <= 0:
            self._update_bound()
        return hit

    def count(self, others: Sequence[Sample]) -> tuple[int, int]:
        self._until_update -= len(others)
        hits = [hit for sample in others if (hit := self._is_above(sample, False)) is not None]
        return len(hits), sum(hits)

    def _is_above(self, sample: Sample, is_tested: bool) -> bool | None:
        seconds = self._value(sample)
        if seconds is None or self.bound is None or sample.arrived < self._not_before:
            return None
        is_above = seconds > self.limit(is_tested)
        return (is_above or None) if sample.has_left else is_above

    def limit(self, is_tested: bool) -> float:
        """Return the seconds above which a sample counts. `bound` must not be None."""
        assert self.bound is not None
        return max(self.bound * self._ratio, self.bound + SLACK[self.name]) if is_tested else self.bound

    def judge_past(self, samples: Iterable[Sample]) -> list[bool]:
        """Judge samples of the other side, from before a switch."""
        bound = self.bound
        return [] if bound is None else [(self._value(sample) or 0) > bound for sample in samples]

    def _update_bound(self) -> None:
        if self._past:
            self.set_bound(
                [sample for sample in self._past if getattr(sample, self.name) is not None and not sample.has_left]
            )
            self._until_update = len(self._past) if self.bound is not None else self._min_samples


class Trial:
    """One rule on one tier.

    For a switch, `baseline` has the outcomes of the side that was left. For a canary it is None:
    the other side's samples count as they arrive.
    """

    def __init__(self, rule: Rule, baseline: deque[bool] | None) -> None:
        self.rule = rule
        self.baseline = baseline
        self._per_sample = 1 if baseline is None else max(1, len(baseline) // PAIRS)
        self.test = SequentialTest(rule.margin, rule.expected)

    def __repr__(self) -> str:
        return f"<Trial {self.rule.name} {self.test}>"

    @property
    def is_over(self) -> bool:
        return self.baseline is not None and len(self.baseline) < self._per_sample

    def take(self, sample: Sample, others: Sequence[Sample]) -> None:
        """Add a sample of the side under test, and those of the other side since the last one."""
        if others:
            self.test.add_others(*self.rule.count(others))
        hit = self.rule.judge(sample)
        if hit is None or self.is_over:
            return
        if self.baseline is not None:
            for _ in range(self._per_sample):
                self.test.add_other(self.baseline.popleft())
        self.test.add_tested(hit)

    def restart(self) -> None:
        self.test = SequentialTest(self.rule.margin, self.rule.expected)


def p95(samples: Iterable[Sample], name: str) -> float | None:
    """Return the 95th percentile of a time, in seconds; None without samples."""
    times = sorted(
        seconds for sample in samples if not sample.has_left and (seconds := getattr(sample, name)) is not None
    )
    return times[min(len(times) - 1, int(P95 * len(times)))] if times else None
