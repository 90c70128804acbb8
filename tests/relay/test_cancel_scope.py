"""Ends waiting for a reason."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.errors import ClientLeft, ShuttingDown
from gateway.relay.cancel_scope import CancelScope


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
