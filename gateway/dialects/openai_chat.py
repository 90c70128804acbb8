"""OpenAI's chat completions: an answer to bytes, plain or as a stream. Pure: no I/O, no clock.

The result does not depend on the backend. A stream always consists of a role chunk, deltas, one
chunk with the finish reason, the usage if requested, and `[DONE]`.
"""

from collections.abc import Sequence
from typing import ClassVar

import msgspec
from msgspec import Raw, Struct, structs

from gateway.chat.answer import Answer, CallDelta, ChosenLogprob, Delta, ReasoningField, Usage
from gateway.dialects.choices import KeptChoice
from gateway.dialects.dialect import ChatCall, ChatForm, Clock, ErrorForm, OpenAiErrors
from gateway.dialects.json_body import Steps
from gateway.dialects.json_text import escaped, json_value
from gateway.dialects.long_answers import LongChoices
from gateway.dialects.openai_chat_request import check_long_text, decode_long, read
from gateway.errors import GatewayError

STREAM_LINES = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
"""Header lines of an answer as server-sent events."""

_encode_plain = msgspec.json.encode

_USAGE = b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}'


def usage_json(usage: Usage) -> bytes:
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return _USAGE % (prompt, completion, prompt + completion)


def _reasoning_json(reasoning: str, field: ReasoningField) -> bytes:
    """Render the reasoning under the names that the operator chose.

    Ollama and vLLM from 0.16 on say `reasoning`, vLLM before 0.12 and DeepSeek `reasoning_content`.
    """
    text = json_value(reasoning)
    if field == "both":
        return b'"reasoning":%b,"reasoning_content":%b' % (text, text)
    return b'"%b":%b' % (field.encode(), text)


def _logprobs_json(logprobs: list[ChosenLogprob] | Raw) -> bytes:
    return b'{"content":%b,"refusal":null}' % json_value(logprobs)


def _call_json(call: CallDelta, prefix: bytes) -> bytes:
    """Render the first piece of a call or all of it. `prefix` precedes the id."""
    function = b'{"name":%b,"arguments":%b}' % (json_value(call.name), json_value(call.arguments))
    return b'{%b"id":"%b","type":"function","function":%b}' % (prefix, call.id.encode(), function)


def _call_delta_json(call: CallDelta) -> bytes:
    prefix = b'"index":%d,' % call.index
    if call.id:
        return _call_json(call, prefix)
    return b'{%b"function":{"arguments":%b}}' % (prefix, json_value(call.arguments))


class StreamRenderer:
    """Renders deltas as `chat.completion.chunk` events."""

    __slots__ = (
        "_after", "_after_text", "_before", "_before_text", "_between_texts", "_head", "_reasoning_field",
        "_wants_usage",
    )  # fmt: skip

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        wants_usage: bool,
        reasoning_field: ReasoningField = "reasoning",
        index: int = 0,
    ) -> None:
        self._wants_usage = wants_usage
        self._reasoning_field = reasoning_field
        self._head = b'data: {"id":"%b","object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
            id.encode(),
            created,
            json_value(model),
        )
        self._before = self._head + b'{"index":%d,"delta":' % index
        self._after = b',"logprobs":null,"finish_reason":null}]' + self._tail()
        self._after_text = b'"}' + self._after
        self._before_text = self._before + b'{"content":"'
        self._between_texts = b'"}' + self._after + self._before_text

    def _tail(self) -> bytes:
        return b',"usage":null}\n\n' if self._wants_usage else b"}\n\n"

    def opening(self) -> bytes:
        """Return the role chunk."""
        return self._before + b'{"role":"assistant","content":""}' + self._after

    def keepalive(self) -> bytes:
        """Return a chunk without content, so that proxies and clients keep waiting.

        Comments would break openai-go before 3.43 and Dify's parser.
        """
        return self._before + b"{}" + self._after

    def render(self, delta: Delta) -> bytes:
        if (
            delta.finish is None
            and delta.usage is None
            and not delta.reasoning
            and delta.calls is None
            and delta.logprobs is None
        ):
            if not delta.content:
                return b""
            text = _encode_plain(delta.content)  # inlined `json_value`
            if not text.isascii():
                text = escaped(text)
            return b"".join((self._before, b'{"content":', text, b"}", self._after))
        return self._render_rare(delta)

    @property
    def around_text(self) -> tuple[bytes, bytes]:
        """Return the bytes before and after a text in a chunk.

        The text is the content of a JSON string.
        """
        return self._before_text, self._after_text

    def splice(self, texts: list[bytes]) -> bytes:
        """Return a chunk for each of `texts`, the contents of JSON strings."""
        return b'%b%b"}%b' % (self._before_text, self._between_texts.join(texts), self._after)

    def _render_rare(self, delta: Delta) -> bytes:
        parts = []
        fields = []
        if delta.reasoning:
            fields.append(_reasoning_json(delta.reasoning, self._reasoning_field))
        if delta.content:
            fields.append(b'"content":' + json_value(delta.content))
        if fields or delta.logprobs:
            logprobs = b"null" if delta.logprobs is None else _logprobs_json(delta.logprobs)
            middle = b',"logprobs":%b,"finish_reason":null}]' % logprobs
            parts += [self._before, b"{", b",".join(fields), b"}", middle, self._tail()]
        for call in delta.calls or ():
            parts += [self._before, b'{"tool_calls":[', _call_delta_json(call), b"]}", self._after]
        if delta.finish is not None:
            parts += [self._before, b'{},"logprobs":null,"finish_reason":"%b"}]' % delta.finish.encode(), self._tail()]
        if delta.usage is not None and self._wants_usage:
            parts += [self._head, b'],"usage":', usage_json(delta.usage), b"}\n\n"]
        return b"".join(parts)

    def end(self, clock: Clock) -> bytes:
        return b"data: [DONE]\n\n"

    def end_steps(self, clock: Clock) -> None:
        return None

    def error(self, error: GatewayError) -> bytes:
        return b"data: %b\n\n" % error.envelope()


_COMPLETION = b'{"id":"chatcmpl-%%b","object":"chat.completion","created":%%d,"model":%%b,"choices":[%b],"usage":%b}'
_CHOICE = (
    b'{"index":%b,"message":{"role":"assistant","content":%%b,"refusal":null%b},"logprobs":%b,"finish_reason":"%%b"}'
)
_ANY_COMPLETION = _COMPLETION % (b"%b", b"%b")
_ANY_CHOICE = _CHOICE % (b"%d", b"%b", b"%b")
_TEXT_COMPLETION = _COMPLETION % (_CHOICE % (b"0", b"", b"null"), _USAGE)
"""An answer that is one text, as almost all are, in one step."""


class CompletionForm(Struct, OpenAiErrors, LongChoices, frozen=True, gc=False):
    """A `chat.completion` object, or a stream of `chat.completion.chunk` events."""

    endpoint: ClassVar[str] = "chat"
    shows_arguments_as_text: ClassVar[bool] = True
    stream_lines: ClassVar[bytes] = STREAM_LINES

    model: str
    is_stream: bool
    wants_usage: bool
    reasoning_field: ReasoningField = "reasoning"

    def stream(self, id: str, created: int) -> StreamRenderer:
        return StreamRenderer("chatcmpl-" + id, created, self.model, self.wants_usage, self.reasoning_field)

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        usage = answer.usage
        if usage is None or answer.reasoning or answer.calls or answer.logprobs is not None:
            choice = _choice_json(0, answer, self.reasoning_field)
            counts = b"null" if usage is None else usage_json(usage)
            return _ANY_COMPLETION % (id.encode(), created, json_value(self.model), choice, counts)
        prompt, completion = usage.prompt_tokens, usage.completion_tokens
        json = _TEXT_COMPLETION % (
            id.encode(),
            created,
            _encode_plain(self.model),
            _encode_plain(answer.content),
            answer.finish.encode(),
            prompt,
            completion,
            prompt + completion,
        )
        return json if json.isascii() else escaped(json)

    def choice(self, index: int) -> "ChoiceForm":
        return ChoiceForm(self, index)

    def choices_answer(self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None) -> bytes:
        choices = [
            _choice_json(index, answer, self.reasoning_field)
            for index, answer in enumerate(answers)
            if answer is not None
        ]
        counts = b"null" if usage is None else usage_json(usage)
        return _ANY_COMPLETION % (id.encode(), created, json_value(self.model), b",".join(choices), counts)

    def choices_end(self, id: str, created: int, usage: Usage | None) -> bytes:
        renderer = StreamRenderer("chatcmpl-" + id, created, self.model, self.wants_usage)
        return renderer.render(Delta(usage=usage)) + b"data: [DONE]\n\n"

    def choices_error(self, error: GatewayError) -> bytes:
        return b"data: %b\n\n" % error.envelope() if self.is_stream else error.envelope()


def _choice_json(index: int, answer: Answer, reasoning_field: ReasoningField) -> bytes:
    content = b"null" if answer.calls and not answer.content else json_value(answer.content)
    rest = b""
    if answer.reasoning:
        rest = b"," + _reasoning_json(answer.reasoning, reasoning_field)
    if answer.calls:
        rest += b',"tool_calls":[%b]' % b",".join([_call_json(call, b"") for call in answer.calls])
    logprobs = b"null" if answer.logprobs is None else _logprobs_json(answer.logprobs)
    return _ANY_CHOICE % (index, content, rest, logprobs, answer.finish.encode())


class ChoiceForm(KeptChoice):
    """The form of one of several choices of a `CompletionForm`."""

    endpoint: ClassVar[str] = CompletionForm.endpoint
    stream_lines: ClassVar[bytes] = STREAM_LINES

    __slots__ = ("_form",)

    def __init__(self, form: CompletionForm, index: int) -> None:
        super().__init__(index)
        self._form = form

    @property
    def is_stream(self) -> bool:
        return self._form.is_stream

    def stream(self, id: str, created: int) -> "ChoiceRenderer":
        return ChoiceRenderer(self, self._form, "chatcmpl-" + id, created, self._index)


class ChoiceRenderer(StreamRenderer):
    """Renders the deltas of one choice. The usage and the end are those of the whole stream."""

    __slots__ = ("_choice",)

    def __init__(self, choice: ChoiceForm, form: CompletionForm, id: str, created: int, index: int) -> None:
        super().__init__(id, created, form.model, form.wants_usage, form.reasoning_field, index)
        self._choice = choice

    def render(self, delta: Delta) -> bytes:
        if delta.usage is not None:
            self._choice.usage, delta.usage = delta.usage, None
        return super().render(delta)

    def end(self, clock: Clock) -> bytes:
        self._choice.is_complete = True
        return b""

    def error(self, error: GatewayError) -> bytes:
        self._choice.error = error
        return b""


def with_reasoning_field(form: ChatForm, field: ReasoningField) -> ChatForm:
    """Return `form` with the reasoning in `field`, if it is a form of chat completions."""
    return structs.replace(form, reasoning_field=field) if isinstance(form, CompletionForm) else form


class OpenAiChat:
    """`POST /v1/chat/completions`."""

    endpoint = CompletionForm.endpoint
    errors: ErrorForm = OpenAiErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        chat, text_size = read(body, max_text_body)
        form = CompletionForm(chat.model, chat.stream is True, chat.stream_options is not None and chat.wants_usage)
        return ChatCall(chat, form), text_size

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        text_size = yield from check_long_text(body, max_text_body)
        yield
        chat = yield from decode_long(body, max_text_body)
        return ChatCall(chat, CompletionForm(chat.model, bool(chat.stream), chat.wants_usage)), text_size
