"""Clients that send requests over raw sockets, leave at a chosen moment, and judge what they got.

Each request has an id of its own, sent as `x-request-id`, by which `benchmarks/accounting.py` finds
it in the gateway's log.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Moment = Literal["uploading", "waiting", "streaming"]
Seen = Literal["ok", "error", "cut", "left", "lost", "wrong", "hung"]
"""Outcome of a request as its client saw it.

`ok`: a whole and right answer. `error`: an error status with a code. `cut`: an answer that began
and ended with an error. `left`: the client left. The others are faults of the gateway: `lost`, an
answer that is missing or breaks off; `wrong`, one that looks whole and is not right; `hung`,
none in time.
"""

CODES = frozenset(
    (
        "invalid_json", "invalid_value", "unsupported_parameter", "invalid_image", "invalid_image_url",
        "context_length_exceeded", "invalid_api_key", "forbidden", "model_not_found", "not_found",
        "method_not_allowed", "request_timeout", "conflict", "request_too_large", "unsupported_media_type",
        "headers_too_large", "upstream_error", "queue_full", "queue_timeout", "backend_unavailable", "shutting_down",
        "upstream_timeout", "loop_detected", "tier_not_allowed", "rate_limit_exceeded", "concurrency_exceeded",
    )
)  # fmt: skip
"""The error codes that `docs/errors.md` defines."""

_SLICE = 64 * 1024
_REUSE_SECONDS = 20.0
_CONNECT_SECONDS = 4.0
"""Longest time until a new connection is used. On a busy machine a client may get no processor for
longer than the 10 s after which the gateway closes a connection without a byte; it connects anew.
"""
_PIECE = b'"content":"'
_RESET = struct.pack("ii", 1, 0)


class Leave(NamedTuple):
    """When a client leaves.

    `amount` is a share of the body while uploading, seconds after the body while waiting, and
    a number of pieces while streaming. With `resets` the connection is reset instead of closed.
    """

    moment: Moment
    amount: float
    resets: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """The right answer.

    Attributes:
        status: the status, unless the gateway refuses the request for lack of capacity or the
            backend fails. Above 400, with `code`, it is the only right one.
        beginnings: by backend, the beginning of the text.
        tokens: completion tokens; 0: unknown.
        prompt_tokens: by backend, the prompt tokens.
        vectors: number of embeddings.
    """

    status: int = 200
    code: str | None = None
    beginnings: Mapping[str, str] = field(default_factory=dict)
    tokens: int = 0
    prompt_tokens: Mapping[str, int] = field(default_factory=dict)
    vectors: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One request: what is sent, what is expected, and when its client leaves.

    `deadline` is the number of seconds within which the whole answer has to arrive.
    """

    id: str
    kind: str
    head: bytes
    body: bytes
    expected: Expected
    deadline: float
    leave: Leave | None = None
    is_kept: bool = False
    """True if the connection is kept for another request."""


def head_of(request_id: str, path: str, length: int, *, kept: bool = False, **fields: str) -> bytes:
    """Return the head of a POST with a JSON body; `_` in the names of further fields means `-`."""
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        f"x-request-id: {request_id}",
        f"Connection: {'keep-alive' if kept else 'close'}",
        f"Content-Length: {length}",
    ]
    lines += [
        f"{name.replace('_', '-')}: {value}" for name, value in ({"content_type": "application/json"} | fields).items()
    ]
    return "\r\n".join([*lines, "", ""]).encode()


class ClientRecord(NamedTuple):
    """Record of one request by its client.

    `sent` is on the monotonic clock that all processes share. `note` says where a client left, or
    what was wrong with the answer.
    """

    id: str
    kind: str
    seen: Seen
    sent: float
    seconds: float
    status: int = 0
    code: str | None = None
    backend: str = ""
    note: str = ""
    deadline: float = 0.0


class Verdict(NamedTuple):
    """Judgement of an answer that ended."""

    seen: Seen
    code: str | None = None
    note: str = ""


def judge(expected: Expected, status: int, backend: str, body: bytes) -> Verdict:
    """Judge an answer whose connection or framing has ended normally."""
    if status != 200:
        return _judge_error(expected, status, body)
    if expected.status != 200:
        return Verdict("wrong", None, f"answered although {expected.code} was due")
    is_stream = body.startswith((b"data:", b":"))
    try:
        found = _joined(body) if is_stream else json.loads(body)
    except ValueError as broken:
        return Verdict("lost", None, f"not a whole answer: {broken}")
    if "error" in found:
        code = found["error"].get("code")
        return Verdict("cut", code) if code in CODES else Verdict("wrong", code, "unknown error code")
    problem = _difference(expected, backend, found)
    return Verdict("wrong", None, problem) if problem else Verdict("ok")


def _judge_error(expected: Expected, status: int, body: bytes) -> Verdict:
    try:
        code = json.loads(body)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return Verdict("wrong", None, f"status {status} without an error object")
    if code not in CODES:
        return Verdict("wrong", code, f"status {status} with an unknown code")
    if expected.status != 200 and (status, code) != (expected.status, expected.code):
        return Verdict("wrong", code, f"status {status} instead of {expected.status} {expected.code}")
    if expected.status == 200 and status < 500 and status != 408:
        return Verdict("wrong", code, f"a good request was refused with {status}")
    return Verdict("error", code)


def _joined(stream: bytes) -> dict[str, Any]:
    """Join the events of a stream into one answer, or return its error.

    Raises:
        ValueError: the stream has no end: neither `[DONE]` nor an error; or it goes on after it.
    """
    text, finish, usage, is_done = "", None, None, False
    *events, rest = stream.decode().split("\n\n")
    if rest:
        raise ValueError("ends within an event")
    for event in events:
        data = event.removeprefix("data: ")
        if is_done or (data == event and not event.startswith(":")):
            raise ValueError("an event after [DONE], or a line that is not data")
        if event.startswith(":"):
            continue
        if data == "[DONE]":
            is_done = True
            continue
        chunk = json.loads(data)
        if "error" in chunk:
            if event != events[-1]:
                raise ValueError("an event after the error")
            return {"error": chunk["error"]}
        usage = chunk.get("usage") or usage
        for choice in chunk["choices"]:
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    if not is_done:
        raise ValueError("the stream ends without [DONE]")
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage}


def _difference(expected: Expected, backend: str, found: dict[str, Any]) -> str:
    """Return what is wrong with a whole answer, empty if it is right."""
    if expected.vectors:
        vectors = [item["embedding"] for item in found.get("data", ())]
        return "" if len(vectors) == expected.vectors and all(vectors) else f"{len(vectors)} vectors"
    choice, usage = found["choices"][0], found.get("usage") or {}
    if choice["finish_reason"] not in ("stop", "length"):
        return f"finish_reason {choice['finish_reason']!r}"
    content = choice["message"]["content"] or ""
    if not content.startswith(expected.beginnings.get(backend, "")):
        return "the text belongs to another request"
    for name, wanted in (
        ("completion_tokens", expected.tokens),
        ("prompt_tokens", expected.prompt_tokens.get(backend, 0)),
    ):
        if wanted and usage.get(name) != wanted:
            return f"{name} {usage.get(name)} instead of {wanted}"
    return ""


class _Left(Exception):
    """The client leaves."""


class Connection:
    """One connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.used = time.monotonic()

    @property
    def is_usable(self) -> bool:
        return not self._reader.at_eof() and time.monotonic() - self.used < _REUSE_SECONDS

    def close(self, *, resets: bool = False) -> None:
        if resets:
            with suppress(OSError):
                self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self._writer.transport.abort()

    async def exchange(self, plan: Plan) -> tuple[int, str, bytes]:
        """Send the request; return status, backend and body.

        Raises:
            _Left: the client leaves now.
            OSError, EOFError: the connection broke off.
        """
        leave = plan.leave
        self._writer.write(plan.head)
        head = asyncio.ensure_future(self._reader.readuntil(b"\r\n\r\n"))
        try:
            body = plan.body
            if leave is not None and leave.moment == "uploading":
                body = body[: int(len(body) * leave.amount)]
            await self._upload(body, head)
            if leave is not None and leave.moment == "uploading" and not head.done():
                await asyncio.sleep(0.02)
                raise _Left
            if leave is None or leave.moment != "waiting":
                return await self._answer(await head, leave)
            try:
                async with asyncio.timeout(leave.amount):
                    return await self._answer(await head, leave)
            except TimeoutError:
                raise _Left from None
        finally:
            head.cancel()
            with suppress(asyncio.CancelledError, OSError, EOFError):
                await head

    async def _upload(self, body: bytes, head: "asyncio.Future[bytes]") -> None:
        """Send the body until the answer begins, as programs do."""
        with suppress(OSError):  # the answer may have come before the connection closed
            for start in range(0, len(body), _SLICE):
                if head.done():
                    return
                self._writer.write(body[start : start + _SLICE])
                await self._writer.drain()

    async def _answer(self, head: bytes, leave: Leave | None) -> tuple[int, str, bytes]:
        lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        status = int(lines[0].split()[1])
        pieces = leave.amount if leave is not None and leave.moment == "streaming" and status == 200 else 0
        body = bytearray()
        async for part in self._parts(fields):
            body += part
            if pieces and body.count(_PIECE) >= pieces:
                raise _Left
        self.used = time.monotonic()
        if fields.get("connection") == "close":
            self.used = 0.0
        return status, fields.get("x-gateway-backend", ""), bytes(body)

    async def _parts(self, fields: Mapping[str, str]) -> AsyncIterator[bytes]:
        read = self._reader
        if "content-length" in fields:
            yield await read.readexactly(int(fields["content-length"]))
        elif "chunked" in fields.get("transfer-encoding", ""):
            while size := int(await read.readuntil(b"\r\n"), 16):
                yield (await read.readexactly(size + 2))[:-2]
            await read.readuntil(b"\r\n")
        else:
            raise EOFError("an answer without framing")


class Clients:
    """Clients of the gateway on `port`; some requests share kept connections."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def send(self, plan: Plan) -> ClientRecord:
        """Send a request and return what its client saw."""
        sent = time.monotonic()
        connection: Connection | None = None

        def record(verdict: Verdict, status: int = 0, backend: str = "") -> ClientRecord:
            seconds = time.monotonic() - sent
            return ClientRecord(
                plan.id, plan.kind, verdict.seen, sent, seconds, status, verdict.code, backend, verdict.note,
                plan.deadline,
            )  # fmt: skip

        resets = plan.leave is not None and plan.leave.resets
        is_kept = False
        try:
            async with asyncio.timeout(plan.deadline):
                connection = await self._connection(plan.is_kept)
                status, backend, body = await connection.exchange(plan)
            is_kept = plan.is_kept and connection.is_usable
            return record(judge(plan.expected, status, backend, body), status, backend)
        except _Left:
            assert plan.leave is not None
            return record(Verdict("left", None, plan.leave.moment))
        except TimeoutError:
            return record(Verdict("hung", None, f"no end within {plan.deadline:g} s"))
        except (OSError, EOFError) as broken:
            return record(Verdict("lost", None, repr(broken)))
        finally:
            if connection is not None:
                self._idle.append(connection) if is_kept else connection.close(resets=resets)

    async def _connection(self, may_reuse: bool) -> Connection:
        while may_reuse and self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        while True:
            began = time.monotonic()
            connection = Connection(*await asyncio.open_connection("127.0.0.1", self._port, limit=2**20))
            if time.monotonic() - began < _CONNECT_SECONDS:
                return connection
            connection.close()

    def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop().close()


async def get(port: int, path: str, key: str = "") -> bytes:
    """Return the body of a GET, in at most 20 s."""
    async with asyncio.timeout(20.0):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            authorization = f"Authorization: Bearer {key}\r\n" if key else ""
            writer.write(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{authorization}Connection: close\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            if head.split()[1] != b"200":
                raise OSError(f"GET {path}: {head[:40]!r}")
            return await reader.read()
        finally:
            writer.transport.abort()
