"""The rows of a comparison: each metric on both sides, the difference, its interval, and which side is better. Pure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.bench.compare_result import ColdStart, Comparison, EngineUse, Side, SideName
from gateway.bench.compare_statistics import Interval, paired, paired_ratio, welch, welch_ratio
from gateway.bench.metrics import run_figures
from gateway.bench.quantiles import mean, quantile
from gateway.bench.results import RequestRecord, RunResult

Better = Literal["A", "B", "same", "unknown", "neither"]
"""`same`: no difference was seen; `unknown`: no interval, or a side was not seen; `neither`: no direction is better."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of a side.

    Attributes:
        of_round: one value for each round, None where it was not seen.
        of_requests: values of single requests, where the metric is one of requests; used without rounds.
        is_ratio: compared as B ÷ A, else as B − A.
    """

    key: str
    unit: str
    lower_is_better: bool | None
    of_round: Callable[[Side], list[float | None]]
    of_requests: Callable[[RequestRecord], float | None] | None = None
    is_ratio: bool = True
    group: str = "warm"


@dataclass(frozen=True, slots=True)
class Row:
    """One metric on both sides. `a` and `b` are means over the rounds; None: not seen."""

    metric: Metric
    a: float | None
    b: float | None
    interval: Interval | None
    better: Better

    @property
    def difference(self) -> float | None:
        """B minus A."""
        return None if self.a is None or self.b is None else self.b - self.a

    @property
    def ratio(self) -> float | None:
        """B divided by A."""
        if self.metric.is_ratio and self.interval is not None:
            return self.interval.estimate
        return self.b / self.a if self.a and self.b is not None else None


def _runs(figure: Callable[[RunResult], float | None]) -> Callable[[Side], list[float | None]]:
    return lambda side: [figure(run) for run in side.rounds]


def _cold(figure: Callable[[ColdStart], float | None]) -> Callable[[Side], list[float | None]]:
    return lambda side: [figure(cold) for cold in side.cold]


def _use(figure: Callable[[EngineUse], float | None]) -> Callable[[Side], list[float | None]]:
    return lambda side: [figure(use) for use in side.uses]


def _median(value: Callable[[RequestRecord], float | None]) -> Callable[[Side], list[float | None]]:
    return _runs(lambda run: quantile([found for one in run.good if (found := value(one)) is not None], 50))


def _latency(record: RequestRecord) -> float | None:
    return record.latency


def _ttft(record: RequestRecord) -> float | None:
    return record.ttft


def _tpot(record: RequestRecord) -> float | None:
    return record.tpot


def _speed(record: RequestRecord) -> float | None:
    return record.tokens_per_second


def _per_second(count: Callable[[RunResult], float]) -> Callable[[RunResult], float | None]:
    return lambda run: count(run) / run.duration if run.duration > 0 and run.good else None


def _tokens(run: RunResult) -> float:
    return float(sum(record.completion_tokens or 0 for record in run.good))


def _failed_percent(run: RunResult) -> float | None:
    return 100 * (len(run.ended) - len(run.good)) / len(run.ended) if run.ended else None


def _mean_speed(run: RunResult) -> float | None:
    return mean([speed for record in run.good if (speed := record.tokens_per_second) is not None])


METRICS: tuple[Metric, ...] = (
    Metric("load_time", "s", True, _cold(lambda cold: cold.load_seconds), group="cold"),
    Metric("cold_response", "s", True, _cold(lambda cold: cold.response_seconds), group="cold"),
    Metric("cold_speed", "tok/s", False, _cold(lambda cold: cold.tokens_per_second), group="cold"),
    Metric("cold_gpu_memory", "%", None, _cold(lambda cold: cold.use.gpu_memory_percent), is_ratio=False, group="cold"),
    Metric("cold_gpu", "%", None, _cold(lambda cold: cold.use.gpu_percent), is_ratio=False, group="cold"),
    Metric("response", "s", True, _median(_latency), _latency),
    Metric("speed", "tok/s", False, _runs(_mean_speed), _speed),
    Metric("ttft", "s", True, _median(_ttft), _ttft),
    Metric("tpot", "s", True, _median(_tpot), _tpot),
    Metric("throughput", "tok/s", False, _runs(_per_second(_tokens))),
    Metric("requests", "req/s", False, _runs(_per_second(lambda run: float(len(run.good))))),
    Metric("failed", "%", True, _runs(_failed_percent), is_ratio=False),
    Metric("gpu_memory", "%", None, _use(lambda use: use.gpu_memory_percent), is_ratio=False),
    Metric("gpu", "%", None, _use(lambda use: use.gpu_percent), is_ratio=False),
    Metric("kv_cache", "%", None, _use(lambda use: use.kv_cache_percent), is_ratio=False),
    Metric("model_memory", "GiB", True, _use(lambda use: use.model_gib), is_ratio=False),
)
"""Seed order: what a cold start shows, then what repeated requests show."""


def rows(comparison: Comparison) -> list[Row]:
    """Return every metric that was seen on a side, and those of a cold start and of the GPU in any case."""
    found = [_row(metric, comparison) for metric in METRICS]
    always = ("load_time", "cold_speed", "cold_gpu_memory", "cold_gpu", "gpu_memory", "gpu")
    return [row for row in found if row.metric.key in always or row.a is not None or row.b is not None]


def _row(metric: Metric, comparison: Comparison) -> Row:
    a, b = comparison.a, comparison.b
    of_a = _seen(metric.of_round(a))
    of_b = _seen(metric.of_round(b)) if b is not None else []
    interval = None if b is None else _interval(metric, comparison, a, b)
    return Row(metric, mean(of_a), mean(of_b), interval, _better(metric, interval))


def _seen(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _interval(metric: Metric, comparison: Comparison, a: Side, b: Side) -> Interval | None:
    """Compare rounds in pairs if the sides took turns, else rounds as samples, else single requests."""
    of_a, of_b = metric.of_round(a), metric.of_round(b)
    if comparison.in_turn:
        pairs = [(one, other) for one, other in zip(of_a, of_b, strict=False) if one is not None and other is not None]
        compare = paired_ratio if metric.is_ratio else paired
        return compare([one for one, _ in pairs], [other for _, other in pairs])
    ratio = welch_ratio if metric.is_ratio else welch
    if min(len(_seen(of_a)), len(_seen(of_b))) < 2 and metric.of_requests is not None:
        return ratio(_requests(metric.of_requests, a), _requests(metric.of_requests, b))
    return ratio(_seen(of_a), _seen(of_b))


def _requests(value: Callable[[RequestRecord], float | None], side: Side) -> list[float]:
    return [found for run in side.rounds for record in run.good if (found := value(record)) is not None]


def _better(metric: Metric, interval: Interval | None) -> Better:
    if interval is None or interval.low is None:
        return "unknown" if metric.lower_is_better is not None else "neither"
    if metric.lower_is_better is None:
        return "neither"
    unchanged = 1.0 if metric.is_ratio else 0.0
    if interval.crosses(unchanged):
        return "same"
    b_is_lower = interval.estimate < unchanged
    winner: SideName = "B" if b_is_lower == metric.lower_is_better else "A"
    return winner


def figures(comparison: Comparison) -> dict[str, float | None]:
    """Return the figures for `--fail-if`.

    These are `a_KEY`, `b_KEY` and `ratio_KEY` (B ÷ A) of each row, in how many rows a side is worse
    (`a_worse`, `b_worse`), and under `a_` and `b_` the figures of all rounds together, such as
    `b_p99_ttft_ms`.
    """
    found: dict[str, float | None] = {}
    for side, prefix in zip(comparison.sides, ("a", "b"), strict=False):
        whole = side.rounds[0].merged(side.rounds[1:], "all")
        found |= {
            f"{prefix}_{name}": value
            for name, value in run_figures(whole).items()
            if isinstance(value, int | float | None) and not isinstance(value, bool)
        }
    for row in (_row(metric, comparison) for metric in METRICS):
        found[f"a_{row.metric.key}"] = row.a
        if comparison.b is not None:
            found[f"b_{row.metric.key}"] = row.b
            found[f"ratio_{row.metric.key}"] = row.ratio
            for side_name, key in (("B", "a_worse"), ("A", "b_worse")):
                found[key] = (found.get(key) or 0.0) + (row.better == side_name)
    return found
