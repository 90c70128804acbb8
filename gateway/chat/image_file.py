"""Check and conversion of one image, so that every engine reads it alike.

The module depends on Pillow and on nothing of the gateway, because it also runs as a script in a
process of its own: `python image_file.py SITE_PACKAGES`. It reads images from standard input, each
after its length and maximum size (`REQUEST`), and writes an answer to each on standard output: `ANSWER`, then the
result. It ends with its input.

"Alike" was tested on Ollama 0.24 (Go's decoders), Ollama 0.33 (stb_image) and vLLM 0.32 (Pillow):
see docs/dialect.md.
"""

import sys

if __name__ == "__main__":
    sys.path.append(sys.argv[1])  # Pillow's location: the process has no environment that could name it

import fcntl
import io
import os
import re
import resource
import signal
import struct
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

MAX_PIXELS = 64_000_000
"""Maximum number of pixels: 8000 × 8000, more than a phone's 50 megapixels.

Decoding so many takes 256 MB. All three engines accept them.
"""
MAX_CONVERTED_PIXELS = 1 << 24
"""Maximum number of pixels of a converted image.

Nothing is lost, because Qwen3-VL's own processing shrinks images to this size.
"""
MAX_CONVERTED_SIDE = 1 << 14
MIN_SIDE = 32
"""Minimum width and height.

Ollama 0.24's runner crashes, with all requests in progress, on a Qwen3-VL image that is less than
32 pixels wide or high (28 for Qwen2.5-VL).
"""
MAX_ASPECT = 200
"""Maximum aspect ratio.

Above it, the same runner crashes and vLLM answers 400: Qwen's `smart_resize`.
"""
LARGE_PIXELS = 1 << 22
LARGE_BYTES = 1 << 22
"""Number of pixels and bytes above which an image is large.

A smaller one takes at most a second of CPU.
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
TOO_MUCH_MEMORY = "it takes too much memory to decode"
AS_IS = b""

REQUEST = struct.Struct(">QQ")
"""Number of bytes of the image that follows, and its maximum number of pixels (0: none)."""
ANSWER = struct.Struct(">BQdQ")
"""Status, number of pixels, seconds of CPU, and number of bytes of the result that follows."""
DONE, BAD, FAILED = 0, 1, 2
"""Status of an answer.

`DONE`: the result is the image to use instead, or empty if the image can be used as it is. `BAD`:
it is the reason why the image is rejected. `FAILED`: it is the traceback of an error in this module.
"""
CPU_SECONDS = 15
"""CPU time for an image.

64 million pixels take up to 5 s. `RLIMIT_CPU` would add up over the images of a process.
"""
ORPHAN_SECONDS = 60
"""Time for an image, should the gateway be gone and not end the process."""
OVER_TIME = (-signal.SIGPROF, -signal.SIGALRM)
MEMORY = 2 << 30

PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "LA")


class _JpegFile(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Do nothing. Pillow reads all tags for this, and a few KB of tags can name gigabytes."""


PNG, JPEG, GIF, WEBP = "png", "jpeg", "gif", "webp"
# Used instead of Image.open, which supports more formats, loads all of them on first use, and warns
# about files that are rejected here anyway.
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
    """Incomplete image, unsupported format or excessive size.

    The text of the exception is the second half of a sentence.
    """


class ParsedImage(NamedTuple):
    """Image of which only the beginning has been read."""

    kind: str
    data: bytes
    image: ImageFile.ImageFile
    pixels: int
    is_plain: bool
    """True if every engine accepts its structure. Its pixels have not been decoded."""

    @property
    def is_small_and_plain(self) -> bool:
        """Return whether the image may be decoded in a thread of the gateway.

        Pillow releases the GIL while it decodes PNG and JPEG, and 4 million pixels take 16 MB. It
        holds the GIL while it decodes WebP and encodes PNG.
        """
        return self.is_plain and not is_large(self.data, self.pixels)


@contextmanager
def _reading() -> Iterator[None]:
    """Turn every exception into `BadImage`.

    Pillow has no base class for its errors on hostile input.
    """
    try:
        yield
    except BadImage:
        raise
    except MemoryError as error:
        raise BadImage(TOO_MUCH_MEMORY) from error
    except Exception as error:
        raise BadImage(CUT if "truncated" in str(error) else DAMAGED) from error


def kind_of(data: bytes | bytearray) -> str | None:
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return PNG
    if data.startswith(b"\xff\xd8\xff"):
        return JPEG
    if data.startswith((b"GIF87a", b"GIF89a")):
        return GIF
    return WEBP if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def is_large(data: bytes, pixels: int) -> bool:
    return pixels > LARGE_PIXELS or len(data) > LARGE_BYTES


def declared_pixels(data: bytes) -> int | None:
    """Return the number of pixels that a GIF or WebP declares, or None for another format.

    Pillow is not needed for this: it holds the GIL while it opens these formats, and allocates
    memory for all pixels of a WebP.

    Raises:
        BadImage: the image is too large, or ends before its size.
    """
    kind = kind_of(data)
    if kind not in (GIF, WEBP):
        return None
    with _reading():
        size: tuple[int, int] = _webp_size(data) if kind == WEBP else struct.unpack_from("<HH", data, 6)
    _check_size(*size)
    return size[0] * size[1]


def begin(data: bytes) -> ParsedImage:
    """Read the beginning, and for PNG and JPEG the structure up to the end.

    Raises:
        BadImage: the format is unknown, or the image is truncated, damaged, or larger than
            `MAX_PIXELS`.
    """
    kind = kind_of(data)
    if kind is None:
        raise BadImage("it is not a PNG, JPEG, WebP or GIF" if data else "it is empty")
    with _reading():
        is_plain = False
        if kind == PNG:
            is_plain, data = _walk_png(data)
        elif kind == JPEG:
            # The WebP decoder allocates memory for all pixels when it is opened.
            is_plain = _walk_jpeg(data)
        elif kind == WEBP:
            _check_size(*_webp_size(data))
        image = _OPENERS[kind](io.BytesIO(data))
        _check_size(*image.size)
        is_plain = is_plain and image.mode in PLAIN_MODES and _is_upright(image) and shape_for(image.size) == image.size
    return ParsedImage(kind, data, image, image.width * image.height, is_plain)


def is_taken_as_is(parsed: ParsedImage) -> bool:
    """Return whether every engine accepts a plain image unchanged.

    This is the case if all of its pixels can be decoded and none is transparent.

    Raises:
        BadImage: pixels are missing.
    """
    image = parsed.image
    with _reading():
        if parsed.kind == JPEG:
            # All data is read, but an eighth of each side is enough to keep.
            image.draft(None, (image.width // 8, image.height // 8))
        image.load()
        # Transparent pixels become white in vLLM and Ollama 0.24, and show their hidden colour in
        # 0.33.
        opaque = image.mode not in ("RGBA", "LA") or image.getchannel("A").getextrema() == (255, 255)
        return opaque and _is_upright(image)  # a PNG may contain the orientation after its pixels


def convert(parsed: ParsedImage, max_pixels: int = 0) -> bytes:
    """Convert the image to a PNG, or to a JPEG if it was compressed lossily.

    The result is upright, 8 bits deep, on a white background, and of a shape that all engines
    accept. It has at most `max_pixels`, if they are not 0: then it is scaled down with Lanczos's
    filter, which keeps text readable.

    Raises:
        BadImage: pixels are missing.
    """
    kind = JPEG if parsed.kind == JPEG or parsed.data[12:16] == b"VP8 " else PNG
    with _reading():
        image: Image.Image = parsed.image
        limit = min(max_pixels or MAX_CONVERTED_PIXELS, MAX_CONVERTED_PIXELS)
        shape = shape_for(image.size, limit)
        if parsed.kind == JPEG:
            width, height = shape
            # Decode at a lower resolution, but at twice the final one if the filter is to see the details.
            parsed.image.draft(None, (2 * width, 2 * height) if max_pixels else (width, height))
        image.load()
        orientation = _TRANSPOSE.get(_orientation(parsed.image))
        image = _opaque(image)
        if image.size != shape:
            is_smaller = shape[0] < image.width and shape[1] < image.height
            kernel = Image.Resampling.LANCZOS if is_smaller and max_pixels else Image.Resampling.BICUBIC
            image = image.resize(shape, kernel)
        if orientation is not None:
            image = image.transpose(orientation)
        out = io.BytesIO()
        # Drop the metadata, because its orientation would rotate the image twice. Do not subsample
        # the chroma, because decoders undo that differently.
        if kind == JPEG:
            image.save(out, "JPEG", quality=95, subsampling=0)
        else:
            image.save(out, "PNG", compress_level=1)
        return out.getvalue()


def shape_for(size: tuple[int, int], max_pixels: int | None = None) -> tuple[int, int]:
    """Return the nearest width and height that all engines accept.

    Neither side is too short, the ratio is not extreme, and the area is at most `max_pixels`. The
    short side is stretched, as Qwen's own processing does within its bounds; padding would turn an
    area of one colour into a dot.
    """
    width, height = size
    if max_pixels is not None:
        scale = min(1.0, (max_pixels / (width * height)) ** 0.5, MAX_CONVERTED_SIDE / max(size))
        width, height = max(1, int(width * scale)), max(1, int(height * scale))
    least = max(MIN_SIDE, -(-max(width, height) // MAX_ASPECT))
    width, height = max(width, least), max(height, least)
    if max_pixels is not None and width * height > max_pixels:  # the short side was stretched
        longest = max(MIN_SIDE, max_pixels // min(width, height))
        width, height = min(width, longest), min(height, longest)
    return width, height


def _check_size(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise BadImage("it has no pixels")
    if width * height > MAX_PIXELS:
        raise BadImage(f"it has {width} x {height} pixels; width times height may be at most {MAX_PIXELS}")


def _webp_size(data: bytes) -> tuple[int, int]:
    """Return the size of the canvas (https://developers.google.com/speed/webp/docs/riff_container)."""
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits: int = struct.unpack_from("<I", data, 21)[0]
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", data, 26)
    return width & 0x3FFF, height & 0x3FFF


def _walk_png(data: bytes) -> tuple[bool, bytes]:
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


def _walk_jpeg(data: bytes) -> bool:
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


def _is_upright(image: Image.Image) -> bool:
    return _orientation(image) not in _TRANSPOSE


def _orientation(image: Image.Image) -> int:
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


def _opaque(image: Image.Image) -> Image.Image:
    """Return the image as 8-bit grey or RGB. Transparent pixels become white, as in vLLM."""
    if image.mode.startswith("I"):
        return image.point(lambda value: value * (1 / 256)).convert("L")  # Pillow alone would clip at 255
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image if image.mode == "RGBA" else image.convert("RGBA")  # a copy of 64 million pixels takes 256 MB
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def main() -> int:
    """Answer for one image after another until standard input ends."""
    os.nice(10)  # the gateway has priority
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway, which ends this process
    if sys.platform != "darwin":  # macOS refuses to limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # no image on disk
        resource.setrlimit(limit, (0, 0))
    os.set_blocking(sys.stderr.fileno(), False)  # it is read only once this process has ended
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(REQUEST.size)) == REQUEST.size:
        length, max_pixels = REQUEST.unpack(head)
        data = source.read(length)
        if len(data) < length:
            break
        began = time.process_time()
        with _limits(source.fileno()):
            status, pixels, out = _answer(data, max_pixels)
        del data
        sink.write(ANSWER.pack(status, pixels, time.process_time() - began, len(out)))
        sink.write(out)
        sink.flush()
    return 0


@contextmanager
def _limits(source: int) -> Iterator[None]:
    """Have the kernel end this process if the image takes too long, or the gateway ends.

    The signals keep their default action, which no decoder can delay. `SIGIO` says that `source`
    was closed, because the gateway writes nothing before it has its answer (not on macOS).
    """
    flags = fcntl.fcntl(source, fcntl.F_GETFL)
    fcntl.fcntl(source, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(source, fcntl.F_SETFL, flags | fcntl.FASYNC)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        fcntl.fcntl(source, fcntl.F_SETFL, flags)


def _answer(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Return the status, the number of pixels, and the result."""
    pixels = 0
    try:
        parsed = begin(data)
        pixels = parsed.pixels
        is_small = not max_pixels or pixels <= max_pixels
        as_is = is_small and parsed.is_plain and is_taken_as_is(parsed)
        return DONE, pixels, AS_IS if as_is else convert(parsed, max_pixels)
    except BadImage as error:
        return BAD, pixels, str(error).encode()
    except MemoryError:
        return BAD, pixels, TOO_MUCH_MEMORY.encode()
    except Exception:
        return FAILED, pixels, traceback.format_exc().encode()[-500:]


if __name__ == "__main__":
    sys.exit(main())
