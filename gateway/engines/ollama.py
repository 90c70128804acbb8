"""Kind `ollama`: `/api/chat`, always as an NDJSON stream (docs/adr/0003).

Ollama's own `/v1` swallows errors in mid-stream, splits a text with an image into two messages, and
ignores `max_completion_tokens`.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from gateway.chat.answer import CallDelta, ChosenLogprob, Delta, FinishReason, TimedUsage, Usage
from gateway.chat.constraints import ChoiceFormat, RegexFormat
from gateway.chat.request import THINKING_FIELDS, Chat
from gateway.chat.surrogates import without_halves
from gateway.engines.engine import (
    MAX_REFUSAL,
    STOP_TOKEN_IDS,
    Ask,
    LineReader,
    LoadedUntil,
    ModelFacts,
    Models,
    broken_off,
    decode,
    is_error,
    possible_tokens,
    token_count,
    unreadable,
    unsupported,
)
from gateway.engines.error_mapping import client_error
from gateway.engines.json_text import JsonTextReader
from gateway.engines.ollama_loading import OllamaLoading, canonical, loaded
from gateway.engines.ollama_request import OllamaRequest, grammar
from gateway.errors import GatewayError, UnsupportedParameter, UpstreamError

REPETITION = 30
"""Limit of equal pieces in a row.

After more than this, Ollama 0.24 and 0.33 end the stream without a last line (llm/llama_server.go).
"""


MAX_DURATION = 10**15
"""Nanoseconds. No answer takes so long."""


class _Function(Struct, gc=False):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _Call(Struct, gc=False):
    function: _Function


class _Message(Struct, gc=False):
    content: str = ""
    thinking: str = ""
    tool_calls: list[_Call] | None = None


_ZERO = msgspec.Raw(b"0")
_NO_ERROR = msgspec.Raw(b"null")


MAX_ASKED = 16
"""Maximum number of models that no setting names and whose details are asked for in one probe."""
MAX_UNANSWERED = 4
"""Number of failed questions about such models after which a probe asks no more, since each may take seconds."""


class LineEnd(Struct, gc=False):
    """Fields that the lines of all answers have."""

    done: bool = False
    done_reason: str | None = None
    load_duration: msgspec.Raw = _ZERO
    prompt_eval_count: msgspec.Raw = _ZERO
    prompt_eval_duration: msgspec.Raw = _ZERO
    eval_count: msgspec.Raw = _ZERO
    eval_duration: msgspec.Raw = _ZERO
    logprobs: list[ChosenLogprob] | None = None
    error: msgspec.Raw = _NO_ERROR


class _Line(LineEnd, gc=False):
    message: _Message | None = None


class _Model(Struct):
    name: str
    digest: str = ""
    context_length: Any = None
    """Context length that the model was loaded with. Only present in `/api/ps`."""


class _Models(Struct):
    models: list[_Model] | None


class _ModelDetails(Struct):
    capabilities: list[str] | None = None
    model_info: dict[str, Any] = {}

    @property
    def trained_length(self) -> int | None:
        """Maximum context length of the model. Its key contains the name of the architecture."""
        found = next((value for name, value in self.model_info.items() if name.endswith(".context_length")), None)
        return possible_tokens(found)


_lines = msgspec.json.Decoder(_Line)
_durations = msgspec.json.Decoder(int)
_model_lists = msgspec.json.Decoder(_Models)
_model_details = msgspec.json.Decoder(_ModelDetails)


class OllamaReader(LineReader):
    """Reader of `/api/chat` lines. The end is `done: true`; only a repetition stop lacks it."""

    __slots__ = ("_calls", "_json_text", "_last", "_may_think", "_pieces", "_repeats")

    def __init__(self, json_text: JsonTextReader | None = None, is_thinking_off: bool = False) -> None:
        """`json_text` reads the answer out of the JSON string that a grammar forces."""
        super().__init__()
        self._json_text = json_text
        self._may_think: bool | None = None if is_thinking_off else True
        """False if the answer arrives as thinking: see `chat/normalizer.py`. None until it is known."""
        self._last = ""
        self._repeats = 0
        self._pieces = 0
        self._calls = 0

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        parsed = decode(_lines, line)
        if parsed is None:
            raise unreadable()
        if parsed.error is not _NO_ERROR:
            self._check_error(parsed, line)
        message = parsed.message
        if message is not None and (message.content or message.thinking or message.tool_calls or parsed.logprobs):
            self._count(message.content or message.thinking)
            calls = None if message.tool_calls is None else self._whole_calls(message.tool_calls)
            content, thinking = message.content, message.thinking
            if self._json_text is not None:
                content, thinking = self._plain(content, thinking, self._json_text)
            if content or thinking or calls or parsed.logprobs:
                deltas.append(Delta(content, thinking, None, None, calls, parsed.logprobs))
        if parsed.done:
            self._close(parsed, deltas)

    def _check_error(self, line: LineEnd, text: bytes) -> None:
        if is_error(line.error):
            fault = client_error(500, text[:MAX_REFUSAL])
            raise broken_off("stream_error", fault.engine_reason) if isinstance(fault, UpstreamError) else fault

    def _close(self, line: LineEnd, deltas: list[Delta]) -> None:
        self.done = True
        finish: FinishReason = "length" if line.done_reason == "length" else "stop"
        deltas.append(Delta(finish=finish))
        deltas.append(Delta(usage=_usage(line)))

    def _plain(self, content: str, thinking: str, json_text: JsonTextReader) -> tuple[str, str]:
        """Return content and thinking, with the text of the JSON string as the content."""
        if self._may_think is None and (beginning := (thinking or content).lstrip()):
            self._may_think = not (thinking and beginning.startswith('"'))
        if self._may_think is False:
            content, thinking = thinking + content, ""
        return json_text.feed(content), thinking

    def _whole_calls(self, calls: list[_Call]) -> list[CallDelta]:
        """Convert Ollama's calls, each complete, with its arguments as an object.

        Some of Ollama's parsers restart the indices with every line, so they are numbered here.
        """
        first = self._calls
        self._calls += len(calls)
        return [
            CallDelta(index, "", call.function.name, _json_text(call.function.arguments))
            for index, call in enumerate(calls, first)
        ]

    def _count(self, text: str) -> None:
        self._pieces += 1
        text = text.strip()
        if text == self._last:
            self._repeats += 1
        else:
            self._last, self._repeats = text, 1

    def _end(self, deltas: list[Delta]) -> None:
        if self._repeats < REPETITION:
            raise broken_off("truncated")
        self.done = True
        deltas.append(Delta(finish="stop"))
        deltas.append(Delta(usage=Usage(0, self._pieces)))


def _usage(last: LineEnd) -> Usage:
    """Return the counts of the last line, and its durations, which are in nanoseconds, if it has any."""
    prompt, completion = token_count(last.prompt_eval_count), token_count(last.eval_count)
    times = [_seconds(each) for each in (last.load_duration, last.prompt_eval_duration, last.eval_duration)]
    return TimedUsage(prompt, completion, *times) if any(times) else Usage(prompt, completion)


def _seconds(nanoseconds: msgspec.Raw) -> float:
    """Return a duration in seconds, 0 if it is anything but a possible one."""
    value = decode(_durations, nanoseconds)
    return value / 1e9 if value is not None and 0 < value < MAX_DURATION else 0.0


def _json_text(json: msgspec.Raw) -> str:
    return without_halves(bytes(json)).decode("utf-8", "replace")


class Ollama:
    """Engine `ollama`. The operator sets `keep_alive`, `num_ctx` and `truncate`.

    A `num_ctx` other than the loaded one makes Ollama reload the model.
    """

    chat_path = "/api/chat"
    models_path = "/api/tags"
    health_path: str | None = None
    metrics_path: str | None = None
    streams_only = True
    names_stop = False
    max_stops: int | None = None
    stream_type = b"application/x-ndjson"

    def __init__(
        self, keep_alive: str | float | None = None, num_ctx: int | None = None, truncate: bool = False
    ) -> None:
        self._keep_alive = keep_alive
        self._num_ctx = num_ctx
        self._truncate = truncate

    def check(self, chat: Chat) -> None:
        if chat.stop_token_ids:
            raise unsupported(*STOP_TOKEN_IDS)
        grammar(chat)

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        return OllamaRequest(chat, model, facts, self._num_ctx, self._keep_alive, self._truncate).render()

    def relaxed(self, chat: Chat, error: GatewayError) -> Chat | None:
        """Drop the thinking parameters for a model that does not support them, as other engines do."""
        if isinstance(error, UnsupportedParameter) and error.param == "reasoning_effort" and chat.effort is not None:
            return msgspec.structs.replace(chat, **dict.fromkeys(THINKING_FIELDS))
        return None

    def reader(self, chat: Chat | None = None) -> OllamaReader:
        if chat is not None and isinstance(chat.output_format, ChoiceFormat | RegexFormat) and not chat.forced:
            return OllamaReader(JsonTextReader(), chat.effort == "none")
        return OllamaReader()

    def parse_answer(self, body: bytes) -> Delta:
        raise AssertionError("Ollama is always asked to stream")

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return client_error(status, body)

    def canonical(self, name: str) -> str:
        return canonical(name)

    def models(self, body: bytes) -> Models | None:
        """Return the models under their full names and also without `:latest`; Ollama accepts both.

        The capabilities in this list (0.33) are ignored: they lack `vision` and `thinking`.
        """
        parsed = decode(_model_lists, body)
        if parsed is None:
            return None
        found: Models = {}
        for model in parsed.models or ():
            found[model.name] = found[model.name.removesuffix(":latest")] = ModelFacts(digest=model.digest)
        return found

    async def probe_models(
        self, models: Models, before: Models, wanted: Iterable[str], ask: Ask, others: Iterable[str] = ()
    ) -> LoadedUntil | None:
        """Probe capabilities and context length of the wanted models, and of some others.

        `/api/show`, asked once per digest, has the capabilities and the maximum context. `/api/ps`
        has the context that the model is loaded with, which is remembered after the model is
        unloaded.
        """
        running_body = await ask("GET", OllamaLoading.path, None) or b""
        running = decode(_model_lists, running_body)
        lengths = {
            canonical(model.name): possible_tokens(model.context_length) for model in (running and running.models) or ()
        }
        listed: dict[str, list[str]] = {}
        for name in models:
            listed.setdefault(canonical(name), []).append(name)
        asked = 0
        named = {canonical(name): name for name in wanted}
        found = dict.fromkeys(name for name in (*named, *map(canonical, others)) if name in listed)
        for name in found:
            facts, known = models[listed[name][0]], before.get(listed[name][0], ModelFacts())
            if known.digest != facts.digest:
                known = ModelFacts()
            capabilities, length = known.capabilities, known.context_length
            if capabilities is None and (name in named or asked < MAX_ASKED):
                question = msgspec.json.encode({"model": named.get(name, listed[name][0])})
                answer = await ask("POST", "/api/show", question)
                if name not in named:
                    asked += 1 if answer is not None else MAX_ASKED // MAX_UNANSWERED
                details = decode(_model_details, answer or b"") or _ModelDetails()
                capabilities = None if details.capabilities is None else frozenset(details.capabilities)
                length = details.trained_length
            length = lengths.get(name) or self._num_ctx or length
            models.update(dict.fromkeys(listed[name], ModelFacts(length, capabilities, facts.digest)))
        return loaded(running_body)
