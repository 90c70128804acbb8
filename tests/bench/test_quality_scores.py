import json
from dataclasses import replace

import pytest

from gateway.bench.quality_checks import Point
from gateway.bench.quality_scores import SideQuality, TaskScore, mean_dimension, recommendation, rows
from gateway.bench.quality_tasks import Scored


def point(value: float | None, measures: Scored = "accuracy", points: float = 1) -> Point:
    return Point("mentions", measures, points, value)


def task(name: str, *accuracies: float, scenario: str = "") -> TaskScore:
    return TaskScore(name, scenario or name, tuple((point(value), point(1, "clarity")) for value in accuracies))


def side(*tasks: TaskScore, digest: str = "d") -> SideQuality:
    return SideQuality("m", tasks, digest, 3, 0.7)


def test_a_dimension_is_the_share_of_its_points_over_the_repeats_times_five() -> None:
    score = TaskScore("a", "s", ((point(1, points=3), point(0)), (point(0.5, points=3), point(1))))
    assert score.dimension("accuracy") == pytest.approx(5 * (0.75 + 0.625) / 2)


def test_consistency_is_what_every_repeat_reached_of_what_the_best_reached() -> None:
    """The first point is always there, the second once, the third never."""
    score = TaskScore("a", "s", ((point(1), point(1), point(0)), (point(1), point(0), point(0))))
    assert score.dimension("consistency") == pytest.approx(5 * 1 / 2)


def test_a_model_that_is_always_wrong_is_not_consistent() -> None:
    assert task("a", 0, 0, 0).dimension("consistency") == 0


def test_one_repeat_has_no_consistency() -> None:
    assert task("a", 1).dimension("consistency") is None
    assert task("a", 1).total == 5


def test_the_total_weighs_what_was_seen() -> None:
    score = TaskScore("a", "s", ((point(0.6), point(1, "clarity"), point(None, "code_quality")),))
    assert score.dimension("code_quality") is None
    assert score.total == pytest.approx((0.5 * 3 + 0.15 * 5) / 0.65)


def test_the_total_is_the_mean_of_the_totals_of_the_repeats() -> None:
    score = task("a", 0.2, 0.9, 1)
    assert score.total == pytest.approx(sum(score.totals) / 3)


def test_a_scenario_counts_once_in_the_mean_row_however_many_tasks_it_has() -> None:
    found = rows(side(task("a", 1, 1), task("b", 1, 1, scenario="a"), task("c", 0, 0)), None)
    assert [row.scenario for row in found] == ["a", "c", ""]
    one, other, mean = [row.a for row in found]
    assert mean == pytest.approx(((one or 0) + (other or 0)) / 2)


def test_the_mean_rows_difference_is_that_of_its_means() -> None:
    """One scenario of one task, where B is better, and one of four, where A is slightly better."""
    many = [task(name, 0.6, scenario="many") for name in "bcde"]
    a = side(task("a", 0.2, scenario="one"), *many)
    b = side(task("a", 1.0, scenario="one"), *(task(item.name, 0.5, scenario="many") for item in many))
    mean = rows(a, b)[-1]
    assert mean.a is not None
    assert mean.b is not None
    assert mean.difference is not None
    assert mean.difference.estimate == pytest.approx(mean.b - mean.a)
    assert mean.difference.estimate > 0


def test_a_scenario_is_better_only_outside_the_interval() -> None:
    good = side(task("a", 1, 1, 1), task("b", 0.4, 1, 0.6))
    bad = side(task("a", 0.1, 0.2, 0.1), task("b", 0.5, 0.9, 0.5))
    found = {row.scenario: row.better for row in rows(good, bad)}
    assert found["a"] == "A"
    assert found["b"] == ""
    assert {row.scenario: row.better for row in rows(bad, good)}["a"] == "B"


def test_a_difference_in_every_task_is_recommended() -> None:
    names = "abcdef"
    good, bad = side(*(task(name, 1, 1, 0.9) for name in names)), side(*(task(name, 0.2, 0.3, 0.2) for name in names))
    assert recommendation(good, bad) == "quality_prefer_a"
    assert recommendation(bad, good) == "quality_prefer_b"
    assert recommendation(good, good) == "quality_no_difference"


def test_nothing_is_recommended_from_one_model_alone() -> None:
    one = side(task("a", 1, 1, 1))
    assert recommendation(one, None) == "quality_one_side"
    assert recommendation(None, one) == "quality_one_side"
    assert [row.better for row in rows(one, None)] == ["", ""]


def test_nothing_is_recommended_from_unlike_tasks_or_many_failures() -> None:
    one = side(*(task(name, 1, 1, 1) for name in "abcdef"))
    assert recommendation(one, replace(one, tasks_sha256="other")) == "quality_unlike_tasks"
    failing = replace(one, tasks=tuple(replace(item, failures=1) for item in one.tasks))
    assert recommendation(one, failing) == "quality_many_failures"


def test_scores_survive_json() -> None:
    one = side(task("a", 1, 0.5), task("b", 0.25, 0))
    value = json.loads(json.dumps(one.to_json()))
    assert value["tasks"][0]["scores"]["accuracy"] == 3.75
    assert SideQuality.from_json(value) == one
    with pytest.raises(ValueError, match="not a quality result"):
        SideQuality.from_json({"tasks": [{}]})


def test_a_mean_dimension_leaves_out_tasks_without_it() -> None:
    code = TaskScore("c", "c", ((point(1), point(0.4, "code_quality")),))
    one = side(task("a", 1), code)
    assert mean_dimension(one, "code_quality") == pytest.approx(2)
    assert mean_dimension(one, "consistency") is None
