"""Kind `ollama`: `/api/chat`, always as a stream of NDJSON (docs/adr/0003).

Ollama's own `/v1` swallows errors in mid-stream, makes two turns of a text with an image and ignores `max_completion_tokens`.
"""

from collections.abc import Iterable
from typing import Any

import msgspec
from msgspec import Struct

from gateway.chat.answer import CallDelta, ChosenLogprob, Delta, FinishReason, Usage
from gateway.chat.request import Chat
from gateway.engines.engine import Ask, LineReader, LoadedUntil, ModelFacts, Models, broken_off, decode
from gateway.engines.error_mapping import client_error
from gateway.engines.ollama_loading import OllamaLoading, canonical, loaded
from gateway.engines.ollama_request import OllamaRequest
from gateway.errors import GatewayError, UnsupportedParameter, UpstreamError

REPETITION = 30
"""Ollama 0.24 and 0.33 end a stream, without a last line, after more than this many equal pieces (llm/llama_server.go)."""


class _Function(Struct, gc=False):
    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class _Call(Struct, gc=False):
    function: _Function


class _Said(Struct, gc=False):
    content: str = ""
    thinking: str = ""
    tool_calls: list[_Call] | None = None


class _Line(Struct, gc=False):
    message: _Said | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int = 0
    eval_count: int = 0
    logprobs: list[ChosenLogprob] | None = None
    error: Any = None


class _Model(Struct):
    name: str
    digest: str = ""
    context_length: int | None = None
    """In the list of what is loaded, `/api/ps`: what it was loaded with."""


class _Models(Struct):
    models: list[_Model] | None


class _Shown(Struct):
    capabilities: list[str] | None = None
    model_info: dict[str, Any] = {}

    @property
    def trained_length(self) -> int | None:
        """The longest context that the model could have, under a key with the name of its architecture."""
        found = next((value for name, value in self.model_info.items() if name.endswith(".context_length")), None)
        return found if isinstance(found, int) else None


_lines = msgspec.json.Decoder(_Line)
_model_lists = msgspec.json.Decoder(_Models)
_shown = msgspec.json.Decoder(_Shown)


class OllamaReader(LineReader):
    """Reads the lines of `/api/chat`. The end is `done: true`; only a repetition stop may do without."""

    __slots__ = ("_calls", "_last", "_pieces", "_run")

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._run = 0
        self._pieces = 0
        self._calls = 0

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        read = decode(_lines, line)
        if read is None:
            self.malformed += 1
            return
        if read.error:
            fault = client_error(500, line)
            raise broken_off("stream_error") if isinstance(fault, UpstreamError) else fault
        said = read.message
        if said is not None and (said.content or said.thinking or said.tool_calls or read.logprobs):
            self._count(said.content or said.thinking)
            calls = None if said.tool_calls is None else self._whole_calls(said.tool_calls)
            deltas.append(Delta(said.content, said.thinking, None, None, calls, read.logprobs))
        if read.done:
            self.done = True
            finish: FinishReason = "length" if read.done_reason == "length" else "stop"
            deltas.append(Delta(finish=finish))
            deltas.append(Delta(usage=Usage(read.prompt_eval_count, read.eval_count)))

    def _whole_calls(self, calls: list[_Call]) -> list[CallDelta]:
        """Ollama gives a call whole, its arguments as an object; the indices of its parsers may begin anew with each line."""
        first = self._calls
        self._calls += len(calls)
        return [
            CallDelta(index, "", call.function.name, bytes(call.function.arguments).decode("utf-8", "replace"))
            for index, call in enumerate(calls, first)
        ]

    def _count(self, text: str) -> None:
        self._pieces += 1
        text = text.strip()
        if text == self._last:
            self._run += 1
        else:
            self._last, self._run = text, 1

    def _end(self, deltas: list[Delta]) -> None:
        if self._run < REPETITION:
            raise broken_off("truncated")
        self.done = True
        deltas.append(Delta(finish="stop"))
        deltas.append(Delta(usage=Usage(0, self._pieces)))


class Ollama:
    """`keep_alive`, `num_ctx` and `truncate` are the operator's; a `num_ctx` that differs from the loaded one makes Ollama reload."""

    chat_path = "/api/chat"
    models_path = "/api/tags"
    health_path: str | None = None
    streams_only = True
    stream_type = b"application/x-ndjson"

    def __init__(
        self, keep_alive: str | float | None = None, num_ctx: int | None = None, truncate: bool = False
    ) -> None:
        self._keep_alive = keep_alive
        self._num_ctx = num_ctx
        self._truncate = truncate

    def render(self, chat: Chat, model: str, facts: ModelFacts, stream: bool) -> bytes:
        return OllamaRequest(chat, model, facts, self._num_ctx, self._keep_alive, self._truncate).render()

    def relaxed(self, chat: Chat, refusal: GatewayError) -> Chat | None:
        """A wish to think is dropped for a model that cannot, as other engines drop it."""
        if (
            isinstance(refusal, UnsupportedParameter)
            and refusal.param == "reasoning_effort"
            and chat.effort is not None
        ):
            return msgspec.structs.replace(
                chat, reasoning_effort=None, reasoning=None, think=None, chat_template_kwargs=None
            )
        return None

    def reader(self) -> OllamaReader:
        return OllamaReader()

    def parse_answer(self, body: bytes) -> Delta:
        raise AssertionError("Ollama is always asked to stream")

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return client_error(status, body)

    def canonical(self, name: str) -> str:
        return canonical(name)

    def models(self, body: bytes) -> Models | None:
        """Under the full name, and without `:latest`, as both are taken. The capabilities that 0.33 lists here leave out `vision` and
        `thinking`."""
        parsed = decode(_model_lists, body)
        if parsed is None:
            return None
        found: Models = {}
        for model in parsed.models or ():
            found[model.name] = found[model.name.removesuffix(":latest")] = ModelFacts(digest=model.digest)
        return found

    async def probe_models(self, models: Models, before: Models, wanted: Iterable[str], ask: Ask) -> LoadedUntil | None:
        """What a model can do and the longest context it could have (`/api/show`, once), and the context that it is loaded with (`/api/ps`;
        kept when it is unloaded)."""
        shown = await ask("GET", OllamaLoading.path, None) or b""
        running = decode(_model_lists, shown)
        lengths = {canonical(model.name): model.context_length for model in (running and running.models) or ()}
        known_before = {canonical(name): facts for name, facts in before.items()}
        for name in wanted:
            wanted_name = canonical(name)
            listed = [other for other in models if canonical(other) == wanted_name]
            if not listed:
                continue
            facts, known = models[listed[0]], known_before.get(wanted_name, ModelFacts())
            capabilities = known.capabilities if known.digest == facts.digest else None
            length = known.context_length
            if capabilities is None:
                told = (
                    decode(_shown, await ask("POST", "/api/show", msgspec.json.encode({"model": name})) or b"")
                    or _Shown()
                )
                capabilities = None if told.capabilities is None else frozenset(told.capabilities)
                length = told.trained_length
            length = lengths.get(wanted_name) or self._num_ctx or length
            models.update(dict.fromkeys(listed, ModelFacts(length, capabilities, facts.digest)))
        return loaded(shown)
