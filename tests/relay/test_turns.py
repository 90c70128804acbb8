"""Tests of long work in steps."""

import asyncio
from collections.abc import Generator

import pytest

from gateway.relay.turns import in_turns


async def test_others_get_a_turn_before_each_step() -> None:
    order: list[str] = []

    def steps() -> Generator[None, None, str]:
        order.append("step")
        yield
        order.append("step")
        return "done"

    async def other() -> None:
        for _ in range(3):
            order.append("other")
            await asyncio.sleep(0)

    work = asyncio.ensure_future(in_turns(steps()))
    await asyncio.gather(work, other())
    assert work.result() == "done"
    assert order[:4] == ["other", "step", "other", "step"]


async def test_error_and_cancellation_end_the_work() -> None:
    def failing() -> Generator[None, None, None]:
        yield
        raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        await in_turns(failing())

    done: list[int] = []

    def endless() -> Generator[None, None, None]:
        while True:
            done.append(1)
            yield

    task = asyncio.ensure_future(in_turns(endless()))
    while len(done) < 3:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(done) <= 4
