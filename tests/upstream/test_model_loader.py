"""Loading of models on Ollama through the whole gateway, on real sockets.

The servers are stand-ins that behave like Ollama, and a scripted one whose loads the test answers.
"""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.errors import BackendUnavailable
from gateway.simulate import Fault, Model, Options
from gateway.simulate import Running as StandIn
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.trace_context import current_trace
from gateway.upstream.backend import Backend
from gateway.upstream.model_loader import ModelLoader, _repeat
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import TIMES, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in
from tests.fakes.virtual_time import is_virtual

pytestmark = pytest.mark.uvloop

A, B = Model("a", size=4), Model("b", size=4)
EMBEDDING = Model("e", embedding=8, size=1)
PATIENT = {**TIMES, "first_token_timeout": 10, "idle_timeout": 5, "total_timeout": 30, "queue_timeout": 10}


def document(
    url: str, *more_urls: str, tier: Mapping[str, Any] | None = None, other_url: str | None = None, **keys: Any
) -> dict[str, Any]:
    """Return settings with the tiers `standard` and `b` for the models a and b."""
    servers = [{"base_url": one} for one in (url, *more_urls)]
    backends: dict[str, Any] = {"ollama": {"kind": "ollama", "servers": servers, **PATIENT, **keys}}
    models = {"ollama": "a"}
    if other_url is not None:
        backends["vllm"] = {"kind": "vllm", "base_url": other_url, **TIMES}
        models["vllm"] = MODEL
    return {
        "llm_backend": "ollama",
        "backends": backends,
        "tiers": {"standard": {"models": models, **(tier or {})}, "b": {"models": {"ollama": "b"}}},
        "embeddings": {"ours": {"backend": "ollama", "model": "e"}},
        "log_format": "json",
        "state_file": "",
    }


@asynccontextmanager
async def gateway_before_ollama(
    *, tier: Mapping[str, Any] | None = None, keys: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Running, StandIn]]:
    """Run a gateway in front of a stand-in for an Ollama that has nothing loaded."""
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(stand_in(Options("ollama", (A, B, EMBEDDING), **options)))
        yield (
            await stack.enter_async_context(
                running(config.build(document(server.base_url, tier=tier, **(keys or {}))), shares_loop=is_virtual())
            ),
            server,
        )


async def test_a_load_has_the_trace_of_no_request(caplog: pytest.LogCaptureFixture) -> None:
    """It serves all that wait. The request that began it would get its connection as a span, and its log line."""
    traces = {}

    def note(record: logging.LogRecord) -> bool:
        traces[record.getMessage().partition(" in ")[0]] = current_trace.get()
        return True

    caplog.set_level(logging.INFO, "gateway.upstream.model_loader")
    caplog.handler.addFilter(note)
    async with gateway_before_ollama() as (gateway, _):
        trace = "traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with gateway.sent({}, trace) as raw:
            assert (await raw.reply()).status == 200
    assert traces["backend ollama: loaded the model 'a'"] is None


def loads(server: StandIn, path: str = "/api/chat") -> list[dict[str, Any]]:
    """Return the bodies of the requests without messages or input: the loads."""
    bodies = [request["body"] for request in server.engine.requests if request["path"] == path]
    return [body for body in bodies if not body.get("messages") and not body.get("input")]


def loaded(server: StandIn) -> list[str]:
    return [runner.model.name for runner in server.app.scheduler.runners()]


# One load for all requests


@pytest.mark.virtual_time(only=True)
async def test_cold_model_is_loaded_once_for_all_waiting_requests() -> None:
    async with gateway_before_ollama(load_seconds=0.3, parallel=4, max_queue=0) as (gateway, server):
        replies = await asyncio.gather(*(gateway.ask({"stream": number % 2 == 0}) for number in range(8)))
        assert [reply.status for reply in replies] == [200] * 8
        assert len(loads(server)) == 1
        assert gateway.metric("gateway_backend_load_seconds_count", backend="ollama", model="a") == 1
        assert 0.25 < gateway.metric("gateway_backend_load_seconds_sum", backend="ollama", model="a") < 20
        assert (await gateway.ask()).status == 200
        assert len(loads(server)) == 1


async def test_load_continues_when_every_client_has_left() -> None:
    async with gateway_before_ollama(load_seconds=0.5) as (gateway, server):
        async with gateway.sent(), gateway.sent():
            await until(lambda: gateway.waiting == 2 and server.engine.waiting == 1)
        await until(lambda: gateway.waiting == 0)
        await until(lambda: loaded(server) == ["a"])
        assert server.engine.cancelled == 0
        assert (await gateway.ask()).status == 200
        assert len(loads(server)) == 1
        assert gateway.metric("gateway_client_disconnects_total", phase="queued") == 2


async def test_load_uses_the_num_ctx_and_keep_alive_of_the_settings() -> None:
    async with gateway_before_ollama(keys={"num_ctx": 2048, "keep_alive": "9m"}) as (gateway, server):
        await gateway.ask()
        assert loads(server) == [
            {"model": "a", "messages": [], "stream": False, "options": {"num_ctx": 2048}, "keep_alive": "9m"}
        ]
        (runner,) = server.app.scheduler.runners()
        assert runner.context_length == 2048


async def test_keep_alive_of_zero_does_not_turn_the_load_into_an_unload() -> None:
    async with gateway_before_ollama(keys={"keep_alive": 0}) as (gateway, server):
        assert (await gateway.ask()).status == 200
        assert [body["keep_alive"] for body in loads(server)] == [30]
        await until(lambda: loaded(server) == [])


async def test_loaded_model_is_not_loaded_again() -> None:
    async with stand_in(Options("ollama", (A, B))) as server:
        async with running(config.build(document(server.base_url))) as gateway:
            await gateway.ask()
        async with running(config.build(document(server.base_url))) as gateway:
            reply = await gateway.ask()
            assert (reply.status, reply.headers["x-gateway-queue-ms"]) == (200, "0")
        assert len(loads(server)) == 1


async def test_embedding_model_is_loaded_by_its_own_endpoint() -> None:
    async with gateway_before_ollama(load_seconds=0.2) as (gateway, server):
        data = json.dumps({"model": "ours", "input": "a text"}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(data) + data
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        assert len(loads(server, "/api/embed")) == 1
        assert loads(server) == []


async def test_server_loads_one_model_at_a_time() -> None:
    async with gateway_before_ollama(load_seconds=0.3, max_queue=0) as (gateway, server):
        replies = await asyncio.gather(*(gateway.ask({"model": model}) for model in ("standard", "b") * 3))
        assert [reply.status for reply in replies] == [200] * 6
        assert sorted(body["model"] for body in loads(server)) == ["a", "b"]


async def test_model_that_was_unloaded_is_loaded_again() -> None:
    async with gateway_before_ollama(keys={"probe_interval": 0.05}, load_seconds=0.05) as (gateway, server):
        await gateway.ask()
        server.app.scheduler.expire(A)
        state = gateway.gateway._backends["ollama"].servers[0].residency.states["a"]  # type: ignore[union-attr]
        await until(lambda: not state.is_ready)
        assert (await gateway.ask()).status == 200
        assert len(loads(server)) == 2


async def test_request_before_the_gateway_notices_an_unloaded_model_is_only_slow() -> None:
    async with gateway_before_ollama(load_seconds=0.05) as (gateway, server):
        await gateway.ask()
        server.app.scheduler.expire(A)
        assert (await gateway.ask()).status == 200
        assert len(loads(server)) == 1


# Timeouts


@pytest.mark.virtual_time(only=True)
async def test_load_does_not_count_toward_the_queue_timeout() -> None:
    async with gateway_before_ollama(load_seconds=0.6, keys={"queue_timeout": 0.2}) as (gateway, _):
        replies = await asyncio.gather(
            *(gateway.ask({"model": model}) for model in ("standard", "standard", "standard"))
        )
        assert [reply.status for reply in replies] == [200] * 3
        assert all(int(reply.headers["x-gateway-queue-ms"]) >= 500 for reply in replies)


@pytest.mark.virtual_time(only=True)
async def test_wait_before_and_after_the_load_counts_toward_the_queue_timeout() -> None:
    async with gateway_before_ollama(load_seconds=0.4, keys={"queue_timeout": 0.2, "model_concurrency": 1}) as (
        gateway,
        server,
    ):
        server.engine.inject(Fault("stall"))
        async with gateway.sent():
            reply = await gateway.ask()
            assert (reply.status, reply.error and reply.error["code"]) == (503, "queue_timeout")
            assert gateway.exchanges()[-1]["duration"] >= 0.55


async def test_queue_timeout_of_zero_still_allows_a_load() -> None:
    async with gateway_before_ollama(load_seconds=0.3, keys={"queue_timeout": 0}) as (gateway, _):
        assert (await gateway.ask()).status == 200


async def test_max_queue_of_zero_still_allows_a_load_for_as_many_requests_as_may_run() -> None:
    async with gateway_before_ollama(load_seconds=0.3, parallel=2, keys={"max_queue": 0, "model_concurrency": 2}) as (
        gateway,
        _,
    ):
        replies = await asyncio.gather(*(gateway.ask() for _ in range(4)))
        assert sorted(reply.status for reply in replies) == [200, 200, 503, 503]


@pytest.mark.virtual_time(only=True)
async def test_load_counts_toward_the_client_deadline() -> None:
    async with gateway_before_ollama(load_seconds=1) as (gateway, server):
        async with gateway.sent({}, "X-Gateway-Timeout: 0.2") as raw:
            reply = await raw.reply()
            assert (reply.status, reply.error and reply.error["code"]) == (503, "queue_timeout")
        await until(lambda: loaded(server) == ["a"])


async def test_stream_that_waits_for_a_load_is_kept_alive() -> None:
    async with gateway_before_ollama(load_seconds=0.5) as (gateway, _):
        gateway.gateway._context.commit_after = gateway.gateway._context.heartbeat = 0.05
        reply = await gateway.ask({"stream": True})
        assert (reply.status, reply.events[-1]) == (200, "[DONE]")
        assert (
            len(
                [
                    event
                    for event in reply.events[:-1]
                    if event["choices"] and not any(event["choices"][0]["delta"].values())
                ]
            )
            >= 2
        )


# Loads that fail


class ScriptedOllama:
    """An Ollama with the models a and b.

    It answers loads with `answer`: a status and a body, or None for no answer.
    """

    def __init__(self) -> None:
        self.answer: tuple[int, bytes] | None = (500, b'{"error":"llama runner process has terminated: exit status 2"}')
        self.may_answer = asyncio.Event()
        self.loads = self.chats = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.may_answer.set()
        self._server.close()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = int(
                next(
                    (line.split(":")[1] for line in head.split("\r\n") if line.lower().startswith("content-length")),
                    "0",
                )
            )
            body = json.loads(await reader.readexactly(length) or b"{}")
            if head.startswith("POST /api/chat ") and not body["messages"]:
                self.loads += 1
                await _first_completed(self.may_answer.wait(), reader.read())
            answer = self._answer(head.split()[1], body)
            if answer is not None:
                status, kind, content = answer
                head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(content)}\r\n"
                writer.write(f"{head}Connection: close\r\n\r\n".encode() + content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, str, bytes] | None:
        if path == "/api/tags":
            return 200, "application/json", b'{"models":[{"name":"a:latest"},{"name":"b:latest"}]}'
        if path == "/api/ps":
            return 200, "application/json", b'{"models":[]}'
        if path == "/api/chat" and not body["messages"]:
            return None if self.answer is None else (self.answer[0], "application/json", self.answer[1])
        if path == "/api/chat":
            self.chats += 1
            lines = (
                b'{"message":{"content":"well"},"done":false}\n',
                b'{"message":{"content":""},"done":true,"done_reason":"stop"}\n',
            )
            return 200, "application/x-ndjson", b"".join(lines)
        return 404, "application/json", b"{}"


async def _first_completed(*waits: Coroutine[Any, Any, object]) -> None:
    """Wait until one of `waits` is over."""
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@asynccontextmanager
async def gateway_before_scripted(
    *, count: int = 1, **more: Any
) -> AsyncIterator[tuple[Running, list[ScriptedOllama]]]:
    async with AsyncExitStack() as stack:
        servers = [await stack.enter_async_context(ScriptedOllama()) for _ in range(count)]
        settings = config.build(document(*(server.base_url for server in servers), **more))
        yield await stack.enter_async_context(running(settings)), servers


async def replies_to_waiting(gateway: Running, server: ScriptedOllama, count: int) -> list[Reply]:
    """Return the replies to `count` requests that all wait for one load."""
    asking = [asyncio.create_task(gateway.ask({"stream": number % 2 == 0})) for number in range(count)]
    await until(lambda: gateway.waiting == count and server.loads == 1)
    server.may_answer.set()
    return await asyncio.gather(*asking)


LOAD_ANSWERS = [
    ((500, b'{"error":"llama runner process has terminated: exit status 2"}'), 502, "upstream_error"),
    ((404, b'{"error":"model \'a\' not found"}'), 404, "model_not_found"),
    ((200, b"{"), 200, None),
    (None, 502, "upstream_error"),
]


@pytest.mark.parametrize(("answer", "status", "code"), LOAD_ANSWERS, ids=["500", "404", "200", "no answer"])
async def test_all_requests_that_wait_for_a_load_get_its_outcome(
    answer: tuple[int, bytes] | None, status: int, code: str | None
) -> None:
    async with gateway_before_scripted() as (gateway, (server,)):
        server.answer = answer
        replies = await replies_to_waiting(gateway, server, 5)
        assert {(reply.status, reply.error and reply.error["code"]) for reply in replies} == {(status, code)}
        assert server.loads == 1
        await until(gateway.is_idle)


async def test_next_request_repeats_a_failed_load() -> None:
    async with gateway_before_scripted() as (gateway, (server,)):
        await replies_to_waiting(gateway, server, 3)
        server.answer = (200, b"{}")
        assert (await gateway.ask()).status == 200
        assert (server.loads, server.chats) == (2, 1)


async def test_requests_that_wait_for_a_load_on_a_dead_server_are_served_when_it_is_back() -> None:
    async with AsyncExitStack() as stack:
        life = await stack.enter_async_context(AsyncExitStack())
        server = await life.enter_async_context(stand_in(Options("ollama", (A,))))
        gateway = await stack.enter_async_context(running(config.build(document(server.base_url))))
        await life.aclose()
        asking = [asyncio.create_task(gateway.ask()) for _ in range(3)]
        ollama_server = gateway.gateway._backends["ollama"].servers[0]
        await until(lambda: ollama_server.circuit.is_open)
        assert gateway.waiting == 3
        back = await stack.enter_async_context(
            stand_in(Options("ollama", (A,)), int(server.base_url.rsplit(":", 1)[1]))
        )
        ollama_server.doubted.set()  # a probe is due
        assert [reply.status for reply in await asyncio.gather(*asking)] == [200] * 3
        assert len(loads(back)) == 1


@pytest.mark.virtual_time(only=True)
async def test_load_that_takes_too_long_ends_with_504() -> None:
    async with gateway_before_scripted(first_token_timeout=0.3) as (gateway, (server,)):
        replies = await asyncio.gather(*(gateway.ask() for _ in range(3)))
        assert [(reply.status, reply.headers["x-should-retry"]) for reply in replies] == [(504, "false")] * 3
        assert server.loads == 1


async def test_three_failed_loads_make_the_server_suspect() -> None:
    async with gateway_before_scripted() as (gateway, (server,)):
        server.may_answer.set()
        circuit = gateway.gateway._backends["ollama"].servers[0].circuit
        changes: list[str] = []
        circuit._on_change = lambda was, reason: changes.append(reason)
        for _ in range(3):
            await gateway.ask()
        assert changes == ["status_5xx"]
        assert circuit.state == "suspect"


async def test_load_on_a_busy_server_is_repeated_while_requests_wait() -> None:
    async with gateway_before_scripted() as (gateway, (server,)):
        server.answer = (503, b'{"error":"server busy, please try again.  maximum pending requests exceeded"}')
        server.may_answer.set()
        asking = asyncio.create_task(gateway.ask())
        await until(lambda: server.loads == 2)
        server.answer = (200, b"{}")
        assert (await asking).status == 200


@pytest.mark.parametrize("status", [500, 503])
async def test_waiting_requests_fall_back_to_the_other_backend_if_the_tier_allows_it(status: int) -> None:
    async with (
        FaultBackend("vllm") as other,
        gateway_before_scripted(other_url=other.base_url, tier={"fallback": True}) as (gateway, (server,)),
    ):
        server.answer = (status, b'{"error":"no"}')
        replies = await replies_to_waiting(gateway, server, 4)
        assert [(reply.status, reply.headers["x-gateway-backend"]) for reply in replies] == [(200, "vllm")] * 4
        assert gateway.metric("gateway_fallbacks_total", tier="standard") == 4
        assert server.chats == 0


async def test_second_server_loads_the_model_that_the_first_one_could_not() -> None:
    async with gateway_before_scripted(count=2) as (gateway, servers):
        for server in servers:
            server.may_answer.set()
        servers[1].answer = (200, b"{}")
        assert [reply.status for reply in [await gateway.ask() for _ in range(3)]] == [200] * 3
        assert servers[0].loads <= 1
        assert servers[1].chats == 3


async def test_every_server_is_tried_once_before_waiting_requests_get_the_error() -> None:
    async with gateway_before_scripted(count=3) as (gateway, servers):
        for server in servers:
            server.may_answer.set()
        replies = await asyncio.gather(*(gateway.ask() for _ in range(3)))
        assert [reply.status for reply in replies] == [502] * 3
        assert [server.loads for server in servers] == [1, 1, 1]


async def test_load_refused_as_invalid_leaves_the_error_to_the_requests() -> None:
    async with gateway_before_scripted() as (gateway, (server,)):
        server.answer = (400, b'{"error":"\\"a\\" does not support chat"}')
        server.may_answer.set()
        assert (await gateway.ask()).status == 200


async def test_stopping_the_gateway_cancels_the_load() -> None:
    async with gateway_before_scripted() as (gateway, (server,)), gateway.sent():
        await until(lambda: server.loads == 1)


# Warm models


async def test_warm_models_are_loaded_one_by_one_at_the_start_without_delaying_readiness() -> None:
    tiers = {"tiers": {"standard": {"models": {"ollama": "a"}, "warm": True}, "b": {"models": {"ollama": "b"}}}}
    tiers |= {"embeddings": {"ours": {"backend": "ollama", "model": "e", "warm": True}}}
    async with (
        stand_in(Options("ollama", (A, B, EMBEDDING), load_seconds=0.4, max_queue=0)) as server,
        AsyncExitStack() as stack,
    ):
        gateway = await stack.enter_async_context(running(config.build(document(server.base_url) | tiers)))
        assert loaded(server) == []
        await until(lambda: sorted(loaded(server)) == ["a", "e"])
        assert (len(loads(server)), len(loads(server, "/api/embed"))) == (1, 1)
        await until(lambda: gateway.metric("gateway_backend_load_seconds_count") == 2)


# Rivals


@pytest.mark.virtual_time(only=True)
async def test_two_models_in_memory_for_one_take_turns() -> None:
    async with gateway_before_ollama(memory=4, load_seconds=0.1, time_to_first_token=0.05, keys={"swap_after": 1}) as (
        gateway,
        server,
    ):
        assert [(await gateway.ask({"model": model})).status for model in ("standard", "b", "standard")] == [200] * 3
        began = len(loads(server))
        replies = await asyncio.gather(*(gateway.ask({"model": model}) for model in ("standard", "b") * 8))
        assert [reply.status for reply in replies] == [200] * 16
        assert len(loads(server)) - began <= 2  # without taking turns, it could be 15


async def test_waiting_model_gets_its_turn_from_one_that_is_never_idle() -> None:
    async with gateway_before_ollama(
        memory=4, parallel=2, time_to_first_token=0.1, keys={"swap_after": 0.5, "model_concurrency": 2}
    ) as (gateway, _):
        assert [(await gateway.ask({"model": model})).status for model in ("standard", "b", "standard")] == [200] * 3
        is_over = asyncio.Event()

        async def keep_asking() -> list[int]:
            return [(await gateway.ask()).status for _ in iter(is_over.is_set, True)]

        asking = [asyncio.create_task(keep_asking()) for _ in range(4)]
        await until(lambda: gateway.running == 2)
        reply = await gateway.ask({"model": "b"})
        is_over.set()
        assert reply.status == 200
        assert 300 < int(reply.headers["x-gateway-queue-ms"]) < 3000
        assert {status for statuses in await asyncio.gather(*asking) for status in statuses} == {200}


# The time of a load, and what it says about the server


async def loader_for(own: Mapping[str, Any], **keys: Any) -> ModelLoader:
    """Return the loader of a backend with two tiers on the model a, the second with limits of its own."""
    found = document("http://127.0.0.1:1", **keys)
    found["tiers"]["slow"] = {"models": {"ollama": "a"}, "limits": {"ollama": own}}
    settings = config.build(found)
    backend = Backend(settings.backends["ollama"])
    return ModelLoader(backend, settings, Metrics(CollectorRegistry(), "test"), b"id")


@pytest.mark.parametrize(("own", "expected"), [(90, 90), (3, 10)], ids=["longer", "shorter"])
async def test_load_may_take_the_longest_first_token_timeout_of_the_tiers_on_its_model(
    own: float, expected: float
) -> None:
    loader = await loader_for({"first_token_timeout": own})
    assert loader._load_timeout("a") == expected
    assert loader._load_timeout("b") == 10, "a tier on another model does not count"
    assert loader._load_timeout("e") == 10, "no tier leads to the embedding model"


async def test_only_tiers_own_first_token_timeout_counts_if_it_has_one() -> None:
    loader = await loader_for({}, first_token_timeout=7)
    assert loader._load_timeout("a") == 7
    settings = config.build(
        document("http://127.0.0.1:1", tier={"limits": {"ollama": {"first_token_timeout": 3}}}, first_token_timeout=20)
    )
    loader.change(settings)
    assert (loader._load_timeout("a"), loader._load_timeout("b")) == (3, 20)


@pytest.mark.virtual_time(only=True)
async def test_load_takes_as_long_as_the_tiers_own_timeout_allows() -> None:
    tier = {"limits": {"ollama": {"first_token_timeout": 10}}}
    async with gateway_before_ollama(tier=tier, keys={"first_token_timeout": 0.05}, load_seconds=0.3) as (gateway, _):
        assert (await gateway.ask()).status == 200


@pytest.mark.parametrize("state", ["closed", "half_open"])
async def test_load_that_succeeds_clears_the_circuit(state: str) -> None:
    """No request succeeds here: the only client leaves during the load."""
    async with gateway_before_ollama(load_seconds=0.2) as (gateway, server):
        circuit = gateway.gateway._backends["ollama"].servers[0].circuit
        if state == "half_open":
            circuit.probe_missed(is_sure=True)
            circuit.probe_answered()
        else:
            for _ in range(2):
                circuit.fail("reset", time.monotonic())
        assert (circuit.state, circuit.is_troubled) == (state, True)
        async with gateway.sent():
            await until(lambda: server.engine.waiting == 1)
        await until(lambda: loaded(server) == ["a"])
        await until(lambda: circuit.state == "closed" and circuit._in_a_row == 0)
        for _ in range(2):  # the failures in a row are counted anew
            circuit.fail("reset", time.monotonic())
        assert circuit.state == "closed"


async def test_reload_that_takes_warm_away_ends_it() -> None:
    """Also of one model of several, and of a model that is not loaded yet."""
    loader = await loader_for({})
    server = loader._backend.servers[0]
    assert server.residency is not None

    def warm(**changes: Any) -> list[str]:
        loader.change(config.build(document("http://127.0.0.1:1") | changes))
        assert server.residency is not None
        return sorted(name for name, state in server.residency.states.items() if state.warm)

    tiers = {name: {"models": {"ollama": model}, "warm": True} for name, model in (("standard", "a"), ("b", "b"))}
    embedding = {"ours": {"backend": "ollama", "model": "e", "warm": True}}
    assert warm(tiers=tiers, embeddings=embedding) == ["a", "b", "e"]
    assert warm(tiers=tiers | {"b": {"models": {"ollama": "b"}}}, embeddings=embedding) == ["a", "e"]
    assert warm(tiers=tiers) == ["a", "b"]
    assert warm() == []


async def test_only_models_of_its_own_backend_are_kept_warm() -> None:
    found = document("http://127.0.0.1:1")
    found["backends"]["other"] = {"kind": "ollama", "base_url": "http://127.0.0.1:2"}
    found["tiers"]["there"] = {"models": {"other": "x"}, "backend": "other", "warm": True}
    found["tiers"]["both"] = {"models": {"other": "y", "ollama": "b"}, "warm": True}
    found["embeddings"] = {"theirs": {"backend": "other", "model": "z", "warm": True}}
    settings = config.build(found)
    kept = {}
    for name in ("ollama", "other"):
        loader = ModelLoader(Backend(settings.backends[name]), settings, Metrics(CollectorRegistry(), "test"), b"id")
        kept[name] = sorted(loader._warm_models())
    assert kept == {"ollama": [("b", False)], "other": [("x", False), ("y", False), ("z", True)]}


# A load that is not needed


async def test_model_that_the_server_reports_as_loaded_is_not_loaded_again() -> None:
    """Another program has loaded it since the last probe."""
    async with gateway_before_ollama() as (gateway, server):
        reader, writer = await asyncio.open_connection("127.0.0.1", int(server.base_url.rsplit(":", 1)[1]))
        writer.write(b'POST /api/generate HTTP/1.1\r\nHost: x\r\nContent-Length: 13\r\n\r\n{"model":"a"}')
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        assert loaded(server) == ["a"]
        assert (await gateway.ask()).status == 200
        assert loads(server) == []
        assert gateway.metric("gateway_backend_load_seconds_count") == 0


def test_error_of_a_load_is_new_for_each_request_and_keeps_what_the_server_asked_for() -> None:
    first = BackendUnavailable("busy", retry_after=7)
    first.pause = 3.0
    errors = [_repeat(lambda: BackendUnavailable("busy", retry_after=1), first) for _ in range(2)]
    assert errors[0] is not errors[1]
    assert [error.retry_after for error in errors] == [7, 7]
    assert [error.pause for error in errors if isinstance(error, BackendUnavailable)] == [3.0, 3.0]
