"""Tests of the check and conversion of one image, through `ImageNormalizer.check`.

Covers: gateway/chat/image_structure.py
"""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway.chat import image_file
from gateway.chat.images import ImageNormalizer
from gateway.errors import InvalidImage
from tests.chat.image_samples import (
    CONVERTED,
    DRAWING,
    JPEG,
    PALETTE,
    PARAM,
    PNG,
    UNCHANGED,
    WHOLE,
    Size,
    assert_no_warning_behind,
    chunk,
    distance,
    drawing,
    opened,
    png,
    rejection_message,
    saved,
    url_of,
    with_chunk,
)
from tests.fakes.processor_time import assert_at_most


@pytest.mark.parametrize("name", UNCHANGED)
def test_image_that_all_engines_read_alike_is_unchanged(images: ImageNormalizer, name: str) -> None:
    url = url_of(UNCHANGED[name])
    assert images.check(url, PARAM)[0] is url


@pytest.mark.parametrize("name", CONVERTED)
def test_image_that_engines_read_differently_is_converted_and_looks_the_same(
    images: ImageNormalizer, name: str
) -> None:
    data, expected, is_lossy = CONVERTED[name]
    url, pixels, *_ = images.check(url_of(data), PARAM)
    result = opened(url)
    assert result.mode in ("L", "RGB")
    assert distance(result, expected) <= (
        6.0 if is_lossy else 0.5
    )  # half a step, since decoders round alpha differently
    assert pixels == expected.width * expected.height
    assert images.check(url, PARAM)[0] is url, "the result itself is in the plain form"


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((1, 1), (32, 32)),
        ((2, 9), (32, 32)),
        ((31, 32), (32, 32)),
        ((2000, 4), (2000, 32)),
        ((4, 2000), (32, 2000)),
        ((804, 4), (804, 32)),
        ((6432, 32), (6432, 33)),
    ],
)
def test_tiny_and_very_narrow_images_are_stretched(images: ImageNormalizer, size: Size, expected: Size) -> None:
    result = opened(images.check(url_of(saved(drawing(size), "PNG")), PARAM)[0])
    assert result.size == expected


def test_image_of_one_pixel_keeps_its_colour(images: ImageNormalizer) -> None:
    result = opened(images.check(url_of(saved(Image.new("RGB", (1, 1), (200, 30, 40)), "PNG")), PARAM)[0])
    assert result.getcolors() == [(32 * 32, (200, 30, 40))]


@pytest.mark.parametrize("size", [(64_000_000, 1), (1, 64_000_000), (65_535, 900), (8000, 8000), (3, 1)])
def test_shape_stays_within_the_bounds(size: Size) -> None:
    width, height = image_file.shape_for(size, image_file.MAX_CONVERTED_PIXELS)
    assert min(width, height) >= 32
    assert max(width, height) <= min(width, height) * image_file.MAX_ASPECT
    assert width * height <= image_file.MAX_CONVERTED_PIXELS
    assert max(width, height) <= image_file.MAX_CONVERTED_SIDE


@pytest.mark.parametrize("name", WHOLE)
def test_image_truncated_anywhere_is_rejected(images: ImageNormalizer, name: str) -> None:
    data = WHOLE[name]
    places = {*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), *range(len(data) - 16, len(data))}
    for place in places:
        rejection_message(images, url_of(data[:place]))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_gif_truncated_in_its_first_frame_is_rejected(images: ImageNormalizer, part: float) -> None:
    data = saved(PALETTE, "GIF")
    rejection_message(images, url_of(data[: int(len(data) * part) + 20]))


def test_png_with_a_wrong_byte_is_rejected(images: ImageNormalizer) -> None:
    for place in range(8, len(PNG), len(PNG) // 100):
        rejection_message(images, url_of(PNG[:place] + bytes([PNG[place] ^ 4]) + PNG[place + 1 :]))


def gif_bomb() -> bytes:
    """Return a GIF with a screen of one pixel and a first frame of 60,000 by 60,000."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x44\x01\x00;"


def webp_bomb() -> bytes:
    lossless = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0\0"
    return b"RIFF" + struct.pack("<I", len(lossless) + 4) + b"WEBP" + lossless


def endless_scans() -> bytes:
    data = saved(DRAWING, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 200 + data[-2:]


ORDINARY = url_of(saved(drawing((1600, 1200)), "PNG"))
"""A picture such as clients send, whose pixels have to be decoded."""
BOMBS = {
    "png of 50,000 x 50,000": (png((50_000, 50_000), 1, 0, bytes(6251) * 2000), "50000 x 50000 pixels"),
    "png a little too large": (png((8001, 8000), 1, 0, bytes(1002) * 8000), "8001 x 8000 pixels"),
    "png of a million chunks": (
        with_chunk(PNG, b"teSt", b"")[:45] + chunk(b"teSt", b"") * 100_000 + PNG[33:],
        "chunks",
    ),
    "gif": (gif_bomb(), "it is"),
    "webp": (webp_bomb(), "16383 x 16383 pixels"),
    "jpeg of many scans": (endless_scans(), "scans"),
    "jpeg of many segments": (JPEG[:2] + b"\xff\xfe\x00\x02" * 100_000 + JPEG[2:], "segments"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_decompression_bomb_is_rejected_cheaply(images: ImageNormalizer, name: str) -> None:
    data, words = BOMBS[name]
    url = url_of(data)
    assert words in rejection_message(images, url)
    assert_at_most(5, lambda: rejection_message(images, url), yardstick=lambda: images.check(ORDINARY, PARAM))


def test_exif_that_names_gigabytes_is_cheap(images: ImageNormalizer) -> None:
    entries = b"".join(struct.pack("<HHII", tag, 2, 60_000, 8) for tag in range(0x9000, 0x9000 + 5000))
    data = (
        JPEG[:2]
        + b"\xff\xe1"
        + struct.pack(">H", len(entries) + 18)
        + b"Exif\0\0II*\0\x08\0\0\0"
        + struct.pack("<H", 5000)
        + entries
        + JPEG[2:]
    )
    url = url_of(data)
    assert images.check(url, PARAM)[0] is url
    assert_at_most(5, lambda: images.check(url, PARAM), yardstick=lambda: images.check(ORDINARY, PARAM))


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF"])
def test_other_format_is_rejected(images: ImageNormalizer, kind: str) -> None:
    assert "not a PNG, JPEG, WebP or GIF" in rejection_message(images, url_of(saved(DRAWING, kind)))


@pytest.mark.parametrize(
    "data", [b"\x00", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", bytes(1000)]
)
def test_bytes_that_are_not_an_image_are_rejected(images: ImageNormalizer, data: bytes) -> None:
    assert "not a PNG, JPEG, WebP or GIF" in rejection_message(images, url_of(data))


def test_empty_image_is_rejected(images: ImageNormalizer) -> None:
    assert "empty" in rejection_message(images, "data:image/png;base64,")


BEGINNINGS = [
    data[:cut]
    for data in (PNG, JPEG, WHOLE["webp"], WHOLE["webp lossless"], WHOLE["webp with alpha"])
    for cut in (0, 4, 16, 40, 400)
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=600))
def test_any_bytes_are_rejected_or_become_a_canonical_url(
    images: ImageNormalizer, beginning: bytes, rest: bytes
) -> None:
    assert_rejected_or_canonical(images, beginning + rest)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_corruption_is_rejected_or_becomes_a_canonical_url(
    images: ImageNormalizer, name: str, wrong: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE[name])
    for place, value in wrong:
        data[place % len(data)] = value
    assert_rejected_or_canonical(images, bytes(data))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_corruption_of_a_gif_is_rejected_or_becomes_a_canonical_url(
    images: ImageNormalizer, wrong: list[tuple[int, int]]
) -> None:
    data = bytearray(CONVERTED["gif animated"][0])
    for place, value in wrong:
        data[6 + place % (len(data) - 6)] = value
    assert_rejected_or_canonical(images, bytes(data))


def assert_rejected_or_canonical(images: ImageNormalizer, data: bytes) -> None:
    try:
        url = images.check(url_of(data), PARAM).url
    except InvalidImage as error:
        assert_no_warning_behind(error)
    else:
        opened(url)
