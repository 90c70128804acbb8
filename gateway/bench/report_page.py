"""The report as one HTML file: style, script and data are inside, and nothing is loaded from elsewhere."""

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from gateway.bench.report_blocks import Page
from gateway.bench.report_texts import Lang

STATIC = Path(__file__).parents[1] / "static"
_LOCALES: dict[Lang, str] = {"en": "en-US", "ko": "ko-KR"}


@dataclass
class _Charts:
    lang: Lang
    charts: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    def add(self, chart: Mapping[str, Any]) -> str:
        name = f"chart-{len(self.charts) + 1}"
        self.charts[name] = chart
        return name


def render(page: Page) -> str:
    """Return the HTML of a report."""
    charts = _Charts(page.lang)
    body = _body(page, charts)
    scripts = [_asset("uplot/uPlot.iife.min.js"), _asset("report/report.js")] if charts.charts else []
    data = _inline_json({"locale": _LOCALES[page.lang], "charts": charts.charts})
    return "\n".join(
        [
            "<!doctype html>",
            f'<html lang="{page.lang}">',
            '<head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{escape(page.title)}</title>",
            f"<style>{_asset('uplot/uPlot.min.css')}\n{_asset('report/report.css')}</style></head>",
            f"<body><main>{body}</main>",
            f'<script type="application/json" id="data">{data}</script>',
            *(f"<script>{script}</script>" for script in scripts),
            "</body></html>\n",
        ]
    )


def _body(page: Page, charts: _Charts) -> str:
    verdicts = "".join(
        f"<li>{escape(one.words)}{f'<small>{escape(one.rule)}</small>' if one.rule else ''}</li>"
        for one in page.verdicts
    )
    warnings = "".join(f"<li>{escape(line)}</li>" for line in page.warnings)
    head = (
        f'<header><p class="eyebrow">{escape(page.eyebrow)}</p><h1>{escape(page.title)}</h1>'
        f'<p class="lead">{escape(page.lead)}</p></header>'
    )
    parts = (
        head,
        f'<div class="sides">{"".join(side.html(charts) for side in page.sides)}</div>' if page.sides else "",
        f'<ul class="verdicts">{verdicts}</ul>' if verdicts else "",
        f'<ul class="warnings">{warnings}</ul>' if warnings else "",
        page.tiles.html(charts) if page.tiles.tiles else "",
        *(section.html(charts) for section in page.sections),
        f"<footer>{escape(page.footer)}</footer>" if page.footer else "",
    )
    return "\n".join(part for part in parts if part)


def _asset(name: str) -> str:
    """Return a file of `gateway/static`; none of them may end the element that it is put into."""
    content = (STATIC / name).read_text(encoding="utf-8")
    assert "</script" not in content, name
    assert "</style" not in content, name
    return content


def _inline_json(value: Any) -> str:
    """Return JSON that cannot end its script element or begin a comment."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c").replace("&", "\\u0026")


def _policy(scripts: list[str]) -> str:
    """Return a content security policy that permits the page's own scripts and no request at all."""
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; base-uri 'none'; form-action 'none'"
