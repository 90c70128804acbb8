"""What is decided of a chat request before it is carried out, on real sockets."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import config
from gateway.api.request_headers import request_id_of
from gateway.downstream import server as drain
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.pictures import picture_url
from tests.fakes.running_gateway import PATIENCE, TIMES, Raw, Reply, Running, request_bytes, running
from tests.real_engines.process import free_port

pytestmark = pytest.mark.uvloop

KEY = "client-key"
CANARY = "the-canary-of-this-test"


def document(backend: FaultBackend, **more: Any) -> dict[str, Any]:
    kind = backend.kind
    return {
        "llm_backend": kind,
        "backends": {
            kind: {"kind": kind, "servers": [{"base_url": backend.base_url, "models": [MODEL, "big"]}], **TIMES}
        },
        "tiers": {
            "standard": {"models": {kind: MODEL}, "aliases": ["gpt-4o-mini", {"name": "hidden", "listed": False}]},
            "ultra": {"models": {kind: "big"}, "aliases": ["gpt-4o"]},
        },
        "default_tier": "ultra",
        "state_file": "",
        **more,
    }


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[tuple[Running, FaultBackend]]:
    async with FaultBackend("vllm") as backend, running(config.build(document(backend, **more))) as gateway:
        yield gateway, backend


async def exchange(
    gateway: Running, headers: Mapping[str, str], body: bytes = b"", *, path: str = "/v1/chat/completions"
) -> Reply:
    """What is answered to these very bytes; the connection stays open, so whoever waits for more bytes waits in vain."""
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: gateway",
            *(f"{name}: {value}" for name, value in headers.items()),
            "",
            "",
        ]
        writer.write("\r\n".join(lines).encode() + body)
        try:
            return await Raw(reader, writer).reply()
        finally:
            writer.close()


async def post(
    gateway: Running,
    body: bytes | dict[str, Any],
    headers: Mapping[str, str] | None = None,
    path: str = "/v1/chat/completions",
) -> Reply:
    data = (
        body
        if isinstance(body, bytes)
        else json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x"}]} | body).encode()
    )
    return await exchange(
        gateway,
        {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})},
        data,
        path=path,
    )


def code(reply: Reply) -> tuple[int, str]:
    assert reply.error is not None
    assert list(reply.error) == ["message", "type", "param", "code"]
    return reply.status, reply.error["code"]


# Keys


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic client-key"}])
async def test_wrong_key_is_refused_before_the_body_is_read(headers: dict[str, str]) -> None:
    async with serving(api_keys=[KEY]) as (gateway, backend):
        reply = await exchange(gateway, {"Content-Type": "application/json", "Content-Length": "100000", **headers})
        assert code(reply) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["x-request-id"]
        assert not backend.requests


async def test_right_key_is_served_and_known_by_its_id_alone() -> None:
    async with serving(api_keys=[KEY]) as (gateway, backend):
        assert (await post(gateway, {}, {"Authorization": f"Bearer {KEY}"})).status == 200
        line = gateway.exchanges()[-1]
        assert len(line["key_id"]) == 8
        assert KEY not in gateway.log.getvalue().decode()
        assert KEY.encode() not in backend.requests[0]


async def test_key_of_each_request_on_a_connection_is_judged_anew() -> None:
    """What is known of a head holds for that head alone."""
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x"}]}).encode()
    async with serving(api_keys=[KEY]) as (gateway, _), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        statuses = []
        for key in (KEY, KEY, "client-kex"):
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            writer.write(f"{head}Authorization: Bearer {key}\r\n\r\n".encode() + body)
            statuses.append((await Raw(reader, writer).reply()).status)
        writer.close()
    assert statuses == [200, 200, 401]


# The body


async def test_body_that_is_said_to_be_too_large_is_refused_before_it_is_read() -> None:
    async with serving(max_body="10KiB", max_text_body="10KiB") as (gateway, _):
        reply = await exchange(gateway, {"Content-Type": "application/json", "Content-Length": "10241"})
        assert code(reply) == (413, "request_too_large")


async def test_body_that_turns_out_too_large_is_refused() -> None:
    async with serving(max_body="10KiB", max_text_body="10KiB") as (gateway, _):
        chunks = b"800\r\n" + b"x" * 2048 + b"\r\n"
        reply = await exchange(
            gateway, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}, chunks * 6
        )
        assert code(reply) == (413, "request_too_large")


async def test_long_text_is_refused_where_a_long_image_is_taken() -> None:
    async with serving(max_text_body="1KiB") as (gateway, _):
        assert code(await post(gateway, {"messages": [{"role": "user", "content": "x" * 2000}]})) == (
            413,
            "request_too_large",
        )
        image = {"type": "image_url", "image_url": {"url": picture_url(40, is_noise=True)}}
        assert (await post(gateway, {"messages": [{"role": "user", "content": [image]}]})).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonp"},
        {"Content-Encoding": "gzip"},
    ],
)
async def test_body_that_is_not_plain_json_is_415(headers: dict[str, str]) -> None:
    async with serving() as (gateway, _):
        assert code(await post(gateway, {}, headers)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_json_is_taken_by_any_spelling(media_type: str) -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, {"Content-Type": media_type})).status == 200


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", (400, "invalid_json")),
        ({"messages": []}, (400, "invalid_value")),
        ({"model": None}, (400, "invalid_value")),
        ({"n": 2}, (400, "unsupported_parameter")),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
            (400, "invalid_image_url"),
        ),
        ({"model": CANARY}, (404, "model_not_found")),
    ],
)
async def test_request_that_cannot_be_served_is_refused_and_counted_without_its_text(
    body: Any, expected: tuple[int, str]
) -> None:
    async with serving() as (gateway, backend):
        assert code(await post(gateway, body)) == expected
        assert not backend.requests
        assert gateway.metric("gateway_requests_total", tier="none", backend="none", outcome="client_error") == 1
        assert gateway.exchanges()[-1]["code"] == expected[1]
        assert CANARY not in gateway.log.getvalue().decode()


async def test_unknown_parameters_are_ignored_and_not_sent_on() -> None:
    async with serving() as (gateway, backend):
        reply = await post(
            gateway,
            {"user": "u", "logit_bias": {"1": 2}, "prompt_logprobs": 1, "x": {"y": []}, "metadata": {}, "store": True},
        )
        assert reply.status == 200
        sent = json.loads(backend.requests[0].partition(b"\r\n\r\n")[2])
        assert set(sent) == {"model", "messages", "stream", "stream_options"}


# Names


@pytest.mark.parametrize(
    ("name", "tier", "model"),
    [
        ("standard", "standard", MODEL),
        ("STANDARD", "standard", MODEL),
        ("gpt-4o-mini", "standard", MODEL),
        ("hidden", "standard", MODEL),
        ("gpt-4o", "ultra", "big"),
        ("auto", "ultra", "big"),
        ("big", "ultra", "big"),
        (MODEL, "standard", MODEL),
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
async def test_name_leads_to_its_tier_and_comes_back_in_the_body(
    name: str, tier: str, model: str, stream: bool
) -> None:
    async with serving() as (gateway, backend):
        reply = await post(gateway, {"model": name, "stream": stream})
        assert {key: reply.headers[f"x-gateway-{key}"] for key in ("tier", "backend", "model", "attempts")} == {
            "tier": tier,
            "backend": "vllm",
            "model": model,
            "attempts": "1",
        }
        assert int(reply.headers["x-gateway-queue-ms"]) < 1000
        documents = reply.events[:-1] if stream else [json.loads(reply.body)]
        assert {document["model"] for document in documents} == {name}
        assert json.loads(backend.requests[0].partition(b"\r\n\r\n")[2])["model"] == model


async def test_auto_is_answered_with_the_tier_and_the_reason() -> None:
    rules: list[dict[str, Any]] = [{"tier": "standard", "task": "simple"}, {"tier": "standard", "longer_than": 100}]
    for stream in (False, True):
        async with serving(auto=rules) as (gateway, backend):
            for body, headers, tier, reason in (
                ({}, {}, "ultra", "no rule holds"),
                ({}, {"X-Gateway-Task": "Simple"}, "standard", "rule 1: task=simple"),
                ({"messages": [{"role": "user", "content": CANARY * 10}]}, {}, "standard", "rule 2: longer_than=100"),
            ):
                reply = await post(gateway, {"model": "auto", "stream": stream, **body}, headers)
                assert (reply.status, reply.headers["x-gateway-tier"], reply.headers["x-gateway-reason"]) == (
                    200,
                    tier,
                    reason,
                )
            assert (
                "x-gateway-reason"
                not in (await post(gateway, {"stream": stream}, {"X-Gateway-Task": "nonsense"})).headers
            )
            backend.mode = "status_500"
            assert (await post(gateway, {"model": "auto"})).headers["x-gateway-reason"] == "no rule holds"


async def test_reason_of_one_request_is_not_told_to_the_next_on_its_connection() -> None:
    async with serving(auto=[{"tier": "standard", "longer_than": 100}]) as (gateway, _), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        reasons = []
        for model, text in (("auto", "x" * 200), ("auto", "x" * 200), ("auto", "x"), ("gpt-4o", "x")):
            writer.write(request_bytes({"model": model, "messages": [{"role": "user", "content": text}]}))
            reasons.append((await Raw(reader, writer).reply()).headers.get("x-gateway-reason"))
        writer.close()
    assert reasons == ["rule 1: longer_than=100", "rule 1: longer_than=100", "no rule holds", None]


async def test_word_for_the_task_that_means_nothing_is_refused() -> None:
    async with serving() as (gateway, backend):
        reply = await post(gateway, {"model": "auto"}, {"X-Gateway-Task": CANARY})
        assert code(reply) == (400, "invalid_value")
        assert reply.error is not None
        assert reply.error["param"] == "x-gateway-task"
        assert CANARY not in reply.body.decode()
        assert not backend.requests


async def test_unknown_model_is_told_the_public_names() -> None:
    async with serving() as (gateway, _):
        reply = await post(gateway, {"model": "nope"})
        assert code(reply) == (404, "model_not_found")
        assert reply.error is not None
        assert reply.error["param"] == "model"
        assert "'standard', 'gpt-4o-mini', 'ultra', 'gpt-4o'" in reply.error["message"]
        assert "nope" not in reply.error["message"]


async def test_path_works_without_v1() -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, path="/chat/completions")).status == 200


# What a tier does to parameters


async def test_tiers_parameters_are_what_the_backend_gets() -> None:
    params = {"default": {"temperature": 0.7, "top_p": 0.5}, "force": {"seed": 1}, "drop": ["stop"]}
    async with FaultBackend("vllm") as backend:
        settings = document(backend)
        settings["tiers"]["standard"] |= {"params": params, "max_tokens": 50}
        async with running(config.build(settings)) as gateway:
            assert (
                await post(gateway, {"temperature": 0, "seed": 9, "stop": ["x"], "max_completion_tokens": 500})
            ).status == 200
            assert (await post(gateway, {"model": "ultra", "seed": 9, "stop": ["x"]})).status == 200
        first, second = (json.loads(request.partition(b"\r\n\r\n")[2]) for request in backend.requests)
    assert {key: first.get(key) for key in ("temperature", "top_p", "seed", "stop", "max_tokens")} == {
        "temperature": 0,
        "top_p": 0.5,
        "seed": 1,
        "stop": None,
        "max_tokens": 50,
    }
    assert (second["seed"], second["stop"], second.get("temperature")) == (9, ["x"], None)


# Loops


async def test_request_that_this_gateway_sent_is_508() -> None:
    async with serving(api_keys=[KEY]) as (gateway, _):
        gateway_id = gateway.gateway._context.gateway_id.decode()
        for via in (gateway_id, f"other, {gateway_id}"):
            assert code(await post(gateway, {}, {"x-gateway-via": via})) == (508, "loop_detected")


async def test_request_of_another_gateway_is_served_and_goes_on_with_both_ids() -> None:
    async with serving() as (gateway, backend):
        assert (await post(gateway, {}, {"x-gateway-via": "another"})).status == 200
        assert b"X-Gateway-Via: another, " + gateway.gateway._context.gateway_id in backend.requests[0]


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_gateway_whose_backend_is_itself_says_so(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A program and the gateway that share one `.env` do that."""
    port, listen = free_port(), drain.listen
    monkeypatch.setattr("gateway.downstream.server.listen", lambda host, _: listen(host, port))
    settings = config.build(
        {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "base_url": f"http://127.0.0.1:{port}/v1", **TIMES}},
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "api_keys": [KEY],
            "state_file": "",
        }
    )
    async with running(settings) as gateway:
        for stream in (False, True):
            assert code(await post(gateway, {"stream": stream}, {"Authorization": f"Bearer {KEY}"})) == (
                508,
                "loop_detected",
            )
    assert "this is the gateway itself" in caplog.text


# Ids


@pytest.mark.parametrize("given", ["abc", "A-1.b:c_2", "x" * 128])
async def test_clients_own_request_id_is_kept(given: str) -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, {"x-request-id": given})).headers["x-request-id"] == given
        assert gateway.exchanges()[-1]["request_id"] == given


@pytest.mark.parametrize("given", [b"", b"x" * 129, b"a b", b"<script>", b"\xff", b"a\tb"])
def test_odd_request_id_is_replaced(given: bytes) -> None:
    minted = request_id_of({b"x-request-id": given})
    assert minted.startswith("req-")
    assert minted != request_id_of({})


async def test_every_answer_has_an_id_of_its_own() -> None:
    async with serving() as (gateway, _):
        ids = {json.loads((await post(gateway, {})).body)["id"] for _ in range(5)}
        assert len(ids) == 5
        assert all(one.startswith("chatcmpl-") for one in ids)


# Browsers


@pytest.mark.parametrize(("body", "status"), [({}, 200), ({"stream": True}, 200), ({"model": "nope"}, 404)])
async def test_listed_origin_may_read_whatever_is_answered(body: dict[str, Any], status: int) -> None:
    async with serving(cors_origins=["https://app.example"]) as (gateway, _):
        reply = await post(gateway, body, {"Origin": "https://app.example"})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, "https://app.example")
        assert (
            "access-control-allow-origin" not in (await post(gateway, body, {"Origin": "https://evil.example"})).headers
        )


# The end


async def test_gateway_that_stops_refuses_what_is_new() -> None:
    async with serving() as (gateway, _):
        gateway.gateway.begin_drain()
        assert (await post(gateway, {})).status == 200
        gateway.gateway.cut_off()
        reply = await post(gateway, {})
        assert code(reply) == (503, "shutting_down")
        assert int(reply.headers["retry-after"]) > 0
