"""OpenAI's embeddings request and its answer: bytes to an `Embedding`, vectors to bytes. Pure: no I/O, no clock."""

import base64
import sys
from array import array
from typing import Annotated, Literal

import msgspec
import orjson
from msgspec import Meta, Struct

from gateway.errors import InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter
from gateway.parsing import MAX_NESTING_MARKS, explain

MAX_TEXTS = 2048
"""As many as OpenAI takes in one request."""
MAX_DIMENSIONS = 65_536

Text = Annotated[str, Meta(min_length=1)]


class Embedding(Struct, frozen=True, kw_only=True):
    """One parsed request. Other fields, as `user`, are ignored."""

    model: Text
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=MAX_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=MAX_DIMENSIONS)] | None = None

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input

    @property
    def in_base64(self) -> bool:
        return self.encoding_format == "base64"


_IN_A_LIST = b"0123456789+-.eE, \t\r\n"
_IN_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"  # some write `\/`

_decoder = msgspec.json.Decoder(Embedding)
_numbers = msgspec.json.Decoder(list[float])


def parse_embedding(body: bytes, max_text_body: int) -> Embedding:
    """The request in `body`, which may be as long as any: a batch of texts is what it is for.

    Raises:
        InvalidJson: no JSON, or no JSON object.
        InvalidRequest: a field is missing, of the wrong type or out of range; `param` is its name.
        UnsupportedParameter: token numbers in place of text.
        RequestTooLarge: it is large by other than text.
    """
    try:
        embedding = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidJson("The body is not valid JSON.") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deeply.") from None
    if len(body) > max_text_body and _marks(body) - sum(_marks(text.encode()) for text in embedding.texts) > MAX_NESTING_MARKS:
        raise RequestTooLarge("The request has too many parts.")
    try:  # msgspec skips what it does not take without a look
        orjson.loads(body)
    except orjson.JSONDecodeError:
        raise InvalidJson("The body is not valid JSON.") from None
    return embedding


def _marks(text: bytes) -> int:
    return text.count(b"[") + text.count(b"{")


def _explain(text: str) -> InvalidRequest:
    error = explain(text)
    if error.param is None or not error.param.startswith("input"):
        return error
    if error.param != "input" and ("got `int`" in text or "got `array`" in text):
        return UnsupportedParameter(
            "'input' has to be text: token numbers mean another thing to each model. With LangChain's OpenAIEmbeddings set "
            "check_embedding_ctx_length=False, which makes it send text.",
            param="input",
        )
    if "length" in text:
        return InvalidRequest(f"'input' has to be a text that is not empty, or a list of 1 to {MAX_TEXTS} of them.", param=error.param)
    return error


# The answer

Vector = bytes
"""One embedding as JSON: a list of numbers, or base64 in quotes of four bytes a number, the least significant first."""


def converted(vector: Vector, in_base64: bool) -> Vector:
    """`vector`, which is some JSON value, in the form that was asked for.

    Raises:
        ValueError: it is in neither.
    """
    is_list = vector.translate(None, _IN_A_LIST) == b"[]"  # else it may hold null for what is no number, or be one of many for a text
    if not is_list and vector.translate(None, _IN_BASE64) != b'""':
        raise ValueError
    if is_list is not in_base64:
        return vector
    if is_list:
        return b'"%b"' % base64.b64encode(_little_endian(array("f", _numbers.decode(vector))).tobytes())
    numbers = array("f")
    numbers.frombytes(base64.b64decode(msgspec.json.decode(vector, type=str), validate=True))
    return msgspec.json.encode(_little_endian(numbers).tolist())


def _little_endian(numbers: "array[float]") -> "array[float]":
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def width(vector: Vector) -> int:
    """How many numbers it has."""
    if vector[:1] == b'"':
        return (len(vector) - 2) * 3 // 4 // 4
    return vector.count(b",") + 1


def render_embeddings(vectors: list[Vector], model: str, prompt_tokens: int) -> bytes:
    """The answer's body; `model` is the name that the client sent."""
    data = b",".join([b'{"object":"embedding","index":%d,"embedding":%b}' % pair for pair in enumerate(vectors)])
    usage = b'{"prompt_tokens":%d,"total_tokens":%d}' % (prompt_tokens, prompt_tokens)
    return b'{"object":"list","data":[%b],"model":%b,"usage":%b}' % (data, msgspec.json.encode(model), usage)
