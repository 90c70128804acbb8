"""Clients of a stand-in: an HTTP client and a raw connection."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from gateway.simulate import Running

PATIENCE = 20.0
"""Seconds after which a condition that has not come true is a failure."""


def client(server: Running) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=server.base_url, timeout=PATIENCE, verify=False)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, and check it in every turn of the event loop."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0)


@asynccontextmanager
async def sent(server: Running, path: str, body: dict[str, Any]) -> AsyncIterator[asyncio.StreamReader]:
    """Send a POST request on a new connection and yield its response stream.

    At the end of the block the client disconnects.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    try:
        yield reader
    finally:
        writer.close()
        await writer.wait_closed()


def user(text: str) -> list[dict[str, Any]]:
    """Return the messages of a conversation of one user message."""
    return [{"role": "user", "content": text}]
