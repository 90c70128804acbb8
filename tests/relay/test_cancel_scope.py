"""A cancel scope interrupts what its body awaits, with a reason."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.errors import ClientLeft, GatewayError, ModelUnloaded, ShuttingDown
from gateway.relay.cancel_scope import CancelScope, ErrorScope


class Client:
    def __init__(self) -> None:
        self.gone = False
        self.on_leave: Callable[[], None] | None = None

    def leave(self) -> None:
        self.gone = True
        if self.on_leave is not None:
            self.on_leave()


def scope_of(client: Client) -> CancelScope:
    return CancelScope(client, asyncio.get_running_loop())


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def test_client_that_leaves_ends_the_wait() -> None:
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), scope_of(client):
        await forever()


async def test_body_does_not_begin_if_the_client_has_already_left() -> None:
    client = Client()
    client.leave()
    with pytest.raises(ClientLeft), scope_of(client):
        pytest.fail("the body began")


async def test_first_reason_wins() -> None:
    client = Client()
    scope = scope_of(client)
    asyncio.get_running_loop().call_soon(scope.end, ShuttingDown())
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ShuttingDown), scope:
        await forever()


async def test_client_that_leaves_after_the_block_is_ignored() -> None:
    client = Client()
    with scope_of(client):
        pass
    assert client.on_leave is None
    client.leave()
    await asyncio.sleep(0)


async def test_error_raised_by_the_body_propagates() -> None:
    with pytest.raises(ValueError, match="it broke"), scope_of(Client()):
        raise ValueError("it broke")


async def test_task_is_not_cancelled_after_the_block() -> None:
    """The cancellation that woke the task up does not reach its next await."""
    client = Client()
    asyncio.get_running_loop().call_soon(client.leave)
    with pytest.raises(ClientLeft), scope_of(client):
        await forever()
    await asyncio.sleep(0)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_cancellation_from_outside_takes_precedence() -> None:
    async def body() -> None:
        with scope_of(Client()):
            await forever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


@pytest.mark.parametrize("first", ["client", "outside"])
async def test_cancellation_from_outside_comes_before_a_client_that_leaves(first: str) -> None:
    """Both happen before the task runs again: the task has to end, and not to answer."""
    client = Client()

    async def body() -> None:
        with scope_of(client):
            await forever()

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    for step in (client.leave, task.cancel) if first == "client" else (task.cancel, client.leave):
        step()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_scope_inside_a_cancelled_task_still_ends_for_its_own_reason() -> None:
    """A cancellation that the task has handled before does not count."""
    client, seen = Client(), list[str]()

    async def body() -> None:
        try:
            await forever()
        except asyncio.CancelledError:
            seen.append("cancelled")
            with pytest.raises(ClientLeft), scope_of(client):
                await forever()
            seen.append("left")

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert seen == ["cancelled"]
    client.leave()
    await task
    assert seen == ["cancelled", "left"]


async def interrupted_wait(scope: CancelScope) -> GatewayError | None:
    """Wait until `scope` is interrupted or ended; raise the cancellation again if it is ended."""
    try:
        await forever()
    except asyncio.CancelledError:
        error = scope.absorb()
        if error is None:
            raise
        return error
    return None


async def test_interruption_ends_a_part_of_the_body_and_the_rest_goes_on() -> None:
    scope, error, loop = scope_of(Client()), ShuttingDown(), asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    with scope:
        for _ in range(2):
            loop.call_soon(scope.interrupt, error)
            loop.call_soon(scope.interrupt, ShuttingDown())
            assert await interrupted_wait(scope) is error
            assert task.cancelling() == 0
        await asyncio.sleep(0)
        assert scope.absorb() is None


async def test_end_takes_precedence_over_an_interruption() -> None:
    for interrupts_first in (True, False):
        scope, reason, loop = scope_of(Client()), ShuttingDown(), asyncio.get_running_loop()
        steps = [(scope.interrupt, ClientLeft()), (scope.end, reason)]
        for step, error in steps if interrupts_first else reversed(steps):
            loop.call_soon(step, error)
        with pytest.raises(ShuttingDown) as raised, scope:
            await interrupted_wait(scope)
        assert raised.value is reason
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0


async def test_cancellation_from_outside_takes_precedence_over_an_interruption() -> None:
    scope = scope_of(Client())

    async def body() -> None:
        with scope:
            await interrupted_wait(scope)

    task = asyncio.create_task(body())
    await asyncio.sleep(0)
    scope.interrupt(ShuttingDown())
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_interruption_before_the_block_is_ignored() -> None:
    scope = scope_of(Client())
    scope.interrupt(ShuttingDown())
    with scope:
        await asyncio.sleep(0)


async def test_inner_scope_ends_its_block_and_the_outer_one_goes_on() -> None:
    client = Client()
    inner = ErrorScope(asyncio.get_running_loop())
    asyncio.get_running_loop().call_soon(inner.end, ModelUnloaded())
    with scope_of(client):
        with pytest.raises(ModelUnloaded), inner:
            await forever()
        await asyncio.sleep(0)


@pytest.mark.parametrize("inner_first", [True, False])
async def test_client_that_leaves_takes_precedence_over_an_inner_scope(inner_first: bool) -> None:
    client = Client()
    inner = ErrorScope(asyncio.get_running_loop())

    def end() -> None:
        inner.end(ModelUnloaded())

    steps = [end, client.leave] if inner_first else [client.leave, end]
    for step in steps:
        asyncio.get_running_loop().call_soon(step)
    with pytest.raises(ClientLeft), scope_of(client), inner:
        await forever()


async def test_inner_scope_that_has_ended_cannot_be_interrupted() -> None:
    inner = ErrorScope(asyncio.get_running_loop())
    with inner:
        pass
    inner.end(ModelUnloaded())
    await asyncio.sleep(0)
