"""Covers: gateway/bench/formatting.py
Covers: gateway/bench/texts.py"""

import csv
import io
import json
import re
import string
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.bench import texts
from gateway.bench.formatting import cell_text, client_text, facts, metrics_table, number, remarks, text_table
from gateway.bench.result_json import from_json
from gateway.bench.results import Cell, ClientLoad, Column, ScenarioResult, Table, Verdict
from gateway.bench.texts import Language
from gateway.bench.writers import Style, csv_text, html_text, json_text, markdown_text, write_all
from tests.bench.records import record, run

ROOT = Path(__file__).parents[2]


COLUMNS = (
    Column("files", "n"),
    Column("total", "s"),
    Column("speedup", "x"),
    Column("in_turn_computed", "s"),
    Column("forecast"),
)
ROWS = (
    (Cell(5), Cell(397.2), Cell(0.642), Cell(255.0, "computed"), Cell("35", "forecast")),
    (
        Cell(10),
        Cell(600.0, note="until_last_failure"),
        Cell(None),
        Cell(510.0, "computed"),
        Cell(None, "forecast"),
    ),
)


def result() -> ScenarioResult:
    failed = record(1, error="http_503 queue_full", ttft=None, itl=())
    return ScenarioResult(
        scenario="vision-batch",
        date="20261129-050000",
        target="gw|x",
        url="http://127.0.0.1:1",
        api="openai",
        endpoint="/v1/chat/completions",
        model="m",
        workload={},
        runs=(run([record(0, name="=cmd"), failed], label="5"),),
        headline="5",
        notes=("images_made",),
        tables=(Table("vision_batch", COLUMNS, ROWS),),
        verdicts=(Verdict("slower_together", "rule_speedup", {"n": 5, "speedup": 0.642}),),
    )


def test_markdown_has_the_table_the_verdict_its_rule_and_the_kinds_of_values() -> None:
    shown = markdown_text(result(), Style())
    assert "| files | total time (s) | speed-up | one after the other (s, computed) | plan (forecast) |" in shown
    assert "| 5 | 397.20 | 0.64x | 255.00 | 35 |" in shown
    assert "| 10 | 600.00 (until the last failure) | – | 510.00 | – |" in shown
    assert "**5 at once: slower than one after the other (0.64 times)." in shown
    assert "Speed-up: time of one file" in shown
    assert "“computed” follows from measured values" in shown
    assert r"gw\|x" in shown


def test_markdown_is_korean_on_demand() -> None:
    shown = markdown_text(result(), Style("ko"))
    assert "| 파일 수 | 총 시간 (s) | 속도 향상 | 순차 처리 예상 (s, 계산) | 계획값 (예상) |" in shown
    assert "**5개 동시: 순차보다 느립니다 (0.64배)." in shown


def test_the_csv_has_a_line_for_each_request() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(result(), Style()))))
    assert [(row["run"], row["index"], row["error"]) for row in rows] == [
        ("5", "0", ""),
        ("5", "1", "http_503 queue_full"),
    ]
    assert float(rows[0]["ttft"]) == 0.5


def test_the_csv_runs_no_formula() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(result(), Style()))))
    assert rows[0]["name"] == "'=cmd"


def test_the_json_reads_back() -> None:
    assert from_json(json.loads(json_text(result(), Style()))) == result()


def test_the_folder_gets_every_file(tmp_path: Path) -> None:
    paths = write_all(result(), tmp_path / "new" / "folder", Style())
    assert [path.name for path in paths][:3] == ["benchmark_results.json", "benchmark_summary.md", "results.csv"]
    assert all(path.stat().st_size for path in paths)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "s", "–"),
        (0.642, "x", "0.64x"),
        (1234.56, "ms", "1234.6"),
        (3, "n", "3"),
        (2.5, "n", "2.5"),
        ("a", "", "a"),
    ],
)
def test_a_number_has_the_decimals_of_its_unit(value: float | str | None, unit: str, shown: str) -> None:
    assert number(value, unit) == shown


def test_a_column_of_mixed_kinds_marks_each_cell() -> None:
    table = Table("users", (Column("total", "s"),), ((Cell(1.0),), (Cell(2.0, "computed"),), (Cell(3.0, "forecast"),)))
    assert text_table(table, "en").rows == (("1.00",), ("2.00 (computed)",), ("3.00 (forecast)",))
    assert text_table(table, "en").headings == ("total time (s)",)


def test_only_text_cells_of_keys_are_translated() -> None:
    """A model may be called `together`."""
    assert cell_text(Cell("together"), Column("model"), "ko") == "together"
    assert cell_text(Cell("together"), Column("mode", "key"), "ko") == "동시"
    assert cell_text(Cell("http_503"), Column("outcome", "key"), "ko") == "http_503"


def test_a_percentile_with_too_few_values_says_so() -> None:
    shown = metrics_table(run([record(number) for number in range(16)]), "en", (50.0, 90.0, 99.0), ["ttft"])
    assert shown.headings[1:] == ("mean (ms)", "median (ms)", "std. deviation (ms)", "p90 (ms)", "p99 (ms)")
    assert shown.rows[0][1:] == ("500.0", "500.0", "0.0", "500.0", "n too small (16/100)")


def test_a_busy_client_is_warned_of_once() -> None:
    load = ClientLoad(0.95, 12.0, 20.0, 30.0, ("client_busy", "client_lagging", "client_late"))
    busy = replace(result(), runs=tuple(replace(item, client=load) for item in (*result().runs, *result().runs)))
    found = remarks(busy, "en")
    assert [line for line in found if "95 % of a core" in line and "bottleneck" in line] == [found[0]]
    assert "12 ms late" in found[1]
    assert "30 ms (p99) after they were due" in found[2]
    assert client_text(load, "en") == "95 % of a core, event loop late by 12.0 ms (p99), 20.0 ms at most"


def test_the_worst_run_of_the_client_is_told_wherever_it_is() -> None:
    loads = (
        ClientLoad(0.9, 30.0, 40.0, 50.0, ("client_lagging",)),
        ClientLoad(0.1, 200.0, 210.0, None, ("client_lagging",)),
    )
    runs = tuple(replace(result().headline_run, client=load) for load in loads)
    whole = replace(result(), runs=runs)
    assert "up to 200 ms late" in remarks(whole, "en")[0]
    assert ("Load client", "90 % of a core, event loop late by 200.0 ms (p99), 210.0 ms at most") in facts(whole, "en")
    assert html_text(whole, Style()).count("200 ms late") == 1


def test_the_tables_of_the_main_run_name_it() -> None:
    shown = markdown_text(result(), Style())
    label = result().headline
    assert f"## Counts and rates of the main run: {label}" in shown
    assert f"## Latencies of the main run: {label}" in shown
    assert re.search(r"Most pieces within a second \| \d+ \|", shown), "a count has no decimals"


def fields_of(text: str) -> set[str]:
    return {name.split(".")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("key", list(texts._TEXTS))
def test_both_languages_say_the_same_with_the_same_figures(key: str) -> None:
    english, korean = texts._TEXTS[key]
    assert fields_of(english) == fields_of(korean)
    assert english.strip()
    assert korean.strip()


def test_every_key_in_the_code_has_a_text() -> None:
    """Columns, titles, verdicts and notes are named in scenarios as words; each is looked up when it is shown."""
    named: set[str] = set()
    for file in (ROOT / "gateway/bench/scenarios").glob("*.py"):
        source = file.read_text()
        named |= set(re.findall(r'(?:Column|table|verdict_of)\(\s*"([a-z_0-9]+)"', source))
        named |= set(re.findall(r'note="([a-z_]+)"', source))
        named |= set(re.findall(r'key = "([a-z_]+)"', source))
        named |= set(re.findall(r'"(rule_[a-z_]+)"', source))
    assert len(named) > 40
    assert [key for key in sorted(named) if not texts.has(key)] == []


@pytest.mark.parametrize("language", ["en", "ko"])
def test_no_text_is_missing_for_a_failure_or_a_key(language: Language) -> None:
    assert texts.text_or_key("http_503 queue_full", language) == "http_503 queue_full"
    with pytest.raises(KeyError):
        texts.text("no_such_text", language)
