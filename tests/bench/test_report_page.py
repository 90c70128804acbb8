"""Covers: gateway/bench/report_blocks.py"""

import base64
import hashlib
import json
import re

from gateway.bench.report_blocks import (
    Chart,
    DataTable,
    Facts,
    Notes,
    Page,
    Section,
    Series,
    SideCard,
    Terminal,
    TextCell,
    Tile,
    Tiles,
    Verdict,
)
from gateway.bench.report_page import render

EVIL = "</script><script>alert(1)</script><!--&"
CHART = Chart("c", "h", "points", "x", "y", (Series(EVIL, [1.0, 1.0, 2.0], [3.0, 4.0, 5.0], 0, "forecast"),))


def page(*blocks: object) -> str:
    return render(Page("en", "e", "t", "l", sections=(Section("s", blocks),)))  # type: ignore[arg-type]


def test_nothing_is_loaded_from_elsewhere() -> None:
    html = page(CHART)
    assert "uPlot" in html
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)[^"']""", html)
    assert not re.findall(r"url\((?!\s*[\"']?data:)", html)
    assert "@import" not in html
    assert "default-src 'none'" in html


def test_only_the_pages_own_scripts_may_run() -> None:
    html = page(CHART)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', html)
    assert policy
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = {f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts}
    assert set(re.findall(r"'sha256-[^']+'", policy[1])) == digests
    assert len(scripts) == 2
    assert "unsafe-inline" not in policy[1].split("script-src")[1].split(";")[0]


def test_a_page_without_charts_has_no_script() -> None:
    html = page(Notes(("x",)))
    assert "<script>" not in html
    assert "script-src 'none'" in html


def test_no_text_can_leave_its_place() -> None:
    blocks = (
        CHART,
        DataTable(EVIL, (EVIL,), ((TextCell(EVIL, note=EVIL),),), hint=EVIL),
        Facts(EVIL, ((EVIL, EVIL),)),
        Notes((EVIL,)),
        Terminal(EVIL, EVIL),
    )
    html = render(
        Page(
            "en", EVIL, EVIL, EVIL, (SideCard(EVIL, EVIL, ((EVIL, EVIL),)),), (Verdict(EVIL, EVIL),), (EVIL,),
            Tiles((Tile(EVIL, EVIL, EVIL),)), (Section(EVIL, blocks, EVIL),), EVIL,
        )
    )  # fmt: skip
    assert "alert(1)" in html
    assert html.count("<script") == 3
    assert "<!--" not in html.removeprefix("<!doctype html>")


def test_the_data_of_a_chart_survive_and_equal_places_are_moved_apart() -> None:
    found = re.search(r'id="data">(.*?)</script>', page(CHART))
    assert found
    chart = json.loads(found[1])["charts"]["chart-1"]
    series = chart["series"][0]
    assert (series["name"], series["kind"], series["y"]) == (EVIL, "forecast", [3, 4, 5])
    first, second, third = series["x"]
    assert first < second < third
    assert second - first < 1e-6


def test_what_was_not_measured_is_marked_in_a_table() -> None:
    rows = ((TextCell("5"), TextCell("397.2 s"), TextCell("255 s", "computed"), TextCell("35 s", "forecast")),)
    html = page(DataTable("t", ("n", "a", "b", "c"), rows, frozenset({1})))
    assert re.findall(r'class="kind (\w+)">(\w+)<', html) == [("computed",) * 2, ("forecast",) * 2]
    assert '<td class="num">397.2 s</td>' in html


def test_a_long_table_is_folded_and_the_last_row_set_apart_on_demand() -> None:
    rows = ((TextCell("a"),), (TextCell("mean"),))
    assert "<details><summary>t</summary>" in page(DataTable("t", ("n",), rows, folded=True))
    assert '<tr class=total><th scope="row">mean' in page(DataTable("t", ("n",), rows, total=True))


def test_the_page_is_in_its_language() -> None:
    assert '<html lang="ko">' in render(Page("ko", "", "t", "l"))
