import io
import struct
from pathlib import Path

import pytest
from PIL import Image

from gateway.bench.images import InvalidImage, make_images, read_folder, read_image


def psd(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    """Return a flat RGB Photoshop document of one colour."""
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, height, width, 8, 3)
    empty_sections = struct.pack(">III", 0, 0, 0)
    planes = b"".join(bytes([value]) * (width * height) for value in colour)
    return head + empty_sections + struct.pack(">H", 0) + planes


def test_a_psd_is_sent_as_the_png_of_its_composite(tmp_path: Path) -> None:
    (tmp_path / "a.psd").write_bytes(psd(4, 3, (10, 200, 30)))
    image = read_image(tmp_path / "a.psd")
    assert (image.media_type, image.name) == ("image/png", "a.psd")
    with Image.open(io.BytesIO(image.data)) as read:
        assert (read.format, read.size, read.getpixel((0, 0))) == ("PNG", (4, 3), (10, 200, 30))


@pytest.mark.parametrize(("kind", "media_type"), [("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp")])
def test_what_engines_read_is_sent_as_it_is(tmp_path: Path, kind: str, media_type: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    assert (read_image(path).data, read_image(path).media_type) == (path.read_bytes(), media_type)


@pytest.mark.parametrize("kind", ["bmp", "gif", "tiff"])
def test_other_kinds_become_png(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (4, 4), (1, 2, 3)).save(path)
    assert read_image(path).data.startswith(b"\x89PNG")


def test_transparency_survives(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.new("RGBA", (4, 4), (1, 2, 3, 128)).save(path)
    with Image.open(io.BytesIO(read_image(path).data)) as read:
        assert read.getpixel((0, 0)) == (1, 2, 3, 128)


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "notes.txt"):
        (tmp_path / name).write_bytes(make_images(1, 8)[0].data)
    assert [image.name for image in read_folder(tmp_path)] == ["a.PNG", "b.png"]


def test_what_is_not_an_image_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(InvalidImage, match=r"a\.png: not an image"):
        read_folder(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(InvalidImage, match=r"a\.txt: expected one of"):
        read_image(tmp_path / "a.txt")
    with pytest.raises(InvalidImage, match="No such file"):
        read_image(tmp_path / "no.png")


def test_a_folder_without_images_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidImage, match="no images"):
        read_folder(tmp_path)
    with pytest.raises(InvalidImage, match="not a folder"):
        read_folder(tmp_path / "no")


def test_made_images_differ_and_are_the_same_for_a_seed() -> None:
    images = make_images(4, 32, seed=1)
    assert len({image.data for image in images}) == 4
    assert images == make_images(4, 32, seed=1)
    assert images != make_images(4, 32, seed=2)
