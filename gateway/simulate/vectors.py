"""Deterministic embeddings: texts with words in common have similar vectors. Pure."""

import base64
import hashlib
import math
import struct
from collections.abc import Sequence

Vector = tuple[float, ...]


def embed(text: str, width: int) -> Vector:
    """Return the normalised sum of one vector for each word."""
    sums = [0.0] * width
    for word in text.split() or [text]:
        sums = [total + part for total, part in zip(sums, _word_vector(word, width), strict=True)]
    return unit(sums)


def _word_vector(word: str, width: int) -> Vector:
    raw = hashlib.shake_128(word.encode()).digest(width)
    return tuple((byte + math.pi / 10) / 128 - 1 for byte in raw)  # no sum of these is exactly zero


def unit(vector: Sequence[float]) -> Vector:
    """Scale to length 1, in float32 precision."""
    length = math.sqrt(sum(part * part for part in vector)) or 1.0
    return narrow([part / length for part in vector])


def narrow(vector: Sequence[float]) -> Vector:
    """Round each number to float32."""
    return struct.unpack(f"<{len(vector)}f", struct.pack(f"<{len(vector)}f", *vector))


def short(vector: Sequence[float]) -> Vector:
    """Round to the digits that Go writes for a float32."""
    return tuple(float(f"{part:.8g}") for part in vector)


def packed(vector: Sequence[float]) -> str:
    """Encode for `encoding_format: base64`: little-endian float32."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
