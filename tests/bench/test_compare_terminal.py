import io

import pytest
from rich.console import Console

from gateway.bench.compare_terminal import show
from gateway.bench.report_texts import Lang
from gateway.bench.results import ClientLoad
from tests.bench.comparisons import comparison, quality, side


def shown(found: object, lang: Lang = "en") -> str:
    out = io.StringIO()
    show(found, Console(file=out, width=200), lang)  # type: ignore[arg-type]
    return out.getvalue()


def test_both_sides_their_rows_and_the_verdict_are_printed() -> None:
    text = shown(comparison(side("A", gap=0.2, quality=quality(0.9)), side("B", quality=quality(0.2))))
    assert "A: model-A (vllm 0.33.0)  http://127.0.0.1:1" in text
    assert "Response time, median" in text
    assert "Total score by scenario" in text
    assert "A gives the better answers in these tasks." in text
    assert "! The sides run different models (model-A, model-B)" in text


def test_one_side_alone_is_printed_without_a_verdict_on_another() -> None:
    text = shown(comparison(side("A")))
    assert "Only one side was measured" in text
    assert "B ÷ A" not in text


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    assert "[red]x" in shown(comparison(side("A", model="[red]x"), side("B")))


@pytest.mark.parametrize(("lang", "words"), [("en", "may be the bottleneck"), ("ko", "병목")])
def test_a_busy_client_is_warned_of(lang: Lang, words: str) -> None:
    from dataclasses import replace

    one = side("A")
    busy = replace(one.rounds[0], client=ClientLoad(0.95, 1, 2, warnings=("client_busy",)))
    assert words in shown(comparison(replace(one, rounds=(busy, *one.rounds[1:])), side("B")), lang)
