import io

import pytest
from rich.console import Console

from gateway.bench.terminal import ProgressBar, show
from gateway.bench.writers import Style
from tests.bench.records import record
from tests.bench.test_writers import result


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_result_is_shown_with_tables_and_remarks() -> None:
    console = terminal()
    show(result(), console, Style())
    shown = text_of(console)
    assert "Files at once" in shown
    assert "5 at once: slower than one after the other" in shown
    assert "! The images were made by the benchmark." in shown


def test_names_with_brackets_are_no_markup() -> None:
    console = terminal()
    from dataclasses import replace

    show(replace(result(), model="[red]m[/]"), console, Style())
    assert "[red]m[/]" in text_of(console)


async def test_the_bar_counts_requests_and_failures() -> None:
    console = terminal()
    async with ProgressBar(console, Style()) as bar:
        bar.begin("in_turn", 3, None)
        bar.advance(record(0))
        bar.advance(record(1, error="timeout"))
        bar._progress.refresh()
        bar.end()
    shown = text_of(console)
    assert "one after the other" in shown
    assert "2/3" in shown
    assert "failures: 1" in shown


@pytest.mark.virtual_time
async def test_the_bar_is_silent_where_there_is_no_terminal() -> None:
    console = Console(file=io.StringIO())
    async with ProgressBar(console, Style()) as bar:
        bar.begin("x", None, 5.0)
        bar.advance(record(0))
        bar.end()
    assert text_of(console) == ""
