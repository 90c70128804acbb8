"""The summary of a run in the form in which `vllm bench serve` prints it (vLLM 0.32). Pure."""

from gateway.bench.metrics import run_figures
from gateway.bench.results import RunResult

WIDTH = 50
_FIGURES = (
    ("Successful requests:", "completed"),
    ("Failed requests:", "failed"),
    ("Maximum request concurrency:", "max_concurrency"),
    ("Request rate configured (RPS):", "request_rate"),
    ("Benchmark duration (s):", "duration"),
    ("Total input tokens:", "total_input_tokens"),
    ("Total generated tokens:", "total_output_tokens"),
    ("Request throughput (req/s):", "request_throughput"),
    ("Output token throughput (tok/s):", "output_throughput"),
    ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
    ("Peak concurrent requests:", "max_concurrent_requests"),
    ("Total token throughput (tok/s):", "total_token_throughput"),
)
_PROBES = (
    ("Probe requests completed:", "probe_completed"),
    ("Probe requests failed:", "probe_failed"),
    ("Median probe E2EL (ms):", "probe_median_e2el_ms"),
    ("P99 probe E2EL (ms):", "probe_p99_e2el_ms"),
    ("Max probe E2EL (ms):", "probe_max_e2el_ms"),
)
_METRICS = (
    ("ttft", "TTFT", "Time to First Token"),
    ("tpot", "TPOT", "Time per Output Token (excl. 1st token)"),
    ("itl", "ITL", "Inter-token Latency"),
    ("e2el", "E2EL", "End-to-end Latency"),
)


def summary(run: RunResult) -> str:
    """Return the lines of the summary; figures that there are too few values for are left out."""
    figures = {**run_figures(run), "max_concurrency": run.max_concurrency, "request_rate": run.request_rate}
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}"]
    lines += [_line(words, figures[key]) for words, key in _FIGURES if figures[key] is not None]
    if run.probes is not None:
        lines.append(f"{'Probe Requests':-^{WIDTH}}")
        lines += [_line(words, figures[key]) for words, key in _PROBES if figures[key] is not None]
    for name, short, title in _METRICS:
        if figures[f"mean_{name}_ms"] is None:
            continue
        lines.append(f"{title:-^{WIDTH}}")
        for statistic, words in (("mean", "Mean"), ("median", "Median"), ("p95", "P95"), ("p99", "P99")):
            if (value := figures[f"{statistic}_{name}_ms"]) is not None:
                lines.append(_line(f"{words} {short} (ms):", float(value)))
    return "\n".join([*lines, "=" * WIDTH])


def _line(words: str, value: int | float) -> str:  # noqa: PYI041  # counts are shown without decimals
    shown = f"{value:.2f}" if isinstance(value, float) else str(value)
    return f"{words:<40} {shown:<10}".rstrip()
