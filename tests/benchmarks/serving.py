"""The cheap upstream in this process, and a client of it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from benchmarks.upstream import MODEL, Upstream, UpstreamProtocol


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Upstream]]:
    """Serve the upstream in this process, and connect to it."""
    shared = Upstream(MODEL)
    server = await asyncio.get_running_loop().create_server(lambda: UpstreamProtocol(shared), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer, shared
    finally:
        writer.close()
        server.close()
        await server.wait_closed()


async def body_of(reader: asyncio.StreamReader) -> bytes:
    """Read the body of the next response, and join its chunks."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length: " in head:
        return await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body
