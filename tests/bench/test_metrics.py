from dataclasses import replace

import pytest

from gateway.bench.metrics import peaks, run_figures
from gateway.bench.results import CANCELLED, RunResult
from tests.bench.records import record, run


def test_the_figures_are_those_of_vllm() -> None:
    """Two answers of three tokens in two seconds, computed by hand from vLLM's definitions."""
    figures = run_figures(run([record(0), record(1, start=101.0, ttft=0.7, itl=(0.2, 0.1))], duration=2.0), [50])
    assert (figures["completed"], figures["failed"]) == (2, 0)
    assert (figures["total_input_tokens"], figures["total_output_tokens"]) == (14, 6)
    assert (figures["request_throughput"], figures["output_throughput"]) == (1.0, 3.0)
    assert figures["total_token_throughput"] == 10.0
    assert figures["mean_ttft_ms"] == pytest.approx(600)
    assert figures["std_ttft_ms"] == pytest.approx(100)
    assert figures["mean_itl_ms"] == pytest.approx(125)
    assert figures["mean_tpot_ms"] == pytest.approx(125)
    assert figures["p50_e2el_ms"] == figures["median_e2el_ms"] == pytest.approx(850)
    assert figures["output_throughput_per_user"] == pytest.approx((3 / 0.7 + 3 / 1.0) / 2)


def test_a_percentile_without_enough_values_is_null_and_says_what_it_needs() -> None:
    figures = run_figures(run([record(index) for index in range(16)]), [90, 99])
    assert figures["p90_ttft_ms"] == pytest.approx(500)
    assert figures["p99_ttft_ms"] is None
    assert figures["too_few"]["p99_ttft_ms"] == {"has": 16, "needs": 100}
    assert "p90_ttft_ms" not in figures["too_few"]


def test_failed_requests_count_as_failed_and_nowhere_else() -> None:
    figures = run_figures(run([record(0), record(1, ttft=None, itl=(), error="timeout")], duration=1.0))
    assert (figures["completed"], figures["failed"]) == (1, 1)
    assert figures["mean_e2el_ms"] == pytest.approx(700)


def test_requests_in_flight_at_an_interruption_count_nowhere() -> None:
    figures = run_figures(run([record(0), record(1, ttft=None, itl=(), error=CANCELLED)], duration=1.0))
    assert (figures["completed"], figures["failed"]) == (1, 0)


def test_a_run_without_answers_has_no_latency_instead_of_zero() -> None:
    figures = run_figures(run([record(0, ttft=None, itl=(), error="connect")], duration=0.0))
    assert figures["mean_ttft_ms"] is figures["request_throughput"] is None


def test_probes_have_figures_of_their_own() -> None:
    failed = record(2, ttft=None, itl=(), error="timeout")
    probes = (record(0, itl=()), record(1, ttft=1.5, itl=()), failed)
    figures = run_figures(replace(run([record(0)]), probes=probes))
    assert (figures["completed"], figures["probe_completed"], figures["probe_failed"]) == (1, 2, 1)
    assert figures["probe_median_e2el_ms"] == pytest.approx(1000)
    assert figures["probe_max_e2el_ms"] == pytest.approx(1500)
    assert figures["probe_p99_e2el_ms"] is None
    assert figures["too_few"]["probe_p99_e2el_ms"] == {"has": 2, "needs": 100}


def test_a_run_without_probes_has_no_figures_of_them() -> None:
    assert not [name for name in run_figures(run([record(0)])) if name.startswith("probe")]


def test_probes_that_all_failed_have_no_latency() -> None:
    figures = run_figures(replace(run([record(0)]), probes=(record(0, ttft=None, itl=(), error="timeout"),)))
    assert figures["probe_median_e2el_ms"] is figures["probe_max_e2el_ms"] is None


@pytest.mark.parametrize(
    ("limits", "per_second"),
    [({"ttft": 500.0}, 1.0), ({"ttft": 400.0}, 0.5), ({"ttft": 500.0, "e2el": 650.0}, 0.5), ({"tpot": 99.0}, 0.0)],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: dict[str, float], per_second: float) -> None:
    whole = run([record(0), record(1, ttft=0.4)], duration=2.0)
    assert run_figures(RunResult(**{name: getattr(whole, name) for name in RunResult.__slots__} | {"goodput": limits}))[
        "request_goodput"
    ] == pytest.approx(per_second)


def test_peaks_count_pieces_and_requests_by_the_second() -> None:
    """Pieces at 0.5, 0.6, 0.7, and at 0.9, 1.9, 2.1 seconds after the first start."""
    assert peaks([record(0), record(1, start=100.4, itl=(1.0, 0.2))]) == (4.0, 2)


def test_tokens_that_the_server_did_not_count_are_not_seen_and_not_0() -> None:
    uncounted = replace(record(0), prompt_tokens=None, completion_tokens=None)
    figures = run_figures(run([uncounted]))
    names = ("total_input_tokens", "total_output_tokens", "output_throughput", "total_token_throughput")
    assert [figures[name] for name in names] == [None] * 4
    assert run_figures(run([uncounted, record(1)], duration=1.0))["output_throughput"] == 3.0
    assert run_figures(replace(run([uncounted]), records=()))["total_output_tokens"] == 0
