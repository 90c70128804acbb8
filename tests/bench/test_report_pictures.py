import re

import pytest

from gateway.bench.report_page import _Charts
from gateway.bench.report_pictures import MOST_REQUESTS, Bar, Bars, Forest, Ratio, Span, Timeline

CHARTS = _Charts("en")


def widths(html: str) -> list[float]:
    return [float(value) for value in re.findall(r'class="bar [a-z]+" style="width:([\d.]+)%', html)]


def bars(*values: float | None, kind: str = "measured", **changes: object) -> str:
    group = tuple(Bar(str(place), value, str(value), 0, kind) for place, value in enumerate(values))  # type: ignore[arg-type]
    return Bars("t", "h", (("group", group),), **changes).html(CHARTS)  # type: ignore[arg-type]


def test_bars_are_as_long_as_their_values() -> None:
    assert widths(bars(51.0, 397.2, 255.0)) == pytest.approx([12.84, 100, 64.2], abs=0.01)
    assert widths(bars(1.0, 5.0, top=5.0)) == [20, 100]
    assert widths(bars(0.0)) == [0]


def test_a_missing_value_has_no_bar_and_says_so() -> None:
    html = bars(None, 2.0)
    assert widths(html) == [100]
    assert 'class="value absent">None' in html


def test_computed_and_forecast_bars_differ_from_measured_ones_and_have_a_legend() -> None:
    group = (
        Bar("total", 397.2, "397.2 s", 0),
        Bar("in turn", 255.0, "255 s", 0, "computed"),
        Bar("plan", 35.0, "35 s", 0, "forecast"),
    )
    html = Bars("t", "h", (("5", group),)).html(CHARTS)
    assert re.findall(r'class="bar (\w+)"', html) == ["measured", "computed", "forecast"]
    assert re.findall(r'<i class="(\w+)"></i>(\w+)', html) == [("measured",) * 2, ("computed",) * 2, ("forecast",) * 2]
    assert "legend" not in bars(1.0)


def forest(*ratios: Ratio) -> str:
    return Forest("t", "h", ratios, "less", "more").html(CHARTS)


def test_equality_is_in_the_middle_and_twice_is_as_far_as_half() -> None:
    html = forest(
        Ratio("a", 2.0, 1.5, 3.0, "B", ""), Ratio("b", 0.5, None, None, "A", ""), Ratio("c", 1.0, 0.9, 1.1, "", "")
    )
    places = [float(value) for value in re.findall(r'class="point" style="left:([\d.]+)%', html)]
    assert places[0] - 50 == pytest.approx(50 - places[1], abs=0.02)
    assert places[2] == 50
    assert re.findall(r'class="track ([\w-]+)"', html) == ["tone-1", "tone-0", "neutral"]
    assert html.count('class="range"') == 2


def test_an_enormous_ratio_stays_inside() -> None:
    html = forest(Ratio("a", 1e6, 1e5, 1e9, "B", ""))
    assert all(0 <= float(value) <= 100 for value in re.findall(r"left:([\d.]+)%", html))


def test_a_timeline_shows_wait_first_token_and_answer() -> None:
    html = Timeline("t", "h", (Span("1", 0.0, 2.0, 5.0, 10.0), Span("2", 0.0, 0.0, None, 4.0, failed=True)), 10.0).html(
        CHARTS
    )
    pieces = re.findall(r'<span class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', html)
    assert pieces == [
        ("waited", "0.00", "20.00"),
        ("first", "20.00", "30.00"),
        ("rest", "50.00", "50.00"),
        ("failed", "0.00", "40.00"),
    ]
    assert re.findall(r'<i class="(\w+)">', html) == ["waited", "first", "rest", "failed"]


def test_a_timeline_of_many_requests_says_how_many_it_shows() -> None:
    spans = tuple(Span(str(place), 0.0, 0.0, 1.0, 2.0) for place in range(MOST_REQUESTS + 1))
    html = Timeline("t", "h", spans, 2.0).html(CHARTS)
    assert "The first 64 of 65 requests." in html
    assert html.count('class="label"') == MOST_REQUESTS


def test_names_are_escaped() -> None:
    evil = "<script>"
    for html in (
        Bars(evil, evil, ((evil, (Bar(evil, 1.0, evil, 0), Bar(evil, 1.0, evil, 1))),)).html(CHARTS),
        forest(Ratio(evil, 1.0, None, None, "", evil)),
        Timeline(evil, evil, (Span(evil, 0.0, 0.0, None, 1.0),), 1.0).html(CHARTS),
    ):
        assert "<script" not in html
