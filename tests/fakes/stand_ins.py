"""Stand-ins of `gateway.simulate`, each on a thread with its own event loop."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from gateway import simulate
from tests.fakes.virtual_time import is_virtual

PATIENCE = 20.0


@asynccontextmanager
async def stand_in(options: simulate.Options, port: int = 0) -> AsyncIterator[simulate.Running]:
    """Serve a stand-in during the block.

    Its engine may be read and given faults and answers from the test's thread. In virtual time it
    shares the test's loop, whose clock would not wait for another thread.
    """
    if is_virtual():
        async with simulate.running(options, port) as server:
            yield server
        return
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"stand-in of {options.kind}")
    thread.start()
    server = simulate.running(options, port)

    async def do(coroutine: Coroutine[Any, Any, Any]) -> None:
        future = asyncio.run_coroutine_threadsafe(coroutine, loop)
        await asyncio.wait_for(asyncio.wrap_future(future), PATIENCE)

    try:
        await do(server.__aenter__())
        yield server
    finally:
        await do(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
