"""Servers that answer their probes and fail their requests: how many requests that costs, on real sockets.

Covers: gateway/upstream/outlier_detection.py
Covers: gateway/relay/stalls.py
Covers: gateway/relay/supervised.py
Covers: gateway/relay/failover.py
"""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.rollout.assignment import Canary
from gateway.upstream import outlier_detection
from gateway.upstream.outlier_detection import HANGS, IN_A_ROW, OutlierDetector
from gateway.upstream.retry_budget import LEAST
from gateway.upstream.server import Server
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend
from tests.fakes.running_gateway import PATIENCE, TIMES, Reply, Running, running, until
from tests.fakes.virtual_time import within

pytestmark = pytest.mark.uvloop

REQUESTS = 200
CLIENTS = 8
LOST_OF_HALF = 10
"""Upper bound of the requests lost to a server that fails half of its requests, before it is ejected."""
AUTHORIZED = "Authorization: Bearer {}"


def settings(
    urls: list[str], other_url: str | None = None, keys: list[str] | None = None, **limits: Any
) -> config.Settings:
    """Build settings with a tier on a vLLM at `urls`, and an Ollama at `other_url` as its fallback."""
    times = {**TIMES, "first_token_timeout": 5, "idle_timeout": 5, "total_timeout": 10, "probe_interval": 0.2}
    backends: dict[str, Any] = {
        "vllm": {
            "kind": "vllm",
            "balance": "least_busy",
            "servers": [{"base_url": url} for url in urls],
            **times,
            **limits,
        }
    }
    if other_url is not None:
        many = {"max_concurrency": 64, "model_concurrency": 64}
        backends["ollama"] = {"kind": "ollama", "base_url": other_url, **times, **many}
    return config.build(
        {
            "llm_backend": "vllm",
            "backends": backends,
            "tiers": {"standard": {"models": dict.fromkeys(backends, MODEL), "fallback": other_url is not None}},
            "log_format": "json",
            "state_file": "",
            **({"api_keys": ",".join(keys)} if keys else {}),
        }
    )


@asynccontextmanager
async def sick_server(
    mode: str, *peers: str, fallback: bool = False, keys: list[str] | None = None, **limits: Any
) -> AsyncIterator[tuple[Running, list[FaultBackend]]]:
    """Start a gateway with a server in `mode`, others in the modes `peers`, and perhaps a healthy fallback.

    The fallback comes last.
    """
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(FaultBackend("vllm", name)) for name in (mode, *peers)]
        urls = [server.base_url for server in found]
        other = await stack.enter_async_context(FaultBackend("ollama")) if fallback else None
        built = settings(urls, other.base_url if other else None, keys, **limits)
        yield await stack.enter_async_context(running(built)), [*found, *([other] if other else [])]


def server_of(gateway: Running, number: int = 0) -> Server:
    return gateway.gateway._backends["vllm"].servers[number]


def detector_of(gateway: Running, number: int = 0) -> OutlierDetector:
    return server_of(gateway, number).gate(MODEL, "text")


async def ask(gateway: Running, *headers: str, stream: bool = True) -> Reply:
    async with asyncio.timeout(30), gateway.sent({"stream": stream}, *headers) as raw:
        return await raw.reply()


def is_lost(reply: Reply) -> bool:
    return reply.status != 200 or reply.error is not None or reply.text != TEXT


async def lost_of(gateway: Running, requests: int = REQUESTS, clients: int = CLIENTS) -> int:
    """Send requests from several clients at once. Return how many were not answered."""
    left = iter(range(requests))

    async def client() -> int:
        return sum([is_lost(await ask(gateway, stream=bool(number % 2))) for number in left])

    return sum(await asyncio.gather(*(client() for _ in range(clients))))


# What a sick server costs

BROKEN = [
    ("breaks", 0),
    ("rst", 0),
    ("close", 0),
    ("head_alone", 0),
    ("garbage", 0),
    ("html", IN_A_ROW),  # an answer came, so it is not asked for again
    ("invalid_json", IN_A_ROW),
    ("truncated", IN_A_ROW),
    ("missing", 0),
]


@pytest.mark.parametrize(("mode", "most"), BROKEN)
@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "another server"])
async def test_server_that_fails_every_request_costs_at_most_a_few(mode: str, most: int, fallback: bool) -> None:
    peers = () if fallback else ("healthy",)
    if not fallback and mode in ("garbage", "head_alone"):
        most = IN_A_ROW  # a byte came, if only of a head: another server of the backend is not asked
    async with sick_server(mode, *peers, fallback=fallback) as (gateway, (sick, *_)):
        # The requests that were in flight when the server was ejected have failed with it.
        assert await lost_of(gateway) <= (most and most + CLIENTS)
        assert len(sick.requests) <= 4 * CLIENTS
        await until(gateway.is_idle)


@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "another server"])
async def test_server_that_fails_half_of_its_requests_is_ejected(fallback: bool) -> None:
    peers = () if fallback else ("healthy",)
    async with sick_server("healthy", *peers, fallback=fallback) as (gateway, (sick, *_)):
        sick.script.extend(["breaks", "healthy", "healthy", "breaks"] * REQUESTS)
        assert await lost_of(gateway) <= LOST_OF_HALF
        assert detector_of(gateway).restrains


async def test_requests_in_flight_when_a_server_starts_to_fail_are_all_served_elsewhere() -> None:
    """Their number is bounded by what was in flight, so they need no retry budget."""
    async with sick_server("silent", fallback=True, max_concurrency=40, model_concurrency=40) as (gateway, (sick, _)):
        asked = [asyncio.create_task(ask(gateway)) for _ in range(40)]
        await until(lambda: len(sick.requests) == 40)
        for peer in sick.open_peers:
            peer.reset()
        assert not any(map(is_lost, await asyncio.gather(*asked)))


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize("fallback", [True, False], ids=["fallback", "another server"])
async def test_hung_server_costs_two_requests_their_first_token(fallback: bool) -> None:
    """Those that wait there with them are moved when it is ejected, and the next ones are not sent there."""
    peers = () if fallback else ("healthy",)
    async with sick_server("silent", *peers, fallback=fallback, first_token_timeout=0.4) as (gateway, (sick, *_)):
        assert await lost_of(gateway) <= HANGS
        assert len(sick.requests) <= 2 * CLIENTS
        assert detector_of(gateway).reason == outlier_detection.HANG
        await until(gateway.is_idle)
        served = Counter(line["outcome"] for line in gateway.exchanges())
        assert gateway.metric("gateway_retries_total", reason=outlier_detection.HANG) <= CLIENTS - HANGS
        assert served == {"timeout": HANGS, "ok": REQUESTS - HANGS}
        statuses = Counter(line["status"] for line in gateway.exchanges())
        assert statuses == {504: HANGS, 200: REQUESTS - HANGS}


async def test_requests_at_a_hung_server_go_first_where_the_other_servers_are_busy() -> None:
    """They go back to the queue, instead of waiting for their timeouts."""
    limits: dict[str, Any] = {"max_concurrency": 2, "model_concurrency": 2, "first_token_timeout": 5}
    async with sick_server("silent", "slow", **limits) as (gateway, (sick, busy)), AsyncExitStack() as clients:
        for _ in range(4):
            await clients.enter_async_context(gateway.sent({"stream": True}))
        await until(lambda: (len(sick.requests), len(busy.requests)) == (2, 2))
        queued = await clients.enter_async_context(gateway.sent({"stream": True}))
        await until(lambda: gateway.waiting == 1)
        detector_of(gateway).stall({""})
        await until(lambda: (gateway.waiting, gateway.running) == (3, 2))
        assert gateway.metric("gateway_retries_total", reason=outlier_detection.HANG) == 2
        busy.mode = "healthy"
        for peer in busy.open_peers:
            peer.reset()
        assert not is_lost(await queued.reply())
        await until(lambda: (gateway.waiting, gateway.running) == (0, 0))
        attempts = sorted((line["attempts"], line["outcome"]) for line in gateway.exchanges())
        assert attempts[0] == (1, "ok"), attempts
        assert attempts.count((2, "ok")) == 2, attempts
        assert len(sick.requests) == 2


async def test_request_that_could_not_leave_a_hung_server_leaves_once_another_one_is_up() -> None:
    async with sick_server("silent", "healthy", first_token_timeout=60, total_timeout=60) as (gateway, (sick, _)):
        other = server_of(gateway, 1)
        other.circuit.probe_missed(is_sure=True)
        async with gateway.sent({"stream": True}) as raw:
            await until(lambda: len(sick.requests) == 1)
            detector_of(gateway).stall({""})
            assert gateway.running == 1
            other.circuit.probe_answered()
            assert (await raw.reply()).text == TEXT
        assert gateway.exchanges()[-1]["duration"] < 30


@pytest.mark.virtual_time
async def test_server_that_stalls_loses_no_request_if_its_usual_first_token_time_is_known() -> None:
    """After a few answers, three requests that wait far longer than usual show that nothing comes any more."""
    async with sick_server("healthy", fallback=True, first_token_timeout=4) as (gateway, (sick, _)):
        assert await lost_of(gateway, 2 * outlier_detection.ENOUGH_SAMPLES) == 0
        sick.mode = "silent"
        begun = asyncio.get_running_loop().time()
        assert await lost_of(gateway, 4 * CLIENTS) == 0
        assert asyncio.get_running_loop().time() - begun < within(4)
        assert detector_of(gateway).reason == outlier_detection.STALL


@pytest.mark.virtual_time
async def test_request_on_trial_of_a_server_that_still_hangs_is_moved_early() -> None:
    async with sick_server("healthy", fallback=True, first_token_timeout=4) as (gateway, (sick, _)):
        for _ in range(outlier_detection.ENOUGH_SAMPLES):
            assert not is_lost(await ask(gateway))
        sick.mode = "silent"
        detector = detector_of(gateway)
        detector.stall({""})
        detector.until = 0.0
        begun = asyncio.get_running_loop().time()
        reply = await ask(gateway)
        assert (is_lost(reply), reply.headers["x-gateway-backend"]) == (False, "ollama")
        assert asyncio.get_running_loop().time() - begun < within(4)
        assert (detector.word, len(sick.requests)) == ("ejected", outlier_detection.ENOUGH_SAMPLES + 1)


async def test_slow_first_token_is_not_taken_for_a_hang_while_others_stream() -> None:
    async with sick_server("healthy", fallback=True, first_token_timeout=4) as (gateway, (server, _)):
        assert await lost_of(gateway, 2 * outlier_detection.ENOUGH_SAMPLES) == 0
        server.mode = "slow"
        async with gateway.sent({"stream": True}) as streaming, AsyncExitStack() as clients:
            await streaming.head()
            server.mode = "silent"
            for _ in range(4):
                await clients.enter_async_context(gateway.sent({"stream": True}))
            await until(lambda: gateway.running == 5)
            for _ in range(3):
                gateway.gateway._in_flight._sweep(gateway.gateway._context.clock() + 0.5)
            assert not detector_of(gateway).restrains


# Ejection and readmission


async def test_probe_does_not_readmit_a_server_but_a_trial_request_does(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outlier_detection, "BASE_SECONDS", 60.0)  # longer than the test, which ends each ejection
    caplog.set_level("INFO", "gateway.upstream.restraints")
    async with sick_server("breaks", fallback=True) as (gateway, (sick, other)):
        assert await lost_of(gateway, 20) == 0
        detector = detector_of(gateway)
        before, sent = sick.probes, len(sick.requests)
        await until(lambda: sick.probes >= before + 2)
        assert server_of(gateway).circuit.state == "closed"
        assert detector.word == "ejected"
        detector.until = time.monotonic()
        assert (await ask(gateway)).headers["x-gateway-backend"] == "ollama"
        assert len(sick.requests) == sent + 1, "the request on trial failed, and the fallback served it"
        assert (detector.word, detector.until - detector.ejected_at) == ("ejected", 120.0)
        sick.mode = "healthy"
        assert (await ask(gateway)).headers["x-gateway-backend"] == "ollama"
        detector.until = time.monotonic()
        assert (await ask(gateway)).headers["x-gateway-backend"] == "vllm"
        assert not detector.restrains
        assert await lost_of(gateway, 20) == 0
        assert len(other.requests) == 22, "the first 20, and the two asked while it was ejected"
        told = [message for message in caplog.messages if "ejected" in message or "readmitted" in message]
        assert [message.split(",")[0] for message in told] == [
            f"backend vllm: ejected for '{MODEL}' (text)",
            f"backend vllm: ejected for '{MODEL}' (text)",
            f"backend vllm: readmitted for '{MODEL}' (text)",
        ]


async def test_only_one_request_is_on_trial_and_the_others_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlier_detection, "BASE_SECONDS", 0.1)
    async with sick_server("breaks", "healthy") as (gateway, (sick, _)):
        assert await lost_of(gateway, 20) == 0
        await until(lambda: detector_of(gateway).word == "trial" and not server_of(gateway).circuit.is_paused)
        sent, sick.mode = len(sick.requests), "silent"
        asked = [asyncio.create_task(ask(gateway)) for _ in range(10)]
        await until(lambda: sum(task.done() for task in asked) == 9)
        assert len(sick.requests) == sent + 1
        sick.mode = "rst"  # its kept connection may count as stale, so that it is sent there once more
        for peer in sick.open_peers:
            peer.reset()
        assert not any(map(is_lost, await asyncio.gather(*asked)))


async def test_killed_and_restarted_server_is_not_ejected() -> None:
    """Its death explains its failures; the circuit breaker decides when it gets requests again."""
    async with sick_server("silent", fallback=True) as (gateway, (sick, _)):
        asked = [asyncio.create_task(ask(gateway)) for _ in range(20)]
        await until(lambda: len(sick.requests) == 20)
        sick.die()
        assert not any(map(is_lost, await asyncio.gather(*asked)))
        await until(lambda: server_of(gateway).circuit.is_open)
        assert not detector_of(gateway).restrains
        sick.mode = "healthy"
        await sick.revive()
        await until(lambda: server_of(gateway).circuit.state == "closed")
        sent = len(sick.requests)
        await asyncio.gather(*(ask(gateway) for _ in range(8)))
        assert len(sick.requests) > sent


async def test_request_to_load_a_model_does_not_readmit_a_server() -> None:
    """It is answered without asking the server."""
    async with sick_server("breaks", "healthy") as (gateway, _), httpx2.AsyncClient(trust_env=False) as client:
        assert await lost_of(gateway, 20) == 0
        detector = detector_of(gateway)
        detector.until = 0.0
        for _ in range(4):
            reply = await client.post(f"{gateway.base_url}/api/generate", json={"model": "standard"})
            assert (reply.status_code, reply.json()["done"]) == (200, True)
        assert detector.word == "trial"


# Without an alternative


async def test_last_server_that_fails_is_not_taken_out() -> None:
    """Requests that it can serve are served, though most fail."""
    async with sick_server("breaks") as (gateway, (sick,)):
        assert await lost_of(gateway, 20) == 20
        assert detector_of(gateway).restrains
        sick.script.extend(["breaks", "healthy"] * 10)
        assert await lost_of(gateway, 20, clients=1) == 10
        assert server_status(gateway)["gets_requests"] is True


@pytest.mark.virtual_time(only=True)
async def test_last_server_that_hangs_gets_one_request_at_a_time_and_the_rest_are_refused_at_once() -> None:
    async with sick_server("silent", first_token_timeout=0.3) as (gateway, (sick,)), AsyncExitStack() as clients:
        replies = await asyncio.gather(*(ask(gateway) for _ in range(HANGS)))
        assert [reply.status for reply in replies] == [504] * HANGS
        sent = len(sick.requests)
        raw = await clients.enter_async_context(gateway.sent({"stream": True}))
        await until(lambda: len(sick.requests) == sent + 1)
        reply = await ask(gateway)
        assert (reply.status, reply.error and reply.error["code"]) == (503, "backend_unavailable")
        assert 1 <= int(reply.headers["retry-after"]) <= 60
        assert (await raw.reply()).status == 504
        sick.mode = "healthy"
        assert not is_lost(await ask(gateway)), "the request on trial"
        assert await lost_of(gateway, 20) == 0


async def test_all_servers_ejected_still_get_requests() -> None:
    async with sick_server("breaks", "breaks") as (gateway, found):
        assert await lost_of(gateway, 40) == 40
        assert all(detector_of(gateway, number).restrains for number in range(2))
        before = sum(len(server.requests) for server in found)
        for server in found:
            server.mode = "healthy"
        assert await lost_of(gateway, 20) == 0
        assert sum(len(server.requests) for server in found) == before + 20


async def test_restart_of_all_servers_at_once_leaves_none_out() -> None:
    async with sick_server("silent", "silent", max_concurrency=8, model_concurrency=8) as (gateway, found):
        asked = [asyncio.create_task(ask(gateway)) for _ in range(12)]
        await until(lambda: sum(len(server.requests) for server in found) == 12)
        for server in found:
            server.mode = "healthy"
            server.die()
        await asyncio.gather(*asked)
        for server in found:
            await server.revive()
        await until(lambda: all(server_of(gateway, number).circuit.state == "closed" for number in range(2)))
        assert await lost_of(gateway, 40) == 0


# One client's odd requests


async def test_one_client_cannot_eject_a_server_for_the_others() -> None:
    """A's requests make the engine fail; B's are served there before, between and after them."""
    keys = ["sk-first", "sk-second"]
    async with sick_server("healthy", fallback=True, keys=keys) as (gateway, (server, other)):
        a, b = (AUTHORIZED.format(key) for key in keys)
        assert (await ask(gateway, b)).headers["x-gateway-backend"] == "vllm"
        for _ in range(10):
            server.script.extend(["breaks"] * IN_A_ROW)
            for _ in range(IN_A_ROW):
                await ask(gateway, a)
            server.script.clear()
            assert (await ask(gateway, b)).headers["x-gateway-backend"] == "vllm"
        assert not detector_of(gateway).restrains
        assert len(other.requests) <= 2 * LEAST, "within the retry budget"


async def test_failures_of_several_clients_eject_a_server() -> None:
    keys = ["sk-first", "sk-second"]
    async with sick_server("healthy", fallback=True, keys=keys) as (gateway, (server, _)):
        for key in keys:
            assert not is_lost(await ask(gateway, AUTHORIZED.format(key)))
        server.mode = "breaks"
        replies = [await ask(gateway, AUTHORIZED.format(keys[number % 2])) for number in range(10)]
        assert not any(map(is_lost, replies))
        assert detector_of(gateway).restrains
        assert len(server.requests) == 2 + IN_A_ROW


# A kept connection that is stale, then a new one that fails


@pytest.mark.parametrize("mode", ["rst", "close", "head_alone", "breaks"])
async def test_request_that_met_a_stale_connection_and_a_dying_server_is_served_by_the_fallback(mode: str) -> None:
    async with sick_server("stale", fallback=True) as (gateway, (sick, other)):
        assert not is_lost(await ask(gateway))
        sick.script += ["stale", mode]
        reply = await ask(gateway)
        assert (is_lost(reply), reply.headers["x-gateway-backend"]) == (False, "ollama")
        assert (len(sick.requests), len(other.requests)) == (3, 1)


async def test_request_is_not_sent_again_once_a_byte_of_its_answer_came() -> None:
    async with sick_server("stale", fallback=True) as (gateway, (sick, other)):
        assert not is_lost(await ask(gateway))
        sick.script += ["stale", "truncated"]
        assert is_lost(await ask(gateway, stream=False))
        assert not other.requests


# The roll-out


async def test_canary_on_an_ejected_server_is_served_by_the_fallback_and_the_guard_sees_it() -> None:
    async with sick_server("breaks", fallback=True) as (gateway, _):
        gateway.gateway.rollout.rollback(to="ollama")
        gateway.gateway.rollout.set("ollama", Canary("vllm", 50.0))
        tasks = [ask(gateway, f"x-gateway-session: {number}") for number in range(40)]
        assert not any(map(is_lost, await asyncio.gather(*tasks)))
        assert detector_of(gateway).restrains
        await until(gateway.is_idle)
        chosen = [line for line in gateway.exchanges() if line["chosen"] == "vllm"]
        assert chosen
        assert {line["backend"] for line in chosen} == {"ollama"}, "which the guard counts as failures of the canary"


async def test_rollback_away_from_and_to_an_ejected_server_loses_no_request() -> None:
    async with sick_server("breaks", fallback=True) as (gateway, _):
        assert await lost_of(gateway, 20) == 0
        assert detector_of(gateway).restrains
        gateway.gateway.rollout.rollback(to="ollama")
        assert (await ask(gateway)).headers["x-gateway-backend"] == "ollama"
        gateway.gateway.rollout.undo()
        assert await lost_of(gateway, 20) == 0


async def test_queued_requests_that_a_rollback_moves_to_a_server_that_hangs_are_served_by_the_fallback() -> None:
    async with sick_server("silent", fallback=True, first_token_timeout=30, queue_timeout=30) as (gateway, (_, other)):
        gateway.gateway.rollout.rollback(to="ollama")
        backend = gateway.gateway._backends["ollama"]
        backend.servers[0].slots.limit = 1
        other.mode = "silent"
        first = asyncio.create_task(ask(gateway))
        await until(lambda: len(other.requests) == 1)
        queued = [asyncio.create_task(ask(gateway)) for _ in range(5)]
        await until(lambda: backend.admission.waiting("text") == 5)
        detector_of(gateway).stall({""})
        other.mode = "healthy"
        gateway.gateway.rollout.rollback(to="vllm")
        assert backend.admission.waiting("text") == 5
        backend.servers[0].slots.limit = 64
        backend.admission.refresh()
        async with asyncio.timeout(PATIENCE):
            replies = await asyncio.gather(*queued)
        assert {(is_lost(reply), reply.headers["x-gateway-backend"]) for reply in replies} == {(False, "ollama")}
        for peer in other.open_peers:
            peer.reset()
        first.cancel()


async def test_request_that_moves_to_a_server_that_hangs_goes_on_to_a_third_backend() -> None:
    async with AsyncExitStack() as stack:
        sick = await stack.enter_async_context(FaultBackend("vllm", "silent"))
        busy, spare = [await stack.enter_async_context(FaultBackend("ollama")) for _ in range(2)]
        built = config.build(
            {
                "llm_backend": "ollama",
                "rollback_to": "vllm",
                "backends": {
                    "ollama": {"base_url": busy.base_url, **TIMES, "max_concurrency": 1, "first_token_timeout": 30},
                    "vllm": {"base_url": sick.base_url, **TIMES, "first_token_timeout": 30},
                    "spare": {"kind": "ollama", "base_url": spare.base_url, **TIMES},
                },
                "tiers": {"standard": {"models": dict.fromkeys(("ollama", "vllm", "spare"), MODEL), "fallback": True}},
                "log_format": "json",
                "state_file": "",
            }
        )
        gateway = await stack.enter_async_context(running(built))
        busy.mode = "silent"
        first = asyncio.create_task(ask(gateway))
        await until(lambda: len(busy.requests) == 1)
        queued = [asyncio.create_task(ask(gateway)) for _ in range(3)]
        admission = gateway.gateway._backends["ollama"].admission
        await until(lambda: admission.waiting("text") == 3)
        detector_of(gateway).stall({""})
        gateway.gateway.rollout.rollback(to="vllm")
        async with asyncio.timeout(PATIENCE):
            replies = await asyncio.gather(*queued)
        assert {(is_lost(reply), reply.headers["x-gateway-backend"]) for reply in replies} == {(False, "spare")}
        assert not sick.requests
        first.cancel()


# Status and metrics


def server_status(gateway: Running, number: int = 0) -> dict[str, Any]:
    status: dict[str, Any] = gateway.gateway._operations.status()["backends"]["vllm"]["servers"][number]
    return status


async def test_status_and_metrics_show_an_ejection() -> None:
    async with sick_server("breaks", "healthy") as (gateway, _):

        async def gauges() -> list[float]:
            await gateway.gateway._operations.exposition("")
            return [
                gateway.metric("gateway_server_up", backend="vllm", server="1"),
                gateway.metric("gateway_server_up", backend="vllm", server="2"),
                gateway.metric("gateway_circuit_state", backend="vllm"),
                gateway.metric("gateway_backend_up", backend="vllm"),
            ]

        assert await gauges() == [1, 1, 0, 1]
        assert await lost_of(gateway, 20) == 0
        await until(lambda: server_of(gateway).circuit.state == "closed")
        (ejection,) = server_status(gateway)["ejections"]
        assert (ejection["model"], ejection["lane"], ejection["state"], ejection["reason"]) == (
            MODEL,
            "text",
            "ejected",
            "status_5xx",
        )
        assert ejection["until"].endswith("Z")
        assert [server_status(gateway, number)["gets_requests"] for number in range(2)] == [False, True]
        assert await gauges() == [0, 1, 0, 1]
        assert gateway.metric("gateway_retries_total", backend="vllm", reason="status_5xx") >= IN_A_ROW


async def test_ejected_only_server_is_level_two() -> None:
    async with sick_server("breaks", fallback=True) as (gateway, _):
        assert await lost_of(gateway, 20) == 0
        await until(lambda: server_of(gateway).circuit.state == "closed")
        await gateway.gateway._operations.exposition("")
        assert gateway.metric("gateway_circuit_state", backend="vllm") == 2
        assert gateway.metric("gateway_server_up", backend="vllm", server="1") == 0
