"""Levels of a benchmark: what the server did with so many requests at once. Pure."""

from collections.abc import Sequence
from itertools import takewhile

from msgspec import Struct

from gateway.bench.advise.target import Target
from gateway.bench.metrics import METRICS, run_figures
from gateway.bench.quantiles import quantile
from gateway.bench.results import RunResult, ScenarioResult

FLAT = 0.05
"""Gain of throughput below which more requests at once bring nothing."""


class Level(Struct, frozen=True):
    """A run with `at_once` requests at the same time. Times are in seconds, rates per second.

    `values` are the figures that the targets name; `too_few` those that had too few values, in
    whose place the largest one stands.
    """

    at_once: int
    requests: int
    failed: int
    rate: float
    tokens_per_second: float
    first_token: float | None
    latency: float
    values: dict[str, float | None]
    too_few: tuple[str, ...]

    def meets(self, targets: Sequence[Target]) -> bool:
        """Return whether the level failed nothing and meets every target."""
        return not self.failed and all(target.holds(self.values[target.name]) for target in targets)


def levels_of(result: ScenarioResult, targets: Sequence[Target]) -> list[Level]:
    """Return the levels of a result, the smallest first; runs without a limit of requests in flight have none."""
    found: dict[int, Level] = {}
    for run in result.runs:
        if run.max_concurrency and run.good and not run.interrupted:
            found[run.max_concurrency] = _level(run, run.max_concurrency, targets)
    return [found[at_once] for at_once in sorted(found)]


def _level(run: RunResult, at_once: int, targets: Sequence[Target]) -> Level:
    figures = run_figures(run, tuple({target.percentile for target in targets if target.percentile is not None}))
    values: dict[str, float | None] = {}
    too_few = []
    for target in targets:
        value = target.value(figures)
        if value is None and target.name in figures["too_few"]:
            value = max(METRICS[target.metric](run), default=0.0) * 1000 or None
            too_few.append(target.name)
        values[target.name] = value
    first = [record.ttft for record in run.good if record.ttft is not None]
    return Level(
        at_once,
        len(run.ended),
        len(run.ended) - len(run.good),
        figures["request_throughput"] or 0.0,
        figures["output_throughput"] or 0.0,
        quantile(first, 50),
        quantile([record.latency for record in run.good], 50) or 0.0,
        values,
        tuple(too_few),
    )


def knee(levels: Sequence[Level]) -> Level:
    """Return the smallest level whose throughput is within `FLAT` of the largest one."""
    most = max(level.rate for level in levels)
    return next(level for level in levels if level.rate >= most * (1 - FLAT))


def is_saturated(levels: Sequence[Level]) -> bool:
    """Return whether a level above the knee was measured: then the knee is a limit of the server."""
    return len(levels) > 1 and knee(levels).at_once < levels[-1].at_once


def largest_that_meets(levels: Sequence[Level], targets: Sequence[Target]) -> Level | None:
    """Return the largest level that meets the targets, and below which all do."""
    return next(reversed(list(takewhile(lambda level: level.meets(targets), levels))), None)
