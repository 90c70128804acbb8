"""The HTML report in a real browser.

Covers: gateway/bench/report_page.py
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.bench.compare_report import html as compare_html
from gateway.bench.report import html
from gateway.bench.report_texts import Lang
from tests.bench.comparisons import cold, comparison, quality, side
from tests.bench.test_report import result
from tests.programs import program


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    path = program("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def reports(lang: Lang) -> dict[str, str]:
    a = side("A", gap=0.2, quality=quality(0.9), cold=(cold(16.3), cold(16.2)))
    b = side("B", quality=quality(0.2), cold=(cold(13.9), cold(14.1)))
    return {"bench": html(result(), lang), "compare": compare_html(comparison(a, b), lang)}


@pytest.mark.parametrize(
    ("lang", "report", "scheme", "width"),
    [
        ("en", "bench", "light", 360),
        ("en", "compare", "light", 360),
        ("en", "compare", "dark", 1280),
        ("ko", "compare", "dark", 360),
    ],
)
def test_a_report_draws_its_charts_without_an_error_or_a_request_and_fits_its_screen(
    browser: Any, lang: Lang, report: str, scheme: str, width: int, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    content = reports(lang)[report]
    file = tmp_path / "report.html"
    file.write_text(content, encoding="utf-8")
    page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url))
    page.goto(file.as_uri())
    expected = content.count('class="plot"')
    assert expected > 0
    page.wait_for_function(f"document.documentElement.dataset.drawn === '{expected}'")
    assert page.locator(".plot canvas").count() == expected
    assert [problem for problem in problems if problem != file.as_uri()] == []
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    if lang == "en":  # the structure and the colours do not depend on the language
        found = Axe().run(page)
        serious = [one for one in found.response["violations"] if one["impact"] in ("serious", "critical")]
        assert [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in serious] == []
    page.close()
