"""Keys with names and limits through a complete gateway, at every door.

Covers: gateway/api/key_routes.py
"""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import pytest

from gateway import config, simulate
from gateway.api import named_keys
from gateway.api.endpoint import Endpoint
from gateway.app import Gateway
from gateway.relay import chat as chat_relay
from gateway.telemetry.log import ExchangeLog
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.keys import bearer_of, key_of, write_keys
from tests.fakes.running_gateway import PATIENCE, Running, running, settings_for, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

ADMIN = {"authorization": "Bearer the-admin-key"}
MESSAGES = [{"role": "user", "content": "Hello?"}]


class Door(NamedTuple):
    """One API: its path, a request, and where its errors have their text and their type."""

    path: str
    body: dict[str, Any]
    shape: str = "openai"


DOORS = {
    "chat": Door("/v1/chat/completions", {"model": "standard", "messages": MESSAGES, "max_tokens": 8}),
    "chat stream": Door("/v1/chat/completions", {"model": "standard", "messages": MESSAGES, "stream": True}),
    "completions": Door("/v1/completions", {"model": "standard", "prompt": "Once", "max_tokens": 8}),
    "responses": Door("/v1/responses", {"model": "standard", "input": "Hello?", "max_output_tokens": 16}),
    "messages": Door("/v1/messages", {"model": "standard", "messages": MESSAGES, "max_tokens": 8}, "anthropic"),
    "embeddings": Door("/v1/embeddings", {"model": "embedder", "input": "Hello?"}),
    "rerank": Door("/v1/rerank", {"model": "ranker", "query": "a", "documents": ["b", "c"]}),
    "ollama chat": Door("/api/chat", {"model": "standard", "messages": MESSAGES, "stream": False}, "ollama"),
    "ollama generate": Door("/api/generate", {"model": "standard", "prompt": "Hello?"}, "ollama"),
    "ollama embed": Door("/api/embed", {"model": "embedder", "input": "Hello?"}, "ollama"),
}


def code_of(answer: httpx2.Response, door: Door) -> str:
    """Return the code of an error in OpenAI's form, the type in Anthropic's, the text in Ollama's."""
    body = answer.json()
    if door.shape == "anthropic":
        assert (body["type"], set(body["error"])) == ("error", {"type", "message"})
        return str(body["error"]["type"])
    if door.shape == "ollama":
        return str(body["error"])
    assert list(body["error"]) == ["message", "type", "param", "code"]
    return str(body["error"]["code"])


@asynccontextmanager
async def serving(file: Path, *, speed: float = 0, **more: Any) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    """Serve two tiers, a reranker and an embedding model on stand-ins, with the keys in `file`.

    `speed` is that of the tiers in tokens a second; 0: no limit.
    """
    small, large, rank, embed = map(
        simulate.Model.parse, ("small,vision", "large", "rank,reranks", "embed,embedding=8")
    )
    async with AsyncExitStack() as stack:
        vllm = await stack.enter_async_context(
            stand_in(simulate.Options("vllm", (small, large), tokens_per_second=speed))
        )
        ranks = await stack.enter_async_context(stand_in(simulate.Options("vllm", (rank,))))
        ollama = await stack.enter_async_context(stand_in(simulate.Options("ollama", (embed,))))
        document = {
            "llm_backend": "vllm",
            "backends": {
                "vllm": {"kind": "vllm", "base_url": vllm.base_url},
                "ranks": {"kind": "vllm", "base_url": ranks.base_url},
                "ollama": {"kind": "ollama", "base_url": ollama.base_url},
            },
            "tiers": {
                "standard": {"models": {"vllm": "small"}, "aliases": ["gpt-4o-mini"]},
                "ultra": {"models": {"vllm": "large"}, "aliases": ["gpt-4o"]},
            },
            "embeddings": {"embedder": {"backend": "ollama", "model": "embed"}},
            "rerankers": {"ranker": {"backend": "ranks", "model": "rank"}},
            "state_file": "",
            "admin_key": "the-admin-key",
            "keys_file": str(file),
            **more,
        }
        gateway = await stack.enter_async_context(running(config.build(document)))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield gateway, await stack.enter_async_context(client)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def limit_headers(answer: httpx2.Response) -> set[str]:
    return {name.removeprefix("x-ratelimit-") for name in answer.headers if name.startswith("x-ratelimit-")}


ALL_HEADERS = {f"{what}-{unit}" for what in ("limit", "remaining", "reset") for unit in ("requests", "tokens")}


# Doors


async def test_limits_hold_at_every_door_in_its_own_form(file: Path) -> None:
    names = [name.replace(" ", "-") for name in DOORS]
    write_keys(file, **{name: {"requests_per_minute": 1, "tokens_per_minute": 100_000} for name in names})
    async with serving(file) as (gateway, client):
        for name, door in zip(names, DOORS.values(), strict=True):
            first = await client.post(door.path, json=door.body, headers=bearer_of(name))
            assert first.status_code == 200, (name, first.text)
            assert limit_headers(first) == ALL_HEADERS
            assert first.headers["x-ratelimit-remaining-requests"] == "0"
            second = await client.post(door.path, json=door.body, headers=bearer_of(name))
            assert second.status_code == 429, name
            assert limit_headers(second) == ALL_HEADERS
            assert 1 <= int(second.headers["retry-after"]) <= 61
            expected = {"openai": "rate_limit_exceeded", "anthropic": "rate_limit_error"}.get(door.shape, "per minute")
            assert expected in code_of(second, door), name
            metric = {"key": name, "limit": "requests_per_minute"}
            assert gateway.metric("gateway_rate_limited_total", **metric) == 1
        assert gateway.running == 0


async def test_tier_that_is_not_allowed_is_403_at_every_door_and_listed_at_none(file: Path) -> None:
    write_keys(file, web={"tiers": ["ULTRA"]}, free={})
    async with serving(file) as (_, client):
        for name, door in DOORS.items():
            answer = await client.post(door.path, json=door.body, headers=bearer_of("web"))
            assert answer.status_code == 403, name
            expected = {"openai": "tier_not_allowed", "anthropic": "permission_error"}.get(door.shape, "may not use")
            assert expected in code_of(answer, door), name
        for model in ("ultra", "gpt-4o", "large", "auto"):
            body = DOORS["chat"].body | {"model": model}
            assert (await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))).status_code == 200
        listed = (await client.get("/v1/models", headers=bearer_of("web"))).json()["data"]
        assert [model["id"] for model in listed] == ["ultra", "gpt-4o"]
        tags = (await client.get("/api/tags", headers=bearer_of("web"))).json()["models"]
        assert [model["name"] for model in tags] == ["ultra:latest", "gpt-4o:latest"]
        assert (await client.get("/api/ps", headers=bearer_of("web"))).json()["models"]
        for path in ("/v1/models/standard", "/v1/models/embed"):
            assert (await client.get(path, headers=bearer_of("web"))).json()["error"]["code"] == "tier_not_allowed"
        assert (await client.post("/api/show", json={"model": "small"}, headers=bearer_of("web"))).status_code == 403
        assert (await client.get("/v1/models/large", headers=bearer_of("web"))).status_code == 200
        everything = (await client.get("/v1/models", headers=bearer_of("free"))).json()["data"]
        assert len(everything) == 6


async def test_error_about_an_unknown_model_names_only_what_the_key_may_use(file: Path) -> None:
    write_keys(file, web={"tiers": ["standard"]})
    async with serving(file) as (_, client):
        for name in ("chat", "embeddings", "rerank"):
            body = DOORS[name].body | {"model": "nope"}
            answer = await client.post(DOORS[name].path, json=body, headers=bearer_of("web"))
            assert answer.status_code == 404
            message = answer.json()["error"]["message"]
            assert "'standard'" in message
            assert not any(hidden in message for hidden in ("ultra", "gpt-4o", "embedder", "ranker"))


async def test_auto_serves_a_tier_that_the_key_may_use(file: Path) -> None:
    write_keys(file, web={"tiers": ["ultra"]})
    async with serving(file, default_tier="standard") as (_, client):
        body = DOORS["chat"].body | {"model": "auto"}
        answer = await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))
        assert (answer.status_code, answer.headers["x-gateway-tier"]) == (200, "ultra")
        assert answer.headers["x-gateway-reason"].endswith("the key may not use its tier")


async def test_key_without_limits_has_no_headers_about_them(file: Path) -> None:
    write_keys(file, free={})
    async with serving(file, api_keys=["sk-plain-0123456789"]) as (gateway, client):
        for key in (bearer_of("free"), {"authorization": "Bearer sk-plain-0123456789"}):
            answer = await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=key)
            assert (answer.status_code, limit_headers(answer)) == (200, set())
        assert [line["key_id"] for line in gateway.exchanges()] == ["free", line_id("sk-plain-0123456789")]


def line_id(key: str) -> str:
    return sha256(key.encode()).hexdigest()[:8]


async def test_every_answer_of_a_limited_key_has_its_limits(file: Path) -> None:
    write_keys(file, web={"requests_per_minute": 100, "tokens_per_minute": 100_000})
    async with serving(file) as (_, client):
        headers = bearer_of("web")
        answers = [
            await client.post(
                "/v1/chat/completions", content=b"{", headers=headers | {"content-type": "application/json"}
            ),
            await client.post("/v1/chat/completions", json={"model": "nope", "messages": MESSAGES}, headers=headers),
            await client.post("/v1/chat/completions", json={"model": "standard"}, headers=headers),
            await client.get("/v1/models", headers=headers),
            await client.get("/v1/models/nope", headers=headers),
            await client.get("/api/tags", headers=headers),
            await client.post("/api/show", json={"model": "nope"}, headers=headers),
        ]
        assert [answer.status_code for answer in answers] == [400, 404, 400, 200, 404, 200, 404]
        assert [limit_headers(answer) for answer in answers] == [ALL_HEADERS] * len(answers)


async def test_every_answer_to_a_person_has_the_limits_of_that_person(file: Path) -> None:
    write_keys(file, web={"trusted": True, "per_person": {"requests_per_minute": 5}})
    async with serving(file, user_header="x-user") as (_, client):
        headers = bearer_of("web") | {"x-user": "ada"}
        nope = {"model": "nope", "messages": MESSAGES}
        answers = [
            await client.get("/v1/models", headers=headers),
            await client.post("/v1/chat/completions", json=nope, headers=headers),
            await client.get("/api/tags", headers=headers),
            await client.get("/v1/models", headers=headers | {"x-user": "bob"}),
            await client.get("/v1/models", headers=bearer_of("web")),
        ]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["5", "4", "4", "5", "5"]


# Keys


async def test_unknown_and_expired_keys_are_401_before_the_body_is_read(file: Path) -> None:
    write_keys(file, web={}, old={"expires": "2020-01-01"})
    async with serving(file) as (gateway, client):
        for headers, word in (({}, "missing"), (bearer_of("nobody"), "Incorrect"), (bearer_of("old"), "expired")):
            head = {"content-type": "application/json", "content-length": "1000000", **headers}
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
            lines = [f"{name}: {value}" for name, value in head.items()]
            writer.write("\r\n".join(["POST /v1/chat/completions HTTP/1.1", "host: x", *lines, "", ""]).encode())
            async with asyncio.timeout(PATIENCE):
                answer = await reader.readuntil(b"\r\n\r\n")
            writer.close()
            assert answer.startswith(b"HTTP/1.1 401 ")
            models = await client.get("/v1/models", headers=headers)
            assert (models.status_code, models.headers["www-authenticate"]) == (401, "Bearer")
            assert word in models.json()["error"]["message"]


async def test_gateway_with_an_empty_list_of_keys_is_closed(file: Path) -> None:
    write_keys(file)
    async with serving(file) as (_, client):
        for headers in ({}, bearer_of("any")):
            assert (
                await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=headers)
            ).status_code == 401
            assert (await client.get("/v1/models", headers=headers)).status_code == 401


async def test_batch_key_cannot_ask_for_more(file: Path) -> None:
    write_keys(file, night={"priority": "batch"}, day={})
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend, model_concurrency=1, max_concurrency=1).model_copy(update={"keys_file": file})
        async with running(settings) as gateway:
            backend.mode = "silent"
            for name in ("night", "day"):
                header = f"Authorization: Bearer {key_of(name)}"
                async with gateway.sent({}, header, "x-gateway-priority: interactive"):
                    await until(lambda: len(gateway.live) == 1)
                    (relay,) = gateway.live
                    assert relay._request.claim.is_batch == (name == "night")
                    assert relay._request.claim.key == name
                await until(gateway.is_idle)


async def test_two_keys_take_turns_as_before_whatever_the_number_of_requests(file: Path) -> None:
    write_keys(file, many={}, few={})
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend, max_concurrency=1, model_concurrency=1).model_copy(update={"keys_file": file})
        async with running(settings) as gateway, AsyncExitStack() as stack:
            backend.mode = "silent"
            for name in ("many", "many", "many", "many", "few"):
                await stack.enter_async_context(gateway.sent({}, f"Authorization: Bearer {key_of(name)}"))
                sent = len(gateway.live) + 1
                await until(lambda sent=sent: len(gateway.live) >= sent)  # type: ignore[misc]
            (queues,) = {relay._destination.queues["text"] for relay in gateway.live}
            order = [ticket.claim.key for ticket in queues.interactive.in_order()]
            assert order[:2] in (["many", "few"], ["few", "many"])


# Tokens


async def test_tokens_of_the_backend_replace_the_estimate(file: Path) -> None:
    write_keys(file, web={"tokens_per_minute": 100_000, "tokens_per_day": 200_000})
    async with serving(file) as (gateway, client):
        body = DOORS["chat"].body | {"max_tokens": 5000}
        answer = await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 95_000
        usage = answer.json()["usage"]
        (row,) = (await client.get("/ops/keys", headers=ADMIN)).json()["keys"]
        assert row["used"]["tokens_per_minute"] == row["used"]["tokens_per_day"] == usage["total_tokens"]
        for kind in ("prompt", "completion"):
            metric = gateway.metric("gateway_key_tokens_total", key="web", type=kind)
            assert metric == usage[f"{kind}_tokens"]
        assert gateway.metric("gateway_key_requests_total", key="web") == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_several_answers_are_one_request_with_the_tokens_of_all(file: Path, stream: bool) -> None:
    write_keys(file, web={"requests_per_minute": 5, "tokens_per_minute": 100_000, "concurrency": 1})
    async with serving(file) as (_, client):
        body = DOORS["chat"].body | {"n": 3, "stream": stream}
        answer = await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))
        assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (200, "4")
        (row,) = (await client.get("/ops/keys", headers=ADMIN)).json()["keys"]
        assert (row["used"]["requests_per_minute"], row["used"]["concurrency"]) == (1, 0)
        if not stream:
            assert row["used"]["tokens_per_day"] == answer.json()["usage"]["total_tokens"]


async def test_client_that_leaves_frees_its_place_and_pays_for_what_was_sent(file: Path) -> None:
    write_keys(file, web={"concurrency": 1, "tokens_per_minute": 100_000})
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend, first_token_timeout=PATIENCE, idle_timeout=PATIENCE, total_timeout=PATIENCE)
        async with running(settings.model_copy(update={"keys_file": file})) as gateway:
            accounts = gateway.gateway.named_keys
            assert accounts is not None
            key = accounts.accounts.named("web")
            assert key is not None
            backend.mode = "stall"
            async with gateway.sent({"stream": True}, f"Authorization: Bearer {key_of('web')}") as raw:
                status, _ = await raw.head()
                assert status == 200
                await until(lambda: bool(gateway.live) and next(iter(gateway.live))._meter.first_piece is not None)
                refused = await gateway_ask(gateway)
                assert (refused.status_code, refused.json()["error"]["code"]) == (429, "concurrency_exceeded")
                assert refused.headers["retry-after"] == "1"
            await until(lambda: key.allowance.running == 0)
            assert 0 < key.view()["used"]["tokens_per_minute"] < 64
            line = gateway.exchanges()[-1]
            assert line["sent_tokens"] > 0


LEAVERS: dict[str, tuple[dict[str, Any], int]] = {
    "leaves a plain answer": ({}, 1000),
    "leaves several prompts": ({"prompt": ["word " * 200] * 6}, 6000),
    "leaves a stream": ({"stream": True}, 0),
    "sets a deadline": ({}, 1000),
    "sets a deadline for a stream": ({"stream": True}, 0),
}
"""What is special about the request, and the tokens that may have been generated for it."""


@pytest.mark.parametrize("kind", LEAVERS)
async def test_client_that_leaves_before_anything_arrives_pays_for_what_ran(
    file: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain answer arrives as a whole, so what was generated of it is estimated from the time that it took."""
    monkeypatch.setattr(chat_relay, "UNSEEN_TOKENS_PER_SECOND", 100_000)
    write_keys(file, web={"tokens_per_day": 10**6})
    more, generated = LEAVERS[kind]
    is_deadline, prompts = kind.startswith("sets"), len(more.get("prompt", [""]))
    messages = {"messages": [{"role": "user", "content": "word " * 200}]}
    body = {"model": "standard", "max_tokens": 1000, **(more if "prompt" in more else messages | more)}
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend, first_token_timeout=PATIENCE, idle_timeout=PATIENCE, total_timeout=PATIENCE)
        async with running(settings.model_copy(update={"keys_file": file})) as gateway:
            accounts = gateway.gateway.named_keys
            assert accounts is not None
            key = accounts.accounts.named("web")
            assert key is not None
            backend.mode = "silent"
            headers = {**bearer_of("web"), **({"x-gateway-timeout": "1.5"} if is_deadline else {})}
            async with httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False) as client:
                asking = asyncio.ensure_future(client.post(path, json=body, headers=headers))
                await until(lambda: is_deadline or _have_run(gateway, prompts))
                if not is_deadline:
                    asking.cancel()
                await asyncio.wait([asking])
                await until(lambda: key.allowance.running == 0)
            prompt = key.allowance.day_tokens - generated
            assert 0 <= prompt - prompts * 250 < 60  # a token for 4 bytes, and the JSON around them


def _have_run(gateway: Running, count: int) -> bool:
    """Return whether so many relays have been at their server for a while."""
    relays = list(gateway.live)
    return len(relays) == count and all(
        each._meter.sent is not None and each._context.clock() - each._meter.last_piece > 0.05 for each in relays
    )


async def gateway_ask(gateway: Running) -> httpx2.Response:
    async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client:
        body = {"model": "standard", "messages": MESSAGES}
        return await client.post("/v1/chat/completions", json=body, headers=bearer_of("web"))


async def test_spent_budget_ends_with_the_time_of_its_renewal_or_with_a_smaller_tier(file: Path) -> None:
    write_keys(
        file,
        hard={"tokens_per_day": 10},
        soft={"tokens_per_day": 10, "on_limit": "downgrade: standard", "tiers": ["ultra", "embedder"]},
    )
    async with serving(file) as (_, client):
        body = DOORS["chat"].body | {"model": "gpt-4o", "max_tokens": 60}
        for name in ("hard", "soft"):
            first = await client.post("/v1/chat/completions", json=body, headers=bearer_of(name))
            assert (first.status_code, first.headers["x-gateway-tier"]) == (200, "ultra")
            assert "of 10 tokens a day are used" in first.headers["x-gateway-budget-warning"]
        refused = await client.post("/v1/chat/completions", json=body, headers=bearer_of("hard"))
        assert (refused.status_code, refused.headers["x-should-retry"]) == (429, "false")
        assert "midnight UTC" in refused.json()["error"]["message"]
        assert refused.headers["x-ratelimit-remaining-tokens"] == "0"
        smaller = await client.post("/v1/chat/completions", json=body, headers=bearer_of("soft"))
        assert (smaller.status_code, smaller.headers["x-gateway-tier"]) == (200, "standard")
        assert (smaller.headers["x-gateway-downgraded-from"], smaller.json()["model"]) == ("ultra", "gpt-4o")
        door = DOORS["embeddings"]
        assert (await client.post(door.path, json=door.body, headers=bearer_of("soft"))).status_code == 429


# Persons


async def test_persons_of_a_trusted_key_have_limits_that_an_untrusted_key_cannot_escape(file: Path) -> None:
    write_keys(
        file,
        webui={"trusted": True, "per_person": {"requests_per_minute": 1}},
        plain={"requests_per_minute": 1},
    )
    async with serving(file, user_header="x-openwebui-user-id") as (_, client):

        async def ask(key: str, person: str) -> int:
            headers = bearer_of(key) | {"x-openwebui-user-id": person}
            return (await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=headers)).status_code

        assert [await ask("webui", person) for person in ("ada", "bob", "ada", "bob")] == [200, 200, 429, 429]
        assert [await ask("plain", person) for person in ("ada", "bob")] == [200, 429]


# The Ollama port


async def test_requests_without_a_key_count_as_a_named_key_on_the_ollama_port_alone(file: Path) -> None:
    write_keys(file, local={"tiers": ["standard"], "requests_per_minute": 2}, web={})
    more = {"ollama_port": 1, "ollama_as_key": "local"}
    async with serving(file, **more) as (gateway, client):
        keyless = gateway.gateway._endpoints["/api/chat"]._keys.keyless_port
        assert keyless is not None
        assert (await client.get("/api/tags")).status_code == 401
        object.__setattr__(keyless, "port", gateway.port)  # as if the request had come to the second port
        chat = DOORS["ollama chat"]
        first = await client.post(chat.path, json=chat.body)
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "1")
        tags = (await client.get("/api/tags")).json()["models"]
        assert [model["name"] for model in tags] == ["standard:latest", "gpt-4o-mini:latest"]
        assert (await client.post(chat.path, json=chat.body, headers=bearer_of("wrong"))).status_code == 401
        assert (await client.post(chat.path, json=chat.body, headers={"x-api-key": ""})).status_code == 401
        assert (await client.post(chat.path, json=chat.body, headers={"host": "evil.example"})).status_code == 403
        assert (await client.get("/api/tags", headers={"host": "evil.example"})).status_code == 403
        assert (await client.post(chat.path, json=chat.body)).status_code == 200
        assert (await client.post(chat.path, json=chat.body)).status_code == 429
        write_keys(file, web={})
        assert (await client.post("/ops/keys/reload", headers=ADMIN)).status_code == 200
        assert (await client.post(chat.path, json=chat.body)).status_code == 401


# The file


async def test_reload_takes_effect_on_open_connections_and_a_wrong_file_changes_nothing(file: Path) -> None:
    write_keys(file, web={}, other={})
    async with serving(file) as (gateway, client):

        async def ask(name: str) -> int:
            body = DOORS["chat"].body
            return (await client.post("/v1/chat/completions", json=body, headers=bearer_of(name))).status_code

        async def reload() -> tuple[int, Any]:
            answer = await client.post("/ops/keys/reload", headers=ADMIN)
            return answer.status_code, answer.json()

        assert [await ask("web"), await ask("new")] == [200, 401]
        for text in (
            "",
            "keys: [",
            "keys: [{name: web}]",
            json.dumps({"keys": [{"name": "x", "sha256": "0" * 64, "tiers": ["no"]}]}),
        ):
            file.write_text(text)
            status, answer = await reload()
            assert (status, answer["error"]["code"]) == (409, "conflict")
            assert "keys before stay in force" in answer["error"]["message"]
            assert await ask("web") == 200
        file.unlink()
        assert (await reload())[0] == 409
        assert await ask("web") == 200
        view = (await client.get("/ops/keys", headers=ADMIN)).json()
        assert (view["reload"]["ok"], view["reload"]["cause"]) == (False, "request")
        await ask("other")
        gateway.gateway.settle()
        write_keys(file, web={"concurrency": 2}, new={})
        status, answer = await reload()
        assert (status, answer["added"], answer["removed"], answer["changed"]) == (200, ["new"], ["other"], ["web"])
        assert [await ask("web"), await ask("new"), await ask("other")] == [200, 200, 401]
        assert gateway.metric("gateway_key_requests_total", key="other") == 0  # its series is gone


async def test_connection_keeps_nothing_of_earlier_keys(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each change of the keys left an entry at each connection that was used afterwards."""
    notes: list[dict[str, Any]] = []
    identify = Endpoint._identify

    def noting(endpoint: Any, scope: Any, client: Any, fields: Any) -> Any:
        notes.append(client.notes)
        return identify(endpoint, scope, client, fields)

    monkeypatch.setattr(Endpoint, "_identify", noting)
    write_keys(file, web={})
    async with serving(file) as (gateway, client):
        named = gateway.gateway.named_keys
        assert named is not None
        for number in range(5):
            for _ in range(2):
                answer = await client.post(
                    "/v1/chat/completions", json=DOORS["chat"].body, headers=bearer_of("web") | {"x-request-id": "r"}
                )
                assert answer.status_code == 200
            write_keys(file, web={"concurrency": 2 + number})
            await named.run(named.read, "test")
    assert all(each is notes[0] for each in notes)
    assert len(notes) == 5
    assert len(notes[0]) <= 3


async def test_ops_keys_needs_the_admin_key_and_shows_no_key(file: Path) -> None:
    write_keys(file, web={"requests_per_minute": 5, "expires": "2999-01-01"})
    async with serving(file, api_keys=["sk-plain-0123456789"]) as (_, client):
        for method, path in (("GET", "/ops/keys"), ("POST", "/ops/keys/reload")):
            for headers in ({}, bearer_of("web")):
                assert (await client.request(method, path, headers=headers)).status_code == 401
        answer = await client.get("/ops/keys", headers=ADMIN)
        assert answer.json()["without_limits"] == 1
        (row,) = answer.json()["keys"]
        assert (row["name"], row["expires"], row["expired"]) == ("web", "2999-01-01T00:00:00+00:00", False)
        assert key_of("web") not in answer.text
        assert file.read_text().split("sha256: ")[1][:64] not in answer.text


async def test_gateway_without_a_file_of_keys_says_so() -> None:
    async with (
        FaultBackend("vllm") as backend,
        running(settings_for(backend)) as gateway,
        httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client,
    ):
        answer = await client.get("/ops/keys")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


async def test_tokens_of_the_day_survive_a_restart(file: Path, tmp_path: Path) -> None:
    write_keys(file, web={"tokens_per_day": 100_000})
    used = []
    for _ in range(2):
        async with serving(file, state_file=str(tmp_path / "state.json")) as (gateway, client):
            await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=bearer_of("web"))
            named = gateway.gateway.named_keys
            assert named is not None
            used.append(next(iter(named.accounts)).view()["used"]["tokens_per_day"])
    assert used[1] == 2 * used[0] > 0


async def test_tokens_of_the_day_are_kept_while_the_gateway_runs(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway that is killed forgets a few seconds at most."""
    monkeypatch.setattr(named_keys, "SAVE_SECONDS", 0.01)
    write_keys(file, web={"tokens_per_day": 100_000})
    state = file.with_name("state.json")
    async with serving(file, state_file=str(state)) as (_, client):
        await client.post("/v1/chat/completions", json=DOORS["chat"].body, headers=bearer_of("web"))
        await until(lambda: state.exists() and b'"web"' in state.read_bytes())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "No such file"),
        ("", "it is empty"),
        ("keys: [{name: a}, {name: b}]", "keys[0] (a).sha256: missing"),
        ("keys: [{name: a, sha256: '" + "0" * 64 + "', tiers: [nope]}]", "a.tiers: 'nope' is not a tier"),
    ],
)
async def test_file_that_cannot_be_used_stops_the_start(file: Path, text: str | None, words: str) -> None:
    if text is not None:
        file.write_text(text)
    settings = config.build({"keys_file": str(file), "state_file": ""})
    with pytest.raises(config.ConfigError) as caught:
        Gateway(settings, ExchangeLog(True, io.BytesIO()))
    assert any(words in line for line in caught.value.lines)
    assert all(line.startswith("GATEWAY_KEYS_FILE: ") for line in caught.value.lines)


async def test_admin_key_cannot_be_a_client_key_as_well(file: Path) -> None:
    write_keys(file, web={})
    with pytest.raises(config.ConfigError, match="one of its keys is the admin key; expected a separate key"):
        named_keys.open_accounts(config.build({"keys_file": str(file), "admin_key": key_of("web")}))


async def test_key_of_the_ollama_port_has_to_exist_at_the_start(file: Path) -> None:
    write_keys(file, web={})
    more = {"ollama_port": 11434, "ollama_as_key": "local"}
    with pytest.raises(config.ConfigError, match="GATEWAY_OLLAMA_AS_KEY: got 'local'; expected the name of a key"):
        named_keys.open_accounts(config.build({"keys_file": str(file), **more}))
    with pytest.raises(config.ConfigError, match="expected ollama_port and keys_file as well"):
        config.build({"ollama_as_key": "local"})
