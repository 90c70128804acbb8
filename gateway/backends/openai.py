"""Servers that speak OpenAI's chat completions themselves: kind `openai`, and the base of `vllm`."""

import re
from typing import Any

import msgspec
from msgspec import Struct

from gateway.backends.base import LineReading, broken_off, decode
from gateway.backends.refusals import refusal
from gateway.errors import GatewayError, UpstreamError
from gateway.protocol import Chat, ImagePart, Message, StreamOptions, TextPart
from gateway.sse import DONE, data_of
from gateway.views import Answer, Delta, FinishReason, Usage


class _Delta(Struct, gc=False):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct, gc=False):
    delta: _Delta
    finish_reason: str | None = None


class _Usage(Struct, gc=False):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None

    def ours(self) -> Usage:
        return Usage(self.prompt_tokens or 0, self.completion_tokens or 0)


class _Chunk(Struct, gc=False):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _Message(Struct):
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _AnswerChoice(Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(Struct):
    choices: list[_AnswerChoice]
    usage: _Usage | None = None


class _Model(Struct):
    id: str
    max_model_len: int | None = None


class _Models(Struct):
    data: list[_Model] | None


_chunks = msgspec.json.Decoder(_Chunk)
_answers = msgspec.json.Decoder(_Answer)
_model_lists = msgspec.json.Decoder(_Models)

_CONTENT = b'"delta":{"content":"'
_json_text = re.compile(rb'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt])*')
_is_json_text = _json_text.fullmatch

_FINISH: dict[str, FinishReason] = {"length": "length", "content_filter": "content_filter", "tool_calls": "tool_calls"}


def _finish(reason: str) -> FinishReason:
    """vLLM adds `abort` (its engine gave the request up) and `repetition` to OpenAI's reasons."""
    if reason == "abort":
        raise broken_off("aborted")
    return _FINISH.get(reason, "stop")


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class OpenAiReading(LineReading):
    """Reads `chat.completion.chunk` events. The end is `[DONE]`, or the body's end after a finish reason.

    Within one stream the events of plain content are equal but for the text. So the first of them is decoded and its bytes before and after
    the text kept; while pieces begin and end with these, and what lies between is nothing but JSON text, there is nothing to decode.
    """

    __slots__ = ("_after", "_before", "_between", "_finished", "_usage")

    def __init__(self) -> None:
        super().__init__()
        self._finished = False
        self._usage: _Usage | None = None
        self._before = b""
        self._after = b""
        self._between = b""

    def texts(self, piece: bytes) -> list[bytes] | None:
        before, after = self._before, self._after
        if not (before and piece.startswith(before) and piece.endswith(after)) or self._lines.held:
            return None
        inside = piece[len(before) : -len(after)]
        if _is_json_text(inside):
            texts = [inside]
        else:
            texts = inside.split(self._between)
            inside = b"".join(texts)
            if not _is_json_text(inside):
                return None
        return texts if inside.isascii() or _is_utf8(inside) else None

    def _learn(self, line: bytes) -> None:
        """`line` was decoded to content alone."""
        start = line.find(_CONTENT) + len(_CONTENT)
        text = _json_text.match(line, start)
        if text is not None and line.count(_CONTENT) == 1 and line.startswith(b'"', text.end()):
            self._before, self._after = line[:start], line[text.end() :] + b"\n\n"
            self._between = self._after + self._before

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        data = data_of(line)
        if data is None:
            return
        chunk = decode(_chunks, data)
        if chunk is None:
            if data.strip() == DONE:
                self._end(deltas)
                self.over = True
            else:
                self.malformed += 1
            return
        if chunk.error:
            raise broken_off("stream_error")
        if chunk.usage is not None:  # given last, once: a server may put it on every chunk
            self._usage = chunk.usage
        for choice in chunk.choices:
            delta = choice.delta
            finish = None if choice.finish_reason is None else _finish(choice.finish_reason)
            self._finished = self._finished or finish is not None
            content, reasoning = delta.content or "", delta.reasoning or delta.reasoning_content or ""
            if content or reasoning or finish:  # a role chunk is no piece: it may come long before the first token
                deltas.append(Delta(content, reasoning, finish))
            if content and not (self._before or reasoning or finish or chunk.usage) and len(chunk.choices) == 1:
                self._learn(line)

    def _end(self, deltas: list[Delta]) -> None:
        if not self._finished:
            raise broken_off("truncated")
        if self._usage is not None:
            deltas.append(Delta(usage=self._usage.ours()))


class _Turn(Struct, gc=False):
    role: str
    content: str | list[TextPart | ImagePart]


class Request(Struct, omit_defaults=True, kw_only=True):
    """What is sent; what has its default is left out."""

    model: str
    messages: list[_Turn]
    max_tokens: int | None = None
    stop: list[str] = []
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


_WITH_USAGE = StreamOptions(include_usage=True)


class OpenAi:
    """Kind `openai`: only fields that are OpenAI's own are sent."""

    chat_path = "/v1/chat/completions"
    models_path = "/v1/models"
    streams_only = False
    stream_type = b"text/event-stream"

    def render(self, chat: Chat, model: str, stream: bool) -> bytes:
        return msgspec.json.encode(self.request(chat, model, stream))

    def request(self, chat: Chat, model: str, stream: bool) -> Request:
        return Request(
            model=model,
            messages=[_message(message) for message in chat.messages],
            max_tokens=chat.token_limit,
            stop=chat.stops,
            temperature=chat.temperature,
            top_p=chat.top_p,
            seed=chat.seed,
            presence_penalty=chat.presence_penalty,
            frequency_penalty=chat.frequency_penalty,
            stream=stream,
            stream_options=_WITH_USAGE if stream else None,
        )

    def reading(self) -> OpenAiReading:
        return OpenAiReading()

    def parse_answer(self, body: bytes) -> Answer:
        parsed = decode(_answers, body)
        if parsed is None or not parsed.choices or parsed.choices[0].finish_reason is None:
            raise UpstreamError("malformed", "The model backend returned an invalid response.")
        choice = parsed.choices[0]
        message = choice.message
        assert choice.finish_reason is not None
        return Answer(
            message.content or "",
            message.reasoning or message.reasoning_content or "",
            _finish(choice.finish_reason),
            None if parsed.usage is None else parsed.usage.ours(),
        )

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return refusal(status, body)

    def canonical(self, name: str) -> str:
        return name

    def models(self, body: bytes) -> dict[str, int | None] | None:
        parsed = decode(_model_lists, body)
        return None if parsed is None else {model.id: model.max_model_len for model in parsed.data or ()}


def _message(message: Message) -> _Turn:
    """`developer` becomes `system`: some chat templates drop a role that they do not know. Parts that are all text become one text."""
    content = message.content
    if isinstance(content, list) and not message.images:
        content = message.text
    return _Turn("system" if message.role == "developer" else message.role, content or "")
