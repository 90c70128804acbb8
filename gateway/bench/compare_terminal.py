"""A comparison on the terminal."""

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gateway.bench import compare_view as view
from gateway.bench.compare_report import lead
from gateway.bench.compare_result import Comparison
from gateway.bench.report import client_line, warnings
from gateway.bench.report_texts import Lang, text


def show(comparison: Comparison, console: Console, lang: Lang) -> None:
    """Print the sides, the tables, the conclusions and the remarks."""
    console.print(f"[bold]{text('compare_title_one' if comparison.b is None else 'compare_title', lang)}[/bold]")
    console.print(escape(lead(comparison, lang)), highlight=False)
    for letter, side in zip("AB", comparison.sides, strict=False):
        console.print(f"{letter}: {escape(side.title)}  {escape(side.url)}", highlight=False, soft_wrap=True)
    views = view.row_views(comparison, lang)
    for group, members in view.groups(views).items():
        console.print(_table(text(f"group_{group}", lang), members, comparison, lang, "col_metric", "col_ratio"))
    if any(quality is not None for quality in view.qualities(comparison)):
        title = text("quality_table", lang)
        scores = view.quality_views(comparison, lang)
        console.print(_table(title, scores, comparison, lang, "col_scenario", "col_interval"))
        for line in view.quality_notes(comparison, lang):
            console.print(escape(line), style="dim", highlight=False)
    for words in view.verdicts(comparison, lang):
        console.print(f"[bold]{escape(words)}[/bold]", highlight=False)
    # The files have the whole method.
    for line in (*view.method_notes(comparison, lang)[1:2], *view.cold_remarks(comparison, lang)):
        console.print(escape(line), style="dim", highlight=False)
    console.print(f"{text('client', lang)}: {escape(client_line(comparison.runs, lang))}", style="dim", highlight=False)
    for line in (*warnings(comparison.runs, lang), *view.remarks(comparison, lang)):
        console.print(f"! {escape(line)}", style="yellow", highlight=False)


def _table(
    title: str, views: Sequence[view.ViewRow], comparison: Comparison, lang: Lang, first: str, interval: str
) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    table.add_column(text(first, lang))
    for name in view.names(comparison):
        table.add_column(escape(name), justify="right")
    two = comparison.b is not None
    if two:
        table.add_column(text("col_difference", lang), justify="right")
        table.add_column(text(interval, lang), justify="right")
        table.add_column(text("col_better", lang))
    for one in views:
        if one.is_total:
            table.add_section()
        cells = [one.name, *_values(one, two=two)]
        if two:
            cells += [escape(one.difference), escape(one.ratio), _strong(one.verdict, bool(one.better))]
        table.add_row(*cells)
    return table


def _values(one: view.ViewRow, *, two: bool) -> list[str]:
    return [_strong(one.a, one.better == "A"), *([_strong(one.b, one.better == "B")] if two else [])]


def _strong(value: str, is_strong: bool) -> str:
    return f"[bold]{escape(value)}[/bold]" if is_strong else escape(value)
