"""Servers for the load client: stand-ins, and one that writes given bytes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from gateway import simulate
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.target import Api, BenchRequest, Target

QUESTION = ({"role": "user", "content": "answer in 8 words"},)


@asynccontextmanager
async def client_of(options: simulate.Options, api: Api = "openai", **target: Any) -> AsyncIterator[HttpLoadClient]:
    """Yield a client for a stand-in in this loop."""
    async with simulate.running(options) as server:
        client = HttpLoadClient(Target(server.base_url, options.served[0].name, api, **target))
        try:
            yield client
        finally:
            await client.close()


@asynccontextmanager
async def scripted(*responses: bytes | None) -> AsyncIterator[tuple[str, list[bytes]]]:
    """Answer each request in turn with these bytes; None closes without a byte.

    Yields the address and the requests so far.
    """
    asked: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        while len(asked) < len(responses):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError):
                break
            length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
            asked.append(head + (await reader.readexactly(int(length)) if length else b""))
            response = responses[len(asked) - 1]
            writer.write(response or b"")
            if response is None or b"connection: close" in response:
                break
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", asked
    finally:
        server.close()
        for writer in writers:
            writer.close()
        await server.wait_closed()


def request(**changes: Any) -> BenchRequest:
    """Return a request that a stand-in answers in eight tokens."""
    return BenchRequest(**{"messages": QUESTION, "max_tokens": 16, **changes})


def plain(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """Return a response with its length."""
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body
