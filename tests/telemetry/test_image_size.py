"""Sizes of images by their first bytes."""

import io

import pytest
from PIL import Image

from gateway.telemetry.image_size import pixels


def encoded(form: str, size: tuple[int, int], **options: object) -> bytes:
    file = io.BytesIO()
    Image.effect_noise(size, 50).convert("RGB").save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}), ("GIF", {}), ("JPEG", {}), ("JPEG", {"progressive": True}), ("JPEG", {"comment": b"c" * 3000}),
        ("WEBP", {}), ("WEBP", {"lossless": True}), ("WEBP", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0"}),
    ],
)  # fmt: skip
def test_pixels_are_read_from_the_beginning(form: str, options: dict[str, object]) -> None:
    data = encoded(form, (70, 41), **options)
    assert pixels(data[:4096]) == 70 * 41


@pytest.mark.parametrize("form", ["PNG", "GIF", "JPEG", "WEBP"])
def test_what_is_cut_off_or_unknown_has_no_size(form: str) -> None:
    data = encoded(form, (70, 41))
    for length in (0, 4, 8):
        assert pixels(data[:length]) is None
    assert pixels(b"\xff\xd8\xff\xe0\xff\xff") is None
    assert pixels(b"plain text that is no image at all") is None
