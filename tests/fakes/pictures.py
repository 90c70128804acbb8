"""Pictures that every engine takes as they are."""

import base64
import random
import struct
import zlib


def picture_url(size: int = 64, *, is_noise: bool = False) -> str:
    """A square PNG as a `data:` URL; noise cannot be made shorter: four bytes of URL for each pixel."""
    numbers = random.Random(1)
    rows = b"".join(b"\0" + (numbers.randbytes(3 * size) if is_noise else b"\x40\x80\xc0" * size) for _ in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b""))
    whole = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + whole).decode()
