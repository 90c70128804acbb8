"""A cancel scope interrupts what its body awaits, with a reason."""

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from itertools import permutations

import pytest

from gateway.errors import ClientLeft, GatewayError, ModelUnloaded, ServerHangs, ShuttingDown
from gateway.relay.cancel_scope import CancelScope


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


async def interrupted_wait(scope: CancelScope) -> GatewayError:
    """Wait as a part of the block of `scope`. Return the error of the interruption."""
    scope.may_interrupt = True
    try:
        await forever()
    except asyncio.CancelledError:
        error = scope.absorbed()
        if not isinstance(error, GatewayError):
            raise error from None
        return error
    finally:
        scope.may_interrupt = False
    raise AssertionError("not reached")


def cancelling() -> int:
    task = asyncio.current_task()
    assert task is not None
    return task.cancelling()


async def test_interruption_ends_a_part_of_the_block_and_the_rest_goes_on() -> None:
    scope, error, loop = scope_of(Client()), ModelUnloaded(), asyncio.get_running_loop()
    with scope:
        for _ in range(2):
            loop.call_soon(scope.interrupt, error)
            assert await interrupted_wait(scope) is error
            assert cancelling() == 0
            await asyncio.sleep(0)


async def test_first_of_two_interruptions_counts() -> None:
    """A model is found frozen while its server is ejected, or the other way round."""
    scope, first, loop = scope_of(Client()), ServerHangs(), asyncio.get_running_loop()
    seen: list[bool] = []
    for error in (first, ModelUnloaded()):
        loop.call_soon(lambda error: seen.append(scope.interrupt(error)), error)
    with scope:
        assert await interrupted_wait(scope) is first
        assert (seen, cancelling()) == ([True, False], 0)
        await asyncio.sleep(0)


REASONS = ["client", "end", "interrupt", "outside"]


@pytest.mark.parametrize("order", list(permutations(REASONS)), ids="-".join)
async def test_reason_that_ends_the_most_takes_precedence(order: Sequence[str]) -> None:
    """All of them happen before the task runs again."""
    seen: list[type[BaseException]] = []

    async def body(scope: CancelScope) -> None:
        try:
            with scope:
                await interrupted_wait(scope)
        except GatewayError as error:
            seen.append(type(error))
            assert cancelling() == 0

    for most in range(1, len(order) + 1):
        client, chosen = Client(), order[:most]
        scope = scope_of(client)
        task = asyncio.create_task(body(scope))
        await asyncio.sleep(0)
        steps: dict[str, Callable[[], object]] = {
            "client": client.leave,
            "end": partial(scope.end, ShuttingDown()),
            "interrupt": partial(scope.interrupt, ModelUnloaded()),
            "outside": task.cancel,
        }
        for name in chosen:
            steps[name]()
        await asyncio.wait([task])
        ends = [name for name in chosen if name in ("client", "end")]
        assert task.cancelled() == ("outside" in chosen)
        expected = [{"client": ClientLeft, "end": ShuttingDown}[ends[0]]] if ends else []
        assert seen == ([] if "outside" in chosen else expected)
        seen.clear()


async def test_nothing_is_interrupted_between_the_parts() -> None:
    """An interruption from the task itself, while it handles a failure, must not cancel its next wait."""
    scope = scope_of(Client())
    assert not scope.interrupt(ModelUnloaded())
    with scope:
        assert not scope.interrupt(ModelUnloaded())
        await asyncio.sleep(0)
    assert not scope.interrupt(ModelUnloaded())
    await asyncio.sleep(0)


async def test_block_that_is_to_end_cannot_be_interrupted() -> None:
    scope, loop = scope_of(Client()), asyncio.get_running_loop()
    seen: list[bool] = []

    def both() -> None:
        scope.end(ShuttingDown())
        seen.append(scope.interrupt(ModelUnloaded()))

    loop.call_soon(both)
    with pytest.raises(ShuttingDown), scope:
        await interrupted_wait(scope)
    assert seen == [False]
