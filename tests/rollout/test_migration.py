"""Requests follow the roll-out: who waits goes to the other backend, who runs may finish, or gets so many seconds; on real sockets."""

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
from gateway.upstream.connection import WireError
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend, Kind
from tests.fakes.pictures import picture_url
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
PICTURE = {"type": "image_url", "image_url": {"url": picture_url()}}
OTHER: dict[Kind, Kind] = {"ollama": "vllm", "vllm": "ollama"}


class House:
    """A gateway whose tier is on `left`, which has one slot and somebody in it, and `there`, where the roll-out may lead."""

    def __init__(self, gateway: Running, left: FaultBackend, there: FaultBackend, stack: AsyncExitStack) -> None:
        self.gateway = gateway
        self.left = left
        self.there = there
        self._stack = stack

    async def sent(self, body: dict[str, Any] | None = None, *headers: str) -> Raw:
        """A client that stays to the end of the test, and is in line or at a backend when this returns."""
        count = len(self.gateway.live)
        raw = await self._stack.enter_async_context(self.gateway.sent(body, *headers))
        await until(lambda: len(self.gateway.live) > count)
        return raw

    async def waiting(self, *bodies: dict[str, Any]) -> list[Raw]:
        """Clients in line, in this order."""
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
        """How many moved, by the answer."""
        moved: int = (await self.order("POST", "/ops/rollback"))["moved"]
        return moved

    async def put(self, **order: Any) -> int:
        moved: int = (await self.order("PUT", "/ops/rollout", order))["moved"]
        return moved

    def line(self, backend: FaultBackend) -> dict[str, int]:
        """Who waits there, by lane."""
        admission = self.gateway.gateway._backends[backend.kind].admission
        return {lane: admission.waiting(lane) for lane in admission.lanes if admission.waiting(lane)}


@asynccontextmanager
async def house(
    kind: Kind = "vllm",
    *,
    first: str = "silent",
    mode: str = "healthy",
    there: dict[str, Any] | None = None,
    left: dict[str, Any] | None = None,
    tier: dict[str, Any] | None = None,
    others: dict[str, Any] | None = None,
    facts: dict[str, Any] | None = None,
    **top: Any,
) -> AsyncIterator[House]:
    """`first` is how the tier's backend takes requests, `mode` how the other one does; `facts` are told of the model there."""
    async with AsyncExitStack() as stack:
        old = await stack.enter_async_context(FaultBackend(kind, first))
        new = await stack.enter_async_context(FaultBackend(OTHER[kind], mode, **(facts or {})))
        document = {
            "llm_backend": kind,
            "rollback_to": new.kind,
            "backends": {
                kind: {"kind": kind, "base_url": old.base_url, **PATIENT, **ONE, **(left or {})},
                new.kind: {
                    "kind": new.kind,
                    "base_url": new.base_url,
                    **PATIENT,
                    "max_concurrency": 8,
                    "model_concurrency": 8,
                    **(there or {}),
                },
            },
            "tiers": {"standard": {"models": {kind: MODEL, new.kind: MODEL}, **(tier or {})}, **(others or {})},
            "log_format": "json",
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document | top)))
        clients = await stack.enter_async_context(AsyncExitStack())
        yield House(gateway, old, new, clients)


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


# Who waits


async def test_who_waits_is_served_by_the_other_backend_and_who_runs_where_he_is(kind: Kind) -> None:
    async with house(kind, first="slow") as here:
        runs = await here.sent({"stream": True})
        await runs.reader.readuntil(b"word")
        waiting = await here.waiting({"stream": True}, {}, {"stream": True}, {})
        assert here.line(here.left) == {"text": 4}
        assert await here.rollback() == 4
        for raw in waiting:
            reply = await reply_of(raw)
            assert (reply.status, reply.text) == (200, TEXT)
            names = [reply.headers[f"x-gateway-{name}"] for name in ("backend", "model", "attempts")]
            assert names == [here.there.kind, MODEL, "1"]
        paths = {request.split(b" ")[1] for request in here.there.requests}
        assert paths == {b"/api/chat" if kind == "vllm" else b"/v1/chat/completions"}
        assert (len(here.left.requests), len(here.there.requests)) == (1, 4)
        await asyncio.wait_for(runs.reader.readuntil(b"word"), PATIENCE)  # and goes on
        assert here.gateway.running == 1


async def test_moved_requests_are_counted_once_and_for_the_backend_that_served(kind: Kind) -> None:
    async with house(kind) as here:
        await here.sent()
        waiting = await here.waiting({}, {}, {})
        await here.rollback()
        for raw in waiting:
            await reply_of(raw)
        await until(lambda: here.gateway.running == 1)
        metric = here.gateway.metric
        assert (
            metric("gateway_requests_total", backend=here.there.kind, outcome="ok")
            == metric("gateway_requests_total")
            == 3
        )
        assert (
            metric("gateway_queue_wait_seconds_count", backend=here.there.kind, lane="text")
            == metric("gateway_queue_wait_seconds_count")
            == 3
        )
        assert metric("gateway_overhead_seconds_sum") < 3
        assert metric("gateway_fallbacks_total") == metric("gateway_retries_total") == 0
        assert [(line["chosen"], line["backend"], line["moved"]) for line in here.gateway.exchanges()] == [
            (here.there.kind,) * 2 + (True,)
        ] * 3
        assert here.line(here.left) == here.line(here.there) == {}


async def test_gauges_show_who_waits_where_by_lane() -> None:
    async with house(mode="silent", there={**ONE}) as here:
        await here.sent()
        await here.waiting({}, {"messages": [{"role": "user", "content": [PICTURE]}]}, {})
        operations = here.gateway.gateway._operations
        operations.exposition("")
        assert here.gateway.metric("gateway_requests_waiting", backend="vllm") == 3
        assert await here.rollback() == 3
        operations.exposition("")
        waiting = {
            lane: here.gateway.metric("gateway_requests_waiting", backend="ollama", lane=lane)
            for lane in ("text", "vision")
        }
        assert (waiting, here.gateway.metric("gateway_requests_waiting", backend="vllm")) == (
            {"text": 1, "vision": 1},
            0,
        )


async def test_images_wait_in_the_lane_of_the_other_side() -> None:
    async with house(mode="silent") as here:
        await here.sent()
        image = {"messages": [{"role": "user", "content": [PICTURE]}]}
        await here.waiting(image, image, image, {}, {})
        assert await here.rollback() == 5
        await until(lambda: len(here.there.requests) == 3)
        assert here.line(here.there) == {"vision": 2}
        assert sum(b'"images"' in request for request in here.there.requests) == 1


async def test_no_line_is_too_full_for_those_who_move() -> None:
    async with house(mode="silent", there={**ONE, "max_queue": 1}) as here:
        await here.sent()
        await here.waiting(*[{}] * 5)
        assert await here.rollback() == 5
        assert here.line(here.there) == {"text": 4}
        refused = await here.gateway.ask()
        assert (refused.status, code(refused), refused.headers["x-gateway-backend"]) == (503, "queue_full", "ollama")


async def test_order_of_arrival_and_priority_are_kept() -> None:
    async with house(mode="brief", there=ONE) as here:
        await here.sent()
        waiting = [await here.sent(saying("later"), "X-Gateway-Priority: batch")]
        waiting += await here.waiting(*[saying(f"number {number}") for number in range(8)])
        assert await here.rollback() == 9
        for raw in waiting:
            assert (await reply_of(raw)).status == 200
        said = [
            json.loads(request.partition(b"\r\n\r\n")[2])["messages"][0]["content"] for request in here.there.requests
        ]
        assert said == [f"number {number}" for number in range(8)] + ["later"]


async def test_clock_of_the_line_begins_anew_and_that_of_the_client_does_not() -> None:
    async with house(mode="silent", left={"queue_timeout": 1}, there={**ONE, "queue_timeout": 1}) as here:
        await here.sent()
        _, patient = await here.sent(), await here.sent()
        hasty = await here.sent({}, "X-Gateway-Timeout: 0.8")
        await until(lambda: all(relay._meter.clock() - relay.arrived > 0.4 for relay in here.gateway.live))
        here.gateway.gateway.rollout.rollback()
        assert (here.line(here.left), here.line(here.there)) == ({}, {"text": 2})
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


async def test_stream_that_began_in_line_goes_on_with_the_answer_of_the_other() -> None:
    async with house(commit_after=0.05, heartbeat=0.05) as here:
        await here.sent()
        raw = await here.sent({"stream": True})
        status, headers = await asyncio.wait_for(raw.head(), PATIENCE)
        assert (status, headers["x-gateway-backend"]) == (200, "vllm")  # true when it left
        assert await here.rollback() == 1
        rest = await asyncio.wait_for(raw.reader.readuntil(b"[DONE]"), PATIENCE)
        assert rest.count(b'"role":"assistant"') == 1
        assert b"Hello" in rest


async def test_client_that_leaves_after_the_move_frees_its_place() -> None:
    async with house(mode="silent", there=ONE) as here:
        await here.sent()
        waiting = await here.waiting({}, {}, {})
        await here.rollback()
        assert here.line(here.there) == {"text": 2}
        waiting[2].leave()
        await until(lambda: here.line(here.there) == {"text": 1})
        waiting[0].leave()
        await until(lambda: (len(here.there.requests), here.line(here.there)) == (2, {}))
        waiting[1].leave()
        await until(lambda: here.gateway.running == 1)


@pytest.mark.parametrize("reason", ["away", "no model", "blind", "too long"])
async def test_what_the_other_cannot_serve_stays_and_is_served_where_it_is(reason: str) -> None:
    facts: dict[str, Any] = {"blind": {"capabilities": ("completion",)}, "too long": {"context_length": 512}}.get(
        reason, {}
    )
    async with house(facts=facts) as here:
        runs = await here.sent()
        await until(lambda: len(here.left.requests) == 1)
        content = [PICTURE] if reason == "blind" else "word " * 20_000
        (raw,) = await here.waiting({"messages": [{"role": "user", "content": content}]})
        server = here.gateway.gateway._backends["ollama"].servers[0]
        if reason == "away":
            server.circuit.probe_missed(is_sure=True)
        elif reason == "no model":
            server.mark_missing(MODEL)
        assert await here.rollback() == 0
        assert sum(here.line(here.left).values()) == 1
        here.left.mode = "healthy"
        runs.leave()
        reply = await reply_of(raw)
        assert (reply.status, reply.text, reply.headers["x-gateway-backend"]) == (200, TEXT, "vllm")
        assert not here.there.requests


async def test_tier_that_does_not_move_keeps_its_line() -> None:
    others = {
        "pinned": {"models": {"vllm": MODEL, "ollama": MODEL}, "backend": "vllm"},
        "pro": {"models": {"vllm": MODEL, "ollama": MODEL}},
    }
    async with house(others=others) as here:
        await here.sent()
        await here.waiting({"model": "pinned"}, {"model": "pro"}, {"model": "standard"})
        assert (await here.order("POST", "/ops/rollback", {"tier": "pro"}))["moved"] == 1
        assert here.line(here.left) == {"text": 2}
        again = await here.order("POST", "/ops/rollback", {"tier": "pro"})
        assert (again["changed"], again["moved"]) == (False, 0)
        assert await here.rollback() == 1
        assert here.line(here.left) == {"text": 1}


async def test_every_change_moves_and_undo_moves_back(kind: Kind) -> None:
    async with house(kind, mode="silent", there=ONE) as here:
        await here.sent()
        await here.waiting({}, {}, {})
        assert await here.put(backend=here.there.kind) == 3
        assert (here.line(here.left), here.line(here.there)) == ({}, {"text": 2})
        assert (await here.order("POST", "/ops/undo"))["moved"] == 2
        assert (here.line(here.left), here.line(here.there)) == ({"text": 2}, {})
        assert await here.put(backend=here.there.kind) == 2


@pytest.mark.parametrize("picture", ["none", "as it is", "converted"])
async def test_canary_moves_the_conversations_that_are_on_its_side(picture: str) -> None:
    """Those who wait are put where each of them would go if it came again."""
    url = {"none": None, "as it is": picture_url(), "converted": picture_url(8)}[picture]
    pictures = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    names = [f"conversation {number:02}" for number in range(16)]
    bodies = {
        name: {"messages": [{"role": "user", "content": [*pictures, {"type": "text", "text": name}]}]} for name in names
    }
    async with house("vllm", mode="silent", there={"vision_concurrency": 8}) as here:
        await here.sent()
        for body in bodies.values():
            await here.sent(body)
        await until(lambda: sum(here.line(here.left).values()) == len(names))
        moved = await here.put(canary={"backend": "ollama", "percent": 50})
        await until(lambda: len(here.there.requests) == min(moved, 8))
        assert 0 < moved < len(names)
        went = [name for name in names if any(name.encode() in request for request in here.there.requests)]
        here.there.mode = "healthy"
        lines = here.gateway.gateway.rollout.tiers["standard"]
        assert lines.requests == 0  # they were counted when they came
        sides = {
            name: relay for relay in here.gateway.live for name in names if name in relay.request.chat.messages[0].text
        }
        now = {name for name, relay in sides.items() if relay.destination.route.backend == "ollama"}
        assert set(went) <= now
        assert len(now) == moved
        before = lines.canary_requests
        for name in names:
            async with here.gateway.sent(bodies[name]):
                await until(lambda: lines.requests == names.index(name) + 1)  # noqa: B023 - awaited at once
            went_there = lines.canary_requests > before
            before = lines.canary_requests
            assert went_there == (name in now)
        assert await here.put(backend="ollama") == len(names) - moved


async def test_named_conversation_moves_by_its_name() -> None:
    async with house(mode="silent") as here:
        await here.sent()
        for number in range(20):
            await here.sent({}, f"X-Gateway-Session: {number}")
        moved = await here.put(canary={"backend": "ollama", "percent": 40})
        assert 0 < moved < 20
        assert here.line(here.left) == {"text": 20 - moved}


async def test_request_that_a_failure_has_led_elsewhere_stays_there() -> None:
    """It waits at its tier's fallback; that the tier goes back to where it failed is no news for it."""
    async with house(first="rst", mode="silent", there=ONE, tier={"fallback": "ollama"}) as here:
        await here.sent()
        await until(lambda: len(here.there.requests) == 1)
        await here.sent()
        await until(lambda: here.line(here.there) == {"text": 1})
        assert await here.rollback() == 0
        assert (await here.order("POST", "/ops/undo"))["moved"] == 0
        assert here.line(here.there) == {"text": 1}


async def test_request_that_waits_once_more_for_a_dead_server_moves() -> None:
    async with house(left={"probe_interval": 0.1}) as here:
        await here.sent()
        waiting = await here.waiting({}, {})
        here.left.die()
        server = here.gateway.gateway._backends["vllm"].servers[0]
        await until(lambda: server.circuit.is_open)
        await until(lambda: here.line(here.left) == {"text": 2})
        assert await here.rollback() == 2
        for raw in waiting:
            reply = await reply_of(raw)
            assert (reply.status, reply.text, reply.headers["x-gateway-backend"]) == (200, TEXT, "ollama")
        await until(here.gateway.is_idle)


async def test_request_that_meets_a_dead_server_after_the_move_waits_where_the_tier_is_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gate = asyncio.Event()

    async def connect(connect_timeout: float) -> None:
        await gate.wait()
        raise WireError("connect_timeout")

    async with house() as here:
        first = await here.sent()
        (waiting,) = await here.waiting({})
        monkeypatch.setattr(here.gateway.gateway._backends["vllm"].servers[0].pool, "connect", connect)
        first.leave()
        await until(lambda: here.line(here.left) == {})
        assert await here.rollback() == 0
        gate.set()
        reply = await reply_of(waiting)
        assert (reply.status, reply.text, reply.headers["x-gateway-backend"], reply.headers["x-gateway-attempts"]) == (
            200,
            TEXT,
            "ollama",
            "2",
        )
        await until(here.gateway.is_idle)
        assert here.gateway.metric("gateway_requests_total", backend="ollama", outcome="ok") == 1


async def test_long_line_of_a_dead_backend_does_not_keep_the_guard_from_moving_it() -> None:
    guard = {"rules": ["errors"], "min_samples": 5}
    async with house(left={"probe_interval": 0.1}, guard=guard) as here:
        await here.rollback()
        for _ in range(20):
            assert (await here.gateway.ask()).status == 200
        here.gateway.gateway.settle()
        await here.put(backend="vllm")
        await here.sent()
        waiting = await here.waiting(*[{}] * 60)
        here.left.die()
        server = here.gateway.gateway._backends["vllm"].servers[0]
        await until(lambda: server.circuit.is_open)
        for _ in range(12):  # fewer than a fourth of those who wait
            assert (await here.gateway.ask()).status == 503
            here.gateway.gateway.settle()
            if here.gateway.gateway.rollout.history[-1].cause == "guard":
                break
        assert here.line(here.left) == {}
        assert {(await reply_of(raw)).headers["x-gateway-backend"] for raw in waiting} == {"ollama"}
        await until(here.gateway.is_idle)


async def test_nothing_is_lost_or_left_when_a_crowd_is_moved_to_and_fro() -> None:
    random = Random(7)
    async with house(
        first="brief", mode="brief", left={**ONE, "max_queue": 999}, there={**ONE, "max_queue": 999}
    ) as here:

        async def client(number: int) -> int:
            async with here.gateway.sent({"stream": number % 2 == 0}) as raw:
                if number % 5 == 0:
                    await asyncio.sleep(random.random() / 10)
                    return 0
                return (await raw.reply()).status

        tasks = [asyncio.create_task(client(number)) for number in range(150)]
        rollout, moved = here.gateway.gateway.rollout, 0
        while not all(task.done() for task in tasks):
            before = len(here.left.requests) + len(here.there.requests)
            rollout.set(random.choice(["vllm", "ollama"]))
            moved += here.gateway.gateway._operations.controller._moved
            await until(
                lambda before=before: (
                    len(here.left.requests) + len(here.there.requests) > before or all(task.done() for task in tasks)
                )
            )
        assert sorted({task.result() for task in tasks}) == [0, 200]
        assert moved > 150
        await until(here.gateway.is_idle)
        assert min(len(here.left.requests), len(here.there.requests)) > 10


# Who runs


async def test_after_the_cutoff_who_runs_ends_with_an_error_and_frees_the_backend(kind: Kind) -> None:
    async with house(
        kind, first="slow", left={"max_concurrency": 3, "model_concurrency": 3}, rollback_cutoff=0.2
    ) as here:
        stream, plain = await here.sent({"stream": True}), await here.sent({})
        await stream.reader.readuntil(b"word")
        await until(lambda: len(here.left.requests) == 2)
        assert await here.rollback() == 0
        later = await here.gateway.ask()
        assert later.headers["x-gateway-backend"] == here.there.kind
        rest = await asyncio.wait_for(stream.reader.readuntil(b"0\r\n\r\n"), PATIENCE)
        assert b'"code":"backend_unavailable"' in rest
        assert b"[DONE]" not in rest
        reply = await reply_of(plain)
        assert (reply.status, code(reply), reply.headers["retry-after"]) == (503, "backend_unavailable", "1")
        await until(here.gateway.is_idle)
        await until(lambda: not here.left.open_peers)
        assert here.gateway.metric("gateway_rejected_total", backend=kind, reason="backend_unavailable") == 2


async def test_cutoff_ends_those_too_who_could_not_move() -> None:
    async with house(rollback_cutoff=0) as here:
        runs, waits = await here.sent(), await here.sent()
        here.gateway.gateway._backends["ollama"].servers[0].circuit.probe_missed(is_sure=True)
        assert await here.rollback() == 0
        assert [code(await reply_of(raw)) for raw in (runs, waits)] == ["backend_unavailable"] * 2
        assert len(here.left.requests) == 1
        await until(here.gateway.is_idle)


async def test_cutoff_does_not_come_once_the_tier_is_back_nor_after_a_switch() -> None:
    async with house(first="slow", rollback_cutoff=0.1) as here:
        stream = await here.sent({"stream": True})
        await stream.reader.readuntil(b"word")
        await here.rollback()
        moves = here.gateway.gateway._migration
        assert len(moves._cutoffs) == 1
        await here.order("POST", "/ops/undo")
        assert not moves._cutoffs
        await here.put(backend="ollama")
        assert not moves._cutoffs
        await here.put(backend="vllm")
        await here.rollback()
        assert len(moves._cutoffs) == 1
        assert (await here.order("POST", "/ops/rollback"))["changed"] is False
        await asyncio.wait_for(stream.reader.readuntil(b"backend_unavailable"), PATIENCE)


async def test_cutoff_spares_who_came_there_by_a_failure_later() -> None:
    slots = {"max_concurrency": 3, "model_concurrency": 3}
    async with house(first="slow", mode="rst", tier={"fallback": True}, rollback_cutoff=0.2, left=slots) as here:
        old = await here.sent({"stream": True})
        await old.reader.readuntil(b"word")
        await here.rollback()
        new = await here.sent({"stream": True})
        _, headers = await asyncio.wait_for(new.head(), PATIENCE)
        assert headers["x-gateway-backend"] == "vllm"
        await asyncio.wait_for(old.reader.readuntil(b"backend_unavailable"), PATIENCE)
        await asyncio.wait_for(new.reader.readuntil(b"word"), PATIENCE)
        assert here.gateway.running == 1


async def test_without_a_cutoff_who_runs_may_run() -> None:
    async with house(first="slow") as here:
        stream = await here.sent({"stream": True})
        await stream.reader.readuntil(b"word")
        await here.rollback()
        assert not here.gateway.gateway._migration._cutoffs
        for _ in range(20):
            await asyncio.wait_for(stream.reader.readuntil(b"word"), PATIENCE)


async def test_gateway_that_ends_forgets_its_cutoffs() -> None:
    async with house(rollback_cutoff=60) as here:
        await here.sent()
        await here.rollback()
        moves = here.gateway.gateway._migration
        (timer,) = moves._cutoffs.values()
    assert timer.cancelled()
    assert not moves._cutoffs
