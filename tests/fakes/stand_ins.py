"""Stand-ins of `gateway.simulate` in an event loop of their own, as servers are: beside the gateway's, on another thread."""

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from gateway import simulate

PATIENCE = 10.0


@asynccontextmanager
async def stand_in(options: simulate.Options, port: int = 0) -> AsyncIterator[simulate.Running]:
    """A stand-in that serves while the block runs; its engine may be read, and given faults and words, from the test's thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name=f"stand-in of {options.kind}")
    thread.start()
    server = simulate.running(options, port)

    async def do(coroutine: object) -> None:
        await asyncio.wait_for(asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, loop)), PATIENCE)  # type: ignore[arg-type]

    try:
        await do(server.__aenter__())
        yield server
    finally:
        await do(server.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
