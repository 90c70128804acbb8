"""`gateway usage`: what a running gateway reports, as a table, CSV and JSON."""

import csv
import io
import json
from typing import Any

import httpx2
import pytest
from rich.console import Console

from gateway.cli.usage import path_of, show, write_csv
from tests.cli.harness import command, gateway

ROWS: list[dict[str, Any]] = [
    {"key": "web", "day": "2026-11-29", "requests": 1200, "seconds": 1.5},
    {"key": '=HYPERLINK("x")', "day": "2026-11-30", "requests": 1, "seconds": 0.0},
]


def test_call_has_the_words_that_were_given() -> None:
    assert path_of("key,day", "2026-11-01", None) == "/ops/usage?by=key%2Cday&since=2026-11-01"
    assert path_of("key", None, "2026-11-30") == "/ops/usage?by=key&until=2026-11-30"


def test_table_has_the_rows_and_says_if_there_are_none() -> None:
    console = Console(file=(out := io.StringIO()), width=100)
    show(ROWS, console)
    show([], console)
    lines = out.getvalue().splitlines()
    assert [line.split() for line in lines[:2]] == [
        ["key", "day", "requests", "seconds"],
        ["web", "2026-11-29", "1,200", "1.5"],
    ]
    assert lines[-1] == "no usage"


@pytest.mark.parametrize("name", ["[/b]", "[bold]x", "[link=http://a]x", "a\x9b31mb", "a\x1b]0;b", ":smile:"])
def test_person_cannot_break_or_colour_the_table(name: str) -> None:
    console = Console(file=(out := io.StringIO()), width=100)
    show([{"person": name, "requests": 1}], console)
    shown = name.replace("\x9b", "\\x9b").replace("\x1b", "\\x1b")
    assert out.getvalue().splitlines()[1].split() == [shown, "1"]


def test_csv_has_no_cell_that_a_spreadsheet_takes_for_a_formula() -> None:
    out = io.StringIO()
    write_csv(ROWS, out)
    write_csv([], out)
    found = list(csv.DictReader(io.StringIO(out.getvalue())))
    assert found[0] == {"key": "web", "day": "2026-11-29", "requests": "1200", "seconds": "1.5"}
    assert found[1]["key"] == '\'=HYPERLINK("x")'
    assert len(found) == 2


@pytest.mark.uvloop
async def test_gateway_without_usage_is_status_1(monkeypatch: pytest.MonkeyPatch, empty_environment: None) -> None:
    async with gateway(monkeypatch):
        done = await command("usage", "--by", "key,day", "--since", "2026-11-01")
        assert (done.exit_code, "Set GATEWAY_USAGE_FILE" in done.stderr) == (1, True)


@pytest.mark.uvloop
@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--by", "key,foo"], "--by: got 'foo'; expected a list of key, person, tier, backend, day"),
        (["--since", "yesterday"], "--since: got 'yesterday'; expected a date such as 2026-11-29"),
        (["--since", "20261101"], "--since: got '20261101'; expected"),
        (["--until", "2026-02-30"], "--until: got '2026-02-30'; expected"),
    ],
)
async def test_wrong_words_are_status_2_without_a_gateway(words: list[str], line: str) -> None:
    done = await command("usage", *words, GATEWAY_URL="http://127.0.0.1:1")
    assert (done.exit_code, done.stderr.startswith(line)) == (2, True)


@pytest.mark.uvloop
@pytest.mark.parametrize(("words", "is_json"), [(["--json"], True), (["--csv"], False), ([], False)])
async def test_answer_is_printed_in_the_form_that_was_asked_for(
    words: list[str], is_json: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = {"rows": ROWS, "since": None, "until": None}
    monkeypatch.setattr(httpx2, "request", lambda *_, **__: httpx2.Response(200, json=answer))
    done = await command("usage", *words, GATEWAY_URL="http://127.0.0.1:1")
    assert done.exit_code == 0
    if is_json:
        assert json.loads(done.stdout) == answer
    else:
        assert done.stdout.splitlines()[0].replace(",", " ").split() == ["key", "day", "requests", "seconds"]


@pytest.mark.uvloop
@pytest.mark.parametrize("is_complete", [True, False])
async def test_answer_without_the_other_replicas_says_so(is_complete: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = {"rows": ROWS, "since": None, "until": None, "complete": is_complete}
    monkeypatch.setattr(httpx2, "request", lambda *_, **__: httpx2.Response(200, json=answer))
    done = await command("usage", "--json", GATEWAY_URL="http://127.0.0.1:1")
    assert json.loads(done.stdout) == answer
    assert ("without the usage of the other replicas" in done.stderr) is not is_complete
