from dataclasses import replace

import pytest

from gateway.bench.compare_result import EngineUse
from gateway.bench.compare_rows import METRICS, Row, figures, rows
from tests.bench.comparisons import cold, comparison, side
from tests.bench.records import record, run


def by_key(*arguments: object, **changes: object) -> dict[str, Row]:
    return {row.metric.key: row for row in rows(comparison(*arguments, **changes))}  # type: ignore[arg-type]


def test_the_faster_side_is_better_in_every_metric_of_speed() -> None:
    found = by_key(side("A", gap=0.2), side("B", seed=2))
    assert {key: found[key].better for key in ("response", "speed", "tpot", "throughput", "requests")} == dict.fromkeys(
        ("response", "speed", "tpot", "throughput", "requests"), "B"
    )
    assert found["response"].ratio == pytest.approx(1.5 / 2.5, rel=0.05)
    assert found["response"].difference == pytest.approx(-1.0, rel=0.05)
    assert found["ttft"].better == "same"


def test_the_sides_are_not_taken_for_each_other() -> None:
    assert by_key(side("A"), side("B", gap=0.2, seed=2))["response"].better == "A"


def test_a_drift_of_the_machine_that_hits_both_sides_decides_nothing() -> None:
    """Every round is twice as slow as the one before; B is always 10 % faster."""
    a, b = side("A", noise=0), side("B", noise=0)
    slow = [2.0**place for place in range(4)]
    a = replace(a, rounds=tuple(run([record(ttft=0.5, itl=[0.1 * factor] * 10)]) for factor in slow))
    b = replace(b, rounds=tuple(run([record(ttft=0.5, itl=[0.09 * factor] * 10)]) for factor in slow))
    assert by_key(a, b)["tpot"].better == "B"
    assert by_key(a, b, in_turn=False)["tpot"].better == "same"


def test_one_run_on_each_side_is_compared_by_its_requests() -> None:
    a, b = side("A", gap=0.2, rounds=1), side("B", rounds=1)
    a = replace(a, rounds=(run([record(i, ttft=0.5 + 0.01 * i, itl=[0.2] * 10) for i in range(9)]),))
    b = replace(b, rounds=(run([record(i, ttft=0.5 + 0.01 * i, itl=[0.1] * 10) for i in range(9)]),))
    found = by_key(a, b, in_turn=False)
    assert found["response"].better == "B"
    interval = found["response"].interval
    assert interval is not None
    assert (interval.method, interval.n) == ("welch", 9)
    assert found["throughput"].better == "unknown"


def test_one_round_in_turn_says_nothing() -> None:
    found = by_key(side("A", gap=0.2, rounds=1), side("B", rounds=1))
    assert found["response"].better == "unknown"


def test_one_side_alone_has_values_and_no_verdict() -> None:
    found = by_key(side("A"))
    assert found["response"].a == pytest.approx(1.5, rel=0.05)
    assert {row.better for row in found.values()} == {"unknown", "neither"}


def test_what_was_not_seen_is_none_and_no_side_is_better() -> None:
    found = by_key(side("A", cold=tuple(cold(seconds) for seconds in (16.0, 16.5, 16.2, 16.3))), side("B"))
    assert found["load_time"].a == pytest.approx(16.25)
    assert found["load_time"].b is None
    assert found["load_time"].better == "unknown"
    assert found["gpu"].a is None


def test_the_shorter_load_is_better_and_gpu_use_has_no_better_direction() -> None:
    """The table of a measured Ollama (16.31 s, 90.41 %) and vLLM (13.99 s, 96.97 %)."""
    a = side("A", cold=tuple(cold(16.31 + i / 100, gpu_memory_percent=90.41) for i in range(4)))
    b = side("B", cold=tuple(cold(13.99 + i / 90, gpu_memory_percent=96.97) for i in range(4)))
    found = by_key(a, b)
    assert found["load_time"].better == "B"
    assert found["load_time"].difference == pytest.approx(-2.32, abs=0.01)
    assert found["cold_gpu_memory"].difference == pytest.approx(6.56)
    assert found["cold_gpu_memory"].better == "neither"


def test_failures_are_compared_by_difference_since_they_may_be_none() -> None:
    failing = replace(
        side("B"),
        rounds=tuple(
            run([record(0), record(1), record(2), record(3, error="timeout" if n < 4 else "", ttft=None)])
            for n in range(4)
        ),
    )
    found = by_key(side("A"), failing)
    assert (found["failed"].a, found["failed"].b) == (0, 25)
    assert found["failed"].better == "A"


def test_engine_values_are_means_over_the_rounds() -> None:
    uses = (EngineUse(gpu_percent=80.0, kv_cache_percent=1.0), EngineUse(gpu_percent=90.0))
    found = by_key(side("A", uses=uses), side("B"))
    assert found["gpu"].a == 85
    assert found["kv_cache"].a == 1


def test_figures_name_both_sides_their_ratio_and_how_often_a_side_is_worse() -> None:
    found = figures(comparison())
    assert found["a_worse"] == sum(row.better == "B" for row in rows(comparison()))
    assert found["b_worse"] == 0
    assert found["ratio_response"] == pytest.approx(0.6, rel=0.05)
    assert found["a_completed"] == 16
    assert found["b_p99_ttft_ms"] is None
    assert {f"a_{metric.key}" for metric in METRICS} <= set(found)
    assert found["a_kv_cache"] is None
    assert not [name for name in figures(comparison(side("A"))) if name.startswith(("b_", "ratio_"))]
