"""Server-sent events of the status: what listeners get, when they end, and what they cost."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import msgspec
import pytest

from gateway.api.events import HEARTBEAT, INTERVAL, MAX_LISTENERS, Events
from gateway.api.json_patch import json_patch
from gateway.errors import QueueFull, ShuttingDown
from tests.api.both_engines import ADMIN, OLLAMA_MODEL, VLLM_MODEL, bearer, error_of, serving
from tests.api.test_json_patch import patched
from tests.fakes.processor_time import processor_seconds
from tests.fakes.running_gateway import Running, until

Event = tuple[str, Any]


class Listener:
    """A client that follows the events and keeps the state as a console does."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.state: dict[str, Any] = {}
        self.series: dict[str, Any] = {}
        self.bytes = 0

    def take(self, name: str, value: Any) -> None:
        self.names.append(name)
        if name == "status":
            self.state = value
        elif name == "patch":
            self.state = patched(self.state, value)
        elif name == "series":
            self.series = value
        else:
            self.series["at"] += value["at"]


@asynccontextmanager
async def listening(client: httpx2.AsyncClient, path: str = "/ops/events", **options: Any) -> AsyncIterator[Listener]:
    listener = Listener()

    async def follow(answer: httpx2.Response) -> None:
        name = ""
        async for line in answer.aiter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                listener.take(name, json.loads(line.removeprefix("data: ")))

    async with client.stream("GET", path, **options) as answer:
        assert answer.status_code == 200, await answer.aread()
        assert answer.headers["content-type"] == "text/event-stream"
        assert answer.headers["cache-control"] == "no-store"
        following = asyncio.create_task(follow(answer))
        try:
            await until(lambda: bool(listener.state))
            yield listener
        finally:
            following.cancel()
            await asyncio.wait([following])


def events_of(gateway: Running) -> Events:
    return gateway.gateway._events


@pytest.mark.uvloop
async def test_a_listener_sees_what_status_answers_and_each_change_of_it() -> None:
    async with serving() as (gateway, client), listening(client) as listener:
        status = (await client.get("/ops/status")).json()
        series = status.pop("series")
        assert listener.state == status
        assert listener.series["backends"].keys() == series["backends"].keys()
        await client.put("/ops/rollout", json={"canary": {"backend": "ollama", "percent": 25}})
        await until(lambda: listener.state["tiers"]["team/Standard"]["canary"] is not None)
        assert listener.state["rollout"]["history"][0]["cause"] == "operator"
        status = (await client.get("/ops/status")).json()
        del status["series"]
        assert listener.state == status
        assert listener.names.count("status") == 1
        await gateway.ask({"model": "pinned"})
        gateway.gateway.settle()
        await until(lambda: bool(listener.state["errors"]))
        assert listener.state["errors"][0]["tier"] == "pinned"


@pytest.mark.uvloop
async def test_events_require_the_operators_right_and_an_existing_tier() -> None:
    async with serving(admin_key=ADMIN) as (gateway, client):
        assert error_of(await client.get("/ops/events")) == (401, "invalid_api_key")
        assert error_of(await client.get("/ops/events?tier=none", headers=bearer(ADMIN))) == (400, "invalid_value")
        assert error_of(await client.get("/ops/status?tier=none", headers=bearer(ADMIN))) == (400, "invalid_value")
        async with listening(client, "/ops/events?tier=team/Standard", headers=bearer(ADMIN)) as listener:
            assert listener.series["tier"] == "team/Standard"
        await until(lambda: events_of(gateway).listeners == 0)


@pytest.mark.uvloop
async def test_without_a_key_no_foreign_page_can_listen() -> None:
    async with serving() as (gateway, client):
        for headers in ({"origin": "http://evil.example"}, {"host": "evil.example"}, {"x-forwarded-for": "127.0.0.1"}):
            assert error_of(await client.get("/ops/events", headers=headers)) == (403, "forbidden")
        async with listening(client, headers={"origin": gateway.base_url}) as listener:
            assert listener.state["ready"]["status"] == "ready"


@pytest.mark.uvloop
async def test_fifty_consoles_hold_the_loop_not_much_longer_than_the_status_of_two_hundred_tiers_takes() -> None:
    tiers = {f"tier-{number}": {"models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}} for number in range(200)}
    async with serving(tiers=tiers) as (gateway, _), AsyncExitStack() as stack:
        events, rollout = events_of(gateway), gateway.gateway.rollout
        for _ in range(50):
            reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**22)
            stack.callback(writer.close)
            writer.write(b"GET /ops/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
            reading = asyncio.create_task(read_all(reader))
            stack.push_async_callback(asyncio.wait, [reading])
            stack.callback(reading.cancel)
        await until(lambda: events.listeners == 50)
        gc.collect()
        gc.freeze()  # as the gateway does, so that no collection walks the objects of the tests
        longest, unit = [], []
        for number in range(6):
            rollout.set("vllm" if number % 2 else "ollama")  # all tiers change at once
            unit.append(processor_seconds(lambda: msgspec.json.encode(json_patch({}, events._snapshot()))))
            version = events._version
            events._stop_timer()
            steps = [processor_seconds(events._tick)]
            assert events._version == version + 1
            for _ in range(20):  # the listeners write in the turns that follow
                began = time.thread_time()
                await asyncio.sleep(0)
                steps.append(time.thread_time() - began)
            longest.append(max(steps))
        assert min(longest) < 4 * min(unit)


async def read_all(reader: asyncio.StreamReader) -> None:
    while await reader.read(2**18):
        pass


@pytest.mark.uvloop
async def test_events_of_a_tier_end_when_new_settings_no_longer_have_it() -> None:
    async with serving() as (gateway, client), client.stream("GET", "/ops/events?tier=team/Standard") as answer:
        await until(lambda: events_of(gateway).listeners == 1)
        operations = gateway.gateway._operations
        tiers = {"other": operations._settings.tiers["team/Standard"].model_copy(update={"name": "other"})}
        await gateway.gateway._reconfiguration.apply(
            operations._settings.model_copy(update={"tiers": tiers, "default_tier": "other"})
        )
        gateway.gateway._live.sample()
        async with asyncio.timeout(20):
            await answer.aread()
        assert error_of(await client.get("/ops/events?tier=team/Standard")) == (400, "invalid_value")


@pytest.mark.uvloop
async def test_nothing_runs_once_the_last_listener_has_left() -> None:
    async with serving() as (gateway, client):
        events = events_of(gateway)
        assert events._timer is None
        async with listening(client), listening(client):
            assert events.listeners == 2
            assert events._timer is not None
        await until(lambda: events.listeners == 0)
        assert events._timer is None


@pytest.mark.uvloop
async def test_the_drain_ends_the_events_at_once_and_refuses_new_ones() -> None:
    async with serving() as (gateway, client):
        async with client.stream("GET", "/ops/events") as answer:
            await until(lambda: events_of(gateway).listeners == 1)
            gateway.gateway.begin_drain()
            async with asyncio.timeout(10):  # less than `HEARTBEAT`
                await answer.aread()  # raises if the response is not complete
        refused = await client.get("/ops/events")
        assert error_of(refused) == (503, "shutting_down")
        assert "retry-after" in refused.headers


@pytest.mark.uvloop
async def test_a_reader_that_does_not_read_costs_nothing_and_then_gets_the_whole_status() -> None:
    async with serving() as (gateway, _):
        events = events_of(gateway)
        state: dict[str, Any] = {"n": 0, "text": ""}
        events._snapshot = lambda: dict(state)
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**16)
        writer.write(b"GET /ops/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        await until(lambda: events.listeners == 1)

        def unsent() -> int:
            return max(c.transport.get_write_buffer_size() for c in gateway.server.server_state.connections)

        while unsent() < 2**16:  # the socket buffers are full
            state["text"] = f"{state['n']}" * 2**17
            state["n"] += 1
            events._refresh()
            for wake in events._listeners:
                wake.set()
            await asyncio.sleep(0.001)
        full = unsent()
        for _ in range(1000):
            state["n"] += 1
            events._refresh()
            for wake in events._listeners:
                wake.set()
            await asyncio.sleep(0)
        assert unsent() == full
        state["text"] = "the last one"
        events._refresh()
        last = b""
        async with asyncio.timeout(10):
            while b'"the last one"' not in last:
                last = last[-(2**10) :] + await reader.read(2**16)
        assert b"event: status" in last
        writer.close()


def client_connection() -> Any:
    class Client:
        gone = False
        on_leave: Callable[[], None] | None = None

    return Client()


@pytest.mark.virtual_time
async def test_at_most_four_events_a_second_and_a_heartbeat_while_nothing_changes() -> None:
    loop = asyncio.get_running_loop()
    changes, sent = {"n": 0}, list[tuple[float, bytes]]()

    async def send(message: Any) -> None:
        if message.get("body"):
            sent.append((loop.time(), message["body"]))

    events = Events(lambda: dict(changes), lambda tier, last: {}, lambda: 0)
    listening = asyncio.create_task(events.listen(client_connection(), None, send))
    began = loop.time()
    while loop.time() < began + 5:
        changes["n"] += 1
        await asyncio.sleep(0.03)
    assert 15 <= len(sent) <= 21
    assert all(b"event: patch" in body for _, body in sent[1:])
    sent.clear()
    await asyncio.sleep(4 * HEARTBEAT)
    assert [body for _, body in sent[1:]] == [b":\n\n"] * (len(sent) - 1)
    assert 3 <= len(sent) <= 5
    events.close()
    await listening


@pytest.mark.virtual_time
async def test_an_expensive_status_is_asked_for_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A status of 200 tiers may take milliseconds; the events take at most a twentieth of the time."""
    now = {"seconds": 0.0}
    monkeypatch.setattr("gateway.api.events.time.perf_counter", lambda: now["seconds"])
    loop, asked = asyncio.get_running_loop(), list[float]()

    def snapshot() -> dict[str, Any]:
        now["seconds"] += 0.1
        asked.append(loop.time())
        return {"n": len(asked)}

    async def send(message: Any) -> None:
        pass

    events = Events(snapshot, lambda tier, last: {}, lambda: 0)
    listening = asyncio.create_task(events.listen(client_connection(), None, send))
    await asyncio.sleep(20)
    assert len(asked) <= 2 + (20 - INTERVAL) / 2
    events.close()
    await listening


@pytest.mark.virtual_time
async def test_a_failing_status_does_not_end_the_events() -> None:
    failures = iter([False, True, False, False])
    sent = list[bytes]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)

    def snapshot() -> dict[str, Any]:
        if next(failures, False):
            raise RuntimeError
        return {"n": len(sent)}

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    events = Events(snapshot, lambda tier, last: {}, lambda: 0)
    listening = asyncio.create_task(events.listen(client_connection(), None, send))
    await asyncio.sleep(1)
    assert any(b"event: patch" in body for body in sent)
    events.close()
    await listening


async def test_listeners_are_limited_and_none_begins_after_the_end() -> None:
    events = Events(dict, lambda tier, last: {}, lambda: 0)
    events._listeners = {asyncio.Event() for _ in range(MAX_LISTENERS)}
    with pytest.raises(QueueFull):
        events.check()
    events._listeners.clear()
    events.check()
    events.close()
    with pytest.raises(ShuttingDown):
        events.check()
