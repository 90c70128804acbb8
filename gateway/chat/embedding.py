"""The canonical embeddings request, and vectors as JSON. Pure: no I/O, no clock."""

import base64
import sys
from array import array
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

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

_numbers = msgspec.json.Decoder(list[float])

EncodedVector = bytes
"""One embedding as JSON: a list of numbers, or base64 in quotes of four bytes a number, the least significant first."""


def converted(vector: EncodedVector, in_base64: bool) -> EncodedVector:
    """`vector`, which is some JSON value, in the form that was asked for.

    Raises:
        ValueError: it is in neither.
    """
    is_list = (
        vector.translate(None, _IN_A_LIST) == b"[]"
    )  # else it may hold null for what is no number, or be one of many for a text
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


def width(vector: EncodedVector) -> int:
    """How many numbers it has."""
    if vector[:1] == b'"':
        return (len(vector) - 2) * 3 // 4 // 4
    return vector.count(b",") + 1
