"""Check and conversion of one image, so that every engine reads it alike.

The module depends on Pillow and on nothing else of the gateway but `image_structure.py`, because
child processes run it as well (`image_child.py`).

"Alike" was tested on Ollama 0.24 (Go's decoders), Ollama 0.33 (stb_image) and vLLM 0.32 (Pillow):
see docs/dialect.md.
"""

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import GifImagePlugin, Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from gateway.chat.image_structure import (
    CUT,
    DAMAGED,
    GIF,
    JPEG,
    ORIENTATIONS,
    PNG,
    WEBP,
    BadImage,
    check_size,
    is_upright,
    kind_of,
    orientation_of,
    walk_jpeg,
    walk_png,
    webp_size,
)

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
TOO_MUCH_MEMORY = "it takes too much memory to decode"
AS_IS = b""

PLAIN_MODES = ("1", "L", "P", "RGB", "RGBA", "LA")


class _JpegFile(JpegImagePlugin.JpegImageFile):
    def _read_dpi_from_exif(self) -> None:
        """Do nothing. Pillow reads all tags for this, and a few KB of tags can name gigabytes."""


# Used instead of Image.open, which supports more formats, loads all of them on first use, and warns
# about files that are rejected here anyway.
_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    PNG: PngImagePlugin.PngImageFile,
    JPEG: _JpegFile,
    GIF: GifImagePlugin.GifImageFile,
    WEBP: WebPImagePlugin.WebPImageFile,
}


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
        size: tuple[int, int] = webp_size(data) if kind == WEBP else struct.unpack_from("<HH", data, 6)
    check_size(*size)
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
            is_plain, data = walk_png(data)
        elif kind == JPEG:
            # The WebP decoder allocates memory for all pixels when it is opened.
            is_plain = walk_jpeg(data)
        elif kind == WEBP:
            check_size(*webp_size(data))
        image = _OPENERS[kind](io.BytesIO(data))
        check_size(*image.size)
        is_plain = is_plain and image.mode in PLAIN_MODES and is_upright(image) and shape_for(image.size) == image.size
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
        return opaque and is_upright(image)  # a PNG may contain the orientation after its pixels


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
        orientation = ORIENTATIONS.get(orientation_of(parsed.image))
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
