"""Queue migration on real sockets: queued requests follow the roll-out, running ones finish.

After a rollback, `rollback_cutoff` may end what still runs.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random
from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.admission.ticket import LATE_SECONDS
from gateway.upstream.transport_error import TransportError
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend, Kind
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, Raw, Reply, Running, running, until

pytestmark = pytest.mark.uvloop

PATIENT = {
    "first_token_timeout": 60,
    "idle_timeout": 60,
    "total_timeout": 60,
    "queue_timeout": 60,
    "probe_interval": 60,
}
ONE: dict[str, Any] = {"max_concurrency": 1, "model_concurrency": 1}
PICTURE = {"type": "image_url", "image_url": {"url": png_data_url()}}
OTHER: dict[Kind, Kind] = {"ollama": "vllm", "vllm": "ollama"}


class Migrating:
    """A gateway whose tier is on `old`, with a single slot, and may move to `new`."""

    def __init__(self, gateway: Running, old: FaultBackend, new: FaultBackend, stack: AsyncExitStack) -> None:
        self.gateway = gateway
        self.old = old
        self.new = new
        self._stack = stack

    async def sent(self, body: dict[str, Any] | None = None, *headers: str) -> Raw:
        """Send a request that stays until the test ends; return once it is queued or running."""
        count = len(self.gateway.live)
        raw = await self._stack.enter_async_context(self.gateway.sent(body, *headers))
        await until(lambda: len(self.gateway.live) > count)
        return raw

    async def queue(self, *bodies: dict[str, Any]) -> list[Raw]:
        """Send requests one after the other."""
        return [await self.sent(body) for body in bodies]

    async def order(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        async with httpx2.AsyncClient(
            base_url=self.gateway.base_url, trust_env=False, verify=False, timeout=PATIENCE
        ) as client:
            answer = await client.request(method, path, json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def rollback(self) -> int:
        """Roll back; return how many requests moved, according to the answer."""
        moved: int = (await self.order("POST", "/ops/rollback"))["moved"]
        return moved

    async def put(self, **order: Any) -> int:
        moved: int = (await self.order("PUT", "/ops/rollout", order))["moved"]
        return moved

    def queued(self, backend: FaultBackend) -> dict[str, int]:
        """Return the number of requests queued for `backend`, by lane."""
        admission = self.gateway.gateway._backends[backend.kind].admission
        return {lane: admission.waiting(lane) for lane in admission.lanes if admission.waiting(lane)}


@asynccontextmanager
async def migrating(
    kind: Kind = "vllm",
    *,
    first: str = "silent",
    mode: str = "healthy",
    of_new: dict[str, Any] | None = None,
    of_old: dict[str, Any] | None = None,
    tier: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    **top: Any,
) -> AsyncIterator[Migrating]:
    """Start a gateway before an old backend in mode `first` and a new one in `mode`.

    `of_old` and `of_new` are settings of the two backends; `facts` are what the new one reports
    about its model.
    """
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(FaultBackend(kind, first))
        new = await stack.enter_async_context(FaultBackend(OTHER[kind], mode, **(facts or {})))
        document = {
            "llm_backend": kind,
            "rollback_to": new.kind,
            "backends": {
                kind: {"kind": kind, "base_url": old.base_url, **PATIENT, **ONE, **(of_old or {})},
                new.kind: {
                    "kind": new.kind,
                    "base_url": new.base_url,
                    **PATIENT,
                    "max_concurrency": 8,
                    "model_concurrency": 8,
                    **(of_new or {}),
                },
            },
            "tiers": {"standard": {"models": {kind: MODEL, new.kind: MODEL}, **(tier or {})}, **(others or {})},
            "log_format": "json",
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document | top)))
        clients = await stack.enter_async_context(AsyncExitStack())
        yield Migrating(gateway, old, new, clients)


async def reply_of(raw: Raw) -> Reply:
    async with asyncio.timeout(PATIENCE):
        return await raw.reply()


def saying(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def code(reply: Reply) -> str | None:
    return None if reply.error is None else reply.error["code"]


@pytest.fixture(params=["ollama", "vllm"])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind: Kind = request.param
    return kind


# Queued requests


async def test_queued_requests_move_to_the_other_backend_and_running_ones_stay(kind: Kind) -> None:
    async with migrating(kind, first="slow") as setup:
        runs = await setup.sent({"stream": True})
        await runs.reader.readuntil(b"word")
        waiting = await setup.queue({"stream": True}, {}, {"stream": True}, {})
        assert setup.queued(setup.old) == {"text": 4}
        assert await setup.rollback() == 4
        for raw in waiting:
            reply = await reply_of(raw)
            assert (reply.status, reply.text) == (200, TEXT)
            names = [reply.headers[f"x-gateway-{name}"] for name in ("backend", "model", "attempts")]
            assert names == [setup.new.kind, MODEL, "1"]
        paths = {request.split(b" ")[1] for request in setup.new.requests}
        assert paths == {b"/api/chat" if kind == "vllm" else b"/v1/chat/completions"}
        assert (len(setup.old.requests), len(setup.new.requests)) == (1, 4)
        await asyncio.wait_for(runs.reader.readuntil(b"word"), PATIENCE)  # still running
        assert setup.gateway.running == 1


async def test_moved_requests_are_counted_once_for_the_backend_that_served_them(kind: Kind) -> None:
    async with migrating(kind) as setup:
        await setup.sent()
        waiting = await setup.queue({}, {}, {})
        await setup.rollback()
        for raw in waiting:
            await reply_of(raw)
        await until(lambda: setup.gateway.running == 1)
        metric = setup.gateway.metric
        assert (
            metric("gateway_requests_total", backend=setup.new.kind, outcome="ok")
            == metric("gateway_requests_total")
            == 3
        )
        assert (
            metric("gateway_queue_wait_seconds_count", backend=setup.new.kind, lane="text")
            == metric("gateway_queue_wait_seconds_count")
            == 3
        )
        assert metric("gateway_overhead_seconds_sum") < 3
        assert metric("gateway_fallbacks_total") == metric("gateway_retries_total") == 0
        assert [(line["chosen"], line["backend"], line["moved"]) for line in setup.gateway.exchanges()] == [
            (setup.new.kind,) * 2 + (True,)
        ] * 3
        assert setup.queued(setup.old) == setup.queued(setup.new) == {}


async def test_gauges_show_queued_requests_by_backend_and_lane() -> None:
    async with migrating(mode="silent", of_new={**ONE}) as setup:
        await setup.sent()
        await setup.queue({}, {"messages": [{"role": "user", "content": [PICTURE]}]}, {})
        operations = setup.gateway.gateway._operations
        await operations.exposition("")
        assert setup.gateway.metric("gateway_requests_waiting", backend="vllm") == 3
        assert await setup.rollback() == 3
        await operations.exposition("")
        waiting = {
            lane: setup.gateway.metric("gateway_requests_waiting", backend="ollama", lane=lane)
            for lane in ("text", "vision")
        }
        assert (waiting, setup.gateway.metric("gateway_requests_waiting", backend="vllm")) == (
            {"text": 1, "vision": 1},
            0,
        )


async def test_moved_images_queue_in_the_vision_lane_of_the_other_backend() -> None:
    async with migrating(mode="silent") as setup:
        await setup.sent()
        image = {"messages": [{"role": "user", "content": [PICTURE]}]}
        await setup.queue(image, image, image, {}, {})
        assert await setup.rollback() == 5
        await until(lambda: len(setup.new.requests) == 3)
        assert setup.queued(setup.new) == {"vision": 2}
        assert sum(b'"images"' in request for request in setup.new.requests) == 1


async def test_moved_requests_are_exempt_from_max_queue() -> None:
    async with migrating(mode="silent", of_new={**ONE, "max_queue": 1}) as setup:
        await setup.sent()
        await setup.queue(*[{}] * 5)
        assert await setup.rollback() == 5
        assert setup.queued(setup.new) == {"text": 4}
        refused = await setup.gateway.ask()
        assert (refused.status, code(refused), refused.headers["x-gateway-backend"]) == (503, "queue_full", "ollama")


async def test_order_of_arrival_and_priority_are_kept() -> None:
    async with migrating(mode="brief", of_new=ONE) as setup:
        await setup.sent()
        waiting = [await setup.sent(saying("later"), "X-Gateway-Priority: batch")]
        waiting += await setup.queue(*[saying(f"number {number}") for number in range(8)])
        assert await setup.rollback() == 9
        for raw in waiting:
            assert (await reply_of(raw)).status == 200
        said = [
            json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"] for request in setup.new.requests
        ]
        assert said == [f"number {number}" for number in range(8)] + ["later"]


async def test_queue_timeout_restarts_with_the_move_and_the_clients_deadline_does_not() -> None:
    async with migrating(mode="silent", of_old={"queue_timeout": 1}, of_new={**ONE, "queue_timeout": 1}) as setup:
        await setup.sent()
        _, patient = await setup.sent(), await setup.sent()
        hasty = await setup.sent({}, "X-Gateway-Timeout: 0.8")
        await until(lambda: all(relay._meter.clock() - relay.arrived > 0.4 for relay in setup.gateway.live))
        setup.gateway.gateway.rollout.rollback()
        assert (setup.queued(setup.old), setup.queued(setup.new)) == ({}, {"text": 2})
        late = [await reply_of(raw) for raw in (hasty, patient)]
        assert [(reply.status, code(reply), reply.headers["x-gateway-backend"]) for reply in late] == [
            (503, "queue_timeout", "ollama")
        ] * 2
        told = [
            "No slot came free within the client's deadline (x-gateway-timeout). Try again later.",
            "No slot came free within 1 seconds. Try again later.",
        ]
        assert [reply.error and reply.error["message"] for reply in late] == told
        early = 1000 * LATE_SECONDS
        assert 800 - early <= int(late[0].headers["x-gateway-queue-ms"]) < 1300
        assert 1400 - early <= int(late[1].headers["x-gateway-queue-ms"]) < 1900


async def test_committed_stream_continues_with_the_answer_of_the_other_backend() -> None:
    async with migrating(commit_after=0.05, heartbeat=0.05) as setup:
        await setup.sent()
        raw = await setup.sent({"stream": True})
        status, headers = await asyncio.wait_for(raw.head(), PATIENCE)
        assert (status, headers["x-gateway-backend"]) == (200, "vllm")  # true when the headers were sent
        assert await setup.rollback() == 1
        rest = await asyncio.wait_for(raw.reader.readuntil(b"[DONE]"), PATIENCE)
        assert rest.count(b'"role":"assistant"') == 1
        assert b"Hello" in rest


async def test_client_that_leaves_after_the_move_frees_its_place() -> None:
    async with migrating(mode="silent", of_new=ONE) as setup:
        await setup.sent()
        waiting = await setup.queue({}, {}, {})
        await setup.rollback()
        assert setup.queued(setup.new) == {"text": 2}
        waiting[2].leave()
        await until(lambda: setup.queued(setup.new) == {"text": 1})
        waiting[0].leave()
        await until(lambda: (len(setup.new.requests), setup.queued(setup.new)) == (2, {}))
        waiting[1].leave()
        await until(lambda: setup.gateway.running == 1)


@pytest.mark.parametrize("reason", ["down", "no-model", "no-images", "too-long"])
async def test_request_that_the_other_backend_cannot_serve_stays(reason: str) -> None:
    facts: dict[str, Any] = {"no-images": {"capabilities": ("completion",)}, "too-long": {"context_length": 512}}.get(
        reason, {}
    )
    async with migrating(facts=facts) as setup:
        runs = await setup.sent()
        await until(lambda: len(setup.old.requests) == 1)
        content = [PICTURE] if reason == "no-images" else "word " * 20_000
        (raw,) = await setup.queue({"messages": [{"role": "user", "content": content}]})
        server = setup.gateway.gateway._backends["ollama"].servers[0]
        if reason == "down":
            server.circuit.probe_missed(is_sure=True)
        elif reason == "no-model":
            server.mark_missing(MODEL)
        assert await setup.rollback() == 0
        assert sum(setup.queued(setup.old).values()) == 1
        setup.old.mode = "healthy"
        runs.leave()
        reply = await reply_of(raw)
        assert (reply.status, reply.text, reply.headers["x-gateway-backend"]) == (200, TEXT, "vllm")
        assert not setup.new.requests


async def test_tier_that_does_not_move_keeps_its_queue() -> None:
    others = {
        "pinned": {"models": {"vllm": MODEL, "ollama": MODEL}, "backend": "vllm"},
        "pro": {"models": {"vllm": MODEL, "ollama": MODEL}},
    }
    async with migrating(others=others) as setup:
        await setup.sent()
        await setup.queue({"model": "pinned"}, {"model": "pro"}, {"model": "standard"})
        assert (await setup.order("POST", "/ops/rollback", {"tier": "pro"}))["moved"] == 1
        assert setup.queued(setup.old) == {"text": 2}
        again = await setup.order("POST", "/ops/rollback", {"tier": "pro"})
        assert (again["changed"], again["moved"]) == (False, 0)
        assert await setup.rollback() == 1
        assert setup.queued(setup.old) == {"text": 1}


async def test_every_change_moves_and_undo_moves_back(kind: Kind) -> None:
    async with migrating(kind, mode="silent", of_new=ONE) as setup:
        await setup.sent()
        await setup.queue({}, {}, {})
        assert await setup.put(backend=setup.new.kind) == 3
        assert (setup.queued(setup.old), setup.queued(setup.new)) == ({}, {"text": 2})
        assert (await setup.order("POST", "/ops/undo"))["moved"] == 2
        assert (setup.queued(setup.old), setup.queued(setup.new)) == ({"text": 2}, {})
        assert await setup.put(backend=setup.new.kind) == 2


@pytest.mark.parametrize("image", ["none", "unchanged", "converted"])
async def test_canary_moves_the_conversations_in_its_buckets(image: str) -> None:
    """Each queued request moves to where it would go if it arrived now."""
    url = {"none": None, "unchanged": png_data_url(), "converted": png_data_url(8)}[image]
    images = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    names = [f"conversation {number:02}" for number in range(16)]
    bodies = {
        name: {"messages": [{"role": "user", "content": [*images, {"type": "text", "text": name}]}]} for name in names
    }
    async with migrating("vllm", mode="silent", of_new={"vision_concurrency": 8}) as setup:
        await setup.sent()
        for body in bodies.values():
            await setup.sent(body)
        await until(lambda: sum(setup.queued(setup.old).values()) == len(names))
        moved = await setup.put(canary={"backend": "ollama", "percent": 50})
        await until(lambda: len(setup.new.requests) == min(moved, 8))
        assert 0 < moved < len(names)
        went = [name for name in names if any(name.encode() in request for request in setup.new.requests)]
        setup.new.mode = "healthy"
        tier = setup.gateway.gateway.rollout.tiers["standard"]
        assert tier.requests == 0  # they were counted when they arrived
        sides = {
            name: relay for relay in setup.gateway.live for name in names if name in relay.request.chat.messages[0].text
        }
        now = {name for name, relay in sides.items() if relay.destination.route.backend == "ollama"}
        assert set(went) <= now
        assert len(now) == moved
        before = tier.canary_requests
        for name in names:
            async with setup.gateway.sent(bodies[name]):
                await until(lambda: tier.requests == names.index(name) + 1)  # noqa: B023  # awaited at once
            is_canary = tier.canary_requests > before
            before = tier.canary_requests
            assert is_canary == (name in now)
        assert await setup.put(backend="ollama") == len(names) - moved


async def test_conversation_with_a_session_header_moves_by_its_session() -> None:
    async with migrating(mode="silent") as setup:
        await setup.sent()
        for number in range(20):
            await setup.sent({}, f"X-Gateway-Session: {number}")
        moved = await setup.put(canary={"backend": "ollama", "percent": 40})
        assert 0 < moved < 20
        assert setup.queued(setup.old) == {"text": 20 - moved}


async def test_request_that_fell_back_stays_at_its_fallback() -> None:
    """The backend where it failed may serve the tier again: that does not move the request."""
    async with migrating(first="rst", mode="silent", of_new=ONE, tier={"fallback": "ollama"}) as setup:
        await setup.sent()
        await until(lambda: len(setup.new.requests) == 1)
        await setup.sent()
        await until(lambda: setup.queued(setup.new) == {"text": 1})
        assert await setup.rollback() == 0
        assert (await setup.order("POST", "/ops/undo"))["moved"] == 0
        assert setup.queued(setup.new) == {"text": 1}


async def test_request_requeued_for_a_dead_server_moves() -> None:
    async with migrating(of_old={"probe_interval": 0.1}) as setup:
        await setup.sent()
        waiting = await setup.queue({}, {})
        setup.old.die()
        server = setup.gateway.gateway._backends["vllm"].servers[0]
        await until(lambda: server.circuit.is_open)
        await until(lambda: setup.queued(setup.old) == {"text": 2})
        assert await setup.rollback() == 2
        for raw in waiting:
            reply = await reply_of(raw)
            assert (reply.status, reply.text, reply.headers["x-gateway-backend"]) == (200, TEXT, "ollama")
        await until(setup.gateway.is_idle)


async def test_request_that_meets_a_dead_server_after_a_switch_requeues_on_the_new_backend(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = asyncio.Event()

    async def connect(connect_timeout: float) -> None:
        await gate.wait()
        raise TransportError("connect_timeout")

    async with migrating() as setup:
        first = await setup.sent()
        (waiting,) = await setup.queue({})
        monkeypatch.setattr(setup.gateway.gateway._backends["vllm"].servers[0].pool, "connect", connect)
        first.leave()
        await until(lambda: setup.queued(setup.old) == {})
        assert await setup.rollback() == 0
        gate.set()
        reply = await reply_of(waiting)
        assert (reply.status, reply.text, reply.headers["x-gateway-backend"], reply.headers["x-gateway-attempts"]) == (
            200,
            TEXT,
            "ollama",
            "2",
        )
        await until(setup.gateway.is_idle)
        assert setup.gateway.metric("gateway_requests_total", backend="ollama", outcome="ok") == 1


async def test_long_queue_of_a_dead_backend_does_not_keep_the_guard_from_rolling_back() -> None:
    guard = {"rules": ["errors"], "min_samples": 5}
    async with migrating(of_old={"probe_interval": 0.1}, guard=guard) as setup:
        await setup.rollback()
        for _ in range(20):
            assert (await setup.gateway.ask()).status == 200
        setup.gateway.gateway.settle()
        await setup.put(backend="vllm")
        await setup.sent()
        waiting = await setup.queue(*[{}] * 60)
        setup.old.die()
        server = setup.gateway.gateway._backends["vllm"].servers[0]
        await until(lambda: server.circuit.is_open)
        for _ in range(12):  # fewer than a fourth of the queued ones
            assert (await setup.gateway.ask()).status == 503
            setup.gateway.gateway.settle()
            if setup.gateway.gateway.rollout.history[-1].cause == "guard":
                break
        assert setup.queued(setup.old) == {}
        assert {(await reply_of(raw)).headers["x-gateway-backend"] for raw in waiting} == {"ollama"}
        await until(setup.gateway.is_idle)


async def test_no_request_is_lost_when_many_are_moved_back_and_forth() -> None:
    random = Random(7)
    async with migrating(
        first="brief", mode="brief", of_old={**ONE, "max_queue": 999}, of_new={**ONE, "max_queue": 999}
    ) as setup:

        async def client(number: int) -> int:
            async with setup.gateway.sent({"stream": number % 2 == 0}) as raw:
                if number % 5 == 0:
                    await asyncio.sleep(random.random() / 10)
                    return 0
                return (await raw.reply()).status

        tasks = [asyncio.create_task(client(number)) for number in range(150)]
        rollout, moved = setup.gateway.gateway.rollout, 0
        while not all(task.done() for task in tasks):
            before = len(setup.old.requests) + len(setup.new.requests)
            rollout.set(random.choice(["vllm", "ollama"]))
            moved += setup.gateway.gateway._operations.controller._moved
            await until(
                lambda before=before: (
                    len(setup.old.requests) + len(setup.new.requests) > before or all(task.done() for task in tasks)
                )
            )
        assert sorted({task.result() for task in tasks}) == [0, 200]
        assert moved > 150
        await until(setup.gateway.is_idle)
        assert min(len(setup.old.requests), len(setup.new.requests)) > 10


# Running requests


async def test_cutoff_ends_running_requests_with_an_error_and_frees_the_backend(kind: Kind) -> None:
    async with migrating(
        kind, first="slow", of_old={"max_concurrency": 3, "model_concurrency": 3}, rollback_cutoff=0.2
    ) as setup:
        stream, plain = await setup.sent({"stream": True}), await setup.sent({})
        await stream.reader.readuntil(b"word")
        await until(lambda: len(setup.old.requests) == 2)
        assert await setup.rollback() == 0
        later = await setup.gateway.ask()
        assert later.headers["x-gateway-backend"] == setup.new.kind
        rest = await asyncio.wait_for(stream.reader.readuntil(b"0\r\n\r\n"), PATIENCE)
        assert b'"code":"backend_unavailable"' in rest
        assert b"[DONE]" not in rest
        reply = await reply_of(plain)
        assert (reply.status, code(reply), reply.headers["retry-after"]) == (503, "backend_unavailable", "1")
        await until(setup.gateway.is_idle)
        await until(lambda: not setup.old.open_peers)
        assert setup.gateway.metric("gateway_rejected_total", backend=kind, reason="backend_unavailable") == 2


async def test_cutoff_ends_requests_that_could_not_move() -> None:
    async with migrating(rollback_cutoff=0) as setup:
        runs, waits = await setup.sent(), await setup.sent()
        setup.gateway.gateway._backends["ollama"].servers[0].circuit.probe_missed(is_sure=True)
        assert await setup.rollback() == 0
        assert [code(await reply_of(raw)) for raw in (runs, waits)] == ["backend_unavailable"] * 2
        assert len(setup.old.requests) == 1
        await until(setup.gateway.is_idle)


async def test_cutoff_is_cancelled_when_the_tier_returns_and_not_set_by_a_switch() -> None:
    async with migrating(first="slow", rollback_cutoff=0.1) as setup:
        stream = await setup.sent({"stream": True})
        await stream.reader.readuntil(b"word")
        await setup.rollback()
        migration = setup.gateway.gateway._migration
        assert len(migration._cutoffs) == 1
        await setup.order("POST", "/ops/undo")
        assert not migration._cutoffs
        await setup.put(backend="ollama")
        assert not migration._cutoffs
        await setup.put(backend="vllm")
        await setup.rollback()
        assert len(migration._cutoffs) == 1
        assert (await setup.order("POST", "/ops/rollback"))["changed"] is False
        await asyncio.wait_for(stream.reader.readuntil(b"backend_unavailable"), PATIENCE)


async def test_cutoff_spares_requests_that_fell_back_there_later() -> None:
    slots = {"max_concurrency": 3, "model_concurrency": 3}
    async with migrating(first="slow", mode="rst", tier={"fallback": True}, rollback_cutoff=0.2, of_old=slots) as setup:
        old = await setup.sent({"stream": True})
        await old.reader.readuntil(b"word")
        await setup.rollback()
        new = await setup.sent({"stream": True})
        _, headers = await asyncio.wait_for(new.head(), PATIENCE)
        assert headers["x-gateway-backend"] == "vllm"
        await asyncio.wait_for(old.reader.readuntil(b"backend_unavailable"), PATIENCE)
        await asyncio.wait_for(new.reader.readuntil(b"word"), PATIENCE)
        assert setup.gateway.running == 1


async def test_running_requests_finish_without_a_cutoff() -> None:
    async with migrating(first="slow") as setup:
        stream = await setup.sent({"stream": True})
        await stream.reader.readuntil(b"word")
        await setup.rollback()
        assert not setup.gateway.gateway._migration._cutoffs
        for _ in range(20):
            await asyncio.wait_for(stream.reader.readuntil(b"word"), PATIENCE)


async def test_shutdown_cancels_the_cutoffs() -> None:
    async with migrating(rollback_cutoff=60) as setup:
        await setup.sent()
        await setup.rollback()
        migration = setup.gateway.gateway._migration
        (timer,) = migration._cutoffs.values()
    assert timer.cancelled()
    assert not migration._cutoffs
