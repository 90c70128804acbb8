"""Embedding vectors of the stand-ins."""

import base64
import math
import struct

from gateway.simulate.vectors import embed, narrow, packed, short, unit


def similarity(one: str, other: str) -> float:
    return sum(a * b for a, b in zip(embed(one, 64), embed(other, 64), strict=True))


def test_equal_texts_have_equal_unit_vectors() -> None:
    assert embed("a text", 64) == embed("a text", 64) != embed("another", 64)
    assert math.isclose(sum(part * part for part in embed("a text", 64)), 1, rel_tol=1e-5)


def test_texts_with_common_words_are_more_similar() -> None:
    assert similarity("the cat sat", "the cat ran") > similarity("the cat sat", "some dogs bark") + 0.2


def test_vectors_have_float32_precision() -> None:
    vector = unit([1.0, 2.0, 3.0])
    assert struct.unpack("<3f", base64.b64decode(packed(vector))) == vector == narrow(short(vector))
