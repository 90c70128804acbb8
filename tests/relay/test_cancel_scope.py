"""Ends waiting for a reason."""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf

import pytest

from gateway.errors import ClientLeft, ShuttingDown
from gateway.relay.cancel_scope import CancelScope
from gateway.relay.in_flight import SWEEP_SECONDS, Sweep
from tests.fakes.running_gateway import until


class Client:
    def __init__(self) -> None:
        self.gone = False
        self.on_leave: Callable[[], None] | None = None

    def leave(self) -> None:
        self.gone = True
        if self.on_leave is not None:
            self.on_leave()


def watch_of(client: Client) -> CancelScope:
    return CancelScope(client, asyncio.get_running_loop())


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


# One task


async def test_client_that_leaves_ends_the_wait() -> None:
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), watch_of(client):
        await for_ever()


async def test_client_that_had_left_already_is_seen_at_once() -> None:
    client = Client()
    client.leave()
    with pytest.raises(ClientLeft), watch_of(client):
        pytest.fail("the body began")


async def test_first_reason_counts() -> None:
    client = Client()
    watch = watch_of(client)
    asyncio.get_running_loop().call_soon(watch.end, ShuttingDown())
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ShuttingDown), watch:
        await for_ever()


async def test_client_may_leave_after_the_end() -> None:
    client = Client()
    with watch_of(client):
        pass
    assert client.on_leave is None
    client.leave()
    await asyncio.sleep(0)


async def test_error_of_the_body_comes_through() -> None:
    with pytest.raises(ValueError, match="it broke"), watch_of(Client()):
        raise ValueError("it broke")


async def test_task_goes_on_after_the_end() -> None:
    """It was cancelled to wake it up; its own next wait is not."""
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), watch_of(client):
        await for_ever()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_cancellation_from_outside_stays_one() -> None:
    async def body() -> None:
        with watch_of(Client()):
            await for_ever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


# All that is under way


class Exchange:
    """`next` is what a look makes of `check_at`; an exception is raised."""

    def __init__(self, check_at: float = 0.0, then: float | Exception = inf) -> None:
        self.check_at = check_at
        self.then = then
        self.looks: list[float] = []

    def check_deadlines(self, now: float) -> None:
        self.looks.append(now)
        if isinstance(self.then, Exception):
            raise self.then
        self.check_at = self.then


def sweep() -> Sweep:
    return Sweep(asyncio.get_running_loop(), time.monotonic)


async def test_each_is_looked_at_when_it_wants_to_be() -> None:
    now, sweeping = time.monotonic(), sweep()
    soon, often, never = Exchange(), Exchange(then=0.0), Exchange(check_at=now + 3600)
    for exchange in (soon, often, never):
        sweeping.add(exchange)
    await until(lambda: len(often.looks) >= 3)
    assert (len(soon.looks), never.looks) == (1, [])
    assert often.looks == sorted(often.looks)
    sweeping.live.clear()


async def test_late_wish_is_granted_within_a_sweep() -> None:
    """A new phase sets `check_at` back: its deadline may be nearer."""
    sweeping, exchange = sweep(), Exchange()
    sweeping.add(exchange)
    await until(lambda: len(exchange.looks) == 1)
    exchange.check_at = 0.0
    await until(lambda: len(exchange.looks) == 2, patience=SWEEP_SECONDS * 20)
    sweeping.live.clear()


async def test_timer_runs_only_while_something_is_under_way() -> None:
    sweeping, exchange = sweep(), Exchange()
    assert sweeping._timer is None
    sweeping.add(exchange)
    assert sweeping._timer is not None
    sweeping.live.discard(exchange)
    await until(lambda: sweeping._timer is None)
    again = Exchange()
    sweeping.add(again)
    await until(lambda: len(again.looks) == 1)
    sweeping.live.clear()


async def test_failure_of_one_look_leaves_the_others_their_deadlines(caplog: pytest.LogCaptureFixture) -> None:
    sweeping, bad, good = sweep(), Exchange(then=ValueError("it broke")), Exchange(then=0.0)
    sweeping.add(bad)
    sweeping.add(good)
    await until(lambda: len(good.looks) >= 3)
    assert len(bad.looks) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    sweeping.live.clear()
