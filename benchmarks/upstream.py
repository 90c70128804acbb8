"""A cheap upstream with vLLM's responses, so that a benchmark measures the program in front of it.

The responses follow recordings of vLLM 0.32.0: a role chunk, one chunk for each token, a finish
chunk, a usage chunk on request, `[DONE]`; each is one TCP write. The upstream finds the few request
fields that it needs by searching the bytes, and imports nothing of the gateway.

Run it with `python -m benchmarks.upstream`; it prints one JSON line with its port.
`GET /pace?interval_ms=10&hold=0&think_ms=0` changes the pace of later answers, and `GET /counts`
returns how many answers and tokens have been sent.
"""

import asyncio
import json
import re
import sys
from dataclasses import dataclass
from itertools import count
from typing import cast
from urllib.parse import parse_qsl

import uvloop

MODEL = "Qwen/Qwen3-8B"
MARK = "~"
"""Appears once in every token and nowhere else: a load generator counts tokens by counting this
byte, however the stream is split into reads.
"""

WORDS = (
    "The",
    " gateway",
    " sends",
    " each",
    " piece",
    " on",
    ",",
    " as",
    " soon",
    " it",
    " came",
    ".",
    "\n",
    ' "quoted"',
    " 42",
    " naïve",
)
"""Texts of the tokens in turn; two of sixteen need a JSON escape, about as in prose with lists and
code.
"""

_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d+)", re.IGNORECASE)
_MAX_TOKENS = re.compile(rb'"max_(?:completion_)?tokens"\s*:\s*(\d+)')
_STREAM = re.compile(rb'"stream"\s*:\s*true')
_USAGE = re.compile(rb'"include_usage"\s*:\s*true')
_COMMON = b"date: Sat, 01 Aug 2026 12:00:00 GMT\r\nserver: uvicorn\r\nvary: Origin\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\n"
    + _COMMON
    + b"content-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
_CREATED = 1_785_000_000
_DEFAULT_TOKENS = 64
_BODY_TAIL = 4096
"""Bytes at each end of the body that are searched for fields; a 10 MB image lies between them."""


@dataclass(slots=True)
class Pace:
    """Pace of the answers.

    Attributes:
        interval: seconds between two tokens.
        hold: number of tokens after which a stream pauses forever (0: never).
        think: seconds before a plain answer.
    """

    interval: float = 0.01
    hold: int = 0
    think: float = 0.0

    def update(self, query: str) -> None:
        """Set `interval_ms`, `hold` and `think_ms` from a query string.

        Raises:
            ValueError: there is another key, or a value is not a number.
        """
        for key, value in parse_qsl(query, strict_parsing=True):
            if key == "interval_ms":
                self.interval = float(value) / 1000
            elif key == "hold":
                self.hold = int(value)
            elif key == "think_ms":
                self.think = float(value) / 1000
            else:
                raise ValueError(f"unknown key {key!r}")


@dataclass(frozen=True, slots=True)
class Asked:
    """Fields of a chat request that the upstream reads."""

    stream: bool
    usage: bool
    tokens: int


def asked(body: bytes) -> Asked:
    """Find these fields without parsing the JSON."""
    edges = body if len(body) <= 2 * _BODY_TAIL else body[:_BODY_TAIL] + body[-_BODY_TAIL:]
    found = _MAX_TOKENS.search(edges)
    return Asked(
        stream=_STREAM.search(edges) is not None,
        usage=_USAGE.search(edges) is not None,
        tokens=int(found[1]) if found else _DEFAULT_TOKENS,
    )


def framed(payload: bytes) -> bytes:
    """Return one HTTP/1.1 chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _answer(status: bytes, body: bytes) -> bytes:
    return b"HTTP/1.1 %b\r\n%bcontent-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (
        status,
        _COMMON,
        len(body),
        body,
    )


class Shapes:
    """vLLM's responses for one model, prepared so that an answer costs only a few joins."""

    def __init__(self, model: str) -> None:
        self._model = model
        opening = _json({"object": "chat.completion.chunk", "created": _CREATED, "model": model})[1:-1]
        self._opening = b'","' + opening[1:] + b',"choices":'
        self._words = [_json(word + MARK) for word in WORDS]
        card: dict[str, object] = {
            "id": model,
            "object": "model",
            "created": _CREATED,
            "owned_by": "vllm",
            "root": model,
        }
        self.models = _answer(
            b"200 OK", _json({"object": "list", "data": [{**card, "parent": None, "max_model_len": 32768}]})
        )

    def _event(self, answer_id: bytes, choices: bytes) -> bytes:
        return framed(b'data: {"id":"%b%b%b}\n\n' % (answer_id, self._opening, choices))

    def role(self, answer_id: bytes) -> bytes:
        choice = b'[{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]'
        return self._event(answer_id, choice + b',"prompt_token_ids":null,"prompt_text":null')

    def token(self, answer_id: bytes, number: int) -> bytes:
        word = self._words[number % len(self._words)]
        return self._event(
            answer_id,
            b'[{"index":0,"delta":{"content":%b},"logprobs":null,"finish_reason":null,"token_ids":null}]' % word,
        )

    def end(self, answer_id: bytes, tokens: int, *, usage: bool) -> bytes:
        """Return the finish chunk, the usage chunk if requested, `[DONE]` and the end of the body.

        vLLM sends these together with the last token.
        """
        finish = (
            b'[{"index":0,"delta":{"content":""},"logprobs":null,'
            b'"finish_reason":"length","stop_reason":null,"token_ids":null}]'
        )
        parts = [self._event(answer_id, finish)]
        if usage:
            counts = {"prompt_tokens": 40, "total_tokens": 40 + tokens, "completion_tokens": tokens}
            parts.append(self._event(answer_id, b'[],"usage":' + _json(counts)))
        parts.append(framed(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        return b"".join(parts)

    def plain(self, answer_id: bytes, tokens: int) -> bytes:
        """Return a plain answer with the text of all tokens of the stream."""
        text = "".join(WORDS[number % len(WORDS)] + MARK for number in range(tokens))
        message = {
            "role": "assistant",
            "content": text,
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
        }
        choice = {
            "index": 0,
            "message": message,
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
        }
        answer = {
            "id": answer_id.decode(),
            "object": "chat.completion",
            "created": _CREATED,
            "model": self._model,
            "choices": [{**choice, "routed_experts": None}],
            "service_tier": None,
            "system_fingerprint": "vllm-0.32.0-882afe58",
            "usage": {
                "prompt_tokens": 40,
                "total_tokens": 40 + tokens,
                "completion_tokens": tokens,
                "prompt_tokens_details": None,
            },
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "kv_transfer_params": None,
        }
        return _answer(b"200 OK", _json(answer))


class Upstream:
    """State shared by the connections: the pace, the shapes, and the counter of answer ids."""

    def __init__(self, model: str) -> None:
        self.pace = Pace()
        self.shapes = Shapes(model)
        self.answers = self.tokens = 0
        self._plain: dict[int, tuple[bytes, bytes]] = {}
        self._numbers = count(0x1000_0000_0000_0000)

    def new_id(self) -> bytes:
        return b"chatcmpl-%016x" % next(self._numbers)

    def plain(self, tokens: int) -> bytes:
        """Return a plain answer with a new id; the rest is built once for each length."""
        halves = self._plain.get(tokens)
        if halves is None:
            spare = self.new_id()
            before, after = self.shapes.plain(spare, tokens).split(spare)
            halves = self._plain[tokens] = (before, after)
        return halves[0] + self.new_id() + halves[1]


class UpstreamProtocol(asyncio.Protocol):
    """One connection with sequential requests, as the connection pools of the routers send them."""

    _transport: asyncio.Transport

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._missing = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports are not subclasses of it

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if self._missing > len(data):
            self._missing -= len(data)
            return
        request = b"".join(self._parts)
        head_end = request.find(_HEAD_END)
        if head_end < 0:
            self._parts, self._missing = [request], 0
            return
        length = _LENGTH.search(request, 0, head_end)
        missing = head_end + 4 + (int(length[1]) if length else 0) - len(request)
        if missing > 0:
            self._parts, self._missing = [request], missing
            return
        self._parts, self._missing = [], 0
        self._serve(request[: request.find(b"\r\n")].split(b" "), request[head_end + 4 :])

    def _serve(self, line: list[bytes], body: bytes) -> None:
        target = line[1] if len(line) == 3 else b""
        path, _, query = target.partition(b"?")
        path = path.removeprefix(b"/second")  # a second server of the same backend
        if path == b"/v1/chat/completions":
            self._chat(asked(body))
        elif path == b"/v1/models":
            self._transport.write(self._upstream.shapes.models)
        elif path == b"/pace":
            self._upstream.pace.update(query.decode())
            self._transport.write(_answer(b"200 OK", b"{}"))
        elif path == b"/counts":
            sent = {"answers": self._upstream.answers, "tokens": self._upstream.tokens}
            self._transport.write(_answer(b"200 OK", _json(sent)))
        elif path in (b"/health", b"/version"):
            self._transport.write(_answer(b"200 OK", b'{"version":"0.32.0"}' if path == b"/version" else b""))
        else:
            self._transport.write(_answer(b"404 Not Found", b'{"detail":"Not Found"}'))

    def _chat(self, what: Asked) -> None:
        pace = self._upstream.pace
        if what.stream:
            self._stream(what)
        elif pace.think:
            self._timer = self._loop.call_later(pace.think, self._plain, what.tokens)
        else:
            self._plain(what.tokens)

    def _plain(self, tokens: int) -> None:
        self._transport.write(self._upstream.plain(tokens))
        self._upstream.answers += 1

    def _stream(self, what: Asked) -> None:
        """Send the role chunk and the first token immediately, then one token per interval.

        Intervals are counted from the start, so delays do not add up.
        """
        shapes, interval, hold = self._upstream.shapes, self._upstream.pace.interval, self._upstream.pace.hold
        answer_id, write, loop = self._upstream.new_id(), self._transport.write, self._loop
        start, sent, shared, known = loop.time(), 0, self._upstream, list[bytes]()

        def step() -> None:
            nonlocal sent
            if sent < len(WORDS):
                known.append(shapes.token(answer_id, sent))
            write(known[sent % len(WORDS)])
            sent += 1
            shared.tokens += 1
            if sent >= what.tokens:
                write(shapes.end(answer_id, sent, usage=what.usage))
                shared.answers += 1
            elif sent != hold:
                self._timer = loop.call_at(start + sent * interval, step)

        write(STREAM_HEAD)
        write(shapes.role(answer_id))
        step()


async def serve(model: str) -> None:
    """Serve on a port chosen by the system until killed, or until standard input ends because the
    parent process is gone.
    """
    upstream = Upstream(model)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: UpstreamProtocol(upstream), "127.0.0.1", 0, backlog=4096)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    orphaned = asyncio.Event()
    loop.add_reader(sys.stdin.fileno(), orphaned.set)
    await orphaned.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve(MODEL))
