"""A result and the progress of a run on the terminal."""

import asyncio
from contextlib import suppress
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from gateway.bench.formatting import TextTable, facts, remarks, text_table, verdict_text
from gateway.bench.results import RequestRecord, ScenarioResult
from gateway.bench.texts import text, text_or_key
from gateway.bench.writers import Style, headline_tables

REFRESH = 0.25
"""Seconds between two drawings: a drawing takes time from the loop that measures."""


def show(result: ScenarioResult, console: Console, style: Style) -> None:
    """Print a result."""
    language = style.language
    console.print(f"[bold]{escape(text(f'scenario_{result.scenario}', language))}[/bold]")
    for name, value in facts(result, language):
        console.print(f"{name}: {escape(value)}", highlight=False)
    console.print()
    for table in (*(text_table(table, language) for table in result.tables), *headline_tables(result, style)):
        console.print(_rich(table))
    rules: dict[str, None] = {}
    for verdict in result.verdicts:
        conclusion, rule = verdict_text(verdict, language)
        rules[rule] = None
        console.print(f"[bold]{escape(conclusion)}[/bold]", highlight=False)
    for rule in rules:
        console.print(f"{text('rule', language)}: {escape(rule)}", style="dim", highlight=False)
    for remark in remarks(result, language):
        console.print(f"! {escape(remark)}", style="yellow", highlight=False)


def _rich(table: TextTable) -> Table:
    shown = Table(title=table.title, title_justify="left", box=SIMPLE_HEAD, title_style="bold")
    for heading, is_number in zip(table.headings, table.is_number, strict=True):
        shown.add_column(escape(heading), justify="right" if is_number else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


class ProgressBar:
    """A `gateway.bench.runner.Progress` that draws a bar, at most four times a second.

    Used by one event loop, within `async with`. On something other than a terminal it draws nothing.
    """

    def __init__(self, console: Console, style: Style) -> None:
        self._language = style.language
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failed]}"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            auto_refresh=False,  # no thread that competes with the loop
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._failed = 0
        self._drawing: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._progress.start()
        self._drawing = asyncio.create_task(self._draw())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._drawing is not None
        self._drawing.cancel()
        with suppress(asyncio.CancelledError):
            await self._drawing
        self._progress.stop()

    async def _draw(self) -> None:
        while True:
            self._progress.refresh()
            await asyncio.sleep(REFRESH)

    def begin(self, label: str, total: int | None, seconds: float | None) -> None:
        """Start the bar of a run."""
        self._failed = 0
        self._task = self._progress.add_task(escape(text_or_key(label, self._language)), total=total, failed="")

    def advance(self, record: RequestRecord) -> None:
        """Count a request."""
        if self._task is None:
            return
        if record.error:
            self._failed += 1
            failed = f"{text('failures', self._language)}: {self._failed}"
            self._progress.update(self._task, advance=1, failed=failed)
        else:
            self._progress.update(self._task, advance=1)

    def end(self) -> None:
        """Remove the bar of the run."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._task = None
