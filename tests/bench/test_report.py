"""Covers: gateway/bench/compare_report.py"""

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from gateway.bench.compare_report import html as compare_html
from gateway.bench.report import html, named_runs, page, tiles, warnings
from gateway.bench.report_texts import Lang
from gateway.bench.results import Cell, ClientLoad, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.writers import WRITERS, Style
from tests.bench.comparisons import cold, comparison, quality, side
from tests.bench.records import record, run

SECRET = "a text that no report may have"


def result(*runs: RunResult, **changes: object) -> ScenarioResult:
    columns = (Column("files", "n"), Column("total", "s", lower_is_better=True), Column("in_turn_computed", "s"))
    rows = ((Cell(1), Cell(51.0), Cell(51.0, "computed")), (Cell(5), Cell(397.2), Cell(255.0, "computed")))
    known = run([replace(record(i, start=100 + i), text=SECRET) for i in range(5)], label="5")
    return replace(
        ScenarioResult(
            "vision-batch", "20261129-050607", "gw", "http://127.0.0.1:1", "ollama", "/api/chat", "qwen3-vl:8b",
            {"requests": 5, "requests_sha256": "ab" * 32}, runs or (known,), "5",
            (Table("vision_batch", columns, rows),),
            (
                Verdict("slower_together", "rule_speedup", {"n": 5, "speedup": 0.64}),
                Verdict("files_failed", "rule_speedup", {"n": 10, "failed": 2}),
            ),
            notes=("images_made",),
        ),
        **changes,
    )  # fmt: skip


def visible(html: str) -> str:
    """Return the text of a page, without its scripts and styles."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)\b.*?</\1>", "", html, flags=re.DOTALL))


def test_the_report_has_the_verdict_the_tables_and_what_was_computed_is_marked() -> None:
    text = visible(html(result()))
    assert "5 at once: slower than one after the other (0.64 times)." in text
    assert "397.2 s" in text
    assert re.search(r"255 s\s+computed", text)
    assert "The images were made by the benchmark." in text
    assert "requests_sha256 abababababab," not in text
    assert "requests_sha256 abababababab" in text


def test_a_rule_that_two_verdicts_share_is_shown_once() -> None:
    assert [bool(one.rule) for one in page(result(), "en", {}).verdicts] == [False, True]


def test_korean_is_korean_throughout() -> None:
    text = visible(html(result(), "ko", {"cpu": "Xeon", "cores": 2}))
    assert "순차보다 느립니다" in text
    for english in ("Results", "Method", "latency", "machine", "computed", "requests over", "tokens per"):
        assert english not in text, english


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_a_report_holds_no_answer(lang: Lang) -> None:
    assert SECRET not in html(result(), lang)


def test_every_scenario_writes_the_report() -> None:
    [writer] = [writer for writer in WRITERS if writer.filename == "report.html"]
    assert writer.render(result(), Style("ko")).startswith("<!doctype html>")


def test_few_requests_have_no_percentile_but_their_longest() -> None:
    shown = {
        tile.what: tile for tile in tiles(run([record(i, ttft=0.125 * (i + 1), itl=[]) for i in range(5)]), "en").tiles
    }
    assert shown["Time to first token"].value == "375 ms"
    assert shown["Time to first token"].detail == "median; longest of 5: 625 ms"
    many = {tile.what: tile for tile in tiles(run([record(i, itl=[]) for i in range(20)]), "en").tiles}
    assert many["Time to first token"].detail == "median; p95 500 ms"


def test_a_run_without_a_single_answer_has_a_report() -> None:
    failed = run([record(i, error="timeout", ttft=None, itl=()) for i in range(3)], label="5")
    text = visible(html(result(failed)))
    assert "of 3 requests, 3 failed" in text
    assert "not seen" in text


def test_the_windows_of_a_long_run_are_one_series() -> None:
    windows = [
        run([record(i, start=100.0 + 60 * number + i) for i in range(4)], label=f"window {number}")
        for number in range(20)
    ]
    [window] = {named.name for named in named_runs(windows, "en")}
    assert window == "run"
    assert named_runs(windows, "en")[1].offset == 60
    assert [named.tone for named in named_runs(windows[:6], "en")] == list(range(6))
    text = visible(html(result(*windows, headline="window 3")))
    assert "Requests over time" not in text
    assert "Latency over time" in text


def test_a_busy_client_and_an_interruption_are_on_top() -> None:
    one = run([record(0)])
    busy = replace(
        one, interrupted=True, client=ClientLoad(0.93, 12.0, 40.0, warnings=("client_busy", "client_lagging"))
    )
    found = warnings([one, busy], "en")
    assert found[0].startswith("Interrupted")
    assert "93 % of a core" in found[1]
    assert "12 ms" in found[2]


def both(**changes: object) -> str:
    a = side("A", gap=0.2, quality=quality(0.9), cold=(cold(16.3), cold(16.2)))
    b = side("B", quality=quality(0.2), cold=(cold(13.9), cold(14.1)))
    return compare_html(comparison(a, b), **changes)  # type: ignore[arg-type]


def test_a_comparison_shows_both_sides_the_intervals_and_the_quality() -> None:
    text = visible(both())
    wanted = (
        "A model-A", "B model-B", "B compared with A", "Load time", "Quality of the answers", "debugging",
        "A gives the better answers in these tasks.", "round 4", "4 rounds in turn, 16 requests a side",
    )  # fmt: skip
    for words in wanted:
        assert words in re.sub(r"\s+", " ", text), words


def test_a_comparison_in_korean_is_korean_throughout() -> None:
    text = visible(both(lang="ko", machine={"cpu": "Xeon"}))
    for english in ("Load time", "Quality", "difference", "better", "round ", "Method", "machine", "seen"):
        assert english not in text, english


@pytest.mark.parametrize(
    "make",
    [
        lambda: compare_html(comparison(side("A"))),
        lambda: compare_html(comparison(side("A", rounds=1), side("B", rounds=1), in_turn=False)),
        lambda: compare_html(comparison(side("A", quality=quality(0.5)), side("B"))),
    ],
)
def test_one_side_one_run_or_one_quality_is_enough_for_a_report(make: Callable[[], str]) -> None:
    assert "model-A" in visible(make())
