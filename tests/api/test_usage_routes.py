"""`/ops/usage` of a complete gateway: what clients counted themselves, to the token."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.app import Gateway
from gateway.usage.recorder import UsageRecorder
from tests.api.test_named_keys import ADMIN, DOORS, MESSAGES, file, serving  # noqa: F401 - a fixture
from tests.fakes import running_gateway
from tests.fakes.images import png_data_url
from tests.fakes.keys import bearer_of, write_keys
from tests.fakes.running_gateway import Running, until

pytestmark = pytest.mark.uvloop


@asynccontextmanager
async def recording(
    keys: Path, monkeypatch: pytest.MonkeyPatch, **more: Any
) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    """Serve as `serving` does, with usage in a file beside that of the keys."""
    usage = UsageRecorder(keys.with_name("usage.db"), 400)

    def build(settings: config.Settings, *words: Any, **options: Any) -> Gateway:
        return Gateway(settings, *words, usage=usage, **options)

    monkeypatch.setattr(running_gateway, "Gateway", build)
    try:
        async with serving(keys, **more) as both:
            yield both
    finally:
        await usage.close()


async def rows(client: httpx2.AsyncClient, **query: str) -> list[dict[str, Any]]:
    answer = await client.get("/ops/usage", params=query, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["rows"]
    return found


async def test_counts_are_those_of_the_clients_to_the_token(
    file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Plain and streamed, several answers, embeddings and two persons of two keys."""
    write_keys(file, web={"trusted": True, "requests_per_minute": 1000}, ops={})
    async with recording(file, monkeypatch, user_header="x-user") as (_, client):
        counted = {("web", "ada"): [0, 0, 0], ("web", "bob"): [0, 0, 0], ("ops", "none"): [0, 0, 0]}
        bodies = [
            DOORS["chat"].body,
            DOORS["chat"].body | {"n": 3, "max_tokens": 5},
            DOORS["chat"].body | {"stream": True, "stream_options": {"include_usage": True}, "model": "ultra"},
            DOORS["chat"].body | {"stream": True, "stream_options": {"include_usage": True}, "n": 2},
        ]
        for (key, person), sums in counted.items():
            for body in bodies:
                headers = bearer_of(key) | {"x-user": person if key == "web" else "not believed"}
                answer = await client.post("/v1/chat/completions", json=body, headers=headers)
                assert answer.status_code == 200
                usage = answer.json()["usage"] if not body.get("stream") else last_usage(answer.text)
                sums[0] += 1
                sums[1] += usage["prompt_tokens"]
                sums[2] += usage["completion_tokens"]
        answer = await client.post("/v1/embeddings", json=DOORS["embeddings"].body, headers=bearer_of("ops"))
        counted["ops", "none"][0] += 1
        counted["ops", "none"][1] += answer.json()["usage"]["prompt_tokens"]
        found = {
            (row["key"], row["person"]): [row["requests"], row["prompt_tokens"], row["completion_tokens"]]
            for row in await rows(client, by="key,person")
        }
        assert found == counted
        by_tier = {row["tier"]: row["requests"] for row in await rows(client, by="tier")}
        assert by_tier == {"standard": 9, "ultra": 3, "embedder": 1}
        assert all(row["seconds"] > 0 for row in await rows(client, by="backend"))


def last_usage(text: str) -> dict[str, int]:
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    (usage,) = [event["usage"] for event in events if event.get("usage")]
    return dict(usage)


async def test_refused_requests_are_counted_apart(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    write_keys(file, web={"requests_per_minute": 1, "tiers": ["standard"]})
    async with recording(file, monkeypatch) as (_, client):
        for model in ("ultra", "standard", "standard"):
            body = DOORS["chat"].body | {"model": model}
            await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))
        await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=bearer_of("nobody"))
        found = {row["key"]: (row["requests"], row["refused"]) for row in await rows(client)}
        assert found == {"web": (0, 3), "none": (0, 1)}


async def test_answer_that_the_client_leaves_counts_what_was_sent(
    file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_keys(file, web={})
    async with recording(file, monkeypatch, speed=200) as (gateway, client):
        body = {"model": "standard", "messages": MESSAGES, "stream": True, "max_tokens": 100_000}
        async with gateway.sent(body, f"authorization: {bearer_of('web')['authorization']}") as raw:
            await raw.head()
            received = b""
            while received.count(b'"content":"') < 5:
                received += await raw.reader.read(4096)
        await until(gateway.is_idle)
        (row,) = await rows(client)
        assert row["requests"] == 1
        assert 4 <= received.count(b'"content":"') - 1 <= row["completion_tokens"] < 100
        assert row["prompt_tokens"] == 0


async def test_images_are_counted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    write_keys(file, web={})
    async with recording(file, monkeypatch) as (gateway, client):
        content = [{"type": "image_url", "image_url": {"url": png_data_url()}}] * 2
        body = {"model": "standard", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        answer = await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))
        gateway.gateway.settle()
        (row,) = await rows(client)
        assert (answer.status_code, row["requests"], row["images"]) == (200, 1, 2)


@pytest.mark.parametrize(
    ("query", "param"),
    [({"by": "key,name"}, "by"), ({"since": "yesterday"}, "since"), ({"until": "2026-13-01"}, "until")],
)
async def test_wrong_query_is_400(
    file: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    query: dict[str, str],
    param: str,
) -> None:
    write_keys(file, web={})
    async with recording(file, monkeypatch) as (_, client):
        answer = await client.get("/ops/usage", params=query, headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert (await client.get("/ops/usage", headers=bearer_of("web"))).status_code == 401
        empty = await client.get("/ops/usage", params={"since": "2026-01-01"}, headers=ADMIN)
        assert empty.json() == {"rows": [], "since": "2026-01-01", "until": None, "complete": True}


async def test_gateway_that_keeps_no_usage_says_so(file: Path) -> None:  # noqa: F811
    write_keys(file, web={})
    async with serving(file) as (_, client):
        answer = await client.get("/ops/usage", headers=ADMIN)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
