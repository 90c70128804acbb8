"""The load client: requests to one target over kept connections."""

import asyncio
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import SplitResult, urlsplit

import orjson

from gateway import __version__
from gateway.bench.answers import AnswerReader, OllamaReader, OpenAIReader, error_code
from gateway.bench.bodies import render
from gateway.bench.http_connection import BodySink, ConnectionLost, HttpConnection, ResponseHead, connect
from gateway.bench.results import RequestRecord
from gateway.bench.target import BenchRequest, Target

IDLE_SECONDS = 4.0
"""Longest time that an idle connection is reused: vLLM closes it after 5 s."""
CONNECT_SECONDS = 30.0
MAX_ERROR_BYTES = 64 * 1024


class InvalidTarget(ValueError):
    """The address of a target cannot be used."""


def base_url(text: str) -> str:
    """Return the address without a slash or `/v1` at its end.

    Raises:
        InvalidTarget: it is not an http or https address, or contains credentials.
    """
    text = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as problem:
        raise InvalidTarget(f"{text!r} is not an address: {problem}") from problem
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise InvalidTarget(f"{text!r} is not an address; expected one such as http://127.0.0.1:8080")
    if parts.username is not None or parts.query or parts.fragment:
        raise InvalidTarget("the address must not contain credentials, a query or a fragment; use --api-key")
    return text.rstrip("/").removesuffix("/v1").rstrip("/")


class HttpLoadClient:
    """A `LoadClient` over HTTP/1.1.

    Connections are opened as needed and kept. A request that fails on a kept connection before any byte
    of the response is sent again once on a new one: the server had closed the old one.
    """

    def __init__(self, target: Target, clock: Callable[[], float] = time.perf_counter) -> None:
        self._target = target
        self._clock = clock
        self._parts: SplitResult = urlsplit(target.url)
        self._idle: list[HttpConnection] = []
        self._tls = self._tls_context() if self._parts.scheme == "https" else None
        self._heads: dict[str, bytes] = {}

    @property
    def target(self) -> Target:
        return self._target

    def _tls_context(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        if not self._target.tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
        """Send one request and return its record; see `LoadClient.send`."""
        target = self._target
        body = render(request, target.model, target.api, target.path)
        kind = OllamaReader if target.api == "ollama" else OpenAIReader
        reader = kind(stream=request.stream, keeps_text=request.keeps_text)
        head = ResponseHead()
        failed = bytearray()

        def take_head(arrived: ResponseHead) -> BodySink:
            nonlocal head
            head = arrived
            return reader.feed if arrived.status == 200 else _keep(failed)

        start = self._clock()
        error = ""
        try:
            async with asyncio.timeout(request.timeout):
                await self._exchange("POST", target.path, body, take_head)
        except TimeoutError:
            error = "timeout"
        except ConnectionLost as lost:
            error = "cut" if lost.began and head.status == 200 else "disconnected"
        except OSError:
            error = "connect"
        end = self._clock()
        if not error and head.status == 200:
            reader.close()
        elif not error:
            error = f"http_{head.status} {_code(bytes(failed))}".rstrip()
        return _record(request, index, reader, head, start=start, end=end, error=error or reader.error)

    async def get(self, path: str) -> tuple[int, bytes]:
        """Fetch a path below the target's address; see `LoadClient.get`."""
        parts = bytearray()
        async with asyncio.timeout(CONNECT_SECONDS):
            head = await self._exchange("GET", path, None, lambda _: _keep(parts))
        return head.status, bytes(parts)

    async def close(self) -> None:
        """Close idle connections."""
        while self._idle:
            self._idle.pop().close()

    async def _exchange(
        self, method: str, path: str, body: bytes | None, sink: Callable[[ResponseHead], BodySink]
    ) -> ResponseHead:
        request = self._head_of(method, path, body)
        if kept := self._kept():
            try:
                return await self._on(kept, request, sink)
            except ConnectionLost as lost:
                if lost.began:
                    raise
        host, port = self._parts.hostname, self._parts.port or (443 if self._tls else 80)
        assert host is not None
        with_limit = asyncio.wait_for(connect(host, port, self._tls, self._clock), CONNECT_SECONDS)
        try:
            connection = await with_limit
        except TimeoutError as late:
            raise OSError("no connection in time") from late
        return await self._on(connection, request, sink)

    async def _on(
        self, connection: HttpConnection, request: bytes, sink: Callable[[ResponseHead], BodySink]
    ) -> ResponseHead:
        try:
            return await connection.exchange(request, sink)
        finally:
            if connection.is_reusable:
                connection.idle_since = self._clock()
                self._idle.append(connection)
            else:
                connection.abort()

    def _kept(self) -> HttpConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_reusable and self._clock() - connection.idle_since < IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _head_of(self, method: str, path: str, body: bytes | None) -> bytes:
        """Return the head of a request, and behind it the body."""
        key = f"{method} {path}"
        if key not in self._heads:
            target = self._target
            lines = [
                f"{method} {self._parts.path}{path} HTTP/1.1",
                f"Host: {self._parts.netloc}",
                f"User-Agent: gateway-bench/{__version__}",
                "Accept: */*",
            ]
            if body is not None:
                lines.append("Content-Type: application/json")
            if target.api_key:
                lines.append(f"Authorization: Bearer {target.api_key}")
            lines += [f"{name}: {value}" for name, value in target.headers]
            self._heads[key] = "\r\n".join(lines).encode("utf-8") + b"\r\n"
        if body is None:
            return self._heads[key] + b"\r\n"
        return b"%bContent-Length: %d\r\n\r\n%b" % (self._heads[key], len(body), body)


def _keep(parts: bytearray) -> BodySink:
    def keep(data: bytes, now: float) -> None:
        if len(parts) < MAX_ERROR_BYTES:
            parts.extend(data)

    return keep


def _code(body: bytes) -> str:
    with suppress(orjson.JSONDecodeError):
        return error_code(orjson.loads(body))
    return ""


def _milliseconds(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        return None


def _record(
    request: BenchRequest,
    index: int,
    reader: AnswerReader,
    head: ResponseHead,
    *,
    start: float,
    end: float,
    error: str,
) -> RequestRecord:
    return RequestRecord(
        index=index,
        arrival=start,
        start=start,
        last_token=end if reader.last is None else reader.last,
        end=end,
        ttft=None if reader.first is None else reader.first - start,
        itl=tuple(reader.gaps),
        prompt_tokens=reader.prompt_tokens,
        completion_tokens=reader.completion_tokens,
        cached_tokens=reader.cached_tokens,
        images=len(request.images),
        status=head.status,
        error=error,
        finish=reader.finish,
        model=request.model,
        language=request.language,
        name=request.name,
        queue_ms=_milliseconds(head.headers.get("x-gateway-queue-ms")),
        backend=head.headers.get("x-gateway-backend", ""),
        load_seconds=reader.load_seconds,
        text=reader.text,
    )
