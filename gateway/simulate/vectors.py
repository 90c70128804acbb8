"""Embeddings that follow from the words alone: the same text has the same vector, texts that share words lie nearer to each other. Pure."""

import base64
import hashlib
import math
import struct
from collections.abc import Sequence

Vector = tuple[float, ...]


def embed(text: str, width: int) -> Vector:
    """A unit vector: the sum of one for each word."""
    sums = [0.0] * width
    for word in text.split() or [text]:
        sums = [total + part for total, part in zip(sums, _of_word(word, width), strict=True)]
    return unit(sums)


def _of_word(word: str, width: int) -> Vector:
    raw = hashlib.shake_128(word.encode()).digest(width)
    return tuple((byte + math.pi / 10) / 128 - 1 for byte in raw)  # sums of these are never just zero


def unit(vector: Sequence[float]) -> Vector:
    """Of length 1, in numbers that four bytes hold."""
    length = math.sqrt(sum(part * part for part in vector)) or 1.0
    return narrow([part / length for part in vector])


def narrow(vector: Sequence[float]) -> Vector:
    return struct.unpack(f"<{len(vector)}f", struct.pack(f"<{len(vector)}f", *vector))


def short(vector: Sequence[float]) -> Vector:
    """The same in no more digits than four bytes have, as Go writes them."""
    return tuple(float(f"{part:.8g}") for part in vector)


def packed(vector: Sequence[float]) -> str:
    """As `encoding_format: base64` has it: four bytes a number, the least significant first."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
