"""OpenAI's chat completions: bytes to a `Chat`, an answer to bytes. Pure: no I/O, no clock.

The result does not depend on the backend. A stream always consists of a role chunk, deltas, one
chunk with the finish reason, the usage if requested, and `[DONE]`.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import orjson
from msgspec import Meta, Raw, Struct, structs

from gateway.chat.answer import Answer, CallDelta, ChosenLogprob, Delta, ReasoningField, Usage
from gateway.chat.checks import check
from gateway.chat.request import (
    MAX_BIASES,
    MAX_MESSAGES,
    MAX_TOOLS,
    RARE_FIELDS,
    Chat,
    Message,
    StreamOptions,
)
from gateway.dialects.choices import KeptChoice
from gateway.dialects.dialect import ChatCall, ChatForm, Clock, ErrorForm, OpenAiErrors
from gateway.dialects.json_body import (
    LONG_BODY,
    Steps,
    completed,
    decode_fields,
    decode_in_steps,
    explain,
    has_too_many_members,
    without_images,
)
from gateway.dialects.json_text import escaped, json_value
from gateway.dialects.long_answers import LongChoices
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge

STREAM_LINES = b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
"""Header lines of an answer as server-sent events."""

_encode_plain = msgspec.json.encode
_decoder = msgspec.json.Decoder(Chat)

_JSON_ERRORS = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_MANY_BYTES = 2048
"""Size from which a body is decoded in one pass, if it can be. A second pass over a shorter one costs less
than to find out."""
_MAX_DECODED = 1024 * 1024
_MAX_SEARCHED = 8 * 1024 * 1024
_MAX_MEMBERS = 400_000
"""Maximum size and number of members of a text that is decoded for a better error."""


class _Lengths(Struct):
    """The fields that may be too long, which is told without decoding their members."""

    messages: Annotated[list[Raw], Meta(max_length=MAX_MESSAGES)] | None = None
    tools: Annotated[list[Raw], Meta(max_length=MAX_TOOLS)] | None = None
    logit_bias: Raw = Raw(b"")


_lengths = msgspec.json.Decoder(_Lengths)


# msgspec skips what it does not know without checking it. These types have nothing to skip.


class _KnownMessage(Message, frozen=True, forbid_unknown_fields=True):
    pass


class _KnownStreamOptions(StreamOptions, frozen=True, forbid_unknown_fields=True):
    pass


class _KnownChat(Chat, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request with nothing but known fields, at least outside its rare ones and the parts of messages.

    Beside those of a `Chat` they are fields of OpenAI's API that do not concern an engine.
    """

    messages: Annotated[list[_KnownMessage], Meta(min_length=1, max_length=MAX_MESSAGES)]  # type: ignore[assignment]  # frozen
    stream_options: _KnownStreamOptions | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    verbosity: str | None = None


_known_decoder = msgspec.json.Decoder(_KnownChat)


def parse(body: bytes, max_text_body: int) -> Chat:
    """Parse the request in `body`: `check_text`, `decode` and `check` in one call.

    Raises:
        RequestTooLarge, InvalidJson, InvalidRequest, UnsupportedParameter: see those functions.
    """
    check_text(body, max_text_body)
    chat = decode(body, max_text_body)
    check(chat)
    return chat


def check_text(body: bytes, max_text_body: int) -> int:
    """Check everything but the images, and return its size in bytes.

    msgspec skips fields that are not in its types without checking them: their numbers and text may
    be invalid JSON.

    Raises:
        RequestTooLarge: more than `max_text_body` bytes, or too many members.
        InvalidJson: the body is not JSON.
    """
    if len(body) > LONG_BODY:
        return completed(check_long_text(body, max_text_body))
    text = body if len(body) <= max_text_body else completed(_checked_text(body, max_text_body))
    _load(text)
    return len(text)


def _load(text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        raise InvalidJson("The body is not valid JSON.") from None


def check_long_text(body: bytes, max_text_body: int) -> Steps[int]:
    """Check a long body in steps, to the same result as `check_text`."""
    text = body if len(body) <= max_text_body else (yield from _checked_text(body, max_text_body))
    if len(text) > LONG_BODY and (yield from has_too_many_members(text)):
        raise _too_many_members(text, max_text_body)
    _load(text)
    return len(text)


def _checked_text(body: bytes, max_text_body: int) -> Steps[bytes]:
    """Return the body without its images, if it is short enough."""
    text = yield from without_images(body)
    if len(text) > max_text_body:
        raise _too_large(max_text_body)
    return text


def _too_many_members(text: bytes, max_text_body: int) -> GatewayError:
    """Return the error for a text with too many members, a better one if there is one.

    Decoding creates no objects for unknown fields.
    """
    try:
        if len(text) <= _MAX_DECODED:
            decode(text, max_text_body)
        elif len(text) <= _MAX_SEARCHED and text.count(b",") <= _MAX_MEMBERS:
            found = _lengths.decode(text)
            if bytes(found.logit_bias).count(b",") >= MAX_BIASES:
                return InvalidRequest(
                    f"Invalid value for 'logit_bias'. Expected an object of length <= {MAX_BIASES}.", param="logit_bias"
                )
    except GatewayError as error:
        return error
    except msgspec.ValidationError as error:
        return explain(str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return InvalidJson("The body is not valid JSON.")
    return RequestTooLarge("The request has too many JSON values or escapes.")


def decode(body: bytes, max_text_body: int) -> Chat:
    """Decode the request in a body that `check_text` has accepted.

    Raises:
        RequestTooLarge: text in the body looked like images.
        InvalidJson: the body is not a JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its path.
        UnsupportedParameter: the request uses a variant that the gateway does not support.
    """
    try:
        chat = _decoder.decode(body)
    except _JSON_ERRORS:
        chat = _decode_odd(body)
    return chat if len(body) <= max_text_body else _with_text_limit(chat, max_text_body)


def _decode_checked(body: bytes) -> Chat:
    """Do what `check_text` and `decode` do."""
    fields = _load(body)
    try:
        chat = _decoder.decode(body)
    except _JSON_ERRORS:
        chat = _decode_odd(body)
    if RARE_FIELDS.isdisjoint(fields):
        chat.__dict__["is_plain"] = True  # here it is known without a look at each of the fields
    return chat


def _decode_known(body: bytes) -> Chat:
    """Do the same in one pass, if the body has nothing but known and common fields."""
    try:
        chat = _known_decoder.decode(body)
    except _JSON_ERRORS:
        return _decode_checked(body)
    if not (chat.is_plain and chat.has_plain_messages):
        _load(body)  # msgspec may have skipped fields inside others
    return chat


def _decode_odd(body: bytes) -> Chat:
    """Decode a body that `_decoder` refuses, if integers with a fraction are the only reason."""
    try:
        return decode_fields(_decoder, body)
    except _JSON_ERRORS as error:
        raise _json_error(error) from None


def _decode_in_steps(body: bytes, max_text_body: int) -> Steps[Chat]:
    """Decode a long body in steps, to the same result as `decode`."""
    try:
        chat = yield from decode_in_steps(_decoder, body)
    except _JSON_ERRORS as error:
        raise _json_error(error) from None
    return chat if len(body) <= max_text_body else _with_text_limit(chat, max_text_body)


def _json_error(error: Exception) -> GatewayError:
    if isinstance(error, msgspec.ValidationError):
        return explain(str(error))
    is_deep = isinstance(error, RecursionError)
    return InvalidJson("The body is nested too deeply." if is_deep else "The body is not valid JSON.")


def _with_text_limit(chat: Chat, max_text_body: int) -> Chat:
    if sum(len(message.text) for message in chat.messages) > max_text_body:
        raise _too_large(max_text_body)
    return chat


def _too_large(max_text_body: int) -> RequestTooLarge:
    return RequestTooLarge(f"A request may have at most {max_text_body} bytes, not counting its images.")


# Answers


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
        text_size = len(body)
        if text_size > LONG_BODY or text_size > max_text_body:
            text_size = check_text(body, max_text_body)
            chat = decode(body, max_text_body)
        else:
            chat = _decode_known(body) if text_size > _MANY_BYTES else _decode_checked(body)
        form = CompletionForm(chat.model, chat.stream is True, chat.stream_options is not None and chat.wants_usage)
        return ChatCall(chat, form), text_size

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        text_size = yield from check_long_text(body, max_text_body)
        yield
        chat = yield from _decode_in_steps(body, max_text_body)
        return ChatCall(chat, CompletionForm(chat.model, bool(chat.stream), chat.wants_usage)), text_size
