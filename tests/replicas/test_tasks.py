"""A task that talks to the other replicas ends, even if it loses a cancellation."""

import asyncio

from gateway.replicas.tasks import end


async def test_a_task_that_loses_a_cancellation_ends_with_the_next() -> None:
    lost = 0

    async def work() -> None:
        nonlocal lost
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if lost == 2:
                    raise
                lost += 1

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    await end(task)
    assert task.cancelled()
    assert lost == 2


async def test_a_task_that_has_failed_ends_without_a_complaint() -> None:
    async def fail() -> None:
        raise ValueError

    task = asyncio.create_task(fail())
    await asyncio.wait([task])
    await end(task)
    assert isinstance(task.exception(), ValueError)
