"""One picture: whether its bytes are a whole one that every engine reads alike, and if not, another that is. It knows Pillow and nothing of
the gateway, so that it also runs as a script, in a process of its own: `python picture.py SITE_PACKAGES`, bytes in, bytes out.

What "alike" means was tried on Ollama 0.24 (Go's decoders), Ollama 0.33 (stb_image) and vLLM 0.32 (Pillow): see docs/dialect.md.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # where Pillow is: the process starts without the environment that may have said so

import io
import os
import re
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PIXELS = 64_000_000
"""8000 × 8000, more than a phone's 50 megapixels; it takes 256 MB to decode. All three engines take that much."""
MAX_CONVERTED_PIXELS = 1 << 24
"""What has to be written anew is made no larger: Qwen3-VL's own processing shrinks to this, so nothing is lost."""
MAX_CONVERTED_SIDE = 1 << 14
MIN_SIDE = 32
"""Ollama 0.24's runner dies, with all that it works on, of a Qwen3-VL image that is less than 32 pixels wide or high (28 for Qwen2.5-VL)."""
MAX_ASPECT = 200
"""Above it the same runner dies and vLLM answers 400: Qwen's `smart_resize`."""
LIGHT_PIXELS = 1 << 18
LIGHT_BYTES = 1 << 20
PLAIN_PIXELS = 1 << 24
MAX_PARTS = 4096
"""Chunks of a PNG or segments of a JPEG; real ones have up to some hundred. Each costs a turn of a loop in Python."""
MAX_SCANS = 100
"""A progressive JPEG has about ten. Each one goes over all pixels, and takes hardly any bytes."""
STEP = 1 << 18  # bytes searched in one call: others get the GIL in between

CUT = "it is cut off"
DAMAGED = "it is damaged"
BAD, AS_IS = 3, b""
CPU_SECONDS, MEMORY = 30, 2 << 30

PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "LA")


class _JpegFile(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Leave it: Pillow reads all tags for this, and a few KB of them can name gigabytes."""


PNG, JPEG, GIF, WEBP = "png", "jpeg", "gif", "webp"
# Not Image.open: that one knows more formats, loads them all at first use, and warns of what is refused here anyway.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    PNG: PngImagePlugin.PngImageFile,
    JPEG: _JpegFile,
    GIF: GifImagePlugin.GifImageFile,
    WEBP: WebPImagePlugin.WebPImageFile,
}
_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7]", re.DOTALL)
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([0-9])")
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """No whole picture of a known kind and bearable size; the text is the second half of a sentence."""


class ParsedImage(NamedTuple):
    """A picture of which only the beginning has been read."""

    kind: str
    data: bytes
    image: ImageFile.ImageFile
    pixels: int
    is_plain: bool
    """By its outer form every engine takes it; its pixels have not been looked at."""

    @property
    def is_light(self) -> bool:
        """Little enough to be decoded and written while others wait: Pillow holds the GIL while it decodes WebP and while it writes PNG."""
        return self.pixels <= LIGHT_PIXELS and len(self.data) <= LIGHT_BYTES and self.kind != GIF

    @property
    def is_bearable(self) -> bool:
        """Pillow lets go of the GIL while it decodes these, and they take 64 MB at most."""
        return self.is_plain and self.pixels <= PLAIN_PIXELS


@contextmanager
def _reading() -> Iterator[None]:
    """Whatever Pillow thinks of hostile bytes: it has no one class of errors for that."""
    try:
        yield
    except BadImage:
        raise
    except Exception as error:
        raise BadImage(CUT if "truncated" in str(error) else DAMAGED) from error


def kind_of(data: bytes) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    return WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def begin(data: bytes) -> ParsedImage:
    """Read the beginning, and the outline of a PNG or JPEG up to its end.

    Raises:
        BadImage: of no known kind, cut off, damaged, or larger than `MAX_PIXELS`.
    """
    kind = kind_of(data)
    if kind is None:
        raise BadImage("it is no PNG, JPEG, WebP or GIF" if data else "it is empty")
    with _reading():
        is_plain = False
        if kind == PNG:
            is_plain, data = _walk_png(data)
        elif kind == JPEG:
            is_plain = _walk_jpeg(data)
        elif kind == WEBP:  # its decoder takes the memory for all pixels when it is opened
            _check_size(*_webp_size(data))
        image = _OPENERS[kind](io.BytesIO(data))
        _check_size(*image.size)
        is_plain = is_plain and image.mode in PLAIN_MODES and _is_upright(image) and shape_for(image.size) == image.size
    return ParsedImage(kind, data, image, image.width * image.height, is_plain)


def is_taken_as_is(picture: ParsedImage) -> bool:
    """Whether every engine takes a plain picture as it is: its pixels are all there, and none of them is transparent.

    Raises:
        BadImage: they are not all there.
    """
    image = picture.image
    with _reading():
        if picture.kind == JPEG:
            image.draft(
                None, (image.width // 8, image.height // 8)
            )  # all its data is read, yet an eighth of each side is enough to keep
        image.load()
        # Transparent pixels become white in vLLM and Ollama 0.24, and whatever colour they hide in 0.33.
        opaque = image.mode not in ("RGBA", "LA") or image.getchannel("A").getextrema() == (255, 255)
        return opaque and _is_upright(image)  # a PNG may say so after its pixels


def convert(picture: ParsedImage) -> bytes:
    """The same picture as a PNG, or as a JPEG if it was compressed with losses: upright, 8 bits deep, on white, of a shape that all take.

    Raises:
        BadImage: its pixels are not all there.
    """
    kind = JPEG if picture.kind == JPEG or picture.data[12:16] == b"VP8 " else PNG
    with _reading():
        image: Image.Image = picture.image
        if picture.kind == JPEG:
            picture.image.draft(None, shape_for(image.size, MAX_CONVERTED_PIXELS))
        image.load()
        orientation = _TRANSPOSE.get(_orientation(picture.image))
        image = _opaque(image)
        shape = shape_for(image.size, MAX_CONVERTED_PIXELS)
        if image.size != shape:
            image = image.resize(shape, Image.Resampling.BICUBIC)
        if orientation is not None:
            image = image.transpose(orientation)
        out = io.BytesIO()
        # No metadata of the old one: an orientation would turn it twice. No chroma subsampling: each decoder undoes that in its own way.
        if kind == JPEG:
            image.save(out, "JPEG", quality=95, subsampling=0)
        else:
            image.save(out, "PNG", compress_level=1)
        return out.getvalue()


def shape_for(size: tuple[int, int], max_pixels: int | None = None) -> tuple[int, int]:
    """The nearest width and height that all engines take: not narrow, not like a thread, and no more than `max_pixels`.

    The short side is stretched, as Qwen's own processing does within its bounds; padding would turn a spot of one colour into a dot.
    """
    width, height = size
    if max_pixels is not None:
        scale = min(1.0, (max_pixels / (width * height)) ** 0.5, MAX_CONVERTED_SIDE / max(size))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    least = max(MIN_SIDE, -(-max(width, height) // MAX_ASPECT))
    return max(width, least), max(height, least)


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("it has no pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has {width} x {height} pixels, and width times height may be {MAX_PIXELS} at most")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Of the canvas (https://developers.google.com/speed/webp/docs/riff_container)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits: int = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _walk_png(data: bytes) -> tuple[bool, bytes]:
    """Whether nothing in its chunks makes engines differ, and the picture without its animation: Pillow warns of odd ones, others show none.

    Go checks the checksums and the end, Pillow neither.
    """
    view = memoryview(data)
    at, is_plain = 8, data[24] <= 8  # vLLM cuts 16-bit greys off at 255
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
        if kind == b"tRNS" or (
            kind[:1].isupper() and kind not in (b"IHDR", b"PLTE", b"IDAT")
        ):  # transparency, and what nobody may skip
            is_plain = False
        at = end
    raise BadImage(f"it has more than {MAX_PARTS} chunks")


def _walk_jpeg(data: bytes) -> bool:
    """Whether it is sequential or progressive Huffman code with nothing odd between its markers: where libjpeg only warns, Go may refuse.

    Damage inside the code itself is not seen here, and libjpeg makes some picture of it.
    """
    at, is_plain, in_scan, scans = 2, True, False, 0
    for _ in range(MAX_PARTS):
        found = _next_marker(data, at)
        is_plain = is_plain and (in_scan or found == at)
        code, at = data[found + 1], found + 2
        if code == 0xD9:
            return is_plain and scans > 0
        if code == 0xFF:  # a marker may have any number of these in front
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


def _is_upright(image: Image.Image) -> bool:
    return _orientation(image) not in _TRANSPOSE


def _orientation(image: Image.Image) -> int:
    """What vLLM goes by and Ollama does not. Read here: Pillow would read all tags."""
    exif, xmp = image.info.get("exif"), image.info.get("XML:com.adobe.xmp") or image.info.get("xmp")
    if (
        exif is None and "Raw profile type exif" in image.info
    ):  # as ImageMagick writes it: a name, a length, hexadecimal digits
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
    """Tag 0x0112 of the first directory (TIFF 6.0, section 2)."""
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


def _opaque(image: Image.Image) -> Image.Image:
    """8-bit grey or RGB; what is transparent lies on white, as in vLLM."""
    if image.mode.startswith("I"):
        return image.point(lambda value: value * (1 / 256)).convert("L")  # Pillow alone would cut off at 255
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # of 64 million pixels a copy is 256 MB
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def main() -> int:
    """Status 0 with the picture to use instead on standard output, nothing for "as it is"; status 3 with what is wrong."""
    os.nice(10)  # the gateway goes first
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    status = 0
    try:
        picture = begin(sys.stdin.buffer.read())
        out = AS_IS if picture.is_plain and is_taken_as_is(picture) else convert(picture)
    except BadImage as error:
        status, out = BAD, str(error).encode()
    sys.stdout.buffer.write(out)
    return status


if __name__ == "__main__":
    sys.exit(main())
