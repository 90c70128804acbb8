"""Failover on real sockets: which server or backend serves instead, and what the client gets.

Case numbers are those of the table of faults: 1 to 6, 12 to 16 and 24.
"""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from email.utils import formatdate
from random import Random
from typing import Any

import pytest

from gateway import config
from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.upstream import outlier_detection
from gateway.upstream.backend import Backend
from gateway.upstream.circuit_breaker import IN_A_ROW
from gateway.upstream.failures import LONGEST_PAUSE, retry_seconds
from gateway.upstream.retry_budget import LEAST
from gateway.upstream.server import Server
from tests.fakes.fault_backend import CANARY, MODEL, TEXT, FaultBackend, Kind
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, TIMES, Reply, Running, running, until
from tests.fakes.virtual_time import within
from tests.real_engines.process import free_port

pytestmark = pytest.mark.uvloop

IMAGE = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": png_data_url()}}],
    }
]
OTHER: dict[Kind, Kind] = {"ollama": "vllm", "vllm": "ollama"}
AT_ONCE = 0.25
"""Upper bound, in seconds, for an answer that waits for nothing."""


@pytest.fixture(params=["ollama", "vllm"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


@pytest.fixture(params=[True, False], ids=["stream", "plain"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def settings(
    kind: Kind, urls: list[str], other_url: str | None = None, tier: dict[str, Any] | None = None, **limits: Any
) -> config.Settings:
    """Build settings with a tier on the backend `kind` at `urls`, and a fallback at `other_url`."""
    # No test here is about these timeouts, and most have to know which server gets a request.
    times = {**TIMES, "first_token_timeout": 5, "idle_timeout": 5, "total_timeout": 10}
    if kind == "vllm":
        limits = {"balance": "least_busy", **limits}
    backends: dict[str, Any] = {kind: {"kind": kind, "servers": [{"base_url": url} for url in urls], **times, **limits}}
    models: dict[str, str] = {kind: MODEL}
    if other_url is not None:
        backends[OTHER[kind]] = {"kind": OTHER[kind], "base_url": other_url, **times}
        models[OTHER[kind]] = MODEL
    fallback = {"fallback": True} if other_url is not None else {}
    return config.build(
        {
            "llm_backend": kind,
            "backends": backends,
            "tiers": {"standard": {"models": models, **fallback, **(tier or {})}},
            "log_format": "json",
            "state_file": "",
        }
    )


@asynccontextmanager
async def two_backends(
    kind: Kind, mode: str = "healthy", other_mode: str = "healthy", **more: Any
) -> AsyncIterator[tuple[Running, FaultBackend, FaultBackend]]:
    """Start a gateway whose tier may fall back from the first backend to the second."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(FaultBackend(kind, mode))
        second = await stack.enter_async_context(FaultBackend(OTHER[kind], other_mode))
        yield (
            await stack.enter_async_context(running(settings(kind, [first.base_url], second.base_url, **more))),
            first,
            second,
        )


@asynccontextmanager
async def servers(kind: Kind, *modes: str, **limits: Any) -> AsyncIterator[tuple[Running, list[FaultBackend]]]:
    """Start a gateway with one backend of several servers, without a fallback."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(FaultBackend(kind, mode)) for mode in modes]
        yield (
            await stack.enter_async_context(running(settings(kind, [server.base_url for server in found], **limits))),
            found,
        )


def backend_of(gateway: Running, kind: Kind) -> Backend:
    return gateway.gateway._backends[kind]


def server_of(gateway: Running, kind: Kind, number: int = 0) -> Server:
    return backend_of(gateway, kind).servers[number]


def mark_healthy(gateway: Running, kind: Kind) -> None:
    """Close the circuit, as if probes had found the server healthy."""
    for _ in range(2):
        server_of(gateway, kind).circuit.probe_answered()


def check_served_by(reply: Reply, kind: Kind, attempts: int) -> None:
    headers = reply.headers
    assert (reply.status, reply.text, reply.error) == (200, TEXT, None)
    assert (headers["x-gateway-backend"], headers["x-gateway-model"], headers["x-gateway-attempts"]) == (
        kind,
        MODEL,
        str(attempts),
    )


def code(reply: Reply) -> str | None:
    return None if reply.error is None else reply.error["code"]


# No connection


async def test_connection_refused_goes_to_the_other_backend(kind: Kind, stream: bool) -> None:
    """Case 1."""
    async with two_backends(kind) as (gateway, first, second):
        first.die()
        check_served_by(await gateway.ask({"stream": stream}), OTHER[kind], 2)
        assert len(second.requests) == 1
        assert (
            gateway.metric("gateway_fallbacks_total", tier="standard", from_backend=kind, to_backend=OTHER[kind]) == 1
        )
        assert gateway.metric("gateway_retries_total", backend=kind, reason="connect") == 1
        assert gateway.metric("gateway_upstream_errors_total", backend=kind, reason="connect") == 1
        assert gateway.metric("gateway_requests_total", backend=OTHER[kind], outcome="ok") == 1
        await until(gateway.is_idle)
        (line,) = gateway.exchanges()
        assert (line["backend"], line["attempts"], line["status"]) == (OTHER[kind], 2, 200)


@pytest.mark.virtual_time
async def test_connection_refused_everywhere_is_a_502_and_a_503_once_the_circuit_is_open(
    kind: Kind, stream: bool
) -> None:
    """Case 2; while the circuit is open, `Retry-After` is the time to the next probe."""
    async with servers(kind, "healthy", probe_interval=7.5) as (gateway, (server,)):
        server.die()
        for _ in range(IN_A_ROW):
            reply = await gateway.ask({"stream": stream})
            assert (reply.status, code(reply), reply.headers["x-gateway-attempts"]) == (502, "upstream_error", "1")
        await until(lambda: server_of(gateway, kind).circuit.is_open)
        begun = asyncio.get_running_loop().time()
        reply = await gateway.ask({"stream": stream})
        assert asyncio.get_running_loop().time() - begun < within(AT_ONCE)
        assert (reply.status, code(reply), reply.headers["retry-after"], reply.headers["x-gateway-attempts"]) == (
            503,
            "backend_unavailable",
            "8",
            "0",
        )
        assert gateway.metric("gateway_rejected_total", backend=kind, reason="backend_unavailable") == 1


async def test_server_that_is_down_at_the_start_is_a_503() -> None:
    async with running(settings("ollama", [f"http://127.0.0.1:{free_port()}"])) as gateway:
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["retry-after"]) == (503, "backend_unavailable", "60")


async def test_unresolvable_name_is_treated_as_a_refused_connection() -> None:
    """Case 3."""
    nowhere = "http://backend.invalid:1"
    async with FaultBackend("vllm") as other, running(settings("ollama", [nowhere], other.base_url)) as gateway:
        check_served_by(await gateway.ask(), "vllm", 1)
        mark_healthy(gateway, "ollama")
        check_served_by(await gateway.ask(), "vllm", 2)
        assert gateway.metric("gateway_retries_total", backend="ollama", reason="connect") == 1
    async with running(settings("ollama", [nowhere])) as gateway:
        mark_healthy(gateway, "ollama")
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (502, "upstream_error")
        assert b"backend.invalid" not in reply.body


@contextmanager
def unresponsive_port() -> Any:
    """Yield a port where the kernel drops every SYN, because its accept backlog is full."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for taken in (first, second):
            taken.setblocking(False)
            taken.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


@pytest.mark.virtual_time
async def test_connect_timeout_goes_to_the_other_backend() -> None:
    """Case 4."""
    async with AsyncExitStack() as stack:
        port = stack.enter_context(unresponsive_port())
        other = await stack.enter_async_context(FaultBackend("vllm"))
        built = settings("ollama", [f"http://127.0.0.1:{port}"], other.base_url, connect_timeout=0.2)
        gateway = await stack.enter_async_context(running(built))
        mark_healthy(gateway, "ollama")
        begun = asyncio.get_running_loop().time()
        check_served_by(await gateway.ask(), "vllm", 2)
        assert 0.2 <= asyncio.get_running_loop().time() - begun <= within(0.2 + AT_ONCE)
        assert gateway.metric("gateway_retries_total", backend="ollama", reason="connect_timeout") == 1


async def test_tier_may_override_the_connect_timeout() -> None:
    async with AsyncExitStack() as stack:
        port = stack.enter_context(unresponsive_port())
        other = await stack.enter_async_context(FaultBackend("vllm"))
        own = {"limits": {"ollama": {"connect_timeout": 0.2}}}
        built = settings("ollama", [f"http://127.0.0.1:{port}"], other.base_url, tier=own, connect_timeout=30)
        gateway = await stack.enter_async_context(running(built))
        mark_healthy(gateway, "ollama")
        check_served_by(await gateway.ask(), "vllm", 2)
        assert gateway.metric("gateway_retries_total", backend="ollama", reason="connect_timeout") == 1


# Failures before the first token


@pytest.mark.parametrize(
    ("mode", "reason"), [("close", "closed"), ("rst", "reset"), ("breaks", "status_5xx"), ("garbage", "protocol")]
)
async def test_failure_before_the_first_token_goes_to_the_other_backend(
    kind: Kind, stream: bool, mode: str, reason: str
) -> None:
    """Cases 5, 6, 8 and 12."""
    async with two_backends(kind, mode) as (gateway, first, second):
        check_served_by(await gateway.ask({"stream": stream}), OTHER[kind], 2)
        assert (len(first.requests), len(second.requests)) == (1, 1)
        assert gateway.metric("gateway_upstream_errors_total", backend=kind, reason=reason) == 1
        assert gateway.metric("gateway_fallbacks_total") == 1
        await until(gateway.is_idle)


async def test_request_that_a_vllm_aborts_before_its_first_token_is_served_elsewhere(stream: bool) -> None:
    """A vLLM answers so when it is told to end, and its clients have not left."""
    async with two_backends("vllm", "aborts") as (gateway, first, second):
        check_served_by(await gateway.ask({"stream": stream}), "ollama", 2)
        assert (len(first.requests), len(second.requests)) == (1, 1)
        assert gateway.metric("gateway_upstream_errors_total", backend="vllm", reason="aborted") == 1
    async with servers("vllm", "aborts", "healthy") as (gateway, (ending, other)):
        check_served_by(await gateway.ask({"stream": stream}), "vllm", 2)
        assert (len(ending.requests), len(other.requests)) == (1, 1)
        await until(gateway.is_idle)


async def test_request_that_every_server_aborts_is_a_502(stream: bool) -> None:
    async with servers("vllm", "aborts") as (gateway, _):
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, code(reply)) == (502, "upstream_error")


async def test_500_without_a_fallback_is_a_502_with_the_gateways_message(kind: Kind, stream: bool) -> None:
    """Case 12."""
    async with servers(kind, "breaks") as (gateway, (server,)):
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, code(reply), CANARY in reply.body.decode()) == (502, "upstream_error", False)
        assert len(server.requests) == 1


async def test_500_goes_to_another_server_once(kind: Kind, stream: bool) -> None:
    """Case 12, with several servers."""
    async with servers(kind, "breaks", "healthy") as (gateway, (broken, other)):
        check_served_by(await gateway.ask({"stream": stream}), kind, 2)
        assert (len(broken.requests), len(other.requests)) == (1, 1)
        assert gateway.metric("gateway_retries_total", backend=kind, reason="status_5xx") == 1
    async with servers(kind, "breaks", "breaks", "breaks") as (gateway, found):
        assert (await gateway.ask({"stream": stream})).status == 502
        assert sum(len(server.requests) for server in found) == 2


async def test_request_is_sent_at_most_twice(kind: Kind, stream: bool) -> None:
    async with two_backends(kind, "breaks", "breaks") as (gateway, first, second):
        reply = await gateway.ask({"stream": stream})
        assert (reply.status, code(reply)) == (502, "upstream_error")
        headers = reply.headers
        assert (headers["x-gateway-backend"], headers["x-gateway-attempts"]) == (OTHER[kind], "2")
        assert (len(first.requests), len(second.requests)) == (1, 1)


async def test_answer_that_has_begun_does_not_fall_back(kind: Kind) -> None:
    async with two_backends(kind, "killed") as (gateway, _, second):
        reply = await gateway.ask({"stream": True})
        assert (reply.status, code(reply)) == (200, "upstream_error")
        assert not second.requests


@pytest.mark.virtual_time(only=True)
async def test_timeout_does_not_go_to_the_other_backend(kind: Kind) -> None:
    async with two_backends(kind, "silent", first_token_timeout=0.2) as (gateway, _, second):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (504, "upstream_timeout")
        assert not second.requests


async def test_client_error_does_not_go_to_the_other_backend(kind: Kind) -> None:
    async with two_backends(kind, "too_long") as (gateway, _, second):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (400, "context_length_exceeded")
        assert not second.requests
        assert not server_of(gateway, kind).circuit.is_troubled


async def test_fallback_false_disables_the_fallback() -> None:
    async with two_backends("vllm", "breaks", tier={"fallback": False}) as (gateway, _, second):
        reply = await gateway.ask()
        assert (reply.status, reply.headers["x-gateway-attempts"], len(second.requests)) == (502, "1", 0)


async def test_fallback_may_be_named() -> None:
    async with two_backends("vllm", "breaks", tier={"fallback": "ollama"}) as (gateway, _, _second):
        check_served_by(await gateway.ask(), "ollama", 2)


async def test_clients_deadline_does_not_restart_on_the_other_backend() -> None:
    async with two_backends("vllm", "breaks") as (gateway, _, _second):
        admission = backend_of(gateway, "ollama").admission
        with ExitStack() as taken:
            while not admission.waiting("text"):
                taken.enter_context(Ticket(admission, admission.queue(MODEL, "text"), Claim()))
            async with gateway.sent({}, "x-gateway-timeout: 30"):
                await until(lambda: admission.waiting("text") == 2)
                (relay,) = gateway.live
                assert 0 < relay._ticket.claim.timeout < 30


async def test_request_that_queues_again_is_at_no_server() -> None:
    """Until it has a slot: what happens to its former server does not concern it any more."""
    async with two_backends("vllm", "breaks") as (gateway, _, _second):
        admission = backend_of(gateway, "ollama").admission
        with ExitStack() as taken:
            while not admission.waiting("text"):
                taken.enter_context(Ticket(admission, admission.queue(MODEL, "text"), Claim()))
            async with gateway.sent():
                await until(lambda: admission.waiting("text") == 2)
                (relay,) = gateway.live
                assert (relay._server, relay.attempt()) == (None, None)


async def test_committed_stream_without_a_token_can_still_fall_back() -> None:
    async with FaultBackend("vllm", "silent") as first, FaultBackend("ollama") as second:
        built = settings("vllm", [first.base_url], second.base_url).model_copy(
            update={"commit_after": 0.05, "heartbeat": 0.05}
        )
        async with running(built) as gateway, gateway.sent({"stream": True}) as raw, asyncio.timeout(PATIENCE):
            status, _ = await raw.head()
            await raw.reader.readuntil(b'"delta":{}')
            first.open_peers[0].reset()
            rest = await raw.reader.readuntil(b"[DONE]")
            assert (status, b"Hello" in rest, b"error" in rest) == (200, True, False)


async def test_request_that_the_fallback_cannot_serve_ends_with_the_first_failure() -> None:
    """That the fallback's model takes no images is not the client's fault."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(FaultBackend("vllm", "breaks"))
        second = await stack.enter_async_context(FaultBackend("ollama", capabilities=("completion",)))
        gateway = await stack.enter_async_context(running(settings("vllm", [first.base_url], second.base_url)))
        reply = await gateway.ask({"messages": IMAGE})
        assert (reply.status, code(reply)) == (502, "upstream_error")
        assert not second.requests


async def test_retry_budget_is_a_tenth_of_the_requests_and_at_least_five() -> None:
    async with two_backends("vllm", "breaks") as (gateway, first, second):
        # One client's failures do not eject a server that has just answered another.
        server_of(gateway, "vllm").gate(MODEL, "text").succeed(Claim("another"), 1, 0.1, False)
        replies = [await gateway.ask() for _ in range(30)]
        assert [reply.status for reply in replies].count(200) == len(second.requests) == LEAST
        assert len(first.requests) == 30
        for _ in range(70):
            backend_of(gateway, "vllm").budget.count(gateway.gateway._context.clock())
        replies = [await gateway.ask() for _ in range(20)]
        assert LEAST < len(second.requests) <= 12


async def test_refused_connections_need_no_retry_budget() -> None:
    """Nothing was sent, so all requests are served, each of them once."""
    async with two_backends("vllm") as (gateway, first, second):
        first.die()
        replies = await asyncio.gather(*(gateway.ask() for _ in range(20)))
        assert {(reply.status, reply.headers["x-gateway-backend"]) for reply in replies} == {(200, "ollama")}
        assert len(second.requests) == 20


# Full


@pytest.mark.parametrize("mode", ["full", "limited_for_seven"])
async def test_full_backend_falls_back(kind: Kind, stream: bool, mode: str) -> None:
    """Cases 13 and 14; the second request is not even sent to the full backend."""
    async with two_backends(kind, mode) as (gateway, first, _):
        check_served_by(await gateway.ask({"stream": stream}), OTHER[kind], 2)
        check_served_by(await gateway.ask({"stream": stream}), OTHER[kind], 1)
        assert len(first.requests) == 1
        assert server_of(gateway, kind).circuit.state == "closed"
        assert gateway.metric("gateway_retries_total", backend=kind, reason="busy") == 1
        assert gateway.metric("gateway_fallbacks_total") == 2


@pytest.mark.parametrize(
    ("mode", "least", "most"),
    [
        ("full", 1, 60),
        ("full_for_seven", 7, 7),
        ("limited_for_seven", 7, 7),
        ("limited_until", 35, 41),
        ("limited_for_ever", 120, 120),
        ("limited_garbage", 1, 60),
    ],
)
async def test_full_backend_without_a_fallback_is_a_503_with_its_retry_after(
    kind: Kind, mode: str, least: int, most: int
) -> None:
    """Cases 13 and 14: a full backend is paused for that time, and its circuit stays closed."""
    async with servers(kind, mode) as (gateway, _):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (503, "backend_unavailable")
        assert least <= int(reply.headers["retry-after"]) <= most
        circuit = server_of(gateway, kind).circuit
        assert (circuit.state, circuit.is_paused, circuit.is_troubled) == ("closed", True, False)


async def test_server_that_is_full_does_not_attract_requests(kind: Kind) -> None:
    async with servers(kind, "limited_for_seven", "healthy") as (gateway, (full, other)):
        for attempts in ("2", "1", "1", "1"):
            reply = await gateway.ask()
            assert (reply.status, reply.headers["x-gateway-attempts"]) == (200, attempts)
        assert (len(full.requests), len(other.requests)) == (1, 4)


async def test_requests_queue_for_a_full_server_until_its_pause_is_over(kind: Kind) -> None:
    async with servers(kind, "full") as (gateway, (server,)):
        assert (await gateway.ask()).status == 503
        server.mode = "healthy"
        reply = await gateway.ask()
        assert (reply.status, len(server.requests)) == (200, 2)
        assert int(reply.headers["x-gateway-queue-ms"]) >= 500


async def test_request_waits_for_a_full_backend_if_the_fallback_is_down() -> None:
    async with two_backends("vllm") as (gateway, first, second):
        second.die()
        server_of(gateway, "ollama").circuit.probe_missed(is_sure=True)
        backend_of(gateway, "vllm").restraints.pause(server_of(gateway, "vllm"), 0.2)
        check_served_by(await gateway.ask(), "vllm", 1)
        assert len(first.requests) == 1


async def test_two_full_backends_answer_with_the_longer_retry_after() -> None:
    async with two_backends("vllm", "limited_for_seven", "full") as (gateway, _, _second):
        reply = await gateway.ask()
        assert (reply.status, code(reply), reply.headers["retry-after"]) == (503, "backend_unavailable", "7")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"7", 7),
        (b"0", 0),
        (b"121", LONGEST_PAUSE),
        (b"9" * 5000, LONGEST_PAUSE),
        (formatdate(1_000_030, usegmt=True).encode(), 30),
        (formatdate(999_000, usegmt=True).encode(), 0),
        (b"", None),
        (b"soon", None),
        (b"-7", None),
        (b"7.5", None),
        (b"\xff\xb2", None),
        (b"Mon, 99 Foo 2026 25:61:61 GMT", None),
    ],
    ids=[
        "seconds",
        "zero",
        "above-the-maximum",
        "huge",
        "date",
        "past-date",
        "empty",
        "word",
        "negative",
        "fraction",
        "bytes",
        "bad-date",
    ],
)
def test_retry_after_is_seconds_a_date_or_ignored(value: bytes, seconds: int | None) -> None:
    assert retry_seconds(value, 1_000_000) == seconds


# Wrong keys and missing models


async def test_key_refused_by_the_backend_is_a_502_and_counted(kind: Kind, stream: bool) -> None:
    """Case 15; never a 401, which would tell the client that its own key is wrong."""
    async with servers(kind, "locked") as (gateway, _):
        for _ in range(2 * IN_A_ROW):
            reply = await gateway.ask({"stream": stream})
            assert (reply.status, code(reply)) == (502, "upstream_error")
        assert gateway.metric("gateway_upstream_errors_total", backend=kind, reason="auth") == 2 * IN_A_ROW
        assert server_of(gateway, kind).circuit.state == "closed"


async def test_model_missing_on_one_server_goes_to_the_other_until_the_next_probe(kind: Kind, stream: bool) -> None:
    """Case 16."""
    async with servers(kind, "missing", "healthy") as (gateway, (lacking, other)):
        for attempts in ("2", "1", "1"):
            reply = await gateway.ask({"stream": stream})
            assert (reply.status, reply.text, reply.headers["x-gateway-attempts"]) == (200, TEXT, attempts)
        assert (len(lacking.requests), len(other.requests)) == (1, 3)
        server = server_of(gateway, kind)
        assert (server.serves(MODEL), server.circuit.state) == (False, "closed")
        server.doubted.set()
        await until(lambda: server.serves(MODEL))


async def test_model_missing_on_all_servers_is_a_404(kind: Kind, stream: bool) -> None:
    """Case 16, on all servers."""
    async with servers(kind, "missing", "missing") as (gateway, found):
        for _ in range(2):
            reply = await gateway.ask({"stream": stream})
            assert (reply.status, code(reply)) == (404, "model_not_found")
        assert [len(server.requests) for server in found] == [1, 1]


async def test_model_missing_on_the_backend_goes_to_the_other_backend(kind: Kind) -> None:
    """Case 16, with a fallback."""
    async with two_backends(kind, "missing") as (gateway, first, _):
        check_served_by(await gateway.ask(), OTHER[kind], 2)
        check_served_by(await gateway.ask(), OTHER[kind], 1)
        assert len(first.requests) == 1
    async with two_backends(kind, "missing", "missing") as (gateway, _, _second):
        reply = await gateway.ask()
        assert (reply.status, code(reply)) == (404, "model_not_found")


# The circuit breaker


@pytest.mark.virtual_time
async def test_killed_server_is_left_out_at_once_and_used_again_after_a_probe(kind: Kind) -> None:
    async with servers(kind, "healthy", "healthy", probe_interval=0.1) as (gateway, (one, two)):
        one.die()
        begun = asyncio.get_running_loop().time()
        while not server_of(gateway, kind).circuit.is_open:
            assert (await gateway.ask()).status == 200
        assert asyncio.get_running_loop().time() - begun <= within(2)
        before = len(two.requests)
        assert [(await gateway.ask()).headers["x-gateway-attempts"] for _ in range(3)] == ["1"] * 3
        assert len(two.requests) == before + 3
        await one.revive()
        await until(lambda: server_of(gateway, kind).circuit.state == "closed", patience=within(1.1))
        await asyncio.gather(*(gateway.ask() for _ in range(4)))
        assert one.requests


async def test_open_circuit_goes_to_the_other_backend_without_an_attempt(kind: Kind) -> None:
    async with two_backends(kind) as (gateway, first, _):
        first.die()
        server_of(gateway, kind).circuit.probe_missed(is_sure=True)
        check_served_by(await gateway.ask(), OTHER[kind], 1)
        assert gateway.metric("gateway_fallbacks_total", from_backend=kind, to_backend=OTHER[kind]) == 1
        assert gateway.metric("gateway_upstream_errors_total") == 0


async def test_simultaneous_failures_of_many_requests_do_not_open_the_circuit(kind: Kind) -> None:
    """A probe finds the server healthy, and the next request is served."""
    async with servers(kind, "silent", max_concurrency=40, model_concurrency=40, queue_timeout=5) as (
        gateway,
        (server,),
    ):
        asked = [asyncio.create_task(gateway.ask()) for _ in range(40)]
        await until(lambda: len(server.requests) == 40)
        server.mode = "healthy"
        for peer in server.open_peers:
            peer.reset()
        assert {reply.status for reply in await asyncio.gather(*asked)} == {502}
        assert (await gateway.ask()).status == 200
        assert server_of(gateway, kind).circuit.state == "closed"


@pytest.mark.parametrize("mode", ["breaks", "truncated", "rst"])
async def test_failures_make_the_circuit_suspect_and_a_good_probe_closes_it(
    kind: Kind, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gateway.upstream.restraints")
    async with servers(kind, mode) as (gateway, (server,)):
        for _ in range(IN_A_ROW):
            assert (await gateway.ask()).status == 502
        circuit = server_of(gateway, kind).circuit
        await until(lambda: circuit.state == "closed")
        told = [record.getMessage() for record in caplog.records if record.name == "gateway.upstream.restraints"]
        assert [message.split("(")[0] for message in told] == [
            f"backend {kind}: circuit suspect, was closed ",
            f"backend {kind}: circuit closed, was suspect ",
        ]
        server.mode = "healthy"
        assert (await gateway.ask()).status == 200


async def test_server_that_fails_fast_does_not_attract_all_requests(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers probes, so its circuit stays closed; but failing fast makes it the least busy."""
    monkeypatch.setattr(outlier_detection, "BASE_SECONDS", outlier_detection.MAX_SECONDS)  # longer than a test may take
    async with servers(kind, "breaks", "healthy") as (gateway, (broken, other)):
        replies = [await gateway.ask() for _ in range(IN_A_ROW)]
        assert [reply.headers["x-gateway-attempts"] for reply in replies] == ["2"] * IN_A_ROW
        await until(lambda: server_of(gateway, kind).circuit.state == "closed")
        assert {(await gateway.ask()).status for _ in range(20)} == {200}
        assert (len(broken.requests), len(other.requests)) == (IN_A_ROW, IN_A_ROW + 20)


async def test_clients_that_leave_do_not_count_against_the_server(kind: Kind) -> None:
    async with servers(kind, "silent") as (gateway, (server,)):
        for number in range(2 * IN_A_ROW):
            async with gateway.sent():
                await until(lambda: len(server.requests) == number + 1)  # noqa: B023  # awaited before it changes
        await until(gateway.is_idle)
        assert not server_of(gateway, kind).circuit.is_troubled


@pytest.mark.virtual_time(only=True)
async def test_first_token_timeout_counts_against_the_server(kind: Kind) -> None:
    async with servers(kind, "silent", first_token_timeout=0.05) as (gateway, _):
        assert (await gateway.ask()).status == 504
        assert server_of(gateway, kind).circuit.is_troubled


@pytest.mark.virtual_time(only=True)
async def test_missing_next_token_does_not_count_in_the_circuit_but_in_the_outlier_detector(kind: Kind) -> None:
    """The server is alive, and its probes would say so; but it may never finish an answer."""
    async with servers(kind, "stall", idle_timeout=0.05) as (gateway, _):
        assert code(await gateway.ask({"stream": True})) == "upstream_timeout"
        server = server_of(gateway, kind)
        assert not server.circuit.is_troubled
        assert list(server.gate(MODEL, "text")._outcomes) == [("", False)]


@pytest.mark.virtual_time(only=True)
async def test_timeout_of_the_whole_answer_counts_nowhere(kind: Kind) -> None:
    async with servers(kind, "drip", total_timeout=0.1) as (gateway, _):
        assert code(await gateway.ask({"stream": True})) == "upstream_timeout"
        server = server_of(gateway, kind)
        assert (server.circuit.is_troubled, list(server.gate(MODEL, "text")._outcomes)) == (False, [])


async def test_gaps_between_tokens_count_for_the_backend_that_served(kind: Kind) -> None:
    async with two_backends(kind, "breaks") as (gateway, _, _second):
        check_served_by(await gateway.ask({"stream": True}), OTHER[kind], 2)
        await until(gateway.is_idle)
        gaps = [
            gateway.metric("gateway_inter_token_latency_seconds_count", backend=name) for name in (kind, OTHER[kind])
        ]
        assert gaps[0] == 0
        assert gaps[1] > 0


async def test_half_open_server_gets_one_request_until_it_answers(kind: Kind) -> None:
    async with servers(kind, "silent") as (gateway, (server,)), AsyncExitStack() as clients:
        circuit = server_of(gateway, kind).circuit
        circuit.probe_missed(is_sure=True)
        circuit.probe_answered()
        raws = [await clients.enter_async_context(gateway.sent({"stream": True})) for _ in range(5)]
        await until(lambda: gateway.waiting == 4)
        assert len(server.requests) == 1
        server.mode = "healthy"
        raws[0].leave()  # without a result, so another request is let through
        for raw in raws[1:]:
            assert (await raw.reply()).text == TEXT
        assert circuit.state == "closed"


async def test_first_piece_of_an_answer_closes_a_half_open_circuit(kind: Kind) -> None:
    """An answer may take minutes, and the others need not wait for its end."""
    async with servers(kind, "stall", model_concurrency=4) as (gateway, (server,)):
        circuit = server_of(gateway, kind).circuit
        circuit.probe_missed(is_sure=True)
        circuit.probe_answered()
        assert circuit.state == "half_open"
        async with gateway.sent({"stream": True}):
            await until(lambda: circuit.state == "closed")
            assert gateway.running == 1
            server.mode = "healthy"
            assert (await gateway.ask()).text == TEXT
            assert gateway.running == 1


async def test_head_of_a_stream_does_not_close_a_half_open_circuit() -> None:
    """A vLLM sends it before it has queued the request."""
    async with servers("vllm", "head_alone") as (gateway, (_,)):
        circuit = server_of(gateway, "vllm").circuit
        circuit.probe_missed(is_sure=True)
        circuit.probe_answered()
        assert (await gateway.ask({"stream": True})).status == 502
        assert circuit.state == "open"


@pytest.mark.parametrize(("mode", "samples"), [("healthy", 1), ("truncated", 0), ("head_alone", 0)])
async def test_only_a_whole_answer_counts_as_a_service_time(kind: Kind, mode: str, samples: int) -> None:
    async with servers(kind, mode) as (gateway, (_,)):
        await gateway.ask({"stream": True})
        await until(gateway.is_idle)
        (queue,) = backend_of(gateway, kind).admission._lanes["text"].queues
        assert len(queue.service_times) == samples


async def test_answer_that_its_client_left_does_not_count_as_a_service_time(kind: Kind) -> None:
    async with servers(kind, "stall") as (gateway, (_,)):
        async with gateway.sent({"stream": True}) as raw, asyncio.timeout(PATIENCE):
            await raw.reader.readuntil(b"Hello")
        await until(gateway.is_idle)
        (queue,) = backend_of(gateway, kind).admission._lanes["text"].queues
        assert not queue.service_times


FLAPPING = [200, 499, 502, 503]


@pytest.mark.parametrize("has_fallback", [False, True], ids=["alone", "fallback"])
async def test_flapping_server_leaves_no_request_stuck(
    kind: Kind, has_fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Case 80, faster: after its last return every request is served and nothing is held."""
    monkeypatch.setattr(outlier_detection, "BASE_SECONDS", 0.1)
    limits = {"max_concurrency": 4, "model_concurrency": 4, "probe_interval": 0.05, "queue_timeout": 5}
    tier = {"fallback": has_fallback}
    async with two_backends(kind, "brief", tier=tier, **limits) as (gateway, first, _):
        over = False

        async def client(number: int) -> None:
            random = Random(number)
            while not over:
                async with gateway.sent({"stream": bool(number % 2)}) as raw:
                    if random.random() < 0.2:
                        await asyncio.sleep(0.02 * random.random())
                    else:
                        assert (await raw.reply()).status in FLAPPING

        clients = [asyncio.create_task(client(number)) for number in range(12)]
        for _ in range(10):
            await asyncio.sleep(0.1)
            first.die()
            await asyncio.sleep(0.1)
            await first.revive()
        over = True
        async with asyncio.timeout(20):
            await asyncio.gather(*clients)
        # A probe may have to time out first, and an ejection to end.
        await until(lambda: server_of(gateway, kind).circuit.state == "closed", patience=20)
        async with asyncio.timeout(20):
            while server_of(gateway, kind).ejections:
                await gateway.ask()
        replies = await asyncio.gather(*(gateway.ask() for _ in range(12)))
        assert {(reply.status, reply.headers["x-gateway-backend"]) for reply in replies} == {(200, kind)}
        await until(gateway.is_idle)
        served = {line["status"] for line in gateway.exchanges()}
        assert 200 in served
        assert served <= set(FLAPPING)


async def test_status_and_metrics_show_the_circuit() -> None:
    async with servers("vllm", "healthy", "healthy") as (gateway, _):
        operations = gateway.gateway._operations
        server_of(gateway, "vllm").circuit.probe_missed(is_sure=True)
        status = operations.status()["backends"]["vllm"]
        assert [(server["up"], server["circuit"], server["paused"]) for server in status["servers"]] == [
            (False, "open", False),
            (True, "closed", False),
        ]
        await operations.exposition("")
        assert (
            gateway.metric("gateway_backend_up", backend="vllm"),
            gateway.metric("gateway_circuit_state", backend="vllm"),
        ) == (1, 0)
        server_of(gateway, "vllm", 1).circuit.probe_missed(is_sure=True)
        await operations.exposition("")
        assert (
            gateway.metric("gateway_backend_up", backend="vllm"),
            gateway.metric("gateway_circuit_state", backend="vllm"),
        ) == (0, 2)
        assert operations.readiness() == (200, {"status": "ready", "unserved_tiers": ["standard"]})


# Queued requests


@pytest.mark.virtual_time(only=True)
async def test_queued_requests_wait_for_a_backend_that_restarts(kind: Kind) -> None:
    """Case 24: the request that ran is lost, those in the queue are not."""
    async with (
        servers(kind, "silent", max_concurrency=1, model_concurrency=1, probe_interval=0.1) as (gateway, (server,)),
        AsyncExitStack() as clients,
    ):
        lost = await clients.enter_async_context(gateway.sent())
        await until(lambda: len(server.requests) == 1)
        waiting = [await clients.enter_async_context(gateway.sent()) for _ in range(4)]
        await until(lambda: gateway.waiting == 4)
        server.mode = "healthy"
        server.die()
        assert (await lost.reply()).status == 502
        await until(lambda: server_of(gateway, kind).circuit.is_open)
        assert gateway.waiting == 4
        assert (await gateway.ask()).status == 503
        await server.revive()
        for raw in waiting:
            reply = await raw.reply()
            assert (reply.status, reply.text) == (200, TEXT)
            assert int(reply.headers["x-gateway-attempts"]) <= 2
        await until(gateway.is_idle)


@pytest.mark.virtual_time(only=True)
async def test_queued_requests_are_refused_if_the_backend_stays_down(kind: Kind) -> None:
    """Case 24, after `queue_timeout`."""
    limits = {"max_concurrency": 1, "model_concurrency": 1, "queue_timeout": 0.3, "probe_interval": 0.1}
    async with servers(kind, "silent", **limits) as (gateway, (server,)), gateway.sent(), gateway.sent() as waiting:
        await until(lambda: gateway.waiting == 1)
        server.die()
        reply = await waiting.reply()
        assert (reply.status, code(reply)) == (503, "queue_timeout")
        assert int(reply.headers["retry-after"]) > 0


async def test_queued_requests_fall_back_when_their_backend_goes_down(kind: Kind) -> None:
    limits = {"max_concurrency": 1, "model_concurrency": 1}
    async with (
        two_backends(kind, "silent", **limits) as (gateway, first, second),
        gateway.sent(),
        AsyncExitStack() as clients,
    ):
        await until(lambda: len(first.requests) == 1)
        waiting = [await clients.enter_async_context(gateway.sent()) for _ in range(3)]
        await until(lambda: gateway.waiting == 3)
        server_of(gateway, kind).circuit.probe_missed(is_sure=True)
        for raw in waiting:
            check_served_by(await raw.reply(), OTHER[kind], 1)
        assert len(second.requests) == 3


async def test_queued_requests_wait_if_the_fallback_is_down_too(kind: Kind) -> None:
    limits = {"max_concurrency": 1, "model_concurrency": 1, "probe_interval": 0.1}
    async with (
        two_backends(kind, "silent", **limits) as (gateway, first, second),
        gateway.sent() as lost,
        gateway.sent() as waiting,
    ):
        second.die()
        server_of(gateway, OTHER[kind]).circuit.probe_missed(is_sure=True)
        await until(lambda: (len(first.requests), gateway.waiting) == (1, 1))
        first.mode = "healthy"
        first.die()
        assert (await lost.reply()).status == 502
        await until(lambda: server_of(gateway, kind).circuit.is_open)
        assert gateway.waiting == 1
        await first.revive()
        reply = await waiting.reply()
        assert (reply.status, reply.headers["x-gateway-backend"]) == (200, kind)
