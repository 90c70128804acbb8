"""Tests of vectors as JSON."""

import base64
import json
import struct

import pytest

from gateway.chat.embedding import MAX_BASE64, MAX_DIMENSIONS, MAX_VECTOR, converted, width

NUMBERS = [0.5, -0.25, 1.0]
AS_BASE64 = b'"%b"' % base64.b64encode(struct.pack("<3f", *NUMBERS))
AS_LIST = b"[0.5, -0.25,1]"


@pytest.mark.parametrize("vector", [AS_LIST, AS_BASE64, AS_BASE64.replace(b"/", b"\\/")])
def test_vector_is_converted_to_the_requested_format(vector: bytes) -> None:
    assert json.loads(converted(vector, in_base64=False)) == NUMBERS
    raw = base64.b64decode(json.loads(converted(vector, in_base64=True)))
    assert struct.unpack("<3f", raw) == tuple(NUMBERS)


@pytest.mark.parametrize(
    "vector", [b"null", b"3", b"{}", b"[null]", b"[[0.5]]", b'["a"]', b"[true]", b'"not base64"', b'"\\""', b'"\xff"']
)
@pytest.mark.parametrize("in_base64", [False, True])
def test_value_that_is_not_a_vector_is_rejected(vector: bytes, in_base64: bool) -> None:
    with pytest.raises(ValueError):
        converted(vector, in_base64)


@pytest.mark.parametrize("vector", [b'"QQ=="', b'"QUFBQ"'])
def test_base64_of_incomplete_numbers_is_rejected(vector: bytes) -> None:
    with pytest.raises(ValueError):
        converted(vector, in_base64=False)


@pytest.mark.parametrize("in_base64", [False, True])
def test_longest_vector_is_converted_and_a_longer_one_is_rejected(in_base64: bool) -> None:
    longest = b"[" + b"0.5," * (MAX_DIMENSIONS - 1) + b"0.5]"
    assert width(converted(longest, in_base64)) == MAX_DIMENSIONS
    assert width(converted(converted(longest, True), in_base64)) == MAX_DIMENSIONS
    for vector in (
        longest[:-1] + b",1]",
        b"[" + b" " * MAX_VECTOR + b"1]",
        b'"%b"' % (b"A" * MAX_BASE64),
        b'"%b"' % (b"\\/" * (MAX_BASE64 // 2)),
    ):
        with pytest.raises(ValueError):
            converted(vector, in_base64)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 64, 1023])
def test_width_is_the_number_of_dimensions(count: int) -> None:
    vector = json.dumps([0.5] * count).encode()
    assert width(vector) == width(converted(vector, in_base64=True)) == count
