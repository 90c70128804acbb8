"""An Ollama or a vLLM on a raw socket that can fail in every way that TCP and HTTP allow.

It records the requests that it receives and when their connections close.
"""

import asyncio
import gzip
import json
import socket
import ssl
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import cache
from typing import Literal, Self

Kind = Literal["ollama", "vllm"]

MODEL = "served-model"
WORDS = ("Hello", " there", ",", " client", ".")
TEXT = "".join(WORDS)
# Characters that some libraries take for line ends, and characters of two to four bytes.
ODD_TEXT = "a\u2028b\u2029c\x85d é ß 漢字 🙂"
ODD_PIECES = tuple(ODD_TEXT)
CANARY = "secret-of-the-backend"
"""Part of every broken response; no client may see it."""
CAPABLE = ("completion", "vision", "tools", "thinking")
"""Capabilities of the model, as an Ollama lists them."""
FORCED = ('{"city"', ": ", '"Oslo', '"}')
THOUGHT = ("<th", "ink>why", "</think>\n", "Hel", "lo")
TINY_CHUNKS = 10_000
FLOOD_BYTES = 50_000_000
BOMB_BYTES = 50_000_000
LONG_LINE = 20_000_000
HUGE = 33 * 1024 * 1024


@dataclass(eq=False, repr=False)
class FaultBackend:
    """A server whose responses follow a mode, which is the name of a function in `MODES`.

    Each chat request takes the next mode of `script`, or `mode` once that is used up.
    """

    kind: Kind
    mode: str = "healthy"
    script: deque[str] = field(default_factory=deque)
    host: str = "127.0.0.1"
    tls: ssl.SSLContext | None = None
    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    """Chat requests, head and body as received; probes are not recorded."""
    peers: list["Peer"] = field(default_factory=list)
    """Connections that carried a chat request, in the order of their first one."""
    probes: int = 0
    most_at_once: int = 0
    context_length: int | None = None
    """The model's context in tokens, as reported to probes."""
    capabilities: tuple[str, ...] = CAPABLE
    _at_once: int = 0
    _open: set["Peer"] = field(default_factory=set)

    def __repr__(self) -> str:
        counts = f"{len(self.requests)} requests, {len(self.open_peers)} connections open"
        return f"<FaultBackend {self.kind} {self.next_mode_name}, {counts}>"

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Peer(self), self.host, self.port, ssl=self.tls)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [peer.task for peer in self._open if peer.task is not None]
        for peer in list(self._open):
            peer.transport.abort()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._server.wait_closed()

    def die(self) -> None:
        """Close the listener and reset all connections, as a killed process does."""
        self._server.close()
        for peer in list(self._open):
            peer.reset()

    async def revive(self) -> None:
        """Listen again at the same address."""
        self._server = await asyncio.get_running_loop().create_server(
            lambda: Peer(self), self.host, self.port, ssl=self.tls
        )

    @property
    def base_url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}"

    @property
    def open_peers(self) -> list["Peer"]:
        """Connections that carried a chat request and are still open."""
        return [peer for peer in self.peers if peer.closed_at is None]

    @property
    def next_mode_name(self) -> str:
        return self.script[0] if self.script else self.mode

    def take_mode(self) -> "Mode":
        return MODES[self.script.popleft() if self.script else self.mode]

    def opened(self, peer: "Peer") -> None:
        self._open.add(peer)

    def closed(self, peer: "Peer") -> None:
        self._open.discard(peer)

    def begin(self, peer: "Peer", request: bytes) -> None:
        self.requests.append(request)
        if peer not in self.peers:
            self.peers.append(peer)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)

    def end(self) -> None:
        self._at_once -= 1

    # Responses of each kind of engine

    def event(self, text: str = "", *, finish: bool = False) -> bytes:
        """Return one event of a streamed answer."""
        if self.kind == "ollama":
            line: dict[str, object] = {
                "model": MODEL,
                "message": {"role": "assistant", "content": text},
                "done": finish,
            }
            if finish:
                line |= {"done_reason": "stop", "prompt_eval_count": 7, "eval_count": len(WORDS)}
            return json.dumps(line, ensure_ascii=False).encode() + b"\n"
        choice = {"index": 0, "delta": {} if finish else {"content": text}, "finish_reason": "stop" if finish else None}
        return (
            b"data: "
            + json.dumps({"id": "c", "model": MODEL, "choices": [choice]}, ensure_ascii=False).encode()
            + b"\n\n"
        )

    def ending(self) -> list[bytes]:
        if self.kind == "ollama":
            return [self.event(finish=True)]
        usage = {"prompt_tokens": 7, "completion_tokens": len(WORDS), "total_tokens": 7 + len(WORDS)}
        return [
            self.event(finish=True),
            b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n",
            b"data: [DONE]\n\n",
        ]

    def events(self, words: tuple[str, ...] = WORDS) -> list[bytes]:
        return [*(self.event(word) for word in words), *self.ending()]

    def error_event(self) -> bytes:
        if self.kind == "ollama":
            return b'{"error":"%b"}\n' % CANARY.encode()
        return b'data: {"error":{"message":"%b","type":"InternalServerError","code":500}}\n\n' % CANARY.encode()

    def document(self, text: str = TEXT) -> bytes:
        """Return a plain answer of a vLLM."""
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        return json.dumps(
            {"id": "c", "choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": len(WORDS)}},
            ensure_ascii=False,
        ).encode()

    def models(self) -> bytes:
        if self.kind == "ollama":
            return json.dumps(
                {"models": [{"name": MODEL, "details": {}, "context_length": self.context_length}]}
            ).encode()
        return json.dumps({"data": [{"id": MODEL, "max_model_len": self.context_length}]}).encode()

    def shown(self) -> bytes:
        return json.dumps({"capabilities": self.capabilities}).encode()


class Peer(asyncio.Protocol):
    """One connection of the gateway. `closed_at` is in the loop's time."""

    transport: asyncio.Transport

    def __init__(self, backend: FaultBackend) -> None:
        self.backend = backend
        self.task: asyncio.Task[None] | None = None
        self.closed_at: float | None = None
        self.streams = False
        self.served = 0
        self._received = bytearray()
        self._can_write = asyncio.Event()
        self._can_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is not a subclass
        self.backend.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed_at = asyncio.get_running_loop().time()
        self.backend.closed(self)
        self._can_write.set()
        if self.task is not None:
            self.task.cancel()

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = bytes(self._received).partition(b"\r\n\r\n")
        if not separator or self.task is not None:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        if len(body) < int(fields.get(b"content-length", 0)) and self.backend.next_mode_name not in EARLY:
            return
        request = bytes(self._received)
        self._received.clear()
        self.task = asyncio.get_running_loop().create_task(self._serve(request, body))

    async def _serve(self, request: bytes, body: bytes) -> None:
        if not request.startswith(b"POST") or request.startswith(b"POST /api/show "):
            self.backend.probes += 1
            self.answer(
                200, b"application/json", self.backend.models() if request.startswith(b"GET") else self.backend.shown()
            )
            self.transport.close()
            return
        self.streams = self.backend.kind == "ollama" or b'"stream":true' in body
        self.backend.begin(self, request)
        try:
            await self.backend.take_mode()(self)
            self.served += 1
        finally:
            self.backend.end()
            self.task = None

    # Building blocks of the modes

    def head(self, status: int, media_type: bytes, *fields: bytes) -> None:
        self.transport.write(
            b"HTTP/1.1 %d Any\r\ncontent-type: %b\r\n%b\r\n"
            % (status, media_type, b"".join(field + b"\r\n" for field in fields))
        )

    def answer(self, status: int, media_type: bytes, body: bytes, *fields: bytes) -> None:
        self.head(status, media_type, b"content-length: %d" % len(body), *fields)
        self.transport.write(body)

    @property
    def media_type(self) -> bytes:
        if not self.streams:
            return b"application/json"
        return b"application/x-ndjson" if self.backend.kind == "ollama" else b"text/event-stream; charset=utf-8"

    def open_stream(self) -> None:
        self.head(200, self.media_type, b"transfer-encoding: chunked")

    def chunk(self, data: bytes) -> None:
        self.transport.write(chunked(data))

    def end_stream(self) -> None:
        self.transport.write(b"0\r\n\r\n")

    async def send_words(self) -> None:
        """Send the head and all words, each in a packet of its own, but not the end."""
        self.open_stream()
        for word in WORDS:
            self.chunk(self.backend.event(word))
            await asyncio.sleep(0.002)

    async def wait_until_writable(self) -> None:
        """Wait until the transport accepts more data.

        Yields to the event loop at least once, so a lost connection ends the mode.
        """
        await asyncio.sleep(0)
        await self._can_write.wait()

    def reset(self) -> None:
        """Close the connection with RST instead of FIN."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


Mode = Callable[[Peer], Awaitable[None]]
MODES: dict[str, Mode] = {}
EARLY = {"early_413", "early_400", "early_close"}
"""Modes that respond before they have read the body."""


def mode(function: Mode) -> Mode:
    MODES[function.__name__] = function
    return function


async def for_ever() -> None:
    await asyncio.get_running_loop().create_future()


# Healthy


@mode
async def healthy(peer: Peer) -> None:
    if not peer.streams:
        peer.answer(200, peer.media_type, peer.backend.document())
        return
    peer.open_stream()
    for event in peer.backend.events():
        peer.chunk(event)
    peer.end_stream()


async def say(peer: Peer, words: tuple[str, ...]) -> None:
    if not peer.streams:
        peer.answer(200, peer.media_type, peer.backend.document("".join(words)))
        return
    peer.open_stream()
    for event in peer.backend.events(words):
        peer.chunk(event)
    peer.end_stream()


@mode
async def forced(peer: Peer) -> None:
    """Send the arguments of a tool call as plain text, as grammar-guided decoding does."""
    await say(peer, FORCED)


@mode
async def thinks(peer: Peer) -> None:
    """Send the reasoning as part of the content."""
    await say(peer, THOUGHT)


@mode
async def wordless(peer: Peer) -> None:
    """Send an empty answer that ends normally."""
    await say(peer, ())


@mode
async def too_long(peer: Peer) -> None:
    text = b"This model's maximum context length is 4096 tokens. However, you requested 9000 output tokens"
    peer.answer(400, b"application/json", b'{"error":{"message":"%b"}}' % text)


@mode
async def cannot_think(peer: Peer) -> None:
    peer.answer(400, b"application/json", b'{"error":"\\"%b\\" does not support thinking"}' % MODEL.encode())


@mode
async def slow(peer: Peer) -> None:
    """Stream a word every 5 ms until the client leaves; never send a plain answer."""
    if not peer.streams:
        await for_ever()
    peer.open_stream()
    while True:
        peer.chunk(peer.backend.event("word "))
        await asyncio.sleep(0.005)


@mode
async def brief(peer: Peer) -> None:
    """Answer after 10 ms, while other requests are queued."""
    await asyncio.sleep(0.01)
    await healthy(peer)


@mode
async def leisurely(peer: Peer) -> None:
    """Answer after 80 ms, so that a few requests at once keep no processor busy."""
    await asyncio.sleep(0.08)
    await healthy(peer)


@mode
async def flood(peer: Peer) -> None:
    """Stream as many words as the socket accepts."""
    peer.open_stream()
    event = peer.backend.event("word ") * 50
    for _ in range(FLOOD_BYTES // len(event)):
        peer.chunk(event)
        await peer.wait_until_writable()
    await for_ever()


# Before the first byte


@mode
async def close(peer: Peer) -> None:
    peer.transport.close()


@mode
async def rst(peer: Peer) -> None:
    peer.reset()


@mode
async def silent(peer: Peer) -> None:
    await for_ever()


@mode
async def garbage(peer: Peer) -> None:
    peer.transport.write(b"\x00\xff %b\r\n\r\n" % CANARY.encode())
    await for_ever()


@mode
async def big_header(peer: Peer) -> None:
    peer.head(200, peer.media_type, b"x-big: " + b"a" * 1_000_000, b"content-length: 2")
    peer.transport.write(b"{}")
    await for_ever()


@mode
async def many_headers(peer: Peer) -> None:
    peer.head(200, peer.media_type, *[b"x: y"] * 20_000, b"content-length: 2")
    peer.transport.write(b"{}")
    await for_ever()


@mode
async def informational_flood(peer: Peer) -> None:
    while True:
        peer.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n" * 50)
        await peer.wait_until_writable()
        await asyncio.sleep(0.001)


@mode
async def redirect(peer: Peer) -> None:
    peer.answer(302, b"text/plain", b"", b"location: " + f"{peer.backend.base_url}/elsewhere".encode())


@mode
async def html(peer: Peer) -> None:
    peer.answer(200, b"text/html", b"<html>%b</html>" % CANARY.encode())


@mode
async def truncated(peer: Peer) -> None:
    """Send less than Content-Length announces."""
    body = peer.backend.document() if not peer.streams else peer.backend.event(CANARY)
    peer.head(200, peer.media_type, b"content-length: %d" % (len(body) + 100))
    peer.transport.write(body[: len(body) // 2])
    await asyncio.sleep(0.002)
    peer.transport.close()


@mode
async def invalid_json(peer: Peer) -> None:
    peer.answer(200, peer.media_type, b'{"choices": [%b' % CANARY.encode())


@cache
def _bomb() -> bytes:
    return gzip.compress(b" " * (BOMB_BYTES // 50)) * 50  # concatenated gzip members form one file


@mode
async def bomb(peer: Peer) -> None:
    peer.answer(200, peer.media_type, _bomb(), b"content-encoding: gzip")


@mode
async def huge(peer: Peer) -> None:
    if not peer.streams:
        peer.head(200, peer.media_type, b"content-length: %d" % HUGE)
        for _ in range(HUGE // 65536):
            peer.transport.write(b" " * 65536)
            await peer.wait_until_writable()
        await for_ever()
    peer.open_stream()
    event = peer.backend.event("x" * 60_000)
    while True:
        peer.chunk(event)
        await peer.wait_until_writable()


@mode
async def head_alone(peer: Peer) -> None:
    """Die like a vLLM in prefill: it sends the head of a stream before it queues the request."""
    peer.open_stream()
    await asyncio.sleep(0.005)
    peer.reset()


@mode
async def role_alone(peer: Peer) -> None:
    peer.open_stream()
    peer.chunk(peer.backend.event(""))
    await asyncio.sleep(0.005)
    peer.reset()


@mode
async def aborts(peer: Peer) -> None:
    """Give the request up before its first token, as a vLLM does that was told to end."""

    def aborted(event: bytes) -> bytes:
        return event.replace(b'"finish_reason": "stop"', b'"finish_reason": "abort"')

    if not peer.streams:
        peer.answer(200, peer.media_type, aborted(peer.backend.document(WORDS[0])))
        return
    peer.open_stream()
    peer.chunk(peer.backend.event(""))
    for event in peer.backend.ending():
        peer.chunk(aborted(event))
    peer.end_stream()


@mode
async def surplus(peer: Peer) -> None:
    """Send a healthy answer, and in the same packet another one without a request."""
    await healthy(peer)
    peer.answer(200, peer.media_type, peer.backend.document(CANARY))


@mode
async def late_surplus(peer: Peer) -> None:
    """Send the additional answer a moment later, when the connection is idle."""
    await healthy(peer)
    await asyncio.sleep(0.005)
    peer.answer(200, peer.media_type, peer.backend.document(CANARY))


@mode
async def stale(peer: Peer) -> None:
    """Answer the first request of a connection, and close it when a second one arrives."""
    if peer.served:
        peer.transport.close()
    else:
        await healthy(peer)


@mode
async def early_413(peer: Peer) -> None:
    peer.answer(413, b"application/json", b'{"error":"%b"}' % CANARY.encode(), b"connection: close")
    await asyncio.sleep(0.05)  # read on, as servers do, so that the answer is not lost
    peer.transport.close()


@mode
async def early_400(peer: Peer) -> None:
    peer.transport.pause_reading()
    peer.answer(400, b"application/json", b'{"error":"%b"}' % CANARY.encode())
    await asyncio.sleep(0.05)
    peer.transport.resume_reading()


@mode
async def early_close(peer: Peer) -> None:
    """Answer and close with most of the request unread, so the kernel sends a reset after it."""
    peer.answer(400, b"application/json", b'{"error":"%b"}' % CANARY.encode())
    peer.transport.close()


# Refusals


def refusal(name: str, status: int, *fields: Callable[[], bytes]) -> None:
    async def refuse(peer: Peer) -> None:
        peer.answer(status, b"application/json", b'{"error":"%b"}' % CANARY.encode(), *(field() for field in fields))

    MODES[name] = refuse


ENGINE_REASON = "llama runner process has terminated: signal: killed"
ENGINE_TEXT = f"{ENGINE_REASON}\n\x1b[31m 'Hello?' in /root/{CANARY}"
"""An engine's reason for a failure, followed by what must not be logged."""


@mode
async def runner_dies(peer: Peer) -> None:
    peer.answer(500, b"application/json", json.dumps({"error": ENGINE_TEXT}).encode())


@mode
async def runner_dies_midway(peer: Peer) -> None:
    error = json.dumps({"error": ENGINE_TEXT}).encode()
    peer.open_stream()
    peer.chunk(peer.backend.event(WORDS[0]))
    peer.chunk(error + b"\n" if peer.backend.kind == "ollama" else b"data: " + error + b"\n\n")
    peer.end_stream()


def in_seconds(seconds: float) -> bytes:
    return b"retry-after: " + formatdate(time.time() + seconds, usegmt=True).encode()


refusal("locked", 401)
refusal("missing", 404)
refusal("breaks", 500)
refusal("full", 503)
refusal("full_for_seven", 503, lambda: b"retry-after: 7")
refusal("limited_for_seven", 429, lambda: b"retry-after: 7")
refusal("limited_until", 429, lambda: in_seconds(40))
refusal("limited_for_ever", 429, lambda: b"retry-after: 99999")
refusal("limited_garbage", 429, lambda: b"retry-after: soon")


# In the middle of a stream


@mode
async def killed(peer: Peer) -> None:
    await peer.send_words()
    peer.reset()


@mode
async def cut(peer: Peer) -> None:
    """Close too early; without a length or chunks, only the close marks the end of the body."""
    peer.head(200, peer.media_type, b"connection: close")
    for word in WORDS:
        peer.transport.write(peer.backend.event(word))
        await asyncio.sleep(0.002)
    peer.transport.close()


@mode
async def bad_chunk(peer: Peer) -> None:
    """Send an invalid chunk size in the same packet as valid chunks."""
    peer.open_stream()
    await asyncio.sleep(0.002)
    peer.transport.write(
        b"".join(chunked(peer.backend.event(word)) for word in WORDS) + b"zz\r\n%b\r\n" % CANARY.encode()
    )
    await for_ever()


@mode
async def stall(peer: Peer) -> None:
    await peer.send_words()
    await for_ever()


@mode
async def drip(peer: Peer) -> None:
    await peer.send_words()
    while True:
        peer.chunk(peer.backend.event("."))
        await asyncio.sleep(0.02)


@mode
async def malformed(peer: Peer) -> None:
    """Send the words, an event that cannot be read, and a normal end."""
    await peer.send_words()
    if peer.backend.kind == "vllm":
        peer.chunk(b": note\nretry: 1\nda\x00ta\ndata: \x00%b\n\n" % CANARY.encode())
    else:
        peer.chunk(b'{"message": \x00%b}\n' % CANARY.encode())
    for event in peer.backend.ending():
        peer.chunk(event)
    peer.end_stream()


@mode
async def long_line(peer: Peer) -> None:
    await peer.send_words()
    part = b"data: " if peer.backend.kind == "vllm" else b'{"message":"'
    for _ in range(LONG_LINE // 65536):
        peer.chunk(part + b"x" * 65536)
        part = b""
        await peer.wait_until_writable()
    await for_ever()


@mode
async def odd_text(peer: Peer) -> None:
    """Send every byte in its own chunk; some packets end within a character."""
    if not peer.streams:
        peer.answer(200, peer.media_type, peer.backend.document(ODD_TEXT))
        return
    peer.open_stream()
    body = b"".join(peer.backend.events(ODD_PIECES))
    for index in range(len(body)):
        peer.chunk(body[index : index + 1])
        if body[index] >= 0x80:
            await asyncio.sleep(0)
    peer.end_stream()


@mode
async def error_then_done(peer: Peer) -> None:
    """Send an error event in the same packet as the words before it, then a normal end."""
    peer.open_stream()
    peer.transport.write(
        b"".join(
            chunked(event) for event in [*(peer.backend.event(word) for word in WORDS), peer.backend.error_event()]
        )
    )
    for event in peer.backend.ending():
        peer.chunk(event)
    peer.end_stream()


@mode
async def done_then_more(peer: Peer) -> None:
    peer.open_stream()
    for event in [*peer.backend.events(), peer.backend.event(CANARY)]:
        peer.chunk(event)
    peer.end_stream()
    await for_ever()


@mode
async def done_then_open(peer: Peer) -> None:
    peer.open_stream()
    for event in peer.backend.events():
        peer.chunk(event)
    await for_ever()


@mode
async def tiny_chunks(peer: Peer) -> None:
    peer.open_stream()
    event = peer.backend.event("x")
    peer.transport.write(
        chunked(event) * TINY_CHUNKS + b"".join(chunked(event) for event in peer.backend.ending()) + b"0\r\n\r\n"
    )
