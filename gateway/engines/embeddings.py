"""How each kind of server is asked for embeddings, how it answers, and what its refusals mean."""

import re
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Raw, Struct

from gateway.chat.embedding import Embedding, EncodedVector
from gateway.engines.engine import decode
from gateway.engines.error_mapping import client_error, message_of
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest, UnsupportedParameter, UpstreamError

_NO_EMBEDDINGS = re.compile(r"does not support embeddings", re.IGNORECASE)
_NO_MATRYOSHKA = re.compile(r"does not support matryoshka", re.IGNORECASE)
_BAD_DIMENSIONS = re.compile(r"only supports (?:matryoshka )?dimensions|matryoshka", re.IGNORECASE)
_TOO_LONG = re.compile(r"input length exceeds|after truncation exceeds|too large to process", re.IGNORECASE)
_TOO_LONG_LIMIT = re.compile(r"current batch size: (\d{1,9})")


class Embedded(NamedTuple):
    """A server's answer: the vectors in the order of the texts, as it wrote them."""

    vectors: list[EncodedVector]
    prompt_tokens: int


class Embedder(Protocol):
    """The part of a kind of server that makes embeddings."""

    path: str
    """Below the server's prefix."""

    def render(self, embedding: Embedding, model: str) -> bytes:
        """The request's body, for `model` by the name that it has there."""

    def parse(self, body: bytes) -> Embedded | None:
        """An answer with status 200; None: it is none."""

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """What an answer with another status means to the client."""


class _OllamaAnswer(Struct):
    embeddings: list[Raw]
    prompt_eval_count: int = 0


_ollama_answers = msgspec.json.Decoder(_OllamaAnswer)


class OllamaEmbedder:
    """Kind `ollama`: `/api/embed` (server/routes.go EmbedHandler, 0.24 to 0.33). Its `/v1` cuts long texts without a word and knows neither
    `keep_alive` nor `num_ctx`. The settings are the operator's, the same as a chat's."""

    path = "/api/embed"

    def __init__(
        self, keep_alive: str | float | None = None, num_ctx: int | None = None, truncate: bool = False
    ) -> None:
        self._keep_alive = keep_alive
        self._num_ctx = num_ctx
        self._truncate = truncate

    def render(self, embedding: Embedding, model: str) -> bytes:
        optional: dict[str, Any] = {
            "dimensions": embedding.dimensions,
            "keep_alive": self._keep_alive,
            "truncate": None if self._truncate else False,
            "options": None if self._num_ctx is None else {"num_ctx": self._num_ctx},
        }
        fields = {"model": model, "input": embedding.texts}
        return msgspec.json.encode(fields | {name: value for name, value in optional.items() if value is not None})

    def parse(self, body: bytes) -> Embedded | None:
        parsed = decode(_ollama_answers, body)
        return None if parsed is None else Embedded([bytes(raw) for raw in parsed.embeddings], parsed.prompt_eval_count)

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """The request is known to be right: a 400 that names no fault of the texts is a failure inside (0.24 and 0.33 say so of a runner that
        dies)."""
        error = _client_error(status, body)
        return UpstreamError("status_4xx") if type(error) is InvalidRequest and error.param is None else error


class _Embedded(Struct):
    embedding: Raw
    index: int = -1


class _Usage(Struct):
    prompt_tokens: int | None = None


class _OpenAiAnswer(Struct):
    data: list[_Embedded]
    usage: _Usage | None = None


_openai_answers = msgspec.json.Decoder(_OpenAiAnswer)


class OpenAiEmbedder:
    """Kinds `vllm` and `openai`: `/v1/embeddings`."""

    path = "/v1/embeddings"

    def render(self, embedding: Embedding, model: str) -> bytes:
        fields: dict[str, Any] = {
            "model": model,
            "input": embedding.texts,
            "encoding_format": embedding.encoding_format or "float",
        }
        if embedding.dimensions is not None:
            fields["dimensions"] = embedding.dimensions
        return msgspec.json.encode(fields)

    def parse(self, body: bytes) -> Embedded | None:
        parsed = decode(_openai_answers, body)
        if parsed is None:
            return None
        data = parsed.data
        if any(item.index != place for place, item in enumerate(data)) and all(item.index >= 0 for item in data):
            data = sorted(data, key=lambda item: item.index)
        tokens = parsed.usage.prompt_tokens if parsed.usage is not None else None
        return Embedded([bytes(item.embedding) for item in data], tokens or 0)

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return _client_error(status, body)


def _client_error(status: int, body: bytes) -> GatewayError:
    message = message_of(body)
    if status in (400, 404, 500, 501):
        if _NO_EMBEDDINGS.search(message) or (
            status == 404 and message == "Not Found"
        ):  # a vLLM that serves another kind of model
            return UnsupportedParameter("The model behind this name makes no embeddings.", param="model")
        if _NO_MATRYOSHKA.search(message):
            return UnsupportedParameter(
                "The embeddings of this model cannot be shortened. Leave 'dimensions' out.", param="dimensions"
            )
        if _BAD_DIMENSIONS.search(message):
            return InvalidRequest("This model has no embeddings of so many dimensions.", param="dimensions")
        if _TOO_LONG.search(message):
            limit = _TOO_LONG_LIMIT.search(message)
            return ContextLengthExceeded(int(limit[1]) if limit else None, "input")
    error = client_error(status, body)
    return ContextLengthExceeded(error.limit, "input") if isinstance(error, ContextLengthExceeded) else error
