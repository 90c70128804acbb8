"""Common behaviour of the data endpoints: keys, body limits, loops, CORS and shutdown."""

import asyncio
import json
from typing import Any

import pytest

from gateway import config
from gateway.api.paths import CHAT_PATH
from gateway.downstream import server
from tests.api.one_backend import KEY, code, document, exchange, post, serving
from tests.fakes.fault_backend import MODEL
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, TIMES, Raw, running
from tests.real_engines.process import free_port

pytestmark = pytest.mark.uvloop


# Keys


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic client-key"}],
    ids=["no key", "wrong key", "Basic"],
)
async def test_wrong_key_is_refused_before_the_body_is_read(headers: dict[str, str]) -> None:
    async with serving(api_keys=[KEY]) as (gateway, backend):
        reply = await exchange(gateway, {"Content-Type": "application/json", "Content-Length": "100000", **headers})
        assert code(reply) == (401, "invalid_api_key")
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["x-request-id"]
        assert not backend.requests


async def test_valid_key_is_accepted_and_only_its_id_is_logged() -> None:
    async with serving(api_keys=[KEY]) as (gateway, backend):
        assert (await post(gateway, {}, {"Authorization": f"Bearer {KEY}"})).status == 200
        line = gateway.exchanges()[-1]
        assert len(line["key_id"]) == 8
        assert KEY not in gateway.log.getvalue().decode()
        assert KEY.encode() not in backend.requests[0]


async def test_each_request_on_a_connection_is_authenticated() -> None:
    """A cached head authenticates only requests with the same head."""
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x"}]}).encode()
    async with serving(api_keys=[KEY]) as (gateway, _), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        statuses = []
        for key in (KEY, KEY, "client-kex"):
            head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(body)}\r\n"
            writer.write(f"{head}Authorization: Bearer {key}\r\n\r\n".encode() + body)
            statuses.append((await Raw(reader, writer).reply()).status)
        writer.close()
    assert statuses == [200, 200, 401]


async def test_key_that_was_taken_away_is_refused_on_connections_that_are_open() -> None:
    """The head is the same as before, and what was found out about it does not count any longer."""
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x"}]}).encode()
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nAuthorization: Bearer {KEY}\r\n\r\n"
    async with serving(api_keys=[KEY, "another-key"]) as (gateway, backend), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        statuses = []
        for keys in ([KEY, "another-key"], [KEY], ["another-key"], ["another-key", KEY]):
            settings = config.build(document(backend, api_keys=keys))
            await gateway.gateway.reload.run(lambda settings=settings: settings, "file")  # type: ignore[misc]
            for _ in range(2):
                writer.write(head.encode() + body)
                statuses.append((await Raw(reader, writer).reply()).status)
        writer.close()
    assert statuses == [200, 200, 200, 200, 401, 401, 200, 200]


# Request body


async def test_announced_size_over_the_limit_is_refused_before_the_body_is_read() -> None:
    async with serving(max_body="10KiB", max_text_body="10KiB") as (gateway, _):
        reply = await exchange(gateway, {"Content-Type": "application/json", "Content-Length": "10241"})
        assert code(reply) == (413, "request_too_large")


async def test_each_request_on_a_connection_has_to_keep_to_the_limit() -> None:
    """Such a body arrives in one piece behind a head that was accepted before. Most of it is an image."""
    picture = png_data_url(47, is_noise=True)
    async with serving(max_body="10KiB", max_text_body="4KiB") as (gateway, backend), asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        raw, replies = Raw(reader, writer), []
        for size in (10_240, 10_240, 10_241):
            content = [{"type": "image_url", "image_url": {"url": picture}}]
            body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": content}]}).encode()
            body = body.ljust(size)
            head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {size}\r\n\r\n".encode() + body)
            replies.append(await raw.reply())
        writer.close()
        assert [reply.status for reply in replies] == [200, 200, 413]
        assert code(replies[-1]) == (413, "request_too_large")
        assert replies[-1].error is not None
        assert "at most 10240 bytes" in replies[-1].error["message"]
        assert len(backend.requests) == 2


async def test_body_that_grows_over_the_limit_is_refused() -> None:
    async with serving(max_body="10KiB", max_text_body="10KiB") as (gateway, _):
        chunks = b"800\r\n" + b"x" * 2048 + b"\r\n"
        reply = await exchange(
            gateway, {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}, chunks * 6
        )
        assert code(reply) == (413, "request_too_large")


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Type": "text/plain"},
        {"Content-Type": ""},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/jsonp"},
        {"Content-Encoding": "gzip"},
    ],
    ids=["text", "no type", "form", "similar type", "gzip"],
)
async def test_body_that_is_not_plain_json_is_415(headers: dict[str, str]) -> None:
    async with serving() as (gateway, _):
        assert code(await post(gateway, {}, headers)) == (415, "unsupported_media_type")


@pytest.mark.parametrize("media_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_json_media_type_is_accepted_in_any_spelling(media_type: str) -> None:
    async with serving() as (gateway, _):
        assert (await post(gateway, {}, {"Content-Type": media_type})).status == 200


# Loops


async def test_request_sent_by_this_gateway_is_508() -> None:
    async with serving(api_keys=[KEY]) as (gateway, _):
        gateway_id = gateway.gateway._context.gateway_id.decode()
        for via in (gateway_id, f"other, {gateway_id}"):
            assert code(await post(gateway, {}, {"x-gateway-via": via})) == (508, "loop_detected")


async def test_request_of_another_gateway_is_forwarded_with_both_ids() -> None:
    async with serving() as (gateway, backend):
        assert (await post(gateway, {}, {"x-gateway-via": "another"})).status == 200
        assert b"X-Gateway-Via: another, " + gateway.gateway._context.gateway_id in backend.requests[0]


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_gateway_that_is_its_own_backend_reports_the_loop(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """This happens if a client program and the gateway share one `.env`."""
    port, listen = free_port(), server.listen
    monkeypatch.setattr("tests.fakes.running_gateway.listen", lambda host, _: listen(host, port))
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


# CORS


@pytest.mark.parametrize(
    ("body", "status"), [({}, 200), ({"stream": True}, 200), ({"model": "nope"}, 404)], ids=["plain", "stream", "error"]
)
async def test_allowed_origin_may_read_every_response(body: dict[str, Any], status: int) -> None:
    async with serving(cors_origins=["https://app.example"]) as (gateway, _):
        reply = await post(gateway, body, {"Origin": "https://app.example"})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (status, "https://app.example")
        assert (
            "access-control-allow-origin" not in (await post(gateway, body, {"Origin": "https://evil.example"})).headers
        )


# Shutdown


async def test_gateway_that_shuts_down_refuses_new_requests() -> None:
    async with serving() as (gateway, _):
        gateway.gateway.begin_drain()
        assert (await post(gateway, {})).status == 200
        gateway.gateway.cut_off()
        reply = await post(gateway, {})
        assert code(reply) == (503, "shutting_down")
        assert int(reply.headers["retry-after"]) > 0
