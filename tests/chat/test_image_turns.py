"""Tests of the fair turns: order, cancellation, count."""

import asyncio

import pytest

from gateway.chat.image_turns import FairTurns


async def started(turns: FairTurns, *keys: str) -> tuple[list[str], list[asyncio.Task[None]]]:
    """Have each key wait for a turn, in this order; return the list of those served."""
    served: list[str] = []

    async def take(key: str) -> None:
        await turns.take(key)
        served.append(key)

    tasks = [asyncio.create_task(take(key)) for key in keys]
    await asyncio.sleep(0)
    return served, tasks


async def settle() -> None:
    for _ in range(3):
        await asyncio.sleep(0)


async def test_keys_take_turns_whatever_the_number_of_their_requests() -> None:
    turns = FairTurns(1)
    await turns.take("first")
    served, tasks = await started(turns, *"aaaaabbc")
    for _ in tasks:
        turns.release()
        await settle()
    assert "".join(served) == "abcabaaa"
    turns.release()
    assert repr(turns) == "<FairTurns 1 free, 0 waiting>"


async def test_no_more_turns_are_taken_than_there_are() -> None:
    turns = FairTurns(2)
    served, _ = await started(turns, *"abc")
    assert served == ["a", "b"]
    turns.release()
    await settle()
    assert served == ["a", "b", "c"]
    assert repr(turns) == "<FairTurns 0 free, 0 waiting>"


async def test_request_that_leaves_the_queue_costs_no_turn() -> None:
    turns = FairTurns(1)
    await turns.take("first")
    served, tasks = await started(turns, *"aabc")
    for task in (tasks[0], tasks[2]):
        task.cancel()
    await settle()
    turns.release()
    await settle()
    turns.release()
    await settle()
    assert served == ["a", "c"]
    assert repr(turns) == "<FairTurns 0 free, 0 waiting>"


@pytest.mark.parametrize("is_cancelled_first", [True, False])
async def test_turn_of_a_request_cancelled_in_the_same_step_is_passed_on(is_cancelled_first: bool) -> None:
    turns = FairTurns(1)
    await turns.take("first")
    served, tasks = await started(turns, *"ab")
    if is_cancelled_first:
        tasks[0].cancel()
        turns.release()
    else:
        turns.release()
        tasks[0].cancel()
    await settle()
    assert (served, tasks[0].cancelled()) == (["b"], True)
    turns.release()
    assert repr(turns) == "<FairTurns 1 free, 0 waiting>"
