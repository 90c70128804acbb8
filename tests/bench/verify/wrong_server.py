"""A vLLM stand-in behind a layer that makes it wrong in one way."""

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from gateway import simulate
from gateway.bench.verify.outcome import Check, Outcome
from gateway.bench.verify.server_checks import REACH
from gateway.bench.verify.target import Target
from gateway.bench.verify.verification import outcome_of

Body = dict[str, Any]
CHAT = "/v1/chat/completions"


@dataclass
class Answer:
    """A whole answer, before it is sent."""

    path: str
    asked: Body
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def json(self) -> Body:
        value: Body = json.loads(self.body)
        return value

    def say(self, status: int, value: Any) -> None:
        """Answer with JSON instead."""
        self.status, self.body = status, json.dumps(value, ensure_ascii=False).encode()
        self.headers = [(b"content-type", b"application/json")]

    @property
    def events(self) -> list[Body]:
        return [json.loads(line[6:]) for line in self.body.decode().splitlines() if line.startswith("data: {")]

    def stream(self, events: list[Body], done: bytes = b"data: [DONE]\n\n") -> None:
        """Answer with these events instead."""
        lines = [b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n" for event in events]
        self.body = b"".join(lines) + done

    @property
    def is_stream(self) -> bool:
        return self.status == 200 and self.path == CHAT and self.asked.get("stream") is True


@dataclass(frozen=True)
class Wrong:
    """A way in which a server is wrong.

    `asked` changes the requests, `answered` the answers. Requests at once above `most` are refused.
    With `buffers`, an answer is sent whole.
    """

    asked: Callable[[Body], object] | None = None
    answered: Callable[[Answer], None] | None = None
    most: int = 0
    buffers: bool = False
    key: bytes = b""


class WrongApp:
    """ASGI application of a stand-in that is wrong."""

    def __init__(self, app: Any, wrong: Wrong) -> None:
        self._app = app
        self.engine = app.engine
        self._wrong = wrong
        self._running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        wrong = self._wrong
        body = await _whole(receive)
        if wrong.key and any(name == b"authorization" for name, _ in scope["headers"]):
            scope = {**scope, "headers": [*_without(scope["headers"], b"authorization"), (b"authorization", wrong.key)]}
        asked: Body = {}
        try:
            value = json.loads(body)
            asked = value if isinstance(value, dict) else {}
        except ValueError:
            pass
        if wrong.asked is not None and asked and scope["path"] == CHAT:
            wrong.asked(asked)
            body = json.dumps(asked).encode()
        scope = {**scope, "headers": [*_without(scope["headers"], b"content-length"), _length(body)]}
        self._running += 1
        try:
            if wrong.most and self._running > wrong.most:
                refusal = Answer(scope["path"], asked, 503, [], b"")
                refusal.say(503, {"error": {"message": "full", "type": "server_error", "param": None, "code": None}})
                await _send(send, refusal)
            elif wrong.answered is not None or wrong.buffers:
                await self._changed(scope, body, asked, receive, send)
            else:
                await self._app(scope, _given(body, receive), send)
        finally:
            self._running -= 1

    async def _changed(self, scope: Any, body: bytes, asked: Body, receive: Any, send: Any) -> None:
        sent: list[Any] = []

        async def keep(message: Any) -> None:
            sent.append(message)

        await self._app(scope, _given(body, receive), keep)
        whole = b"".join(message.get("body", b"") for message in sent[1:])
        answer = Answer(scope["path"], asked, sent[0]["status"], list(sent[0].get("headers", ())), whole)
        if self._wrong.answered is not None:
            self._wrong.answered(answer)
        await _send(send, answer)


async def _whole(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _given(body: bytes, receive: Any) -> Callable[[], Any]:
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def next_message() -> Any:
        return next(given, None) or await receive()

    return next_message


async def _send(send: Any, answer: Answer) -> None:
    headers = [*_without(answer.headers, b"content-length"), _length(answer.body)]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})


def _without(headers: Any, name: bytes) -> list[tuple[bytes, bytes]]:
    return [(key, value) for key, value in headers if key.lower() not in (name, b"transfer-encoding")]


def _length(body: bytes) -> tuple[bytes, bytes]:
    return b"content-length", str(len(body)).encode()


@asynccontextmanager
async def target(wrong: Wrong, options: simulate.Options, *, key: str | None = None) -> AsyncIterator[Target]:
    """Serve a stand-in that is wrong, and yield it as a target."""
    server = simulate.running(options)
    server.app = WrongApp(server.app, wrong)  # type: ignore[assignment]  # it stands in for the application
    async with server, Target(server.base_url, model=None, key=key, seconds=5) as found:
        yield found


async def outcome(target: Target, check: Check, kind: str = "", *, reaches: bool = True) -> Outcome:
    """Run one check, after those that choose the model; `kind` overrides what these see."""
    for first in REACH if reaches else ():
        reached = await outcome_of(first, target)
        if first is check:
            return reached
        assert reached.status == "ok", reached
        if kind:
            target.kind = kind  # type: ignore[assignment]
    return await outcome_of(check, target)
