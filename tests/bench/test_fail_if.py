from typing import Any

import pytest

from gateway.bench.fail_if import Condition, InvalidCondition, UnknownFigure

FIGURES: dict[str, Any] = {
    "p99_ttft_ms": 501.0, "speedup": 0.64, "failed": 0, "p95_itl_ms": None, "model_id": "m",
    "too_few": {"p95_itl_ms": {"has": 3, "needs": 20}}, "drift": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("p99_ttft_ms>500", "p99_ttft_ms is 501 (> 500)"),
        ("p99_ttft_ms > 501", None),
        ("p99_ttft_ms>=501", "p99_ttft_ms is 501 (>= 501)"),
        ("speedup<0.98", "speedup is 0.64 (< 0.98)"),
        ("speedup<=0.5", None),
        ("failed!=0", None),
        ("failed==0", "failed is 0 (== 0)"),
        ("failed>-1e0", "failed is 0 (> -1)"),
        ("p95_itl_ms>9999", "p95_itl_ms has no value: it needs 20 values and there are 3"),
        ("drift>1", "drift has no value"),
    ],
)
def test_a_condition_that_is_true_or_cannot_be_shown_fails(text: str, problem: str | None) -> None:
    assert Condition.parse(text).problem(FIGURES) == problem


@pytest.mark.parametrize("text", ["", "p99", ">5", "p99_ttft_ms>", "a>b", "p99_ttft_ms=>5", "x>1 and y>2"])
def test_another_form_is_refused(text: str) -> None:
    with pytest.raises(InvalidCondition):
        Condition.parse(text)


@pytest.mark.parametrize("text", ["p99_tftt_ms>1", "model_id>1", "too_few>1"])
def test_what_is_not_a_figure_is_refused(text: str) -> None:
    with pytest.raises(UnknownFigure):
        Condition.parse(text).problem(FIGURES)


def test_a_condition_on_a_percentile_has_it_computed() -> None:
    assert Condition.parse("p99.9_ttft_ms>1").percentile == 99.9
    assert Condition.parse("mean_ttft_ms>1").percentile is None


@pytest.mark.parametrize(
    ("text", "limit"), [("Failed>.5", 0.5), ("failed > 1.", 1.0), ("FAILED>1e+2", 100.0), ("failed>=-2E1", -20.0)]
)
def test_numbers_may_be_written_as_in_other_programs(text: str, limit: float) -> None:
    condition = Condition.parse(text)
    assert (condition.name, condition.limit) == ("failed", limit)
