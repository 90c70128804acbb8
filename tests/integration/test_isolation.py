"""What the gateway lets through between a client and a backend, and where it connects to.

These are threats S1, S2, S8, S9 and S19 of `docs/security.md`, on real sockets and both kinds of engine.
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import pytest

from tests.fakes import fault_backend
from tests.fakes.fault_backend import TEXT, FaultBackend, Kind, Peer
from tests.fakes.running_gateway import PATIENCE, Raw, Running, request_bytes, running, settings_for

pytestmark = pytest.mark.uvloop

CANARY = "canary-of-a-header"


@pytest.fixture(params=["ollama", "vllm"])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[FaultBackend]:
    kind: Kind = request.param
    async with FaultBackend(kind) as backend:
        yield backend


@pytest.fixture
async def gateway(backend: FaultBackend) -> AsyncIterator[Running]:
    async with running(settings_for(backend)) as gateway:
        yield gateway


@pytest.fixture
def untouchable() -> Iterator[str]:
    """An address that nobody may connect to: `host:port`. The test fails at its end if somebody did."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(BlockingIOError):
            listener.accept()


def client_of(gateway: Running) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)


@asynccontextmanager
async def connected(gateway: Running) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    raw = Raw(reader, writer)
    try:
        yield raw
    finally:
        raw.leave()
        with suppress(OSError):
            await writer.wait_closed()


# S9: headers


CLIENT_HEADERS = (
    "Authorization: Bearer {}",
    "Cookie: session={}",
    "Forwarded: for={}",
    "Keep-Alive: {}",
    "Proxy-Authorization: Basic {}",
    "Proxy-Connection: {}",
    "Te: {}",
    "User-Agent: {}",
    "Via: 1.1 {}",
    "X-Forwarded-For: {}",
    "X-Forwarded-Host: {}",
    "X-Real-Ip: {}",
    "X-{}: 1",
    "Connection: x-{}",
)


async def test_no_header_of_a_client_reaches_a_backend(gateway: Running, backend: FaultBackend) -> None:
    for header in CLIENT_HEADERS:
        async with gateway.sent({}, header.format(CANARY)) as raw:
            assert (await raw.reply()).text == TEXT, header
        assert CANARY.encode() not in backend.requests[-1], header
    assert len(backend.requests) == len(CLIENT_HEADERS)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_no_header_of_a_backend_reaches_a_client(
    gateway: Running, backend: FaultBackend, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("set-cookie", "server", "via", "x-powered-by", "access-control-allow-origin", "location", "keep-alive")
    fields = [f"{name}: {CANARY}".encode() for name in names]

    async def talkative(peer: Peer) -> None:
        """Answer as a healthy server, with more headers."""
        body = b"".join(peer.backend.events()) if peer.streams else peer.backend.document()
        peer.answer(200, peer.media_type, body, *fields)

    monkeypatch.setitem(fault_backend.MODES, "talkative", talkative)
    backend.mode = "talkative"
    reply = await gateway.ask({"stream": stream})
    assert (reply.status, reply.text) == (200, TEXT)
    assert CANARY not in json.dumps(reply.headers)


# S19: proxies and redirects


async def test_proxy_variables_do_not_divert_requests(
    backend: FaultBackend, untouchable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, f"http://{untouchable}")
        monkeypatch.setenv(name.upper(), f"http://{untouchable}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    async with running(settings_for(backend)) as gateway:
        assert (await gateway.ask()).text == TEXT
    assert backend.probes > 0


# S8: paths of engines

ENGINE_PATHS = (
    "/abort_requests",
    "/collective_rpc",
    "/detokenize",
    "/invocations",
    "/load",
    "/pause",
    "/pooling",
    "/reset_prefix_cache",
    "/scale_elastic_ep",
    "/server_info",
    "/sleep",
    "/start_profile",
    "/v1/load_lora_adapter",
    "/wake_up",
)
EVASIONS = (
    "/v1/../api/pull",
    "/v1/%2e%2e/api/pull",
    "/v1/..%2fapi%2fpull",
    "/v1/chat/completions/../../../api/pull",
    "/v1/chat/completions/%2e%2e/%2e%2e/%2e%2e/sleep",
    "//api/pull",
    "/v1/chat/completions;/../sleep",
    "/V1/CHAT/COMPLETIONS",
    "/api%2fpull",
    "/api/pull/",
)


async def test_other_path_of_an_engine_is_refused_and_reaches_no_backend(
    gateway: Running, backend: FaultBackend
) -> None:
    probes = backend.probes
    for path in ENGINE_PATHS + EVASIONS:
        for method in ("POST", "GET"):
            head = f"{method} {path}".encode()
            request = request_bytes({"name": "x"}).replace(b"POST /v1/chat/completions", head, 1)
            async with connected(gateway) as raw:
                raw.writer.write(request)
                reply = await raw.reply()
            assert reply.status in (400, 403, 404, 405), (head, reply.body)
    assert (backend.requests, backend.probes) == ([], probes)


# S1 and S2: addresses in requests


ADDRESSES = ("http://{}/a.png", "HtTp://{}/a.png", "\thttp://{}/a.png", "ht\ntp://{}/a", "//{}/a", "ftp://{}/a")


def messages(part: dict[str, Any], role: str = "user", **more: Any) -> dict[str, Any]:
    return {"model": "standard", "messages": [{"role": role, "content": [part], **more}], "max_tokens": 8}


def address_requests(url: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """The path and the body of requests that name an address, in each API and place that could hold one."""
    chat, file = "/v1/chat/completions", {"type": "file", "file": {"file_data": url, "filename": "a.pdf"}}
    return {
        "image": (chat, messages({"type": "image_url", "image_url": {"url": url}})),
        "image as text": (chat, messages({"type": "image_url", "image_url": url})),
        "image of a tool": (chat, messages({"type": "image_url", "image_url": {"url": url}}, "tool", tool_call_id="a")),
        "audio": (chat, messages({"type": "input_audio", "input_audio": {"data": url, "format": "wav"}})),
        "audio by address": (chat, messages({"type": "audio_url", "audio_url": {"url": url}})),
        "video": (chat, messages({"type": "video_url", "video_url": {"url": url}})),
        "file": (chat, messages(file)),
        "responses": (
            "/v1/responses",
            {
                "model": "standard",
                "input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}],
            },
        ),
        "responses file": (
            "/v1/responses",
            {"model": "standard", "input": [{"role": "user", "content": [{"type": "input_file", "file_url": url}]}]},
        ),
        "messages": ("/v1/messages", messages({"type": "image", "source": {"type": "url", "url": url}})),
        "messages document": ("/v1/messages", messages({"type": "document", "source": {"type": "url", "url": url}})),
        "ollama": (
            "/api/chat",
            {"model": "standard", "messages": [{"role": "user", "content": "a", "images": [url]}]},
        ),
    }


async def test_address_in_a_request_is_refused_and_nothing_connects_to_it(
    gateway: Running, backend: FaultBackend, untouchable: str
) -> None:
    async with client_of(gateway) as client:
        for form in ADDRESSES:
            for place, (path, body) in address_requests(form.format(untouchable)).items():
                answer = await client.post(path, json=body)
                assert answer.status_code == 400, (place, form, answer.text)
    assert backend.requests == []
