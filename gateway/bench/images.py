"""Images to send: from a folder, converted where engines need it, or made up."""

import io
import random
from pathlib import Path

from PIL import Image, ImageDraw, UnidentifiedImageError

from gateway.bench.target import BenchImage

AS_IS = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
"""Files that every engine reads as they are."""
CONVERTED = (".psd", ".bmp", ".gif", ".tif", ".tiff")
"""Files that are sent as PNG. Of a PSD, Pillow reads the composite picture."""


class InvalidImage(ValueError):
    """A file is not an image that can be sent; the message names it."""


def read_image(path: Path) -> BenchImage:
    """Read one image.

    Raises:
        InvalidImage: it is unreadable, or not an image of a known kind.
    """
    suffix = path.suffix.lower()
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise InvalidImage(f"{path}: {problem.strerror}") from problem
    if suffix not in AS_IS and suffix not in CONVERTED:
        raise InvalidImage(f"{path}: expected one of {', '.join((*AS_IS, *CONVERTED))}")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if suffix in AS_IS:
                image.verify()
                return BenchImage(data, AS_IS[suffix], path.name)
            return BenchImage(_png(image), "image/png", path.name)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as problem:
        raise InvalidImage(f"{path}: not an image that can be read") from problem


def read_folder(folder: Path) -> list[BenchImage]:
    """Read every image of a folder, in the order of their names.

    Raises:
        InvalidImage: the folder has none, or one of them is broken.
    """
    if not folder.is_dir():
        raise InvalidImage(f"{folder}: not a folder")
    known = {*AS_IS, *CONVERTED}
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix.lower() in known)
    if not files:
        raise InvalidImage(f"{folder}: no images ({', '.join(sorted(known))})")
    return [read_image(file) for file in files]


def make_images(count: int, size: int, seed: int = 0) -> list[BenchImage]:
    """Return `count` different square PNGs with coloured shapes, the same ones for the same seed."""
    return [_made(number, size, random.Random(f"{seed}/{number}")) for number in range(count)]


def _made(number: int, size: int, rng: random.Random) -> BenchImage:
    def colour() -> tuple[int, int, int]:
        return rng.randrange(256), rng.randrange(256), rng.randrange(256)

    image = Image.new("RGB", (size, size), colour())
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, top = rng.randrange(size), rng.randrange(size)
        box = (left, top, left + rng.randrange(1, size), top + rng.randrange(1, size))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=colour())
    return BenchImage(_png(image), "image/png", f"made-{number + 1}.png")


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    has_alpha = image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info
    image.convert("RGBA" if has_alpha else "RGB").save(out, "PNG")
    return out.getvalue()
