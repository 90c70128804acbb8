"""Covers: gateway/bench/compare_texts.py"""

import string
from dataclasses import replace

import pytest

from gateway.bench import compare_view as view
from gateway.bench.compare_rows import METRICS, Row
from gateway.bench.compare_statistics import Interval
from gateway.bench.compare_texts import COMPARE_TEXTS
from gateway.bench.report_texts import Lang, text
from tests.bench.comparisons import cold, comparison, quality, side


def rows_by_name(shown: list[view.ViewRow]) -> dict[str, view.ViewRow]:
    return {row.name: row for row in shown}


def test_every_metric_has_a_name_and_every_text_two_languages_with_the_same_figures() -> None:
    assert [metric.key for metric in METRICS if f"row_{metric.key}" not in COMPARE_TEXTS] == []
    for key, (english, korean) in COMPARE_TEXTS.items():
        fields = [
            sorted(name for _, name, _, _ in string.Formatter().parse(words) if name) for words in (english, korean)
        ]
        assert fields[0] == fields[1], key


def test_a_row_shows_both_sides_the_difference_the_ratio_and_the_better_one() -> None:
    row = rows_by_name(view.row_views(comparison(), "en"))["Response time, median"]
    assert (row.a[-2:], row.b[-2:], row.better, row.verdict) == (" s", " s", "B", "B")
    assert row.difference.startswith("−1.0")
    assert row.ratio.startswith("0.6")
    assert row.ratio.endswith(")")


def test_an_interval_that_holds_1_is_no_difference_seen() -> None:
    row = rows_by_name(view.row_views(comparison(), "en"))["Time to first token, median"]
    assert (row.verdict, row.better) == ("no difference seen", "")


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [
        (0.6600, 0.9992, "0.81× (0.66 – 0.999)"),
        (0.6600, 0.99996, "0.81× (0.66 – 0.99996)"),
        (0.6600, 1.0004, "0.81× (0.66 – 1.00)"),
        (None, None, "0.81×"),
    ],
)
def test_an_interval_that_excludes_1_by_little_shows_that_it_does(low: float, high: float, shown: str) -> None:
    metric = next(metric for metric in METRICS if metric.key == "ttft")
    row = Row(metric, 1.0, 0.81, Interval(0.81, low, high, "paired", 4), "B")
    assert view.interval_text(row, "en") == shown


def test_what_was_not_seen_is_said_and_never_0() -> None:
    row = rows_by_name(view.row_views(comparison(), "en"))["Load time"]
    assert (row.a, row.b, row.difference, row.ratio) == ("not seen", "not seen", "", "")


def test_times_below_a_second_are_in_milliseconds_on_both_sides() -> None:
    row = rows_by_name(view.row_views(comparison(side("A", gap=0.002), side("B", gap=0.3)), "en"))[
        "Time per output token, median"
    ]
    assert (row.a[-3:], row.b[-3:]) == (" ms", " ms")


def test_the_first_verdict_gives_the_factor_from_the_faster_side() -> None:
    slow, fast = side("A", gap=0.2), side("B", seed=2)
    assert view.verdicts(comparison(slow, fast), "en")[0].startswith(
        "Tokens per second, in sum: B (model-B) reaches 1.2"
    )
    assert view.verdicts(comparison(fast, slow), "en")[0].startswith(
        "Tokens per second, in sum: A (model-B) reaches 1.2"
    )
    assert "no difference seen" in view.verdicts(comparison(side("A"), side("B", seed=2)), "en")[0]


def test_one_run_a_side_has_no_count_of_rows_that_nobody_can_judge() -> None:
    (only,) = view.verdicts(comparison(side("A", rounds=1), side("B", rounds=1)), "en")
    assert "by more than chance" in only


def test_the_first_verdict_of_files_is_about_each_user_where_the_sum_is_one_value() -> None:
    files = comparison(side("A", gap=0.2, rounds=1), side("B", rounds=1), in_turn=False)
    assert view.verdicts(files, "en")[0].startswith("Tokens per second, each user: B (model-B) reaches 1.6")


def test_one_side_alone_has_no_verdict_and_no_recommendation() -> None:
    alone = comparison(side("A", quality=quality(0.9)))
    assert view.verdicts(alone, "en") == [text("verdict_one", "en"), text("quality_one_side", "en")]


@pytest.mark.parametrize(
    ("a", "b", "key"),
    [(0.9, 0.2, "quality_prefer_a"), (0.2, 0.9, "quality_prefer_b"), (0.5, 0.5, "quality_no_difference")],
)
def test_the_recommendation_follows_the_scores(a: float, b: float, key: str) -> None:
    both = comparison(side("A", quality=quality(a)), side("B", quality=quality(b)))
    assert view.verdicts(both, "en")[-1] == text(key, "en")


def test_the_mean_row_comes_last() -> None:
    both = comparison(side("A", quality=quality(0.9)), side("B", quality=quality(0.2)))
    shown = view.quality_views(both, "en")
    assert [row.name for row in shown] == ["debugging", "korean", "s3", "s4", "Mean"]
    assert [row.is_total for row in shown] == [False] * 4 + [True]
    assert {row.better for row in shown} == {"A"}
    assert shown[-1].difference.startswith("−2.")


def test_the_method_stands_beside_the_scores() -> None:
    checked = view.quality_notes(
        comparison(side("A", quality=quality(0.9, guards={"seccomp": True, "landlock": False}))), "en"
    )
    assert "0.5 accuracy + 0.2 consistency" in checked[0]
    assert checked[1].startswith("Scored by stated checks")
    assert checked[2].endswith("held: seccomp.")
    unguarded = view.quality_notes(comparison(side("A", quality=quality(0.9, guards={"seccomp": False}))), "en")
    assert unguarded[2].endswith("held: none, Python's audit hook alone.")


def test_a_judge_that_is_one_of_the_sides_is_pointed_out() -> None:
    other = view.quality_notes(comparison(side("A", quality=quality(0.9, judge="big"))), "en")
    assert other[1].startswith("Graded by the model big")
    assert text("quality_judge_is_side", "en") not in other
    own = view.quality_notes(comparison(side("A", quality=quality(0.9, judge="model-A"))), "en")
    assert text("quality_judge_is_side", "en") in own


def test_a_comparison_of_files_says_that_the_sides_were_not_in_turn() -> None:
    assert text("method_files", "en") in view.method_notes(comparison(in_turn=False), "en")
    assert text("method_paired", "en", n=4) in view.method_notes(comparison(), "en")


def test_remarks_name_different_models_few_rounds_and_force() -> None:
    few = comparison(side("A", rounds=2), side("B", rounds=2), notes=("forced:seed, rounds",))
    assert view.remarks(few, "en") == [
        text("forced", "en", fields="seed, rounds"),
        text("unlike_models", "en", a="model-A", b="model-B"),
        text("few_rounds", "en"),
    ]
    same = comparison(side("A", model="m"), side("B", model="m"))
    assert view.remarks(same, "en") == []
    assert view.names(same) == ["A (A)", "B (B)"]


def test_missing_load_times_are_explained() -> None:
    assert view.cold_remarks(comparison(), "en") == [text("cold_not_asked", "en")]
    unseen = replace(cold(1.0), load_seconds=None, reason="cold_no_api")
    found = view.cold_remarks(comparison(side("A", cold=(cold(1.0),)), side("B", cold=(unseen, unseen))), "en")
    assert found == [text("cold_no_api", "en", side="B (model-B)")]


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_no_text_is_missing_in_either_language(lang: Lang) -> None:
    both = comparison(
        side("A", quality=quality(0.9), cold=(cold(1.0),)), side("B", quality=quality(0.2), cold=(cold(2.0),))
    )
    shown = [*view.row_views(both, lang), *view.quality_views(both, lang)]
    words = [row.name for row in shown] + view.verdicts(both, lang) + view.method_notes(both, lang)
    assert not [word for word in words if "_" in word or "{" in word]


def test_figures_of_a_scenario_are_shown_side_by_side_without_a_verdict() -> None:
    a = side("A", rounds=1, figures={"users_realtime": 2, "only_a": 1.5})
    b = side("B", rounds=1, figures={"users_realtime": 10, "note": "x"})
    found = view.groups(view.row_views(comparison(a, b, in_turn=False), "en"))["figures"]
    assert [(row.name, row.a, row.b, row.difference, row.verdict) for row in found] == [
        ("users_realtime", "2", "10", "+8.00", ""),
        ("only_a", "1.50", "not seen", "", ""),
        ("note", "not seen", "x", "", ""),
    ]
    assert "figures" not in view.groups(view.row_views(comparison(), "en"))


def test_answers_that_failed_or_were_cut_off_are_counted_beside_the_scores() -> None:
    bad = quality(0.3)
    bad = replace(bad, tasks=tuple(replace(task, failures=1, cut=2) for task in bad.tasks))
    notes = view.quality_notes(comparison(side("A", quality=quality(0.9)), side("B", quality=bad)), "en")
    assert [line for line in notes if "max_tokens" in line] == [
        text("quality_losses", "en", side="B (model-B)", failed=4, cut=8, all=12)
    ]
