"""Acceptance of connections by several processes, here several servers of one event loop."""

import asyncio
import socket
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn

from gateway.downstream.fair_accept import MEMORY_BYTES, ConnectionCounts, FairServer
from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from gateway.downstream.server import listen

REQUEST = b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n"


class Server(FairServer):
    @contextmanager
    def capture_signals(self) -> Any:
        yield


async def application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


@asynccontextmanager
async def servers(count: int) -> AsyncIterator[tuple[list[Server], int]]:
    """Run servers that share one listening socket."""
    listener = listen("127.0.0.1", 0)
    listener.listen(100)
    port = listener.getsockname()[1]
    with tempfile.TemporaryFile() as file:
        file.truncate(MEMORY_BYTES)
        running = []
        tasks = []
        for number in range(1, count + 1):
            config = uvicorn.Config(
                application, http=bind_limits(ServerLimits()), interface="asgi3", lifespan="off", log_config=None
            )
            nothing: Any = lambda: None  # noqa: E731
            running.append(
                Server(
                    config,
                    ConnectionCounts(file.fileno()),
                    number,
                    drain_delay=0,
                    drain_timeout=5,
                    on_open=nothing,
                    on_drain=nothing,
                    on_cutoff=nothing,
                )
            )
            tasks.append(asyncio.create_task(running[-1].serve(sockets=[listener.dup()])))
        listener.close()
        while not all(server.started for server in running):
            await asyncio.sleep(0)
        try:
            yield running, port
        finally:
            for server in running:
                server.begin_stop()
            await asyncio.gather(*tasks)


async def use(port: int) -> asyncio.StreamWriter:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(REQUEST)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    return writer


async def close(writers: list[asyncio.StreamWriter]) -> None:
    for writer in writers:
        writer.close()
    await asyncio.gather(*(writer.wait_closed() for writer in writers))


async def test_connections_that_are_kept_are_spread_evenly() -> None:
    async with servers(3) as (running, port):
        writers = list(await asyncio.gather(*(use(port) for _ in range(30))))
        counts = sorted(len(server.server_state.connections) for server in running)
        assert sum(counts) == 30
        assert counts[-1] - counts[0] <= 3
        await close(writers)


async def test_a_server_that_accepts_nothing_delays_connections_and_keeps_none() -> None:
    """It counts as the one with the fewest connections, and hangs."""
    async with servers(2) as (running, port):
        hung = running[1]
        loop = asyncio.get_running_loop()
        for listener in hung._listening:
            loop.remove_reader(listener)
        async with asyncio.timeout(20):
            writers = [await use(port) for _ in range(10)]
        assert len(running[0].server_state.connections) == 10
        await close(writers)


async def test_connections_that_wait_when_the_server_stops_are_served() -> None:
    async with servers(1) as (running, port):
        server = running[0]
        for listener in server._listening:
            asyncio.get_running_loop().remove_reader(listener)
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(REQUEST)
            client.setblocking(False)
            server.begin_stop()
            async with asyncio.timeout(20):
                assert (await asyncio.get_running_loop().sock_recv(client, 100)).startswith(b"HTTP/1.1 200")
