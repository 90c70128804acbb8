"""OpenAI's text completions: bytes to a `Completion`, an answer to bytes. Pure: no I/O, no clock.

The API is OpenAI's older one. Programs use it to measure servers, to complete code, and for models
without a chat template.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from gateway.chat.answer import Answer, ChosenLogprob, Delta, Usage
from gateway.chat.completion import MAX_COMPLETIONS, Completion, prompt_messages
from gateway.chat.request import (
    MAX_BIASES,
    MAX_CHOICES,
    MAX_STOP_IDS,
    MAX_TOKEN_ID,
    Penalty,
    PositiveInt,
    StreamOptions,
)
from gateway.dialects.choices import KeptChoice
from gateway.dialects.dialect import ChatCall, Clock, ErrorForm, OpenAiErrors
from gateway.dialects.json_body import LONG_BODY, Steps, completed, decode_fields, explain, has_too_many_members
from gateway.dialects.json_text import escaped, json_value
from gateway.dialects.long_answers import LongChoices, array_slices, logprob_runs
from gateway.dialects.openai_chat import STREAM_LINES, usage_json
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter

DEFAULT_TOKENS = 16
"""Token limit of a request that sets none, as at OpenAI and vLLM."""

Prompt = Annotated[str, Meta(min_length=1)]


class CompletionBody(Struct, frozen=True, kw_only=True):
    """Body of a request. The fields that a chat has too mean the same there."""

    model: Annotated[str, Meta(min_length=1)]
    prompt: Prompt | Annotated[list[Prompt], Meta(min_length=1, max_length=MAX_COMPLETIONS)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: PositiveInt | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Prompt | Annotated[list[Prompt], Meta(max_length=4)] | None = None
    stop_token_ids: (
        Annotated[list[Annotated[int, Meta(ge=0, le=MAX_TOKEN_ID)]], Meta(max_length=MAX_STOP_IDS)] | None
    ) = None
    ignore_eos: bool | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
    echo: bool | None = None
    suffix: str | None = None
    logit_bias: Annotated[dict[str, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=MAX_BIASES)] | None = None
    response_format: Any = None
    structured_outputs: Any = None
    guided_json: Any = None
    guided_choice: Any = None
    guided_regex: Any = None
    guided_grammar: Any = None
    prompt_embeds: Any = None
    prompt_logprobs: Any = None
    truncate_prompt_tokens: Any = None
    use_beam_search: bool | None = None


_REFUSED = (
    "response_format", "structured_outputs", "guided_json", "guided_choice", "guided_regex", "guided_grammar",
    "prompt_embeds", "prompt_logprobs", "truncate_prompt_tokens",
)  # fmt: skip
"""Fields that change the answer and are not followed here."""
_SHARED = (
    "model", "stream", "stream_options", "min_tokens", "temperature", "top_p", "top_k", "min_p", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "ignore_eos", "n", "logit_bias",
)  # fmt: skip
_decoder = msgspec.json.Decoder(CompletionBody)
_starts_with_numbers = re.compile(rb'"prompt"\s*:\s*\[\s*[\[0-9-]').search


def _decoded(body: bytes) -> Completion:
    try:
        asked = decode_fields(_decoder, body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    _check(asked)
    prompts = [asked.prompt] if isinstance(asked.prompt, str) else asked.prompt
    return Completion(
        messages=prompt_messages(prompts),
        max_tokens=DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens,
        logprobs=None if asked.logprobs is None else True,
        top_logprobs=asked.logprobs,
        echo=bool(asked.echo),
        **{name: getattr(asked, name) for name in _SHARED},
    )


def _check(asked: CompletionBody) -> None:
    """Refuse what no engine serves, or only one.

    Raises:
        UnsupportedParameter, InvalidRequest: see the messages.
    """
    for name in _REFUSED:
        if getattr(asked, name) is not None:
            raise _unsupported(name, "Leave it out, or send a chat.")
    if asked.suffix:
        raise _unsupported("suffix", "Write the text after the gap into the prompt, as the model expects it.")
    if asked.use_beam_search:
        raise _unsupported("use_beam_search", "Leave it out.")
    choices = asked.n or 1
    if asked.best_of is not None and asked.best_of != choices:
        raise _unsupported("best_of", "Leave it out: every completion is returned.")
    if asked.echo and asked.logprobs is not None:
        raise _unsupported("echo", "Together with 'logprobs', it needs log probabilities of the prompt.")
    if isinstance(asked.prompt, list) and len(asked.prompt) * choices > MAX_COMPLETIONS:
        raise InvalidRequest(
            f"'prompt' and 'n' ask for more than {MAX_COMPLETIONS} completions. Send fewer in one request.",
            param="prompt",
        )


def _unsupported(name: str, advice: str) -> UnsupportedParameter:
    return UnsupportedParameter(f"'{name}' is not supported by this gateway on any backend. {advice}", param=name)


def _token_numbers() -> UnsupportedParameter:
    return UnsupportedParameter(
        "'prompt' must be text: token numbers mean something else to each model.", param="prompt"
    )


def _explain(text: str) -> InvalidRequest:
    error = explain(text)
    if error.param is None or not error.param.startswith("prompt"):
        return error
    if error.param != "prompt" and ("got `int`" in text or "got `array`" in text):
        return _token_numbers()
    if "length" in text:
        return InvalidRequest(
            f"'prompt' must be a non-empty string, or a list of 1 to {MAX_COMPLETIONS} of them.", param=error.param
        )
    return error


# Answers


def _logprobs_json(logprobs: list[ChosenLogprob] | Raw | None, offset: int) -> bytes:
    """Render the log probabilities. `offset` is the number of characters of the tokens before."""
    if logprobs is None:
        return b"null"
    if isinstance(logprobs, Raw):
        return bytes(logprobs)
    return b'{"text_offset":%b,"token_logprobs":%b,"tokens":%b,"top_logprobs":%b}' % (
        _Offsets(offset).render(logprobs),
        _values_json(logprobs),
        _tokens_json(logprobs),
        _alternatives_json(logprobs),
    )


class _Offsets:
    """Renders the places of tokens in the text, run by run."""

    __slots__ = ("_next",)

    def __init__(self, first: int) -> None:
        self._next = first

    def render(self, logprobs: list[ChosenLogprob]) -> bytes:
        offsets = []
        for one in logprobs:
            offsets.append(self._next)
            self._next += len(one.token)
        return msgspec.json.encode(offsets)


def _values_json(logprobs: list[ChosenLogprob]) -> bytes:
    return msgspec.json.encode([one.logprob for one in logprobs])


def _tokens_json(logprobs: list[ChosenLogprob]) -> bytes:
    return json_value([one.token for one in logprobs])


def _alternatives_json(logprobs: list[ChosenLogprob]) -> bytes:
    """Render the alternatives. The chosen token is always among them, as at OpenAI and vLLM."""
    return json_value(
        [{one.token: one.logprob} | {other.token: other.logprob for other in one.top_logprobs} for one in logprobs]
    )


class CompletionRenderer:
    """Renders deltas as `text_completion` events."""

    __slots__ = (
        "_after", "_after_text", "_before_text", "_between_texts", "_head", "_index", "_offset", "_wants_usage",
    )  # fmt: skip

    def __init__(self, id: str, created: int, form: "TextForm", index: int = 0) -> None:
        self._wants_usage = form.wants_usage
        self._index = index
        self._offset = 0
        self._head = b'data: {"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,"choices":[' % (
            id.encode(),
            created,
            json_value(form.model),
        )
        self._before_text = self._head + b'{"index":%d,"text":"' % index
        self._after = b',"logprobs":null,"finish_reason":null}]' + self._tail()
        self._after_text = b'"' + self._after
        self._between_texts = self._after_text + self._before_text

    def _tail(self) -> bytes:
        return b',"usage":null}\n\n' if self._wants_usage else b"}\n\n"

    @property
    def around_text(self) -> tuple[bytes, bytes]:
        return self._before_text, self._after_text

    def opening(self) -> bytes:
        return b""

    def keepalive(self) -> bytes:
        """Return an event with an empty text."""
        return self._before_text + self._after_text

    def splice(self, texts: list[bytes]) -> bytes:
        return b"%b%b%b" % (self._before_text, self._between_texts.join(texts), self._after_text)

    def render(self, delta: Delta) -> bytes:
        parts = []
        if delta.is_piece or delta.finish is not None:
            text = msgspec.json.encode(delta.content)
            logprobs = _logprobs_json(delta.logprobs, self._offset)
            self._offset += sum(len(one.token) for one in delta.logprobs or ())
            finish = b"null" if delta.finish is None else b'"%b"' % delta.finish.encode()
            parts += [
                self._before_text[:-1],
                text if text.isascii() else escaped(text),
                b',"logprobs":%b,"finish_reason":%b}]' % (logprobs, finish),
                self._tail(),
            ]
        if delta.usage is not None and self._wants_usage:
            parts.append(self.usage(delta.usage))
        return b"".join(parts)

    def usage(self, usage: Usage) -> bytes:
        return b'%b],"usage":%b}\n\n' % (self._head, usage_json(usage))

    def end(self, clock: Clock) -> bytes:
        return b"data: [DONE]\n\n"

    def end_steps(self, clock: Clock) -> None:
        return None

    def error(self, error: GatewayError) -> bytes:
        return b"data: %b\n\n" % error.envelope()


class TextForm(Struct, OpenAiErrors, LongChoices, frozen=True, gc=False):
    """A `text_completion` object, or a stream of them."""

    endpoint: ClassVar[str] = "completions"
    stream_lines: ClassVar[bytes] = STREAM_LINES

    model: str
    is_stream: bool
    wants_usage: bool

    def stream(self, id: str, created: int) -> CompletionRenderer:
        return CompletionRenderer(id, created, self)

    def logprob_slices(self, logprobs: list[ChosenLogprob]) -> Iterator[bytes]:
        before = b"{"
        for name, render in (
            (b"text_offset", _Offsets(0).render),
            (b"token_logprobs", _values_json),
            (b"tokens", _tokens_json),
            (b"top_logprobs", _alternatives_json),
        ):
            yield b'%b"%b":' % (before, name)
            yield from array_slices(logprob_runs(logprobs), render)
            before = b","
        yield b"}"

    def answer(self, id: str, created: int, answer: Answer, clock: Clock) -> bytes:
        return self.choices_answer(id, created, [answer], answer.usage)

    def choice(self, index: int) -> "TextChoiceForm":
        return TextChoiceForm(self, index)

    def choices_answer(self, id: str, created: int, answers: Sequence[Answer | None], usage: Usage | None) -> bytes:
        choices = [
            b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":"%b"}'
            % (index, json_value(answer.content), _logprobs_json(answer.logprobs, 0), answer.finish.encode())
            for index, answer in enumerate(answers)
            if answer is not None
        ]
        return b'{"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,"choices":[%b],"usage":%b}' % (
            id.encode(),
            created,
            json_value(self.model),
            b",".join(choices),
            b"null" if usage is None else usage_json(usage),
        )

    def choices_end(self, id: str, created: int, usage: Usage | None) -> bytes:
        total = b"" if usage is None or not self.wants_usage else self.stream(id, created).usage(usage)
        return total + b"data: [DONE]\n\n"

    def choices_error(self, error: GatewayError) -> bytes:
        return b"data: %b\n\n" % error.envelope() if self.is_stream else error.envelope()


class TextChoiceForm(KeptChoice):
    """The form of one of several completions of a `TextForm`."""

    endpoint: ClassVar[str] = TextForm.endpoint
    stream_lines: ClassVar[bytes] = STREAM_LINES

    __slots__ = ("_form",)

    def __init__(self, form: TextForm, index: int) -> None:
        super().__init__(index)
        self._form = form

    @property
    def is_stream(self) -> bool:
        return self._form.is_stream

    def stream(self, id: str, created: int) -> "TextChoiceRenderer":
        return TextChoiceRenderer(self, id, created, self._form, self._index)


class TextChoiceRenderer(CompletionRenderer):
    """Renders the deltas of one completion. The usage and the end are those of the whole stream."""

    __slots__ = ("_choice",)

    def __init__(self, choice: TextChoiceForm, id: str, created: int, form: TextForm, index: int) -> None:
        super().__init__(id, created, form, index)
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


class OpenAiCompletions:
    """`POST /v1/completions`."""

    endpoint = TextForm.endpoint
    errors: ErrorForm = OpenAiErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int) -> tuple[ChatCall, int]:
        return completed(self.parse_steps(body, max_text_body))

    def parse_steps(self, body: bytes, max_text_body: int) -> Steps[tuple[ChatCall, int]]:
        if len(body) > max_text_body:
            raise RequestTooLarge(f"A request may have at most {max_text_body} bytes.")
        if len(body) > LONG_BODY and (yield from has_too_many_members(body)):
            raise (
                _token_numbers()
                if _starts_with_numbers(body)
                else RequestTooLarge("The request has too many JSON values or escapes.")
            )
        try:
            orjson.loads(body)  # msgspec skips fields that are not in its types without checking them
        except orjson.JSONDecodeError:
            raise InvalidJson("The body is not valid JSON.") from None
        yield
        chat = _decoded(body)
        return ChatCall(chat, TextForm(chat.model, bool(chat.stream), chat.wants_usage)), len(body)
