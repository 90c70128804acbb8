"""Embeddings requests per engine: rendering, parsing answers, and mapping errors."""

import re
from collections.abc import Callable, Generator
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Raw, Struct

from gateway.chat.embedding import MAX_TEXTS, MAX_VECTOR, Embedding, EncodedVector
from gateway.engines.engine import decode, token_count
from gateway.engines.error_mapping import NO_INPUT, client_error, message_of
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest, UnsupportedParameter, UpstreamError

_NO_EMBEDDINGS = re.compile(r"does not support embeddings", re.IGNORECASE)
_NO_MATRYOSHKA = re.compile(r"does not support matryoshka", re.IGNORECASE)
_BAD_DIMENSIONS = re.compile(r"only supports (?:matryoshka )?dimensions|matryoshka", re.IGNORECASE)
_TOO_LONG = re.compile(r"input length exceeds|after truncation exceeds|too large to process", re.IGNORECASE)
_TOO_LONG_LIMIT = re.compile(r"current batch size: (\d{1,9})")


LONG_ANSWER = 256 * 1024
"""Bytes from which an answer is parsed in steps."""
STEP = 1024 * 1024
"""Bytes of an answer that are looked at in one step."""
MAX_REST = 2 * 1024 * 1024
"""Maximum size of a long answer without its vectors, in bytes. 2,048 texts leave 200 KB."""
_MAX_VECTORS = 4 * MAX_TEXTS
_NUMBERS = b"0123456789+-.eE, \t\r\n"
_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"
_vector_begins = re.compile(rb'\s*:\s*(?=["[])').match

T = TypeVar("T")
Steps = Generator[None, None, T]
_NextVector = Callable[[bytes, int], tuple[int, int]]


class Embedded(NamedTuple):
    """Parsed answer of a server: the vectors in the order of the texts, as the server wrote them."""

    vectors: list[EncodedVector]
    prompt_tokens: int


def _next_list(body: bytes, at: int) -> tuple[int, int]:
    """Return the position of the next innermost list, as Ollama writes vectors, or (-1, 0)."""
    end = body.find(b"]", at) + 1
    return body.rfind(b"[", at, end), end


def _next_embedding(body: bytes, at: int) -> tuple[int, int]:
    """Return the position of the next value of `embedding`: a list or base64, or (-1, 0)."""
    key = body.find(b'"embedding"', at)
    found = _vector_begins(body, key + len(b'"embedding"')) if key >= 0 else None
    if found is None:
        return -1, key + 1
    start = found.end()
    return start, body.find(b"]" if body.startswith(b"[", start) else b'"', start + 1) + 1


def _without_vectors(body: bytes, next_vector: _NextVector) -> Steps[tuple[bytes, list[bytes]] | None]:
    """Cut the vectors out of a long answer, and return the rest and the vectors.

    In the rest, the number of a vector stands in its place. No vector is a single number, so it
    cannot be taken for one. Return None if the rest, a vector or the number of vectors is larger
    than in any answer.
    """
    parts: list[bytes] = []
    vectors: list[bytes] = []
    at = size = 0
    for _ in range(_MAX_VECTORS):
        start, end = next_vector(body, at)
        if not end:
            left = memoryview(body)[at:]
            if sum(map(len, parts)) + len(left) > MAX_REST:
                return None
            return b"".join((*parts, left)), vectors
        if start >= 0 and end - start > MAX_VECTOR:
            return None
        vector = body[start:end] if start >= 0 else b""
        if vector.translate(None, _NUMBERS) == b"[]" or vector.translate(None, _BASE64) == b'""':
            parts += (body[at:start], b"%d" % len(vectors))
            vectors.append(vector)
        else:
            parts.append(body[at:end])
        size += end - at
        at = end
        if size > STEP:
            size = 0
            yield
    return None


def _decoded(
    decoder: msgspec.json.Decoder[T], body: bytes, next_vector: _NextVector
) -> Steps[tuple[T, list[bytes] | None] | None]:
    """Decode an answer. The vectors of a long one are cut out and returned with it."""
    vectors: list[bytes] | None = None
    if len(body) > LONG_ANSWER:
        found = yield from _without_vectors(body, next_vector)
        if found is None:
            return None
        body, vectors = found
        yield
    parsed = decode(decoder, body)
    return None if parsed is None else (parsed, vectors)


def _vector(raw: Raw, vectors: list[bytes] | None) -> EncodedVector:
    """Return the vector at `raw`, or the one whose number is there."""
    text = bytes(raw)
    is_number = vectors is not None and len(text) < 8 and text.isdigit() and int(text) < len(vectors)
    return vectors[int(text)] if vectors is not None and is_number else text


class Embedder(Protocol):
    """Embeddings part of an engine."""

    path: str
    """Path below the server's prefix."""

    def render(self, embedding: Embedding, model: str) -> bytes:
        """Return the request body for `model`, which is the name that the server uses."""

    def parse(self, body: bytes) -> Steps[Embedded | None]:
        """Parse the body of an answer with status 200, a long one in steps.

        Return None if it is not an embeddings answer.
        """

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """Map an answer with any other status to the error that the client gets."""


class _OllamaAnswer(Struct):
    embeddings: list[Raw]
    prompt_eval_count: Raw = Raw(b"0")


_ollama_answers = msgspec.json.Decoder(_OllamaAnswer)


class OllamaEmbedder:
    """Embeddings of kind `ollama`: `/api/embed` (server/routes.go EmbedHandler, 0.24 to 0.33).

    Ollama's `/v1` truncates long texts silently and supports neither `keep_alive` nor `num_ctx`.
    These settings and `truncate` come from the operator, as for chats.
    """

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

    def parse(self, body: bytes) -> Steps[Embedded | None]:
        found = yield from _decoded(_ollama_answers, body, _next_list)
        if found is None:
            return None
        parsed, vectors = found
        return Embedded([_vector(raw, vectors) for raw in parsed.embeddings], token_count(parsed.prompt_eval_count))

    def client_error(self, status: int, body: bytes) -> GatewayError:
        """Map an error; the request itself is known to be valid.

        A 400 that does not blame the texts is therefore an internal failure: 0.24 and 0.33 answer
        400 when a runner dies.
        """
        error = _client_error(status, body)
        return UpstreamError("status_4xx") if type(error) is InvalidRequest and error.param is None else error


class _Embedded(Struct):
    embedding: Raw
    index: int = -1


class _Usage(Struct):
    prompt_tokens: Raw = Raw(b"0")


class _OpenAiAnswer(Struct):
    data: list[_Embedded]
    usage: Raw = Raw(b"null")


_openai_answers = msgspec.json.Decoder(_OpenAiAnswer)
_usages = msgspec.json.Decoder(_Usage)


class OpenAiEmbedder:
    """Embeddings of kinds `vllm` and `openai`: `/v1/embeddings`."""

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

    def parse(self, body: bytes) -> Steps[Embedded | None]:
        found = yield from _decoded(_openai_answers, body, _next_embedding)
        if found is None:
            return None
        parsed, vectors = found
        data = parsed.data
        if any(item.index != position for position, item in enumerate(data)) and all(item.index >= 0 for item in data):
            data = sorted(data, key=lambda item: item.index)
        usage = decode(_usages, parsed.usage) or _Usage()
        return Embedded([_vector(item.embedding, vectors) for item in data], token_count(usage.prompt_tokens))

    def client_error(self, status: int, body: bytes) -> GatewayError:
        return _client_error(status, body)


def _client_error(status: int, body: bytes) -> GatewayError:
    message = message_of(body)
    if status in (400, 404, 500, 501):
        # A bare 404 is a vLLM that serves another kind of model.
        if _NO_EMBEDDINGS.search(message) or (status == 404 and message == "Not Found"):
            return UnsupportedParameter("The model behind this name does not support embeddings.", param="model")
        if _NO_MATRYOSHKA.search(message):
            return UnsupportedParameter(
                "The embeddings of this model cannot be shortened. Leave 'dimensions' out.", param="dimensions"
            )
        if _BAD_DIMENSIONS.search(message):
            return InvalidRequest("This model does not support this number of dimensions.", param="dimensions")
        if _TOO_LONG.search(message):
            limit = _TOO_LONG_LIMIT.search(message)
            return ContextLengthExceeded(int(limit[1]) if limit else None, "input")
        if NO_INPUT.search(message):
            return InvalidRequest("One of the input texts has nothing that the model reads.", param="input")
    error = client_error(status, body)
    return ContextLengthExceeded(error.limit, "input") if isinstance(error, ContextLengthExceeded) else error
