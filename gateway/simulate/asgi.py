"""Raw ASGI for the stand-ins: one request read whole, one answer written, and the watch for a client that leaves."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
AsgiMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[AsgiMessage]]
Send = Callable[[AsgiMessage], Awaitable[None]]
Headers = dict[str, str]


class ClientDisconnected(Exception):
    """The client closed its connection before the answer was whole."""


class HttpExchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method = str(scope["method"])
        self.path = str(scope["path"])
        self.headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self.body = b""
        self.started = False
        self.ended = False
        self._state: dict[str, Any] = scope.get("state", {})
        self._receive = receive
        self._send = send

    async def read(self) -> bytes:
        """Take in the whole body. Raises ClientLeft when it never comes."""
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
        """A whole answer with its length."""
        await self.start(status, {**headers, "content-length": str(len(body))})
        await self.end(body)

    async def hang_up(self) -> None:
        """Close the connection as a killed process does: what was written still goes, nothing more comes."""
        transport: asyncio.Transport = self._state["transport"]
        transport.close()
        await self._gone()

    async def while_client_stays(self, work: Coroutine[Any, Any, None], left: Callable[[], None]) -> None:
        """Do `work`, or cancel it the moment the client leaves: calls `left` before, so that who sees the work gone sees why.

        The body must have been read.

        Raises:
            ClientLeft: the work was cancelled.
        """
        doing = asyncio.create_task(work)
        watching = asyncio.create_task(self._gone())
        try:
            await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not doing.done() and not self.ended:
                left()
                raise ClientDisconnected
            await doing
        finally:
            for task in (doing, watching):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task

    async def _gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
