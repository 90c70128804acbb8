"""Ends a task's waiting for a reason."""

import asyncio
from collections.abc import Callable
from math import inf

import pytest

from gateway.errors import ClientLeft, ShuttingDown, UpstreamTimeout
from gateway.watch import Watch


class Client:
    def __init__(self) -> None:
        self.gone = False
        self.on_leave: Callable[[], None] | None = None

    def leave(self) -> None:
        self.gone = True
        if self.on_leave is not None:
            self.on_leave()


def never(now: float) -> float:
    return inf


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_client_that_leaves_ends_the_wait() -> None:
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), Watch(client, never):
        await for_ever()


async def test_client_that_had_left_already_is_seen_at_once() -> None:
    client = Client()
    client.leave()
    with pytest.raises(ClientLeft), Watch(client, never):
        pytest.fail("the body began")


async def test_first_reason_counts() -> None:
    client = Client()
    watch = Watch(client, never)
    asyncio.get_running_loop().call_soon(watch.end, ShuttingDown())
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ShuttingDown), watch:
        await for_ever()


async def test_tick_ends_the_wait_when_its_deadline_has_passed() -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 0.01
    ticks: list[float] = []

    def tick(now: float) -> float:
        ticks.append(now)
        if now >= deadline:
            watch.end(UpstreamTimeout("no end"))
        return deadline

    async def wait() -> None:
        watch.arm(loop.time() + 60)
        watch.arm(loop.time())
        await for_ever()

    watch = Watch(Client(), tick)
    with pytest.raises(UpstreamTimeout), watch:
        await wait()
    assert len(ticks) >= 2


async def test_later_wish_does_not_put_off_an_earlier_one() -> None:
    loop = asyncio.get_running_loop()
    fired = asyncio.Event()

    def tick(now: float) -> float:
        fired.set()
        return now + 60

    with Watch(Client(), tick) as watch:
        watch.arm(loop.time())
        watch.arm(loop.time() + 60)
        async with asyncio.timeout(5):
            await fired.wait()


async def test_nothing_is_left_behind() -> None:
    client = Client()
    ticks: list[float] = []

    def tick(now: float) -> float:
        ticks.append(now)
        return inf

    with Watch(client, tick) as watch:
        watch.arm(asyncio.get_running_loop().time())
    assert client.on_leave is None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert ticks == []


async def test_error_of_the_body_comes_through() -> None:
    with pytest.raises(ValueError, match="it broke"), Watch(Client(), never):
        raise ValueError("it broke")


async def test_task_goes_on_after_the_end() -> None:
    """It was cancelled to wake it up; its own next wait is not."""
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), Watch(client, never):
        await for_ever()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_cancellation_from_outside_stays_one() -> None:
    async def body() -> None:
        with Watch(Client(), never):
            await for_ever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()
