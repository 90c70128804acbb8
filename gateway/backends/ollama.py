"""Kind `ollama`: `/api/chat`, always as a stream of NDJSON (docs/adr/0003).

Ollama's own `/v1` swallows errors in mid-stream, makes two turns of a text with an image and ignores `max_completion_tokens`.
"""

from typing import Any

import msgspec
from msgspec import Struct

from gateway.backends.base import LineReading, broken_off, decode
from gateway.backends.refusals import refusal
from gateway.errors import GatewayError, UpstreamError
from gateway.protocol import Chat, Message
from gateway.views import Answer, Delta, FinishReason, Usage

REPETITION = 30
"""Ollama 0.24 and 0.33 end a stream, without a last line, after more than this many equal pieces (llm/llama_server.go)."""


class _Said(Struct, gc=False):
    content: str = ""
    thinking: str = ""


class _Line(Struct, gc=False):
    message: _Said | None = None
    done: bool = False
    done_reason: str | None = None
    prompt_eval_count: int = 0
    eval_count: int = 0
    error: Any = None


class _Details(Struct):
    context_length: int | None = None


class _Model(Struct):
    name: str
    details: _Details | None = None


class _Models(Struct):
    models: list[_Model] | None


_lines = msgspec.json.Decoder(_Line)
_model_lists = msgspec.json.Decoder(_Models)


class OllamaReading(LineReading):
    """Reads the lines of `/api/chat`. The end is `done: true`; only a repetition stop may do without."""

    __slots__ = ("_last", "_pieces", "_run")

    def __init__(self) -> None:
        super().__init__()
        self._last = ""
        self._run = 0
        self._pieces = 0

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        read = decode(_lines, line)
        if read is None:
            self.malformed += 1
            return
        if read.error:
            fault = refusal(500, line)
            raise broken_off("stream_error") if isinstance(fault, UpstreamError) else fault
        said = read.message
        if said is not None and (said.content or said.thinking):
            self._count(said.content or said.thinking)
            deltas.append(Delta(said.content, said.thinking))
        if read.done:
            self.over = True
            finish: FinishReason = "length" if read.done_reason == "length" else "stop"
            deltas.append(Delta(finish=finish))
            deltas.append(Delta(usage=Usage(read.prompt_eval_count, read.eval_count)))

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
        self.over = True
        deltas.append(Delta(finish="stop"))
        deltas.append(Delta(usage=Usage(0, self._pieces)))


class Ollama:
    """`keep_alive`, `num_ctx` and `truncate` are the operator's; a `num_ctx` that differs from the loaded one makes Ollama reload."""

    chat_path = "/api/chat"
    models_path = "/api/tags"
    streams_only = True
    stream_type = b"application/x-ndjson"

    def __init__(self, keep_alive: str | float | None = None, num_ctx: int | None = None, truncate: bool = False) -> None:
        self._keep_alive = keep_alive
        self._num_ctx = num_ctx
        self._truncate = truncate

    def render(self, chat: Chat, model: str, stream: bool) -> bytes:
        options = {
            "num_predict": chat.token_limit,
            "num_ctx": self._num_ctx,
            "temperature": chat.temperature,
            "top_p": chat.top_p,
            "top_k": chat.top_k,
            "min_p": chat.min_p,
            "seed": chat.seed,
            "presence_penalty": chat.presence_penalty,
            "frequency_penalty": chat.frequency_penalty,
            "repeat_penalty": chat.repetition_penalty,
            "stop": chat.stops or None,
        }
        fields: dict[str, object] = {"model": model, "messages": [_message(message) for message in chat.messages], "stream": True}
        fields["options"] = {name: value for name, value in options.items() if value is not None}
        if self._keep_alive is not None:
            fields["keep_alive"] = self._keep_alive
        if not self._truncate:
            fields["truncate"] = False
        return msgspec.json.encode(fields)

    def reading(self) -> OllamaReading:
        return OllamaReading()

    def parse_answer(self, body: bytes) -> Answer:
        raise AssertionError("Ollama is always asked to stream")

    def refusal(self, status: int, body: bytes) -> GatewayError:
        return refusal(status, body)

    def canonical(self, name: str) -> str:
        """Ollama takes any case, and leaves out its own registry, the namespace `library` and the tag `latest` (types/model/name.go)."""
        return name.lower().removeprefix("registry.ollama.ai/").removeprefix("library/").removesuffix(":latest")

    def models(self, body: bytes) -> dict[str, int | None] | None:
        """Under the full name, and without `:latest`, as both are taken."""
        parsed = decode(_model_lists, body)
        if parsed is None:
            return None
        found: dict[str, int | None] = {}
        for model in parsed.models or ():
            length = model.details.context_length if model.details else None
            found[model.name] = length
            found[model.name.removesuffix(":latest")] = length
        return found


def _message(message: Message) -> dict[str, object]:
    """Text and images of one turn in one message; images as bare base64. Qwen3-VL's renderer drops the role `developer`."""
    fields: dict[str, object] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    images = message.images
    if images:
        fields["images"] = [url.partition(",")[2] for url in images]
    return fields
