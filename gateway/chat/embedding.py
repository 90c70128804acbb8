"""Canonical embeddings request, and vectors as JSON. Pure: no I/O, no clock."""

import base64
import sys
from array import array
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

MAX_TEXTS = 2048
"""Maximum number of texts in a request, the same as OpenAI's."""

MAX_DIMENSIONS = 65_536
MAX_VECTOR = 32 * MAX_DIMENSIONS
"""Maximum size of one vector in bytes. No engine writes more for a number."""
MAX_BASE64 = 8 * MAX_DIMENSIONS

Text = Annotated[str, Meta(min_length=1)]


class Embedding(Struct, frozen=True, kw_only=True):
    """One parsed request. Other fields, such as `user`, are ignored."""

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


_LIST_CHARACTERS = b"0123456789+-.eE, \t\r\n"

_BASE64_CHARACTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\"  # some servers write `\/`

_numbers = msgspec.json.Decoder(list[float])

EncodedVector = bytes
"""One embedding as JSON.

It is a list of numbers, or quoted base64 of four bytes per number, least significant byte first.
"""


def converted(vector: EncodedVector, in_base64: bool) -> EncodedVector:
    """Return `vector`, which is any JSON value, in the requested format.

    Raises:
        ValueError: it is neither a list of numbers nor base64, or longer than `MAX_DIMENSIONS`.
    """
    if len(vector) > MAX_VECTOR or vector.count(b",") >= MAX_DIMENSIONS:
        raise ValueError
    # Anything else could contain null for non-numbers, or several vectors for one text.
    is_list = vector.translate(None, _LIST_CHARACTERS) == b"[]"
    if not is_list and (len(vector) > MAX_BASE64 or vector.translate(None, _BASE64_CHARACTERS) != b'""'):
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


def width(vector: EncodedVector) -> int:
    """Return the number of dimensions."""
    if vector[:1] == b'"':
        return (len(vector) - 2) * 3 // 4 // 4
    return vector.count(b",") + 1
