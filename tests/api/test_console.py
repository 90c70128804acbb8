"""The console's page: public, self-contained, with a strict policy, and only its own files."""

import re
from typing import Any, get_args

import httpx2
import pytest

from gateway.admission.model_state import Word
from gateway.api.console import FOLDERS, STATIC
from gateway.api.operations import TURNS
from gateway.api.ops_schemas import Readiness
from gateway.errors import Outcome as Ended
from gateway.rollout.assignment import ChangeCause
from gateway.rollout.gpu_state import Outcome, Phase
from gateway.rollout.gpu_times import Basis
from gateway.rollout.guard import RULE_NAMES
from gateway.rollout.preflight.findings import Severity
from gateway.telemetry.exchange import LANES
from tests.api.both_engines import ADMIN, KEY, error_of, serving

pytestmark = pytest.mark.uvloop


async def test_page_needs_no_key_and_contains_nothing_but_code() -> None:
    async with serving(admin_key=ADMIN, api_keys=[KEY]) as (_, client):
        page = await client.get("/ops/", headers={"host": "gateway.example", "via": "proxy"})
        assert page.status_code == 200
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.content == (STATIC / "console" / "index.html").read_bytes()
        assert ADMIN not in page.text


async def test_every_file_of_the_page_is_served_with_the_policy(client: httpx2.AsyncClient) -> None:
    names = [f"/ops/{folder}/{file.name}" for folder in FOLDERS for file in (STATIC / folder).iterdir()]
    for path in ["/ops/", *(name for name in names if not name.endswith("LICENSE"))]:
        answer = await client.get(path)
        assert answer.status_code == 200, path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "*" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_page_and_its_files_name_no_outside_address() -> None:
    for file in (STATIC / "console").iterdir():
        text = file.read_text()
        found = re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text.replace("http://www.w3.org/2000/svg", ""))
        assert found == [], file.name


def test_page_has_no_inline_code_and_loads_only_files_that_exist() -> None:
    page = (STATIC / "console" / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son[a-z]+=|\sstyle=|javascript:", page)
    addresses = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert addresses
    for address in addresses:
        assert (STATIC / address).exists(), address


def test_code_makes_no_text_into_html_or_code() -> None:
    for file in (STATIC / "console").glob("*.js"):
        text = file.read_text()
        for dangerous in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert dangerous not in text, (file.name, dangerous)
        for module in re.findall(r'from "\./([^"]+)"', text):
            assert (file.parent / module).exists(), (file.name, module)


def messages(language: str) -> set[str]:
    text = (STATIC / "console" / f"{language}.js").read_text()
    return set(re.findall(r'^  "?([a-z_.]+)"?: "', text, re.MULTILINE))


def test_both_languages_have_all_texts_and_the_page_uses_no_other() -> None:
    english = messages("en")
    assert english == messages("ko")
    for file in (STATIC / "console").glob("*.js"):
        for name in re.findall(r'\bt\("([a-z_.]+)"', file.read_text()):
            assert name in english, (file.name, name)


def test_every_word_of_the_status_that_the_page_shows_has_a_text() -> None:
    words: dict[str, Any] = {
        "cause": get_args(ChangeCause),
        "gpu.phase": get_args(Phase),
        "gpu.last": [outcome for outcome in get_args(Outcome) if outcome != "done"],
        "gpu.rollback": get_args(Basis),
        "ready": get_args(Readiness.__annotations__["status"]),
        "backend": [turn for turn in TURNS.values() if turn != "awake"],
        "severity": get_args(Severity),
        "rule": RULE_NAMES,
        "load": get_args(Word),
        "outcome": [outcome for outcome in get_args(Ended) if outcome not in ("ok", "cancelled")],
        "lane": {lane for lanes in LANES.values() for lane in lanes},
    }
    known = messages("en")
    assert [f"{group}.{word}" for group, of in words.items() for word in of if f"{group}.{word}" not in known] == []


async def test_address_without_the_slash_leads_to_the_page(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/ops")
    assert (answer.status_code, answer.headers["location"]) == (308, "ops/")
    assert (await client.get("/ops", follow_redirects=True)).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/ops/console/nothing.js",
        "/ops/console/..%2F..%2Fapp.py",
        "/ops/console/%2e%2e/console.py",
        "/ops/uplot/LICENSE",
        "/ops/api/console.py",
    ],
)
async def test_nothing_else_is_served(client: httpx2.AsyncClient, path: str) -> None:
    assert error_of(await client.get(path)) == (404, "not_found")
