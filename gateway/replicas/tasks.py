"""Tasks that talk to the other replicas."""

import asyncio


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait for its end. A cancellation that meets a timeout within redis-py may be lost."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=0.1)
    if not task.cancelled():
        task.exception()  # one that nobody reads is logged
