"""Images that every engine accepts unconverted."""

import base64
import random
import struct
import zlib
from functools import cache


@cache
def png_data_url(size: int = 64, *, is_noise: bool = False) -> str:
    """Return a square PNG as a `data:` URL.

    Noise does not compress: its URL has four bytes for each pixel.
    """
    numbers = random.Random(1)
    rows = b"".join(b"\0" + (numbers.randbytes(3 * size) if is_noise else b"\x40\x80\xc0" * size) for _ in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    whole = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + whole).decode()
