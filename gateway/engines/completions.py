"""Text completions per engine: rendering without a chat template, and reading the answers. Pure."""

from typing import Any, Protocol

import msgspec
from msgspec import Raw, Struct

from gateway.chat.answer import MAX_TEXT, ChosenLogprob, Delta, TokenLogprob
from gateway.chat.completion import Completion
from gateway.chat.request import Chat
from gateway.engines.engine import (
    FEW_MEMBERS,
    MAX_REFUSAL,
    ModelFacts,
    ResponseReader,
    broken_off,
    check_members,
    decode,
    is_error,
    unreadable,
)
from gateway.engines.engine_reason import engine_reason
from gateway.engines.error_mapping import client_error, message_of
from gateway.engines.lines import DONE, data_of
from gateway.engines.ollama import LineEnd, OllamaReader
from gateway.engines.ollama_request import OllamaRequest, escaped_placeholders
from gateway.engines.openai import OpenAi, OpenAiRequest
from gateway.engines.openai_response import NO_ERROR, NO_USAGE, OpenAiReader, finish_reason, usage_of
from gateway.errors import ContextLengthExceeded, GatewayError, UpstreamError


class Completer(Protocol):
    """Text completions part of an engine. The methods are those of `Engine`."""

    path: str
    """Path below the server's prefix."""
    streams_only: bool
    stream_type: bytes

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes: ...

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None: ...

    def reader(self, chat: Chat | None = None) -> ResponseReader: ...

    def parse_answer(self, body: bytes) -> Delta: ...

    def client_error(self, status: int, body: bytes) -> GatewayError: ...


# OpenAI's API

MAX_LOGPROB_VALUES = 60_000
"""Maximum number of commas in a plain answer or an event. Each token with log probabilities has three."""
MAX_DECODED_LOGPROBS = 12_000
"""Maximum number of tokens and alternatives in a plain answer or an event. All of them become objects."""


class _Logprobs(Struct, gc=False):
    """Log probabilities of a text completion. llama.cpp sends those of a chat, in `content`."""

    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[ChosenLogprob] | None = None


class _Choice(Struct, gc=False):
    text: str | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Body(Struct, gc=False):
    """An event of a stream, or a plain answer."""

    choices: list[_Choice] | None = []
    usage: Raw = NO_USAGE
    error: Raw = NO_ERROR


_bodies = msgspec.json.Decoder(_Body)

_NOT_SENT = frozenset(
    {
        "messages", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format",
        "reasoning_effort", "chat_template_kwargs", "continue_final_message", "add_generation_prompt",
        "mm_processor_kwargs", "structured_outputs", "max_tokens",
    }
)  # fmt: skip
"""Fields of a chat that a completion lacks, or has in another form."""


class OpenAiCompleter:
    """Text completions of kinds `vllm` and `openai`: `/v1/completions`.

    See vllm/entrypoints/openai/completion/protocol.py, 0.32.
    """

    path = "/v1/completions"
    streams_only = False
    stream_type = b"text/event-stream"

    def __init__(self, engine: OpenAi) -> None:
        self._engine = engine
        self._known_texts: set[bytes] = set()

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        """Render the request with the engine's own sampling parameters.

        `max_tokens` is always sent: servers take 16 without it, and the rest of the context for null.
        """
        assert isinstance(chat, Completion)
        request = self._engine.request(chat, model, facts, stream)
        fields: dict[str, Any] = {"prompt": chat.prompt, "max_tokens": request.max_tokens}
        if chat.logprobs:
            fields["logprobs"] = request.top_logprobs if chat.top_logprobs is None else chat.top_logprobs
        defaults = OpenAiRequest(model="", messages=[])
        for name in OpenAiRequest.__struct_fields__:
            value = getattr(request, name)
            if name not in _NOT_SENT and value != getattr(defaults, name):
                fields[name] = value
        return msgspec.json.encode(fields)

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None:
        """Return a request without the token limit: it may not fit next to the prompt."""
        if isinstance(error, ContextLengthExceeded) and chat.token_limit is not None:
            return msgspec.structs.replace(chat, max_tokens=None, max_completion_tokens=None, min_tokens=None)
        return None

    def reader(self, chat: Chat | None = None) -> "CompletionReader":
        return CompletionReader(self._known_texts)

    def parse_answer(self, body: bytes) -> Delta:
        if len(body) > FEW_MEMBERS:
            check_members(body, MAX_LOGPROB_VALUES)
        parsed = decode(_bodies, body)
        if parsed is None or not parsed.choices or parsed.choices[0].finish_reason is None:
            raise UpstreamError("malformed", "The model backend returned an invalid response.")
        choice = parsed.choices[0]
        text, reason = choice.text or "", choice.finish_reason
        if len(text) > MAX_TEXT or reason is None:
            raise UpstreamError("too_large")
        return Delta(text, "", finish_reason(reason), usage_of(parsed.usage), None, _chosen(choice.logprobs))

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return client_error(status, body)


class CompletionReader(OpenAiReader):
    """Reader of `text_completion` events, with the fast path of `OpenAiReader`."""

    __slots__ = ()
    before_text = b'"text":"'

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        data = data_of(line)
        if data is None:
            if line.startswith(b"{"):  # an event without `data:`, such as an error
                raise unreadable()
            return
        if len(data) > FEW_MEMBERS:
            check_members(data, MAX_LOGPROB_VALUES)
        event = None if data == DONE else decode(_bodies, data)
        if event is None:
            if data.strip() == DONE:
                self._end(deltas)
                self.done = True
            elif data.strip():
                raise unreadable()
            return
        if event.error is not NO_ERROR and is_error(event.error):
            raise broken_off("stream_error", engine_reason(message_of(data[:MAX_REFUSAL])))
        usage = None if event.usage is NO_USAGE else usage_of(event.usage)
        if usage is not None:  # reported last and once, since a server may send it on every event
            self._usage = usage
        for choice in event.choices or ():
            finish = None if choice.finish_reason is None else finish_reason(choice.finish_reason)
            self._finished = self._finished or finish is not None
            logprobs = _chosen(choice.logprobs)
            if choice.text or finish or logprobs:
                deltas.append(Delta(choice.text or "", "", finish, None, None, logprobs))
            if choice.text and not (self._before or finish or logprobs or usage):
                self._learn_frame(line)


def _chosen(logprobs: _Logprobs | None) -> list[ChosenLogprob] | None:
    if logprobs is None or logprobs.tokens is None:
        return None if logprobs is None else logprobs.content
    values, alternatives = logprobs.token_logprobs or [], logprobs.top_logprobs or []
    if len(logprobs.tokens) + sum(len(found) for found in alternatives if found) > MAX_DECODED_LOGPROBS:
        raise UpstreamError("too_large")
    return [
        ChosenLogprob(
            token,
            (values[index] if index < len(values) else None) or 0.0,
            None,
            _alternatives(alternatives[index] if index < len(alternatives) else None),
        )
        for index, token in enumerate(logprobs.tokens)
    ]


def _alternatives(found: dict[str, float] | None) -> list[TokenLogprob]:
    return [TokenLogprob(token, value) for token, value in (found or {}).items()]


# Ollama's API


class _Line(LineEnd, gc=False):
    response: str = ""
    thinking: str = ""


_lines = msgspec.json.Decoder(_Line)


class OllamaPrompt(OllamaRequest):
    """Renders one request for `/api/generate` (api/types.go GenerateRequest, 0.24 to 0.33).

    `raw` sends the prompt without a template. Unless thinking is off, Ollama looks for thoughts in
    the answer of a model that can think (server/routes.go GenerateHandler).
    """

    def render(self) -> bytes:
        chat = self._chat
        assert isinstance(chat, Completion)
        has_vision = not self._facts.lacks("vision")
        fields: dict[str, Any] = {
            "model": self._model,
            "prompt": escaped_placeholders(chat.prompt) if has_vision else chat.prompt,
            "raw": True,
            "stream": True,
            "options": self._options(),
        }
        optional = self._common() | {"think": None if self._facts.lacks("thinking") else False}
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})


class OllamaCompleter:
    """Text completions of kind `ollama`: `/api/generate`, always as a stream.

    Ollama's own `/v1/completions` puts the chat template round the prompt.
    """

    path = "/api/generate"
    streams_only = True
    stream_type = b"application/x-ndjson"

    def __init__(
        self, keep_alive: str | float | None = None, num_ctx: int | None = None, truncate: bool = False
    ) -> None:
        self._keep_alive = keep_alive
        self._num_ctx = num_ctx
        self._truncate = truncate

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        return OllamaPrompt(chat, model, facts, self._num_ctx, self._keep_alive, self._truncate).render()

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None:
        return None

    def reader(self, chat: Chat | None = None) -> "GenerateReader":
        return GenerateReader()

    def parse_answer(self, body: bytes) -> Delta:
        raise AssertionError("Ollama is always asked to stream")

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return client_error(status, body)


class GenerateReader(OllamaReader):
    """Reader of `/api/generate` lines."""

    __slots__ = ()

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        parsed = decode(_lines, line)
        if parsed is None:
            raise unreadable()
        self._check_error(parsed, line)
        text = parsed.thinking + parsed.response
        if text or parsed.logprobs:
            self._count(text)
            deltas.append(Delta(text, "", None, None, None, parsed.logprobs))
        if parsed.done:
            self._close(parsed, deltas)
