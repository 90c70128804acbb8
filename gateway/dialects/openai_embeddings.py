"""OpenAI's embeddings: bytes to an `Embedding`, vectors to bytes. Pure: no I/O, no clock."""

import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec
import orjson
from msgspec import Raw, structs

from gateway.chat.embedding import MAX_TEXTS, Embedding, EncodedVector
from gateway.dialects.dialect import Clock, EmbeddingCall, ErrorForm, OpenAiErrors
from gateway.dialects.json_body import (
    LONG_BODY,
    STEP,
    Steps,
    completed,
    decode_fields,
    explain,
    has_too_many_members,
    is_too_deep,
    render_list,
)
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidJson,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedParameter,
)

MAX_TEXT = 8 * 1024 * 1024
"""Maximum size of one text in bytes, as the client wrote it. No model takes so long a text."""

_JSON_ERRORS = (msgspec.DecodeError, orjson.JSONDecodeError, UnicodeDecodeError, RecursionError)
_decoder = msgspec.json.Decoder(Embedding)
_fields = msgspec.json.Decoder(dict[str, Raw])
_elements = msgspec.json.Decoder(list[Raw])
_texts = msgspec.json.Decoder(str)
_starts_with_numbers = re.compile(rb"\s*:\s*\[\s*[\[0-9-]").match


def parse_embedding(
    body: bytes,
    max_text_body: int,
    check_model: Callable[[str], object] = lambda model: None,
    decoder: msgspec.json.Decoder[Any] = _decoder,
) -> Embedding:
    """Parse the request in `body`, of any length, because batches of texts are its purpose.

    `max_text_body` is the size from which anything but text is limited, if it is less than usual.
    `check_model` is called with the name of the model as early as possible, and may raise. `decoder`
    decodes an `Embedding`.

    Raises:
        InvalidJson: the body is not JSON, or not a JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its name.
        UnsupportedParameter: the input consists of token numbers instead of text.
        ContextLengthExceeded: a text has more than `MAX_TEXT` bytes.
        RequestTooLarge: something other than text makes the body large.
    """
    if len(body) > min(LONG_BODY, max_text_body):
        return completed(parse_long_embedding(body, check_model, decoder))
    try:
        embedding: Embedding = decode_fields(decoder, body)
        check_model(embedding.model)
        orjson.loads(body)  # msgspec skips fields that are not in its types without checking them
    except _JSON_ERRORS as error:
        raise _json_error(error) from None
    return embedding


def parse_long_embedding(
    body: bytes, check_model: Callable[[str], object], decoder: msgspec.json.Decoder[Any] = _decoder
) -> Steps[Embedding]:
    """Parse the request in a long `body` in steps, to the same result as `parse_embedding`."""
    if (yield from has_too_many_members(body)):
        raise (yield from _too_many_members(body))
    with _json_errors():
        fields = _fields.decode(body)
    yield
    texts = fields.get("input", Raw(b"null"))
    known = {name: fields.pop(name) for name in Embedding.__struct_fields__ if name in fields}
    elements: list[Raw] | None = None
    if _starts_with(texts, b"["):
        with _json_errors():
            elements = _elements.decode(texts)
        yield
    with _json_errors():
        shape: Embedding = decode_fields(
            decoder, msgspec.json.encode(known | ({"input": _shape(texts, elements)} if "input" in known else {}))
        )
    check_model(shape.model)
    decoded: list[str] = []
    size = 0
    for text in [texts] if elements is None else elements:
        length = memoryview(text).nbytes
        if length > MAX_TEXT:
            raise ContextLengthExceeded(param="input")
        with _json_errors():
            decoded.append(_texts.decode(text))
        size += length
        if size > STEP:
            size = 0
            yield
    for other in fields.values():
        with _json_errors():
            orjson.loads(memoryview(other))
        if memoryview(other).nbytes > STEP:
            yield
    return structs.replace(shape, input=decoded[0] if elements is None else decoded)


def _shape(texts: Raw, elements: list[Raw] | None) -> Raw | list[Raw]:
    """Return the input with short texts in place of its own, which takes no time to decode."""
    return _short(texts) if elements is None else [_short(text) for text in elements[: MAX_TEXTS + 1]]


def _short(value: Raw) -> Raw:
    return Raw(b'"x"') if memoryview(value).nbytes > 2 and _starts_with(value, b'"') else value


def _starts_with(value: Raw, mark: bytes) -> bool:
    return bytes(memoryview(value)[:1]) == mark  # a Raw itself has no slices


@contextmanager
def _json_errors() -> Generator[None, None, None]:
    try:
        yield
    except _JSON_ERRORS as error:
        raise _json_error(error) from None


def _json_error(error: Exception) -> GatewayError:
    if isinstance(error, msgspec.ValidationError):
        return _explain(str(error))
    return InvalidJson(
        "The body is nested too deeply." if isinstance(error, RecursionError) else "The body is not valid JSON."
    )


def _too_many_members(body: bytes) -> Steps[GatewayError]:
    if len(body) <= STEP:
        if (yield from is_too_deep(body)):
            return InvalidJson("The body is nested too deeply.")
        with _json_errors():  # may raise a better error, and creates no objects for unknown fields
            _decoder.decode(body)
    found = body.find(b'"input"')
    if found >= 0 and _starts_with_numbers(body, found + len(b'"input"')):
        return _token_numbers()
    return RequestTooLarge("The request has too many JSON values or escapes.")


def _token_numbers() -> UnsupportedParameter:
    return UnsupportedParameter(
        "'input' must be text: token numbers mean something else to each model. With LangChain's OpenAIEmbeddings, "
        "set check_embedding_ctx_length=False to make it send text.",
        param="input",
    )


def _explain(text: str) -> InvalidRequest:
    error = explain(text)
    if error.param is None or not error.param.startswith("input"):
        return error
    if error.param != "input" and ("got `int`" in text or "got `array`" in text):
        return _token_numbers()
    if "length" in text:
        return InvalidRequest(
            f"'input' must be a non-empty string, or a list of 1 to {MAX_TEXTS} of them.", param=error.param
        )
    return error


# Answers


class EmbeddingListForm(OpenAiErrors):
    """A list of `embedding` objects."""

    __slots__ = ("_model",)

    endpoint: ClassVar[str] = "embeddings"

    def __init__(self, model: str) -> None:
        self._model = model

    def answer(self, vectors: list[EncodedVector], prompt_tokens: int, clock: Clock) -> Steps[list[bytes]]:
        return render_embeddings(vectors, self._model, prompt_tokens)


class OpenAiEmbeddings:
    """`POST /v1/embeddings`."""

    endpoint = EmbeddingListForm.endpoint
    errors: ErrorForm = OpenAiErrors()
    needs_media_type = True

    def parse(self, body: bytes, max_text_body: int, check_model: Callable[[str], object]) -> EmbeddingCall:
        embedding = parse_embedding(body, max_text_body, check_model)
        return EmbeddingCall(embedding, EmbeddingListForm(embedding.model))

    def parse_steps(self, body: bytes, check_model: Callable[[str], object]) -> Steps[EmbeddingCall]:
        embedding = yield from parse_long_embedding(body, check_model)
        return EmbeddingCall(embedding, EmbeddingListForm(embedding.model))


def render_embeddings(vectors: list[EncodedVector], model: str, prompt_tokens: int) -> Steps[list[bytes]]:
    """Render the answer in steps, as its parts. `model` is the name that the client sent."""
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (prompt_tokens, prompt_tokens)
    tail = b'],"model":%b,"usage":%b}' % (msgspec.json.encode(model), usage)
    items = (b'{"object":"embedding","index":%d,"embedding":%b}' % pair for pair in enumerate(vectors))
    return render_list(b'{"object":"list","data":[', items, tail)
