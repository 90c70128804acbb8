"""Ollama's own API: answers of `/api/chat` and `/api/generate`. Pure: no I/O, no clock.

Field names and their order are those of Ollama 0.33 (api/types.go): a client cannot tell which
engine serves. Token ids (`context`) are left out, because vLLM does not report them.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import ClassVar

import orjson
from msgspec import Raw, Struct, structs

from gateway.chat.answer import (
    Answer,
    Assembler,
    CallDelta,
    ChosenLogprob,
    Delta,
    FinishReason,
    TimedUsage,
    Timings,
    Usage,
)
from gateway.chat.message import CalledFunction
from gateway.dialects.dialect import ChatCall, Clock, ErrorForm, FieldNames, renamed
from gateway.dialects.json_body import Steps, completed
from gateway.dialects.json_text import escaped, json_text, json_value
from gateway.dialects.long_answers import LongAnswers, array_slices, logprob_runs
from gateway.dialects.ollama_request import ParsedRequest, parse_chat, parse_generate
from gateway.errors import GatewayError, ModelNotFound

STREAM_LINES = b"content-type: application/x-ndjson\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
JSON_LINES = b"content-type: application/json; charset=utf-8\r\n"

MAX_NAME = 256
"""Characters of a model's name that an error repeats."""

_CHAT_FIELDS: FieldNames = (
    (re.compile(r"\.content\[(\d+)\]\.image_url\.url"), r".images[\1]"),
    (re.compile(r"response_format\.json_schema\.schema"), "format"),
)
_GENERATE_FIELDS: FieldNames = (*_CHAT_FIELDS, (re.compile(r"messages\[\d+\]\.images"), "images"))


def ollama_message(error: GatewayError, fields: FieldNames = _CHAT_FIELDS) -> str:
    """Return the message of an error. Clients look for the words `not found`."""
    message = renamed(error.message, fields)
    if isinstance(error, ModelNotFound) and error.model is not None:
        return f"model '{error.model[:MAX_NAME]}' not found. {message}"
    return message


class OllamaErrors:
    """Ollama's error object: `{"error": "…"}`, with the status of the error."""

    __slots__ = ()

    json_lines: ClassVar[bytes] = JSON_LINES
    id_header: ClassVar[bytes] = b""
    fields: ClassVar[FieldNames] = _CHAT_FIELDS

    def error_status(self, error: GatewayError) -> int:
        return error.status

    def error_lines(self, error: GatewayError) -> bytes:
        return error.header_lines()

    def error_body(self, error: GatewayError) -> bytes:
        return json_value({"error": ollama_message(error, self.fields)})


class GenerateErrors(OllamaErrors):
    """The errors of `/api/generate`, whose images are not in a message."""

    __slots__ = ()

    fields = _GENERATE_FIELDS


class _Shape(Struct, frozen=True):
    """The form of one request: how `/api/chat` or `/api/generate` writes the text of the model."""

    model: str
    created_at: bytes

    @property
    def head(self) -> bytes:
        return b'{"model":%b,"created_at":"%b",' % (json_text(self.model), self.created_at)

    def text_head(self) -> bytes:
        """Return what precedes a plain text and its opening quote."""
        raise NotImplementedError

    def text_tail(self) -> bytes:
        """Return what follows a plain text and its closing quote."""
        raise NotImplementedError

    def said(self, content: str, reasoning: str, calls: bytes) -> bytes:
        """Return the fields with the output of the model. `calls` is a JSON array, or empty."""
        raise NotImplementedError

    def late(self, calls: bytes) -> bytes:
        """Return the fields that follow the metrics."""
        return b""


class _ChatShape(_Shape, frozen=True):
    def text_head(self) -> bytes:
        return self.head + b'"message":{"role":"assistant","content":'

    def text_tail(self) -> bytes:
        return b'},"done":false}\n'

    def said(self, content: str, reasoning: str, calls: bytes) -> bytes:
        thinking = b',"thinking":' + json_text(reasoning) if reasoning else b""
        tools = b',"tool_calls":' + calls if calls else b""
        return b'"message":{"role":"assistant","content":%b%b%b}' % (json_text(content), thinking, tools)


class _GenerateShape(_Shape, frozen=True):
    def text_head(self) -> bytes:
        return self.head + b'"response":'

    def text_tail(self) -> bytes:
        return b',"done":false}\n'

    def said(self, content: str, reasoning: str, calls: bytes) -> bytes:
        thinking = b',"thinking":' + json_text(reasoning) if reasoning else b""
        return b'"response":%b%b' % (json_text(content), thinking)

    def late(self, calls: bytes) -> bytes:
        return b',"tool_calls":' + calls if calls else b""


def timestamp(seconds: float) -> bytes:
    """Return a Unix time in RFC 3339, in UTC, as Go writes it."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z").encode()


def _metrics(usage: Usage | None, times: Timings) -> bytes:
    """Return the counts, and the durations in nanoseconds. Counts of zero are left out, as Ollama does.

    The durations are the engine's own if it reports them. They are never zero, since clients divide
    by them, and their sum is not above the total.
    """
    prompt, completion = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (0, 0)
    load, prompt_time, completion_time = times.load, times.prompt, times.completion
    if isinstance(usage, TimedUsage) and usage.completion_seconds:
        load += usage.load_seconds
        prompt_time, completion_time = usage.prompt_seconds, usage.completion_seconds
    elif not completion_time:  # the answer came in one piece, most of it the time of its tokens
        prompt_time, completion_time = 0.0, prompt_time
    parts = [max(int(seconds * 1e9), 1) for seconds in (load, prompt_time, completion_time)]
    values = (
        ("total_duration", max(int(times.total * 1e9), sum(parts))),
        ("load_duration", parts[0]),
        ("prompt_eval_count", prompt),
        ("prompt_eval_duration", parts[1]),
        ("eval_count", completion),
        ("eval_duration", parts[2]),
    )
    return b"".join([b',"%b":%d' % (name.encode(), value) for name, value in values if value > 0])


def _done(finish: FinishReason | None) -> bytes:
    return b'"done":true,"done_reason":"%b"' % (b"length" if finish == "length" else b"stop")


class _Token(Struct, frozen=True, omit_defaults=True, gc=False):
    """Log probability of a token. Ollama leaves out what is empty."""

    token: str
    logprob: float
    bytes: list[int] = []


class _ChosenToken(_Token, frozen=True, omit_defaults=True, gc=False):
    top_logprobs: list[_Token] = []


def _logprobs(logprobs: list[ChosenLogprob] | Raw | None) -> bytes:
    if not logprobs:
        return b""
    return b',"logprobs":' + (bytes(logprobs) if isinstance(logprobs, Raw) else _logprobs_json(logprobs))


def _logprobs_json(logprobs: list[ChosenLogprob]) -> bytes:
    tokens = [
        _ChosenToken(
            chosen.token,
            chosen.logprob,
            chosen.bytes or [],
            [_Token(each.token, each.logprob, each.bytes or []) for each in chosen.top_logprobs],
        )
        for chosen in logprobs
    ]
    return json_value(tokens)


def _calls(calls: list[CallDelta], finish: FinishReason | None) -> bytes:
    """Render whole tool calls, with their arguments as objects. A call that was cut off is left out."""
    rendered: list[bytes] = []
    for call in calls:
        if finish == "length" and not _isjson_text(call.arguments):
            continue
        # JSON has no line ends within strings, so a line end can only be between values.
        arguments = CalledFunction(call.name, call.arguments).whole_arguments.replace(b"\n", b" ").replace(b"\r", b" ")
        function = b'{"index":%d,"name":%b,"arguments":%b}' % (len(rendered), json_text(call.name), escaped(arguments))
        rendered.append(b'{"id":%b,"function":%b}' % (json_text(call.id), function))
    return b"[" + b",".join(rendered) + b"]" if rendered else b""


def _isjson_text(text: str) -> bool:
    try:
        orjson.loads(text)
    except orjson.JSONDecodeError:
        return False
    return True


class LineRenderer:
    """Renders deltas as lines of JSON. The last line has the counts, so it waits for the usage."""

    __slots__ = ("_after", "_before", "_between", "_calls", "_created", "_finish", "_shape", "_usage")

    def __init__(self, shape: _Shape, created: int) -> None:
        self._shape = shape
        self._created = created
        self._before = shape.text_head() + b'"'
        self._after = b'"' + shape.text_tail()
        self._between = self._after + self._before
        self._calls = Assembler()
        self._finish: FinishReason | None = None
        self._usage: Usage | None = None

    @property
    def around_text(self) -> tuple[bytes, bytes]:
        return self._before, self._after

    def splice(self, texts: list[bytes]) -> bytes:
        return b"%b%b%b" % (self._before, self._between.join(texts), self._after)

    def opening(self) -> bytes:
        return b""

    def keepalive(self) -> bytes:
        return self._before + self._after

    def render(self, delta: Delta) -> bytes:
        self._usage = delta.usage or self._usage
        for piece in delta.calls or ():
            self._calls.add_call(piece)
        if delta.calls:
            self._calls.check_size()
        line = b""
        if delta.content or delta.reasoning or delta.logprobs:
            said = self._shape.said(delta.content, delta.reasoning, b"")
            line = b'%b%b,"done":false%b}\n' % (self._shape.head, said, _logprobs(delta.logprobs))
        if delta.finish is not None:
            self._finish = delta.finish
            calls = _calls(self._calls.calls(), delta.finish)
            if calls:
                said, late = self._shape.said("", "", calls), self._shape.late(calls)
                line += b'%b%b,"done":false%b}\n' % (self._shape.head, said, late)
        return line

    def end(self, clock: Clock) -> bytes:
        times = clock()
        shape = structs.replace(self._shape, created_at=timestamp(self._created + times.total))
        said = shape.said("", "", b"")
        return b"%b%b,%b%b}\n" % (shape.head, said, _done(self._finish), _metrics(self._usage, times))

    def end_steps(self, clock: Clock) -> None:
        return None

    def error(self, error: GatewayError) -> bytes:
        return json_value({"error": ollama_message(error)}) + b"\n"


class LineForm(Struct, OllamaErrors, LongAnswers, frozen=True, gc=False):
    """The form of a request of `/api/chat`: lines of JSON, or one object."""

    endpoint: ClassVar[str] = "ollama_chat"
    stream_lines: ClassVar[bytes] = STREAM_LINES
    shape: ClassVar[type[_Shape]] = _ChatShape

    model: str
    is_stream: bool

    def stream(self, id: str, created: int) -> LineRenderer:
        return LineRenderer(self.shape(self.model, timestamp(created)), created)

    def logprob_slices(self, logprobs: list[ChosenLogprob]) -> Iterator[bytes]:
        yield from array_slices(logprob_runs(logprobs), _logprobs_json)

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        times = clock()
        shape = self.shape(self.model, timestamp(created + times.total))
        calls = _calls(answer.calls, answer.finish)
        late = shape.late(calls)
        metrics = _metrics(answer.usage, times)
        said = shape.said(answer.content, answer.reasoning, calls)
        return b"%b%b,%b%b%b%b}" % (shape.head, said, _done(answer.finish), _logprobs(answer.logprobs), metrics, late)


class GenerateForm(LineForm, frozen=True, gc=False):
    """The form of a request of `/api/generate`."""

    endpoint: ClassVar[str] = "ollama_generate"
    shape: ClassVar[type[_Shape]] = _GenerateShape
    fields: ClassVar[FieldNames] = _GENERATE_FIELDS


class LoadForm(LineForm, frozen=True, gc=False, kw_only=True):
    """The form of a request without content, which loads the model or asks to unload it."""

    unloads: bool

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        shape = self.shape(self.model, timestamp(created + clock().total))
        reason = b"unload" if self.unloads else b"load"
        return b'%b%b,"done":true,"done_reason":"%b"}' % (shape.head, shape.said("", "", b""), reason)


class GenerateLoadForm(LoadForm, frozen=True, gc=False, kw_only=True):
    endpoint: ClassVar[str] = "ollama_generate"
    shape: ClassVar[type[_Shape]] = _GenerateShape
    fields: ClassVar[FieldNames] = _GENERATE_FIELDS


class OllamaChat:
    """`POST /api/chat`. Bodies need no media type, as at Ollama."""

    endpoint = LineForm.endpoint
    errors: ErrorForm = OllamaErrors()
    needs_media_type = False

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        parsed = yield from parse_chat(body, max_text_body)
        return _call(parsed, LineForm, LoadForm), parsed.text_size


class OllamaGenerate:
    """`POST /api/generate`."""

    endpoint = GenerateForm.endpoint
    errors: ErrorForm = GenerateErrors()
    needs_media_type = False

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        parsed = yield from parse_generate(body, max_text_body)
        return _call(parsed, GenerateForm, GenerateLoadForm), parsed.text_size


def _call(parsed: ParsedRequest, form: type[LineForm], load_form: type[LoadForm]) -> ChatCall:
    chat = parsed.chat
    if chat.messages:
        return ChatCall(chat, form(chat.model, bool(chat.stream)))
    return ChatCall(chat, load_form(chat.model, False, unloads=parsed.unloads), "unload" if parsed.unloads else "load")
