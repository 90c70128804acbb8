"""Arithmetic and tables of the cost benchmark."""

import json

import pytest

from benchmarks.report import OURS, THEIRS, Comparison, Target, cost_per, percentile
from tests.benchmarks.comparisons import comparison


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.991, 100)])
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_no_values_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_cost_is_in_microseconds_per_item() -> None:
    assert cost_per(0.5, 10_000) == pytest.approx(50)


def test_count_of_zero_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing was counted"):
        cost_per(0.5, 0)


def test_ratios_use_minima_and_medians() -> None:
    assert comparison([5, 8, 90], [10, 16, 17]).ratios() == (0.5, 0.5)


def test_target_applies_to_the_ratio_of_medians() -> None:
    assert comparison([1, 8, 9], [10, 10, 10]).passed() is True
    assert comparison([1, 8.1, 9], [10, 10, 10]).passed() is False


def test_target_without_the_other_subject_is_not_measured() -> None:
    table = comparison([1], [])
    assert table.passed() is None
    assert "target: ratio of medians <= 0.8: not measured" in "\n".join(table.lines())


def test_values_under_a_wrong_load_are_not_comparable() -> None:
    even, uneven = comparison([1], [10], nominal_rate=102), comparison([1], [10], nominal_rate=103)
    assert (even.passed(), uneven.passed()) == (True, None)
    assert "NOT COMPARABLE: the load of gateway, vllm-router was not within 2 % of 103/s" in "\n".join(uneven.lines())


def test_values_of_a_subject_that_batches_tokens_are_not_comparable() -> None:
    table = Comparison("title", "µs", Target(1.1), nominal_rate=100)
    table.add(OURS, 1, 100, 1.5)
    table.add(THEIRS, 10, 100, 1.0)
    assert table.passed() is None
    assert "one sent more tokens at a time" in "\n".join(table.lines())


def test_absolute_target_applies_to_our_own_median() -> None:
    table = Comparison("title", "ms", Target(40, ratio=False))
    for value in (10, 39, 90):
        table.add(OURS, value)
    assert table.passed() is True
    assert "gateway's median <= 40: PASS" in "\n".join(table.lines())


def test_json_report_has_values_and_verdict() -> None:
    report = json.loads(json.dumps(comparison([8], [10]).as_json()))
    assert report["values"] == {OURS: [8], THEIRS: [10]}
    assert report["passed"] is True
