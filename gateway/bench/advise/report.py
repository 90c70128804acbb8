"""Report of `gateway advise`: lines and a table, or JSON."""

from collections.abc import Sequence
from typing import Any

from msgspec import to_builtins
from rich import box
from rich.console import Console
from rich.table import Table

from gateway.bench.advise.advice import Advice, Remark
from gateway.bench.advise.texts import Language, said


def show(advice: Advice, costs: Sequence[Remark], language: Language, console: Console) -> None:
    """Print the figures, the settings that follow from them, and the verdict."""
    for remark in advice.remarks:
        _print(console, _line(remark, language))
    if advice.settings:
        console.print(_table(advice, language), markup=False)
    else:
        _print(console, said("nothing", language))
    if advice.meets is not None:
        _print(console, said("met" if advice.meets else "not_met", language))
    for remark in costs:
        _print(console, _line(remark, language))


def as_json(advice: Advice, costs: Sequence[Remark], language: Language) -> dict[str, Any]:
    """Return the advice with its figures, and the texts in `language`."""
    return {
        "meets": advice.meets,
        "settings": [
            {**to_builtins(setting), "text": said(setting.why, language, **setting.figures)}
            for setting in advice.settings
        ],
        "remarks": [_remark_json(remark, language) for remark in advice.remarks],
        "costs": [_remark_json(remark, language) for remark in costs],
    }


def _remark_json(remark: Remark, language: Language) -> dict[str, Any]:
    return {**to_builtins(remark), "text": said(remark.key, language, **remark.figures)}


def _line(remark: Remark, language: Language) -> str:
    backend = f"{remark.backend}: " if remark.backend else ""
    return f"[{said(remark.origin, language)}] {backend}{said(remark.key, language, **remark.figures)}"


def _table(advice: Advice, language: Language) -> Table:
    has_backends = any(setting.backend for setting in advice.settings)
    headings = [*(["backend"] if has_backends else []), "setting", "value", "origin", "why"]
    table = Table(*(said(heading, language) for heading in headings), box=box.SIMPLE_HEAD)
    for setting in advice.settings:
        row = [setting.name, str(setting.value), said(setting.origin, language)]
        why = said(setting.why, language, **setting.figures)
        table.add_row(*([setting.backend or "-"] if has_backends else []), *row, why)
    return table


def _print(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False, markup=False)
