"""Structure of an image file: its format, size, chunks or segments, and orientation. No pixel is decoded."""

import re
import struct
import zlib

from PIL import Image

MAX_PIXELS = 64_000_000
"""Maximum number of pixels: 8000 × 8000, more than a phone's 50 megapixels.

Decoding so many takes 256 MB. All three engines accept them.
"""
MAX_PARTS = 4096
"""Maximum number of PNG chunks or JPEG segments. Real files have up to a few hundred.

Each costs one iteration of a Python loop.
"""
MAX_SCANS = 100
"""Maximum number of scans of a progressive JPEG. Typical files have about ten.

Each scan goes over all pixels but takes hardly any bytes.
"""
STEP = 1 << 18  # bytes searched in one call: the GIL is free in between

CUT = "it is truncated"
DAMAGED = "it is damaged"

PNG, JPEG, GIF, WEBP = "png", "jpeg", "gif", "webp"
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
ORIENTATIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """Incomplete image, unsupported format or excessive size.

    The text of the exception is the second half of a sentence.
    """


def kind_of(data: bytes | bytearray) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    return WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("it has no pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has {width} x {height} pixels; width times height may be at most {MAX_PIXELS}")


def webp_size(data: bytes) -> tuple[int, int]:
    """Return the size of the canvas (https://developers.google.com/speed/webp/docs/riff_container)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits: int = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def walk_png(data: bytes) -> tuple[bool, bytes]:
    """Return whether all engines read the chunks alike, and the image without its animation.

    Pillow warns about malformed animations, and other decoders ignore animations. Go verifies the
    checksums and the end of the file, Pillow neither.
    """
    view = memoryview(data)
    at, is_plain = 8, data[24] <= 8  # vLLM clips 16-bit grey at 255
    kept = [view[:8]]
    for _ in range(MAX_PARTS):
        if len(data) < at + 12:
            raise BadImage(CUT)
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if len(data) < end:
            raise BadImage(CUT)
        if zlib.crc32(view[at + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise BadImage(DAMAGED)
        if kind in (b"acTL", b"fcTL", b"fdAT"):
            is_plain = False
        else:
            kept.append(view[at:end])
        if kind == b"IEND":
            return is_plain, data if is_plain else b"".join(kept)
        # Transparency, and critical chunks, which no decoder may skip.
        if kind == b"tRNS" or (kind[:1].isupper() and kind not in (b"IHDR", b"PLTE", b"IDAT")):
            is_plain = False
        at = end
    raise BadImage(f"it has more than {MAX_PARTS} chunks")


def walk_jpeg(data: bytes) -> bool:
    """Return whether it is a sequential or progressive Huffman JPEG without oddities.


    Where libjpeg only warns, Go may reject the image. Damage inside the coded data is not detected
    here, and libjpeg decodes it to some image.
    """
    at, is_plain, in_scan, scans = 2, True, False, 0
    for _ in range(MAX_PARTS):
        found = _next_marker(data, at)
        is_plain = is_plain and (in_scan or found == at)
        code, at = data[found + 1], found + 2
        if code == 0xD9:
            return is_plain and scans > 0
        if code == 0xFF:  # any number of 0xFF bytes may precede a marker
            at -= 1
        elif code < 0xC0 or code == 0xD8:
            is_plain = False
        else:
            length = int.from_bytes(data[at : at + 2])
            if length < 2 or len(data) < at + length:
                raise BadImage(CUT)
            at += length
            in_scan = code == 0xDA
            scans += in_scan
            if scans > MAX_SCANS:
                raise BadImage(f"it has more than {MAX_SCANS} scans")
            is_plain = is_plain and (
                code < 0xC3 or code in (0xC4, 0xDA, 0xDB, 0xDD) or 0xE0 <= code <= 0xEF or code == 0xFE
            )
    raise BadImage(f"it has more than {MAX_PARTS} segments")


def _next_marker(data: bytes, at: int) -> int:
    while at < len(data):
        found = _MARKER.search(data, at, at + STEP)
        if found:
            return found.start()
        at += STEP - 1
    raise BadImage(CUT)


def is_upright(image: Image.Image) -> bool:
    return orientation_of(image) not in ORIENTATIONS


def orientation_of(image: Image.Image) -> int:
    """Return the orientation, which vLLM applies and Ollama does not.

    It is read here because Pillow would read all tags.
    """
    exif, xmp = image.info.get("exif"), image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
    # ImageMagick's format: a name, a length, hexadecimal digits.
    if exif is None and "Raw profile type exif" in image.info:
        try:
            exif = bytes.fromhex("".join(str(image.info["Raw profile type exif"]).split("\n")[3:]))
        except ValueError:
            exif = None
    value = _exif_orientation(exif.removeprefix(b"Exif\0\0")) if isinstance(exif, bytes) else None
    if value is None and xmp:
        found = _XMP_ORIENTATION.search(xmp.encode(errors="replace") if isinstance(xmp, str) else xmp)
        value = int(found[1]) if found else None
    return value or 1


def _exif_orientation(tiff: bytes) -> int | None:
    """Return tag 0x0112 of the first directory (TIFF 6.0, section 2)."""
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        at: int = struct.unpack_from(order + "I", tiff, 4)[0]
        count: int = struct.unpack_from(order + "H", tiff, at)[0]
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, entry)
            if tag == 0x0112 and kind == 3:
                return int(value)
    except struct.error:
        return None
    return None
