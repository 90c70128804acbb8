"""The server that is verified: its address, what kind it is, and requests to it."""

import json
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self

import httpx2
from msgspec import Struct

Kind = Literal["gateway", "ollama", "vllm", "openai"]

OWNERS: dict[str, Kind] = {"gateway": "gateway", "vllm": "vllm", "library": "ollama"}
"""Kinds by the `owned_by` of `GET /v1/models`."""

THINKS_NOT: dict[Kind, dict[str, Any]] = {
    "gateway": {"reasoning_effort": "none"},
    "ollama": {"reasoning_effort": "none"},
    "vllm": {"chat_template_kwargs": {"enable_thinking": False}},
    "openai": {},
}
"""Fields with which a model that thinks answers at once, and that others ignore."""

Messages = list[dict[str, Any]]

CONNECT_SECONDS = 5.0
MAX_BODY = 16 * 1024 * 1024
"""Bytes of an answer that are read."""


class ServerUnreachable(Exception):
    """The server did not answer; the text says how."""


class Reply(Struct, frozen=True):
    """A complete answer. `body` is the decoded JSON, None if it is not JSON."""

    status: int
    headers: Mapping[str, str]
    content: bytes
    body: Any
    seconds: float

    @property
    def error(self) -> Mapping[str, Any]:
        """Error object of the body; empty if there is none."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) else {}

    @property
    def message(self) -> str:
        """Message of the error, or the beginning of the body, on one line."""
        text = self.error.get("message") or self.content[:200].decode(errors="replace")
        return shortened(str(text))

    @property
    def choice(self) -> Mapping[str, Any]:
        """First choice of a completion; empty if there is none."""
        return first_choice(self.body)

    @property
    def text(self) -> str:
        """Content of the first choice."""
        message = self.choice.get("message")
        content = message.get("content") if isinstance(message, dict) else None
        return content if isinstance(content, str) else ""

    @property
    def whole_text(self) -> str:
        """Reasoning and content of the first choice."""
        message = self.choice.get("message")
        return _texts(message) if isinstance(message, dict) else ""

    @property
    def usage(self) -> Mapping[str, Any]:
        usage = self.body.get("usage") if isinstance(self.body, dict) else None
        return usage if isinstance(usage, dict) else {}


class Event(Struct, frozen=True):
    """One event of a stream. `data` is what follows `data: `; `at` is when its last byte arrived.

    `read` is the number of the read that brought its last byte: events of one read arrived together.
    """

    data: bytes
    at: float
    read: int

    @property
    def body(self) -> Any:
        try:
            return json.loads(self.data.decode())
        except ValueError:
            return None

    @property
    def delta(self) -> Mapping[str, Any]:
        delta = first_choice(self.body).get("delta")
        return delta if isinstance(delta, dict) else {}

    @property
    def text(self) -> str:
        """Content or reasoning of the event."""
        return _texts(self.delta)

    @property
    def content(self) -> str:
        content = self.delta.get("content")
        return content if isinstance(content, str) else ""


class Stream(Struct, frozen=True):
    """A complete streamed answer; `reply` is the answer itself if it is not a stream."""

    reply: Reply
    events: tuple[Event, ...]
    sent: float
    ended: float

    @property
    def is_stream(self) -> bool:
        return self.reply.status == 200 and self.reply.headers.get("content-type", "").startswith("text/event-stream")

    @property
    def chunks(self) -> list[Event]:
        """Events that are JSON objects."""
        return [event for event in self.events if isinstance(event.body, dict)]

    @property
    def pieces(self) -> list[Event]:
        """Chunks with text."""
        return [event for event in self.chunks if event.text]

    @property
    def content(self) -> str:
        return "".join(event.content for event in self.chunks)

    @property
    def finishes(self) -> list[str]:
        return [finish for event in self.chunks if (finish := first_choice(event.body).get("finish_reason"))]

    @property
    def error_message(self) -> str:
        """Message of an error in the stream, empty without one."""
        errors = [error for event in self.chunks if isinstance(error := event.body.get("error"), dict)]
        return shortened(str(errors[-1].get("message") or "")) if errors else ""

    @property
    def usages(self) -> list[Mapping[str, Any]]:
        return [usage for event in self.chunks if isinstance(usage := event.body.get("usage"), dict)]


class Target:
    """A server with OpenAI's API. `model` and `kind` are set by the first check.

    `base_url` has no `/v1`. `seconds` is the longest wait for the next byte of an answer.
    """

    def __init__(
        self, base_url: str, *, model: str | None, key: str | None, seconds: float = 120.0, users: int = 10
    ) -> None:
        self.base_url = base_url
        self.wanted_model = model
        self.model = model or ""
        self.kind: Kind = "openai"
        self.users = users
        self.listed: list[Mapping[str, Any]] = []
        self.embedding_model: str | None = None
        """None: not looked for yet; empty: there is none."""
        self.key = key
        self._client = httpx2.AsyncClient(
            timeout=httpx2.Timeout(seconds, connect=CONNECT_SECONDS),
            limits=httpx2.Limits(max_connections=None),
            trust_env=False,
            verify=base_url.startswith("https:"),  # loading the system's certificates takes 30 ms
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    @property
    def entry(self) -> Mapping[str, Any]:
        """Entry of the model in `GET /v1/models`; empty if it is not listed."""
        return next((item for item in self.listed if item.get("id") == self.model), {})

    def chat(self, content: str | Messages, **fields: Any) -> dict[str, Any]:
        """Return the body of a chat request; `content` is the user's text, or all the messages."""
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else content
        quiet = THINKS_NOT[self.kind]
        return {"model": self.model, "messages": messages, "max_tokens": 16, "temperature": 0, **quiet, **fields}

    async def ask(self, body: Any, path: str = "/v1/chat/completions", **headers: str) -> Reply:
        """Send a POST request; `body` is bytes that are sent as they are, or a value for JSON.

        A header that is empty is left out, also that of the key.
        """
        return await self._request("POST", path, body, headers)

    async def get(self, path: str) -> Reply:
        return await self._request("GET", path, None, {})

    async def _request(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
        return (await self._exchange(method, path, body, headers)).reply

    async def stream(self, body: dict[str, Any]) -> Stream:
        """Send a chat request with `stream: true`, and read the whole answer."""
        return await self._exchange("POST", "/v1/chat/completions", {**body, "stream": True}, {})

    async def _exchange(self, method: str, path: str, body: Any, headers: Mapping[str, str]) -> Stream:
        content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        own = {"authorization": f"Bearer {self.key}"} if self.key else {}
        whole = {**({} if content is None else {"content-type": "application/json"}), **own, **headers}
        given = {name: value for name, value in whole.items() if value}
        reader, sent = EventReader(), time.perf_counter()
        try:
            async with self._client.stream(
                method, f"{self.base_url}{path}", content=content, headers=given
            ) as response:
                size = 0
                async for piece in response.aiter_bytes():
                    size += len(piece)
                    if size > MAX_BODY:
                        raise ServerUnreachable(f"more than {MAX_BODY} bytes of an answer")
                    reader.feed(piece, time.perf_counter())
                status, answered = (
                    response.status_code,
                    {name.lower(): value for name, value in response.headers.items()},
                )
        except httpx2.TimeoutException:
            raise ServerUnreachable(f"no answer in time from {path}") from None
        except httpx2.HTTPError as error:
            raise ServerUnreachable(f"{path}: {shortened(str(error) or type(error).__name__)}") from None
        ended = time.perf_counter()
        reply = Reply(status, answered, reader.content, decoded(reader.content), ended - sent)
        return Stream(reply, tuple(reader.events), sent, ended)


class EventReader:
    """Reader of server-sent events that notes when each arrived. Events are divided by blank lines."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self._whole = bytearray()
        self._line_start = 0
        self._data: list[bytes] = []
        self._reads = 0

    @property
    def content(self) -> bytes:
        return bytes(self._whole)

    def feed(self, piece: bytes, now: float) -> None:
        self._reads += 1
        self._whole += piece
        while (end := self._whole.find(b"\n", self._line_start)) >= 0:
            line = bytes(self._whole[self._line_start : end]).removesuffix(b"\r")
            self._line_start = end + 1
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                self.events.append(Event(b"\n".join(self._data), now, self._reads))
                self._data = []


def _texts(message: Mapping[str, Any]) -> str:
    names = ("reasoning", "reasoning_content", "content")
    return "".join(part for name in names if isinstance(part := message.get(name), str))


def first_choice(body: Any) -> Mapping[str, Any]:
    """Return the first choice of a completion or a chunk; empty if there is none."""
    choices = body.get("choices") if isinstance(body, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


def decoded(content: bytes) -> Any:
    """Return the value of a JSON text; None if it is not one."""
    try:
        return json.loads(content.decode())
    except ValueError:
        return None


def shortened(text: str, most: int = 160) -> str:
    """Return `text` on one line, cut off after `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
