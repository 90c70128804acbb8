"""Sample images for the tests, and helpers that check what becomes of them."""

import base64
import io
import random
import struct
import zlib

import pytest
from PIL import Image, ImageChops

from gateway.chat import image_structure
from gateway.chat.images import ImageNormalizer
from gateway.errors import InvalidImage

PARAM = "messages[0].content[0].image_url.url"
Size = tuple[int, int]


def drawing(size: Size = (120, 90), seed: int = 1) -> Image.Image:
    """Return a colourful image without symmetry."""
    grey = Image.linear_gradient("L").resize(size)
    image = Image.merge(
        "RGB", (grey, grey.transpose(Image.Transpose.ROTATE_90).resize(size), Image.radial_gradient("L").resize(size))
    )
    numbers = random.Random(seed)
    image.paste((255, numbers.randrange(256), 0), (0, 0, size[0] // 3, size[1] // 4))
    return image


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags.tobytes()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(size: Size, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, colour, 0, 0, 0))
    return b"".join((b"\x89PNG\r\n\x1a\n", head, *extra, chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")))


def with_chunk(data: bytes, kind: bytes, payload: bytes) -> bytes:
    return data[:33] + chunk(kind, payload) + data[33:]


def url_of(data: bytes) -> str:
    return f"data:image/{image_structure.kind_of(data) or 'png'};base64,{base64.b64encode(data).decode()}"


def opened(url: str) -> Image.Image:
    """Decode the image in a canonical URL of a PNG or JPEG."""
    head, _, payload = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    assert head == f"data:image/{str(image.format).lower()};base64"
    assert image.format in ("PNG", "JPEG")
    image.load()
    return image


def distance(one: Image.Image, other: Image.Image) -> float:
    """Return the mean difference of the pixels, from 0 to 255."""
    assert one.size == other.size
    counts = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).convert("L").histogram()
    return sum(value * count for value, count in enumerate(counts)) / (one.width * one.height)


def rejection_message(images: ImageNormalizer, url: str) -> str:
    with pytest.raises(InvalidImage) as caught:
        images.check(url, PARAM)
    assert caught.value.param == PARAM
    assert PARAM in caught.value.message
    assert_no_warning_behind(caught.value)
    return caught.value.message


def assert_no_warning_behind(error: InvalidImage) -> None:
    """Check that Pillow's warning is not the cause. Outside of tests it would reach standard error."""
    assert error.__cause__ is not None
    assert not isinstance(error.__cause__.__cause__, Warning)


DRAWING = drawing()
GREY = DRAWING.convert("L")
PALETTE = DRAWING.quantize(64)
VEIL = Image.linear_gradient("L").resize(DRAWING.size)
VEILED = Image.merge("RGBA", (*DRAWING.split(), VEIL))
ON_WHITE = Image.composite(DRAWING, Image.new("RGB", DRAWING.size, "white"), VEIL)
PNG = saved(DRAWING, "PNG")
JPEG = saved(DRAWING, "JPEG", quality=90)
OTHER = drawing(seed=2)

UNCHANGED = {
    "png": PNG,
    "png grey": saved(GREY, "PNG"),
    "png 1 bit": saved(DRAWING.convert("1"), "PNG"),
    "png palette": saved(PALETTE, "PNG"),
    "png palette of 4 bits": saved(DRAWING.quantize(16), "PNG", bits=4),
    "png rgba, opaque": saved(DRAWING.convert("RGBA"), "PNG"),
    "png grey with alpha, opaque": saved(GREY.convert("LA"), "PNG"),
    "png with text": with_chunk(PNG, b"tEXt", b"Title\0drawing"),
    "png, bytes after its end": PNG + b"more",
    "png of 32 x 32": saved(drawing((32, 32)), "PNG"),
    "png of 6400 x 32": saved(drawing((6400, 32)), "PNG"),
    "jpeg": JPEG,
    "jpeg without subsampling": saved(DRAWING, "JPEG", subsampling=0),
    "jpeg grey": saved(GREY, "JPEG"),
    "jpeg progressive": saved(DRAWING, "JPEG", progressive=True),
    "jpeg in rgb": saved(DRAWING, "JPEG", keep_rgb=True),
    "jpeg with restart markers": saved(DRAWING, "JPEG", restart_marker_rows=1),
    "jpeg upright by its exif": saved(DRAWING, "JPEG", exif=exif(1)),
    "jpeg, bytes after its end": JPEG + b"more",
    "jpeg of several pictures": saved(DRAWING, "MPO", save_all=True, append_images=[OTHER]),
}
"""Images that all engines read alike."""

CONVERTED = {
    "png rgba": (saved(VEILED, "PNG"), ON_WHITE, False),
    "png palette with alpha": (
        saved(PALETTE, "PNG", transparency=bytes(64)),
        Image.new("RGB", DRAWING.size, "white"),
        False,
    ),
    "png with a colour for transparency": (
        saved(Image.new("RGB", (40, 40), "red"), "PNG", transparency=(255, 0, 0)),
        Image.new("RGB", (40, 40), "white"),
        False,
    ),
    "png 16-bit grey": (
        png((40, 40), 16, 0, (b"\0" + b"\x81\x00" * 40) * 40),
        Image.new("RGB", (40, 40), (0x81, 0x81, 0x81)),
        False,
    ),
    "png turned by exif": (saved(DRAWING, "PNG", exif=exif(6)), DRAWING.transpose(Image.Transpose.ROTATE_270), False),
    "png animated": (saved(DRAWING, "PNG", save_all=True, append_images=[OTHER]), DRAWING, False),
    "png with odd animation": (with_chunk(PNG, b"acTL", b"\0\0\0\0"), DRAWING, False),
    "jpeg cmyk": (saved(DRAWING.convert("CMYK"), "JPEG", quality=95), DRAWING, True),
    "webp": (saved(DRAWING, "WEBP", quality=95), DRAWING, True),
    "webp lossless": (saved(DRAWING, "WEBP", lossless=True), DRAWING, False),
    "webp with alpha": (saved(VEILED, "WEBP", lossless=True), ON_WHITE, False),
    "webp animated": (saved(DRAWING, "WEBP", lossless=True, save_all=True, append_images=[OTHER]), DRAWING, False),
    "gif": (saved(PALETTE, "GIF"), PALETTE, False),
    "gif animated": (saved(PALETTE, "GIF", save_all=True, append_images=[OTHER.quantize(64)]), PALETTE, False),
    **{
        f"jpeg turned by exif {value}": (
            saved(DRAWING, "JPEG", quality=95, exif=exif(value)),
            DRAWING.transpose(how),
            True,
        )
        for value, how in image_structure.ORIENTATIONS.items()
    },
}
"""Images that are converted: bytes, what the result shows, and whether losses are acceptable."""

WHOLE = {
    "png": PNG,
    "png palette": saved(PALETTE, "PNG"),
    "jpeg": JPEG,
    "jpeg progressive": saved(DRAWING, "JPEG", progressive=True),
    "webp": saved(DRAWING, "WEBP"),
    "webp lossless": saved(DRAWING, "WEBP", lossless=True),
    "webp with alpha": saved(VEILED, "WEBP"),
}
"""Complete images, to be truncated or corrupted."""
