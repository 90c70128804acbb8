"""Raw ASGI for the stand-ins: read a whole request, write its response, notice a disconnect."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
Headers = dict[str, str]
GARBAGE = b"\x00\x00{not json\n\n"


class ClientDisconnected(Exception):
    """The client closed its connection before the response was complete."""


class HttpExchange:
    """One request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method = str(scope["method"])
        self.path = str(scope["path"])
        self.query = bytes(scope.get("query_string", b"")).decode("latin-1")
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.body = b""
        self.started = False
        self.ended = False
        self._state: dict[str, Any] = scope.get("state", {})
        self._receive = receive
        self._send = send

    async def read(self) -> bytes:
        """Read the whole body.

        Raises:
            ClientDisconnected: the client left before the body was complete.
        """
        parts = []
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnected
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                self.body = b"".join(parts)
                return self.body

    async def start(self, status: int, headers: Headers) -> None:
        self.started = True
        pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        self.ended = True
        await self._send({"type": "http.response.body", "body": data, "more_body": False})

    async def reply(self, status: int, headers: Headers, body: bytes) -> None:
        """Send a complete response with its `content-length`."""
        await self.start(status, {**headers, "content-length": str(len(body))})
        await self.end(body)

    async def drop_connection(self, *, reset: bool = False) -> None:
        """Close the connection as a killed process does: bytes already written still leave.

        With `reset`, close it with RST instead of FIN.
        """
        transport: asyncio.Transport = self._state["transport"]
        if reset:
            linger = struct.pack("ii", 1, 0)
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        transport.close()
        await self._wait_for_disconnect()

    async def garble(self, media_type: str) -> None:
        """Send a response that claims to be of `media_type` and is not JSON."""
        await self.reply(200, {"content-type": media_type}, GARBAGE)

    async def run_until_disconnect(self, work: Coroutine[Any, Any, None], on_disconnect: Callable[[], None]) -> None:
        """Run `work`, and cancel it as soon as the client disconnects.

        `on_disconnect` is called before the cancellation, so an observer that sees the work gone
        can already see why. The body must have been read.

        Raises:
            ClientDisconnected: the client left and the work was cancelled.
        """
        working = asyncio.create_task(work)
        watching = asyncio.create_task(self._wait_for_disconnect())
        try:
            await asyncio.wait({working, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not working.done() and not self.ended:
                on_disconnect()
                raise ClientDisconnected
            await working
        finally:
            for task in (working, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _wait_for_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
