"""Anthropic's Messages API: answers, and `count_tokens`. Pure: no I/O, no clock.

Events and their order are those of API version 2023-06-01. A thought has an empty signature: the
gateway has no secret of Anthropic's to sign it with, and takes thoughts back with any signature.
"""

import re
from typing import ClassVar

import orjson
from msgspec import Struct, structs

from gateway.chat.answer import Answer, CallDelta, Delta, FinishReason, Usage
from gateway.chat.message import CalledFunction
from gateway.dialects.anthropic_request import parse_messages
from gateway.dialects.dialect import JSON_LINES, ChatCall, Clock, ErrorForm, FieldNames, renamed
from gateway.dialects.json_body import Steps, completed
from gateway.dialects.json_text import escaped, json_text
from gateway.dialects.long_answers import LongAnswers
from gateway.dialects.openai_chat import STREAM_LINES
from gateway.errors import ContextLengthExceeded, GatewayError

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

_STOP_REASONS: dict[FinishReason, bytes] = {
    "stop": b'"end_turn"',
    "length": b'"max_tokens"',
    "tool_calls": b'"tool_use"',
    "content_filter": b'"refusal"',
}


_FIELDS: FieldNames = (
    (re.compile(r"\btools\[(\d+)\]\.function\.parameters\b"), r"tools[\1].input_schema"),
    (re.compile(r"\btools\[(\d+)\]\.function\."), r"tools[\1]."),
    (re.compile(r"\bresponse_format\b(?:\.json_schema)?"), "output_config.format"),
    (re.compile(r"\breasoning_effort\b"), "thinking"),
)


class AnthropicErrors:
    """Anthropic's error object. A prompt that is too long has the words that coding agents look for."""

    __slots__ = ()

    json_lines: ClassVar[bytes] = JSON_LINES
    id_header: ClassVar[bytes] = b"request-id"

    def error_status(self, error: GatewayError) -> int:
        return error.status

    def error_lines(self, error: GatewayError) -> bytes:
        return error.header_lines()

    def error_body(self, error: GatewayError) -> bytes:
        kind = _ERROR_TYPES.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
        is_long = isinstance(error, ContextLengthExceeded)
        message = renamed(error.message, _FIELDS)
        if is_long:
            message = f"prompt is too long: {message}"
        return orjson.dumps({"type": "error", "error": {"type": kind, "message": message}})


def _stop_fields(finish: FinishReason | None, has_calls: bool, stop_sequence: str | None) -> bytes:
    """Return `stop_reason` and `stop_sequence`."""
    if stop_sequence is not None:
        return b'"stop_reason":"stop_sequence","stop_sequence":%b' % json_text(stop_sequence)
    reason = b'"tool_use"' if has_calls and finish == "stop" else _STOP_REASONS[finish or "stop"]
    return b'"stop_reason":%b,"stop_sequence":null' % reason


def _usage_json(usage: Usage | None) -> bytes:
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
    return (
        b'{"input_tokens":%d,"cache_creation_input_tokens":0,"cache_read_input_tokens":0,"output_tokens":%d}'
        % (prompt, completion)
    )  # fmt: skip


def _tool_id(id: str) -> str:
    return "toolu_" + id.removeprefix("call_")


def _event(name: bytes, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name, data)


_PING = _event(b"ping", b'{"type":"ping"}')


class MessageRenderer:
    """Renders deltas as events. Each run of thoughts, of text or of a call is a content block."""

    __slots__ = ("_block", "_finish", "_has_calls", "_id", "_index", "_model", "_stop_sequence", "_usage")

    def __init__(self, id: str, model: str) -> None:
        self._id = id
        self._model = model
        self._index = -1
        self._block: str | int | None = None
        """The open block: `text`, `thinking`, or the index of a call; None if none is open."""
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None
        self._has_calls = False
        self._stop_sequence: str | None = None

    @property
    def around_text(self) -> None:
        return None

    def splice(self, texts: list[bytes]) -> bytes:
        raise NotImplementedError

    def opening(self) -> bytes:
        message = (
            b'{"id":"msg_%b","type":"message","role":"assistant","model":%b,"content":[],'
            b'"stop_reason":null,"stop_sequence":null,"usage":%b}'
        ) % (self._id.encode(), json_text(self._model), _usage_json(None))
        return _event(b"message_start", b'{"type":"message_start","message":%b}' % message) + _PING

    def keepalive(self) -> bytes:
        return _PING

    def render(self, delta: Delta) -> bytes:
        parts: list[bytes] = []
        if delta.reasoning:
            parts.append(self._open("thinking", b'{"type":"thinking","thinking":"","signature":""}'))
            parts.append(self._piece(b"thinking_delta", b"thinking", delta.reasoning))
        if delta.content:
            parts.append(self._open("text", b'{"type":"text","text":""}'))
            parts.append(self._piece(b"text_delta", b"text", delta.content))
        parts += [self._call(call) for call in delta.calls or ()]
        self._finish = delta.finish or self._finish
        self._usage = delta.usage or self._usage
        self._stop_sequence = delta.stop_sequence or self._stop_sequence
        return b"".join(parts)

    def end(self, clock: Clock) -> bytes:
        delta = b'{"type":"message_delta","delta":{%b},"usage":%b}' % (
            _stop_fields(self._finish, self._has_calls, self._stop_sequence),
            _usage_json(self._usage),
        )
        empty = b"" if self._index >= 0 else self._open("text", b'{"type":"text","text":""}')
        return b"".join(
            (
                empty,
                self._close(),
                _event(b"message_delta", delta),
                _event(b"message_stop", b'{"type":"message_stop"}'),
            )
        )

    def end_steps(self, clock: Clock) -> None:
        return None

    def error(self, error: GatewayError) -> bytes:
        return _event(b"error", AnthropicErrors().error_body(error))

    def _call(self, call: CallDelta) -> bytes:
        self._has_calls = True
        opened = b""
        if self._block != call.index:
            block = b'{"type":"tool_use","id":%b,"name":%b,"input":{}}' % (
                json_text(_tool_id(call.id)),
                json_text(call.name),
            )
            opened = self._open(call.index, block)
        return opened + (self._piece(b"input_json_delta", b"partial_json", call.arguments) if call.arguments else b"")

    def _open(self, block: str | int, content_block: bytes) -> bytes:
        if self._block == block:
            return b""
        closed = self._close()
        self._block = block
        self._index += 1
        data = b'{"type":"content_block_start","index":%d,"content_block":%b}' % (self._index, content_block)
        return closed + _event(b"content_block_start", data)

    def _close(self) -> bytes:
        if self._block is None:
            return b""
        signature = b""
        if self._block == "thinking":
            signature = self._piece(b"signature_delta", b"signature", "")
        self._block = None
        return signature + _event(b"content_block_stop", b'{"type":"content_block_stop","index":%d}' % self._index)

    def _piece(self, kind: bytes, field: bytes, text: str) -> bytes:
        data = b'{"type":"content_block_delta","index":%d,"delta":{"type":"%b","%b":%b}}' % (
            self._index,
            kind,
            field,
            json_text(text),
        )
        return _event(b"content_block_delta", data)


class MessageForm(Struct, AnthropicErrors, LongAnswers, frozen=True, gc=False):
    """A `message` object, or a stream of events."""

    endpoint: ClassVar[str] = "messages"
    stream_lines: ClassVar[bytes] = STREAM_LINES

    model: str
    is_stream: bool

    def stream(self, id: str, created: int) -> MessageRenderer:
        return MessageRenderer(id, self.model)

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        blocks: list[bytes] = []
        if answer.reasoning:
            blocks.append(b'{"type":"thinking","thinking":%b,"signature":""}' % json_text(answer.reasoning))
        if answer.content or not (blocks or answer.calls):
            blocks.append(b'{"type":"text","text":%b}' % json_text(answer.content))
        for call in answer.calls:
            arguments = escaped(CalledFunction(call.name, call.arguments).whole_arguments)
            block = b'{"type":"tool_use","id":%b,"name":%b,"input":%b}'
            blocks.append(block % (json_text(_tool_id(call.id)), json_text(call.name), arguments))
        return (b'{"id":"msg_%b","type":"message","role":"assistant","model":%b,"content":[%b],%b,"usage":%b}') % (
            id.encode(),
            json_text(self.model),
            b",".join(blocks),
            _stop_fields(answer.finish, bool(answer.calls), answer.stop_sequence),
            _usage_json(answer.usage),
        )


class CountForm(MessageForm, frozen=True, gc=False):
    """The number of tokens of a prompt, as the engine that read it counts."""

    endpoint: ClassVar[str] = "count_tokens"

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        return b'{"input_tokens":%d}' % (answer.usage.prompt_tokens if answer.usage is not None else 0)


class AnthropicMessages:
    """`POST /v1/messages`."""

    endpoint = MessageForm.endpoint
    errors: ErrorForm = AnthropicErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        parsed = yield from parse_messages(body, max_text_body)
        chat = parsed.chat
        form = MessageForm(chat.model, bool(chat.stream))
        return ChatCall(chat, form, names_stop=bool(chat.stops), image_paths=parsed.image_paths), parsed.text_size


class AnthropicCountTokens:
    """`POST /v1/messages/count_tokens`.

    The engine counts: it reads the prompt and generates one token. What it read stays in its prefix
    cache for the request that follows.
    """

    endpoint = CountForm.endpoint
    errors: ErrorForm = AnthropicErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        parsed = yield from parse_messages(body, max_text_body, counts=True)
        chat = structs.replace(
            parsed.chat, stream=False, stream_options=None, max_tokens=1, response_format=None, tool_choice=None
        )
        return ChatCall(chat, CountForm(chat.model, False), image_paths=parsed.image_paths), parsed.text_size
