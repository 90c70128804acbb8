"""A router in front of engines, which answers in the form of the program that it stands for."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass
class Response:
    """An answer: its whole body, or the `pieces` of a chunked one, of which a broken one lacks the end."""

    status: int = 200
    body: bytes = b""
    media_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    pieces: Sequence[bytes] | None = None
    is_broken: bool = False

    @classmethod
    def of(cls, status: int, document: Any, **headers: str) -> Self:
        """Return an answer with a JSON document."""
        return cls(status, json.dumps(document).encode(), headers=headers)

    def to_bytes(self) -> bytes:
        lines = [f"HTTP/1.1 {self.status} Any", f"content-type: {self.media_type}"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        if self.pieces is None:
            lines.append(f"content-length: {len(self.body)}")
            return "\r\n".join([*lines, "", ""]).encode() + self.body
        lines.append("transfer-encoding: chunked")
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in self.pieces)
        return "\r\n".join([*lines, "", ""]).encode() + chunks + (b"" if self.is_broken else b"0\r\n\r\n")


Handler = Callable[[str, str, Any], Response]
"""Returns the answer to a request with this method, path and JSON body, which is None without a body."""


class EngineRouter:
    """A server on loopback whose answers `handler` gives. `requests` has the method and path of each request."""

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
                body = await reader.readexactly(int(fields.get("content-length", 0)))
                method, path, _ = first.split(" ")
                document = json.loads(body) if body else None
                self.requests.append((method, path))
                self.bodies.append(document)
                response = self.handler(method, path, document)
                writer.write(response.to_bytes())
                await writer.drain()
                if response.is_broken:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()
