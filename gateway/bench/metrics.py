"""The figures of a run, under the names of `vllm bench serve`.

Pure. The definitions are those of vLLM 0.32, `vllm/benchmarks/serve.py:calculate_metrics`; in three cases a
figure is None here where vLLM has a number: without any value (vLLM: 0), a percentile for which there are
too few values (vLLM interpolates), and tokens that the server did not count (vLLM tokenizes the answers).
`too_few` lists the percentiles.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gateway.bench.quantiles import deviation, mean, needed, percentile_word, quantile, supported_quantile
from gateway.bench.results import RequestRecord, RunResult

DEFAULT_PERCENTILES: tuple[float, ...] = (50.0, 90.0, 95.0, 99.0)
GOODPUT_METRICS = ("ttft", "tpot", "e2el")

Values = Callable[[RunResult], list[float]]


def _of_good(value: Callable[[RequestRecord], float | None]) -> Values:
    return lambda run: [found for record in run.good if (found := value(record)) is not None]


METRICS: dict[str, Values] = {
    "ttft": _of_good(lambda record: record.ttft),
    "tpot": _of_good(lambda record: record.tpot),
    "itl": lambda run: [gap for record in run.good for gap in record.itl],
    "e2el": _of_good(lambda record: record.latency),
    "client_queue_time": _of_good(lambda record: record.queue_time),
    "e2el_including_client_queue": _of_good(lambda record: record.latency + record.queue_time),
}
"""Values in seconds by metric."""


def metric_figures(name: str, values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float | None]:
    """Return `mean_NAME_ms`, `median_NAME_ms`, `std_NAME_ms` and `pN_NAME_ms`."""

    def milliseconds(seconds: float | None) -> float | None:
        return None if seconds is None else seconds * 1000

    figures = {
        f"mean_{name}_ms": milliseconds(mean(values)),
        f"median_{name}_ms": milliseconds(quantile(values, 50)),
        f"std_{name}_ms": milliseconds(deviation(values)),
    }
    for percentile in percentiles:
        figures[f"p{percentile_word(percentile)}_{name}_ms"] = milliseconds(supported_quantile(values, percentile))
    return figures


def run_figures(run: RunResult, percentiles: Sequence[float] = DEFAULT_PERCENTILES) -> dict[str, Any]:
    """Return every single-valued figure of the run, without the lists of requests."""
    good = run.good
    seconds = run.duration
    prompt = _total([record.prompt_tokens for record in good])
    completion = _total([record.completion_tokens for record in good])
    peak_tokens, peak_requests = peaks(good)
    figures: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(run.ended) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": completion,
        "request_throughput": _rate(len(good), seconds),
        "request_goodput": _rate(sum(_is_within(record, run.goodput) for record in good), seconds)
        if run.goodput
        else None,
        "output_throughput": _rate(completion, seconds),
        "total_token_throughput": None if prompt is None or completion is None else _rate(prompt + completion, seconds),
        "output_throughput_per_user": mean([speed for record in good if (speed := record.tokens_per_second)]),
        "max_output_tokens_per_s": peak_tokens,
        "max_concurrent_requests": peak_requests,
    }
    too_few = {}
    if run.probes is not None:
        figures |= probe_figures(run.probes)
        if (count := figures["probe_completed"]) < needed(99):
            too_few["probe_p99_e2el_ms"] = {"has": count, "needs": needed(99)}
    for name, values_of in METRICS.items():
        values = values_of(run)
        figures |= metric_figures(name, values, percentiles)
        for percentile in percentiles:
            if len(values) < needed(percentile):
                key = f"p{percentile_word(percentile)}_{name}_ms"
                too_few[key] = {"has": len(values), "needs": needed(percentile)}
    figures["too_few"] = too_few
    return figures


def probe_figures(probes: Sequence[RequestRecord]) -> dict[str, float | None]:
    """Return the figures of the small requests that were sent beside the load."""
    latencies = [record.latency for record in probes if record.is_ok]
    figures = metric_figures("e2el", latencies, (99.0,))
    return {
        "probe_completed": len(latencies),
        "probe_failed": len(probes) - len(latencies),
        "probe_median_e2el_ms": figures["median_e2el_ms"],
        "probe_p99_e2el_ms": figures["p99_e2el_ms"],
        "probe_max_e2el_ms": max(latencies) * 1000 if latencies else None,
    }


def peaks(records: Sequence[RequestRecord]) -> tuple[float, int]:
    """Return the most pieces that arrived within one second, and the most requests in flight in one.

    Seconds are counted from the first start, as vLLM does.
    """
    if not records:
        return 0.0, 0
    origin = min(record.start for record in records)
    length = math.ceil(max(record.last_token for record in records) - origin) + 1
    pieces = [0] * length
    requests = [0] * length
    for record in records:
        if record.ttft is not None:
            moment = record.start + record.ttft - origin
            pieces[int(moment)] += 1
            for gap in record.itl:
                moment += gap
                pieces[min(int(moment), length - 1)] += 1
        for second in range(int(record.start - origin), int(record.last_token - origin) + 1):
            requests[second] += 1
    return float(max(pieces)), max(requests)


def _total(counts: Sequence[int | None]) -> int | None:
    """Return the sum; None if there are answers and the server counted the tokens of none of them."""
    counted = [count for count in counts if count is not None]
    return sum(counted) if counted or not counts else None


def _rate(count: float | None, seconds: float) -> float | None:
    return count / seconds if count is not None and seconds > 0 else None


def _is_within(record: RequestRecord, limits: Mapping[str, float]) -> bool:
    """Return whether the request kept every limit; a missing TPOT counts as 0, as in vLLM."""
    measured = {"ttft": record.ttft, "tpot": record.tpot or 0.0, "e2el": record.latency}
    return all((value := measured[name]) is not None and value * 1000 <= limit for name, limit in limits.items())
