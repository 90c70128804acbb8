"""Ollama's own API: `/api/embed` and `/api/embeddings`. Pure: no I/O, no clock.

Ollama cuts a long text by default. Here the operator's setting `truncate` decides, as for any
client.
"""

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta, Struct

from gateway.chat.embedding import MAX_DIMENSIONS, Embedding, EncodedVector
from gateway.dialects.dialect import Clock, EmbeddingCall, ErrorForm
from gateway.dialects.json_body import LONG_BODY, Steps, completed, explain, has_too_many_members, render_list
from gateway.dialects.ollama_chat import OllamaErrors
from gateway.dialects.openai_embeddings import MAX_TEXT, parse_embedding, parse_long_embedding
from gateway.errors import ContextLengthExceeded, InvalidJson, InvalidRequest, RequestTooLarge

_EMPTY: tuple[Any, ...] = ("", [], None)
_MAX_EMPTY = 4096
"""Bytes of a body in which an empty input is looked for."""


class _Input(Struct):
    model: str | None = None
    input: Any = None


class _Embedding(Embedding, frozen=True, kw_only=True):
    """A request with `dimensions` of zero or less, which mean at Ollama that it sets none."""

    dimensions: Annotated[int, Meta(le=MAX_DIMENSIONS)] | None = None


class _Prompt(Struct):
    model: str | None = None
    prompt: str | None = None


_inputs = msgspec.json.Decoder(_Input)
_embeddings = msgspec.json.Decoder(_Embedding)
_prompts = msgspec.json.Decoder(_Prompt)
_encode = msgspec.json.encode


class EmbedForm(Struct, OllamaErrors, frozen=True, gc=False):
    """The form of an answer of `/api/embed`."""

    endpoint: ClassVar[str] = "ollama_embed"

    model: str

    def answer(self, vectors: list[EncodedVector], prompt_tokens: int, clock: Clock) -> Steps[list[bytes]]:
        tail = b""
        if vectors:  # no engine was asked for the vectors of nothing
            times = clock()
            counts = {
                "total_duration": max(int(times.total * 1e9), 1),
                "load_duration": max(int(times.load * 1e9), 1),
                "prompt_eval_count": prompt_tokens,
            }
            tail = b"".join([b',"%b":%d' % (name.encode(), value) for name, value in counts.items() if value > 0])
        return render_list(b'{"model":%b,"embeddings":[' % _encode(self.model), vectors, b"]%b}" % tail)


class EmbeddingForm(Struct, OllamaErrors, frozen=True, gc=False):
    """The form of an answer of `/api/embeddings`, which has a single vector."""

    endpoint: ClassVar[str] = "ollama_embeddings"

    def answer(self, vectors: list[EncodedVector], prompt_tokens: int, clock: Clock) -> Steps[list[bytes]]:
        return render_list(b'{"embedding":', vectors[:1] or [b"[]"], b"}")


class OllamaEmbed:
    """`POST /api/embed`."""

    endpoint = EmbedForm.endpoint
    errors: ErrorForm = OllamaErrors()
    needs_media_type = False

    def parse(self, body: bytes, max_text_body: int, check_model: Callable[[str], object]) -> EmbeddingCall:
        if len(body) <= _MAX_EMPTY:
            asked = _decode(_inputs, body)
            model = _named(asked.model)
            if asked.input in _EMPTY:
                check_model(model)
                return _empty(model, EmbedForm(model))
        return _embed_call(parse_embedding(body, max_text_body, check_model, _embeddings))

    def parse_steps(self, body: bytes, check_model: Callable[[str], object]) -> Steps[EmbeddingCall]:
        embedding = yield from parse_long_embedding(body, check_model, _embeddings)
        return _embed_call(embedding)


class OllamaEmbeddings:
    """`POST /api/embeddings`, which Ollama keeps for older programs."""

    endpoint = EmbeddingForm.endpoint
    errors: ErrorForm = OllamaErrors()
    needs_media_type = False

    def parse(self, body: bytes, max_text_body: int, check_model: Callable[[str], object]) -> EmbeddingCall:
        return completed(self.parse_steps(body, check_model))

    def parse_steps(self, body: bytes, check_model: Callable[[str], object]) -> Steps[EmbeddingCall]:
        if len(body) > LONG_BODY and (yield from has_too_many_members(body)):
            raise RequestTooLarge("The request has too many JSON values or escapes.")
        if len(body) > MAX_TEXT:
            raise ContextLengthExceeded(param="prompt")
        asked = _decode(_prompts, body)
        model = _named(asked.model)
        check_model(model)
        if not asked.prompt:
            return _empty(model, EmbeddingForm())
        return EmbeddingCall(Embedding(model=model, input=asked.prompt), EmbeddingForm())


def _embed_call(embedding: Embedding) -> EmbeddingCall:
    dimensions = embedding.dimensions if embedding.dimensions is None or embedding.dimensions > 0 else None
    asked = Embedding(model=embedding.model, input=embedding.input, dimensions=dimensions)
    return EmbeddingCall(asked, EmbedForm(embedding.model))


def _empty(model: str, form: EmbedForm | EmbeddingForm) -> EmbeddingCall:
    return EmbeddingCall(Embedding(model=model, input=[]), form)


def _named(model: str | None) -> str:
    if not model:
        raise InvalidRequest("model is required", param="model")
    return model


def _decode(decoder: msgspec.json.Decoder[Any], body: bytes) -> Any:
    if not body:
        raise InvalidJson("missing request body")
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson("The body is not valid JSON.") from None
