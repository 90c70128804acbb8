"""Servers that vanish without closing a connection, in virtual time: what ran there ends, in time.

Covers: gateway/upstream/liveness.py
Covers: gateway/upstream/health_checks.py
Covers: gateway/upstream/server.py
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway import config
from gateway.upstream.liveness import GONE_SECONDS
from tests.fakes.fault_backend import MODEL, WORDS, FaultBackend, Kind, Peer, for_ever, mode
from tests.fakes.networks import VanishingHost, vanishing
from tests.fakes.running_gateway import Raw, Running, running

pytestmark = pytest.mark.virtual_time

WITHIN = 30.0
"""Seconds from the vanishing, or from the return, until nothing holds a slot any more."""
PATIENT = {"first_token_timeout": 300, "idle_timeout": 300, "total_timeout": 3600, "queue_timeout": 300}


@mode
async def seldom(peer: Peer) -> None:
    """Send a word every 8 s for two minutes."""
    peer.open_stream()
    for _ in range(15):
        peer.chunk(peer.backend.event(WORDS[0]))
        await asyncio.sleep(8)
    for event in peer.backend.ending():
        peer.chunk(event)
    peer.end_stream()


@mode
async def comments(peer: Peer) -> None:
    """Send one word and then, for two minutes, bytes that mean nothing."""
    peer.open_stream()
    peer.chunk(peer.backend.event(WORDS[0]))
    for _ in range(15):
        peer.chunk(b": still here\n\n")
        await asyncio.sleep(8)
    for event in peer.backend.ending():
        peer.chunk(event)
    peer.end_stream()


@mode
async def ponders(peer: Peer) -> None:
    """Answer after two minutes of silence."""
    await asyncio.sleep(120)
    peer.open_stream()
    for event in peer.backend.events():
        peer.chunk(event)
    peer.end_stream()


@mode
async def accepts(peer: Peer) -> None:
    """Send the head, as vLLM does when it queues a request, and nothing else."""
    if peer.streams:
        peer.open_stream()
    await for_ever()


@asynccontextmanager
async def gateway_behind(
    kind: Kind, *modes: str, tier: dict[str, Any] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, FaultBackend, VanishingHost, FaultBackend]]:
    """Run a gateway whose backend `main` is behind a host that can vanish, and whose `other` is not."""
    async with FaultBackend(kind) as server, FaultBackend("vllm") as other, vanishing(server.port) as host:
        server.script.extend(modes)
        common = {"kind": kind, **PATIENT, **limits}
        settings = config.build(
            {
                "llm_backend": "main",
                "backends": {
                    "main": {**common, "servers": [{"base_url": host.base_url, "models": [MODEL]}]},
                    "other": {"kind": "vllm", "servers": [{"base_url": other.base_url, "models": [MODEL]}]},
                },
                "tiers": {"standard": {"models": {"main": MODEL, "other": MODEL}, **(tier or {})}},
                "log_format": "json",
                "state_file": "",
            }
        )
        async with running(settings) as gateway:
            try:
                yield gateway, server, host, other
            finally:
                await host.close()


async def eventually(condition: Callable[[], bool], patience: float = 5.0) -> None:
    """Wait until `condition` holds, and check it every 0.05 s of virtual time."""
    async with asyncio.timeout(patience):
        while not condition():
            await asyncio.sleep(0.05)


def now() -> float:
    return asyncio.get_running_loop().time()


async def seconds_until_idle(gateway: Running, began: float) -> float:
    await eventually(lambda: gateway.running == 0, patience=400)
    return now() - began


async def first_words(raw: Raw) -> None:
    status, _ = await raw.head()
    assert status == 200
    await raw.reader.readuntil(b"Hello")


async def rest(raw: Raw) -> bytes:
    """Read a stream to its end."""
    return await raw.reader.readuntil(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize("refuses", [False, True], ids=["unanswered", "refused"])
@pytest.mark.parametrize("probe_interval", [5, 60])
async def test_streams_of_a_vanished_server_end_with_an_error_and_free_their_slots(
    kind: Kind, refuses: bool, probe_interval: float
) -> None:
    async with (
        gateway_behind(kind, *["stall"] * 2, model_concurrency=2, probe_interval=probe_interval) as (
            gateway,
            _,
            host,
            _,
        ),
        gateway.sent({"stream": True}) as one,
        gateway.sent({"stream": True}) as two,
    ):
        await first_words(one)
        await first_words(two)
        await asyncio.sleep(7)
        host.vanish(refuses=refuses)
        began = now()
        assert await seconds_until_idle(gateway, began) <= WITHIN
        for raw in (one, two):
            assert b"upstream_error" in await rest(raw)
        assert [exchange["reason"] for exchange in gateway.exchanges()] == ["unresponsive"] * 2


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize("mode", ["silent", "accepts"])
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
async def test_requests_without_a_first_token_go_to_the_fallback(kind: Kind, mode: str, stream: bool) -> None:
    many = 4
    async with gateway_behind(kind, *[mode] * many, tier={"fallback": True}, model_concurrency=many) as (
        gateway,
        server,
        host,
        other,
    ):
        asking = [asyncio.create_task(gateway_ask(gateway, stream)) for _ in range(many)]
        await eventually(lambda: len(server.requests) == many)
        host.vanish()
        began = now()
        assert [reply.status for reply in await asyncio.gather(*asking)] == [200] * many
        assert now() - began <= WITHIN
        assert len(other.requests) == many


async def gateway_ask(gateway: Running, stream: bool, patience: float = 400) -> Any:
    async with asyncio.timeout(patience), gateway.sent({"stream": stream}) as raw:
        return await raw.reply()


async def test_request_without_a_fallback_is_told_so() -> None:
    async with gateway_behind("ollama", "silent") as (gateway, server, host, _):
        asking = asyncio.create_task(gateway_ask(gateway, True))
        await eventually(lambda: len(server.requests) == 1)
        host.vanish()
        began = now()
        reply = await asking
        assert (reply.status, reply.error["code"]) == (502, "upstream_error")
        assert now() - began <= WITHIN


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("has_fallback", [True, False])
async def test_first_token_timeout_at_a_server_that_is_known_to_be_dead_is_no_timeout(
    has_fallback: bool, stream: bool
) -> None:
    """The probes have opened its circuit, and it is not gone for `GONE_SECONDS` yet: it used to be a 504."""
    tier = {"fallback": True} if has_fallback else {}
    async with gateway_behind("vllm", "silent", tier=tier, first_token_timeout=GONE_SECONDS - 5, probe_interval=2) as (
        gateway,
        server,
        host,
        other,
    ):
        asking = asyncio.create_task(gateway_ask(gateway, stream))
        await eventually(lambda: len(server.requests) == 1)
        host.vanish()
        began = now()
        reply = await asking
        assert reply.status == (200 if has_fallback else 502)
        assert len(other.requests) == has_fallback
        assert now() - began < GONE_SECONDS
        assert gateway.metric("gateway_upstream_errors_total", reason="unresponsive") == 1
        assert [exchange["code"] for exchange in gateway.exchanges()] == [None if has_fallback else "upstream_error"]


async def test_queue_of_a_server_that_returns_is_served_while_the_lost_stream_is_ended() -> None:
    """It is away for less time than `GONE_SECONDS`, and its connections stay dead."""
    async with gateway_behind("ollama", "stall", model_concurrency=1, max_concurrency=1) as (gateway, server, host, _):
        async with gateway.sent({"stream": True}) as lost:
            await first_words(lost)
            queued = asyncio.create_task(gateway_ask(gateway, False))
            await eventually(lambda: gateway.waiting == 1)
            host.vanish()
            await asyncio.sleep(15)
            assert gateway.running == 1
            await host.come_back()
            began = now()
            assert (await queued).status == 200
            assert now() - began <= WITHIN
            assert b"upstream_error" in await rest(lost)
        assert len(server.requests) == 2


async def test_request_without_a_first_token_survives_a_pause_of_its_server() -> None:
    """The server has it in its queue still: only an answer that had begun is lost for certain."""
    async with gateway_behind("vllm", "ponders") as (gateway, server, host, _):
        asking = asyncio.create_task(gateway_ask(gateway, True))
        await eventually(lambda: len(server.requests) == 1)
        host.accepts = False
        await asyncio.sleep(12)
        await host.come_back()
        assert (await asking).status == 200
        assert len(server.requests) == 1


@pytest.mark.parametrize("mode", ["seldom", "comments"])
async def test_stream_of_a_restarting_server_is_not_cut_while_bytes_come(mode: str) -> None:
    async with (
        gateway_behind("vllm", mode) as (gateway, server, host, _),
        gateway.sent({"stream": True}) as raw,
    ):
        await eventually(lambda: len(server.requests) == 1)
        host.stop_listening()
        answer = await rest(raw)
        assert b"[DONE]" in answer
        assert b"error" not in answer
        assert gateway.exchanges()[0]["outcome"] == "ok"


async def test_busy_server_that_answers_no_probe_keeps_the_requests_that_wait() -> None:
    """It sends bytes to one request, so the other one is not lost either."""
    async with (
        gateway_behind("vllm", "seldom", "ponders") as (gateway, server, host, _),
        gateway.sent({"stream": True}) as talking,
    ):
        await eventually(lambda: len(server.requests) == 1)
        waiting = asyncio.create_task(gateway_ask(gateway, True))
        await eventually(lambda: len(server.requests) == 2)
        host.accepts = False
        reply = await waiting
        assert (reply.status, reply.error) == (200, None)
        assert b"[DONE]" in await rest(talking)


async def test_long_silence_of_a_server_that_answers_its_probes_ends_nothing() -> None:
    async with gateway_behind("vllm", "ponders", probe_interval=60) as (gateway, _, _, _):
        assert (await gateway_ask(gateway, True)).status == 200


async def test_kept_connections_are_closed_before_a_request_meets_them() -> None:
    async with gateway_behind("ollama") as (gateway, server, host, _):
        assert (await gateway_ask(gateway, False)).status == 200
        pool = gateway.gateway._backends["main"].servers[0].pool
        assert len(pool._idle) == 1
        host.vanish()
        await eventually(lambda: not pool._idle, patience=15)
        await host.come_back()
        await eventually(lambda: gateway.gateway._backends["main"].availability.is_up, patience=15)
        began = now()
        assert (await gateway_ask(gateway, False)).status == 200
        assert now() - began < 1
        assert len(server.requests) == 2


async def test_client_that_leaves_while_its_server_is_away_leaves_nothing_behind() -> None:
    async with gateway_behind("ollama", "stall") as (gateway, _, host, _):
        async with gateway.sent({"stream": True}) as raw:
            await first_words(raw)
            host.vanish()
            await asyncio.sleep(GONE_SECONDS / 2)
        await eventually(gateway.is_idle, patience=5)


async def test_log_says_how_many_requests_were_ended(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway_behind("ollama", "stall") as (gateway, _, host, _), gateway.sent({"stream": True}) as raw:
        await first_words(raw)
        host.vanish()
        await seconds_until_idle(gateway, now())
    assert "backend main: it has vanished or hangs; 1 requests that ran there were ended" in caplog.messages
