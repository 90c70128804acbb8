"""What becomes of an image: taken as it is, written anew, or refused by name, and nothing else ever."""

import asyncio
import base64
import io
import random
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops

from gateway.chat import image_file as picture
from gateway.chat import images as images_module
from gateway.chat.images import ImageNormalizer, decode
from gateway.chat.request import Chat, ImagePart, ImageUrl, Message, TextPart
from gateway.errors import InvalidImage, InvalidImageUrl, InvalidRequest

PARAM = "messages[0].content[0].image_url.url"
Size = tuple[int, int]


@pytest.fixture(scope="module")
def images() -> Iterator[ImageNormalizer]:
    images = ImageNormalizer()
    yield images
    images.close()


def drawing(size: Size = (120, 90), seed: int = 1) -> Image.Image:
    """A colourful picture without symmetry."""
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
    return f"data:image/{picture.kind_of(data) or 'png'};base64,{base64.b64encode(data).decode()}"


def opened(url: str) -> Image.Image:
    """The picture in a canonical URL of a PNG or JPEG."""
    head, _, payload = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(payload, validate=True)))
    assert head == f"data:image/{str(image.format).lower()};base64"
    assert image.format in ("PNG", "JPEG")
    image.load()
    return image


def distance(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of their pixels, 0 to 255."""
    assert one.size == other.size
    counts = ImageChops.difference(one.convert("RGB"), other.convert("RGB")).convert("L").histogram()
    return sum(value * count for value, count in enumerate(counts)) / (one.width * one.height)


def chat_with(*urls: str) -> Chat:
    return Chat(model="m", messages=[Message("user", [ImagePart(ImageUrl(url)) for url in urls])])


def urls_of(chat: Chat) -> list[str]:
    return [url for message in chat.messages for url in message.images]


DRAWING = drawing()
GREY = DRAWING.convert("L")
PALETTE = DRAWING.quantize(64)
VEIL = Image.linear_gradient("L").resize(DRAWING.size)
VEILED = Image.merge("RGBA", (*DRAWING.split(), VEIL))
ON_WHITE = Image.composite(DRAWING, Image.new("RGB", DRAWING.size, "white"), VEIL)
PNG, JPEG = saved(DRAWING, "PNG"), saved(DRAWING, "JPEG", quality=90)
OTHER = drawing(seed=2)


TAKEN_AS_IS = {
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

# name: bytes, what the result shows, whether losses are in order
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
        for value, how in picture._TRANSPOSE.items()
    },
}


@pytest.mark.parametrize("name", TAKEN_AS_IS)
def test_what_all_engines_read_alike_is_handed_on_as_the_same_string(images: ImageNormalizer, name: str) -> None:
    url = url_of(TAKEN_AS_IS[name])
    assert images.check(url, PARAM)[0] is url


@pytest.mark.parametrize("name", CONVERTED)
def test_what_engines_read_differently_becomes_a_plain_picture_of_the_same_view(
    images: ImageNormalizer, name: str
) -> None:
    data, view, may_lose = CONVERTED[name]
    url, pixels = images.check(url_of(data), PARAM)
    result = opened(url)
    assert result.mode in ("L", "RGB")
    assert distance(result, view) <= (6.0 if may_lose else 0.5)  # half a step: alpha is rounded one way or the other
    assert pixels == view.width * view.height
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
def test_tiny_and_threadlike_pictures_are_stretched_to_what_all_engines_take(
    images: ImageNormalizer, size: Size, expected: Size
) -> None:
    result = opened(images.check(url_of(saved(drawing(size), "PNG")), PARAM)[0])
    assert result.size == expected


def test_one_pixel_stays_one_colour(images: ImageNormalizer) -> None:
    result = opened(images.check(url_of(saved(Image.new("RGB", (1, 1), (200, 30, 40)), "PNG")), PARAM)[0])
    assert result.getcolors() == [(32 * 32, (200, 30, 40))]


@pytest.mark.parametrize("size", [(64_000_000, 1), (1, 64_000_000), (65_535, 900), (8000, 8000), (3, 1)])
def test_no_shape_grows_beyond_the_bounds(size: Size) -> None:
    width, height = picture.shape_for(size, picture.MAX_CONVERTED_PIXELS)
    assert min(width, height) >= 32
    assert max(width, height) <= min(width, height) * picture.MAX_ASPECT
    assert width * height <= picture.MAX_CONVERTED_PIXELS
    assert max(width, height) <= picture.MAX_CONVERTED_SIDE


def test_large_pictures_are_converted_in_a_process_of_their_own(images: ImageNormalizer) -> None:
    large = drawing((900, 700))
    result = opened(images.check(url_of(saved(large, "WEBP", quality=90)), PARAM)[0])
    assert result.format == "JPEG"
    assert distance(result, large) < 8


def refusal(images: ImageNormalizer, url: str) -> str:
    with pytest.raises(InvalidImage) as caught:
        images.check(url, PARAM)
    assert caught.value.param == PARAM
    assert PARAM in caught.value.message
    no_warning_behind(caught.value)
    return caught.value.message


def no_warning_behind(error: InvalidImage) -> None:
    """Warnings are errors in tests; outside of them one would reach standard error."""
    assert error.__cause__ is not None
    assert not isinstance(error.__cause__.__cause__, Warning)


WHOLE = {
    "png": PNG,
    "png palette": saved(PALETTE, "PNG"),
    "jpeg": JPEG,
    "jpeg progressive": saved(DRAWING, "JPEG", progressive=True),
    "webp": saved(DRAWING, "WEBP"),
    "webp lossless": saved(DRAWING, "WEBP", lossless=True),
    "webp with alpha": saved(VEILED, "WEBP"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_picture_cut_anywhere_is_refused(images: ImageNormalizer, name: str) -> None:
    data = WHOLE[name]
    places = {*range(1, 40), *range(40, len(data), max(1, len(data) // 60)), *range(len(data) - 16, len(data))}
    for place in places:
        refusal(images, url_of(data[:place]))


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_gif_cut_in_its_first_frame_is_refused(images: ImageNormalizer, part: float) -> None:
    data = saved(PALETTE, "GIF")
    refusal(images, url_of(data[: int(len(data) * part) + 20]))


def test_a_png_with_a_wrong_byte_is_refused(images: ImageNormalizer) -> None:
    for place in range(8, len(PNG), len(PNG) // 100):
        refusal(images, url_of(PNG[:place] + bytes([PNG[place] ^ 4]) + PNG[place + 1 :]))


def gif_bomb() -> bytes:
    """A screen of one pixel, the first frame of 60,000 by 60,000."""
    head = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    return head + b"," + struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0) + b"\x02\x02\x44\x01\x00;"


def webp_bomb() -> bytes:
    lossless = b"VP8L" + struct.pack("<I", 6) + b"\x2f" + struct.pack("<I", 16382 | 16382 << 14) + b"\0\0"
    return b"RIFF" + struct.pack("<I", len(lossless) + 4) + b"WEBP" + lossless


def endless_scans() -> bytes:
    data = saved(DRAWING, "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    return data[:at] + data[at:-2] * 200 + data[-2:]


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
def test_bombs_are_refused_before_they_cost_anything(images: ImageNormalizer, name: str) -> None:
    data, words = BOMBS[name]
    before = time.process_time()
    assert words in refusal(images, url_of(data))
    assert time.process_time() - before < 0.5


def test_exif_that_names_gigabytes_costs_nothing(images: ImageNormalizer) -> None:
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
    before = time.process_time()
    assert images.check(url, PARAM)[0] is url
    assert time.process_time() - before < 0.5


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "JPEG2000", "AVIF"])
def test_other_formats_are_refused_by_name(images: ImageNormalizer, kind: str) -> None:
    assert "not a PNG, JPEG, WebP or GIF" in refusal(images, url_of(saved(DRAWING, kind)))


@pytest.mark.parametrize(
    "data", [b"\x00", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7", bytes(1000)]
)
def test_other_bytes_are_refused(images: ImageNormalizer, data: bytes) -> None:
    assert "not a PNG, JPEG, WebP or GIF" in refusal(images, url_of(data))


def test_an_empty_picture_is_refused(images: ImageNormalizer) -> None:
    assert "empty" in refusal(images, "data:image/png;base64,")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "https://example.org/cat.png",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "ftp://example.org/cat.png",
        "data:",
        "data:image/png",
        "data:image/png;base64",
        "data:image/png,rawbytes",
        "data:image/png;charset=base64,iVBORw0KGgo=",
        " data:image/png;base64,iVBORw0KGgo=",
        "data:image/png;" + "x" * 1000 + ";base64,iVBORw0KGgo=",
        base64.b64encode(PNG).decode(),
    ],
)
async def test_what_is_no_data_url_in_base64_is_refused(images: ImageNormalizer, url: str) -> None:
    with pytest.raises(InvalidImageUrl) as caught:
        await images.checked(chat_with(url))
    assert caught.value.param == PARAM


def test_the_declared_type_is_not_believed(images: ImageNormalizer) -> None:
    payload = base64.b64encode(JPEG).decode()
    for head in (
        "data:;base64,",
        "DATA:IMAGE/PNG;BASE64,",
        "data:image/jpg;base64,",
        "data:text/plain;charset=utf-8;base64,",
        "data:image/webp;base64,",
    ):
        assert images.check(head + payload, PARAM)[0] == "data:image/jpeg;base64," + payload


def wrapped(text: str) -> str:
    return "\r\n".join(text[at : at + 76] for at in range(0, len(text), 76)) + "\n"


@pytest.mark.parametrize("length", [1, 2, 3, 4, 98_303, 98_304, 98_305, 250_001])
def test_base64_with_line_ends_or_without_padding_is_forgiven(length: int) -> None:
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data).decode()
    assert decode("data:," + text, 6) == (data, True)
    for changed in (wrapped(text), " " + text, text + "\n", wrapped(text.rstrip("="))):
        assert decode("data:," + changed, 6) == (data, False)
    assert decode("data:," + text.rstrip("="), 6) == (data, "=" not in text)


def test_base64_with_line_ends_leaves_in_canonical_form(images: ImageNormalizer) -> None:
    assert images.check("data:image/png;base64," + base64.encodebytes(PNG).decode(), PARAM)[0] == url_of(PNG)


def test_bits_left_over_in_the_last_character_are_not_canonical() -> None:
    assert decode("data:,QQ==", 6) == (b"A", True)
    assert decode("data:,QR==", 6) == (b"A", False)


@pytest.mark.parametrize(
    "payload", ["A", "AAAAA", "QQ==QQ==", "iVBO!w0KGgo=", "iVBORw0K-_o=", "iVBOR%77", "=AAA", "é" * 8, "\ud800AAA"]
)
def test_broken_base64_is_refused(images: ImageNormalizer, payload: str) -> None:
    assert "base64" in refusal(images, "data:image/png;base64," + payload)


def test_padding_between_two_pieces_is_refused(images: ImageNormalizer) -> None:
    text = base64.b64encode(PNG * 200).decode()
    at = images_module.TEXT_STEP
    assert "base64" in refusal(images, "data:image/png;base64," + text[: at - 2] + "==" + text[at:])


async def test_a_request_without_images_is_the_same_object(images: ImageNormalizer) -> None:
    chat = Chat(model="m", messages=[Message("user", "hello"), Message("user", [TextPart("hello")])])
    assert await images.checked(chat) is chat


async def test_a_request_whose_images_stay_is_the_same_object(images: ImageNormalizer) -> None:
    chat = chat_with(url_of(PNG), url_of(JPEG))
    assert await images.checked(chat) is chat


async def test_only_the_image_that_changes_is_replaced(images: ImageNormalizer) -> None:
    good, webp = url_of(PNG), url_of(CONVERTED["webp"][0])
    first, second = (
        Message("system", "Be brief."),
        Message("user", [TextPart("these?"), ImagePart(ImageUrl(good)), ImagePart(ImageUrl(webp))]),
    )
    third = Message("user", [ImagePart(ImageUrl(good))])
    chat = Chat(model="m", messages=[first, second, third], temperature=0.5)
    result = await images.checked(chat)
    assert result.messages[0] is first
    assert result.messages[2] is third
    assert result.messages[1].content[:2] == second.content[:2]
    assert urls_of(result)[0] is good
    assert opened(urls_of(result)[1]).size == DRAWING.size
    assert result.temperature == 0.5
    assert urls_of(chat) == [good, webp, good], "the request itself stays as it was"


async def test_the_refusal_names_the_image(images: ImageNormalizer) -> None:
    chat = Chat(
        model="m",
        messages=[Message("system", "x"), Message("user", [TextPart("x"), ImagePart(ImageUrl(url_of(PNG[:-5])))])],
    )
    with pytest.raises(InvalidImage) as caught:
        await images.checked(chat)
    assert caught.value.param == "messages[1].content[1].image_url.url"


async def test_more_images_than_the_bound_are_refused(images: ImageNormalizer) -> None:
    with pytest.raises(InvalidRequest, match="500 images"):
        await images.checked(chat_with(*[url_of(PNG)] * 501))


async def test_more_pixels_in_all_than_the_bound_are_refused(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_REQUEST_PIXELS", 2 * DRAWING.width * DRAWING.height)
    chat = chat_with(*[url_of(PNG)] * 2)
    assert await images.checked(chat) is chat
    with pytest.raises(InvalidRequest, match="pixels in total"):
        await images.checked(chat_with(*[url_of(PNG)] * 3))


async def test_a_client_that_leaves_drops_the_result_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(found: picture.ParsedImage) -> bool:
        at_work.set()
        go_on.wait(10)
        ended.set()
        raise picture.BadImage("it came too late")

    monkeypatch.setattr(picture, "is_taken_as_is", slow)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    images = ImageNormalizer()
    task = asyncio.create_task(images.checked(chat_with(url_of(PNG))))
    assert await asyncio.to_thread(at_work.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    go_on.set()
    assert await asyncio.to_thread(ended.wait, 10)
    images._pool.shutdown(wait=True)
    await asyncio.sleep(0)
    assert complaints == []


async def test_closing_ends_the_process_of_an_image_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    popen = subprocess.Popen

    def sleeper(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        child = popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        started.set()
        return child

    monkeypatch.setattr(images_module.subprocess, "Popen", sleeper)
    images = ImageNormalizer()
    task = asyncio.create_task(images.checked(chat_with(url_of(CONVERTED["gif"][0]))))
    assert await asyncio.to_thread(started.wait, 10)
    images.close()
    with pytest.raises(InvalidImage):
        await task


def test_a_process_that_cannot_run_is_no_fault_of_the_image(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module.PIL, "__file__", "/nowhere/PIL/__init__.py")
    popen = subprocess.Popen
    isolated = "import sys; sys.exit('no Pillow')"
    monkeypatch.setattr(
        images_module.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", isolated], **options)
    )
    with pytest.raises(RuntimeError, match="no Pillow"):
        images.check(url_of(CONVERTED["gif"][0]), PARAM)


async def test_the_loop_goes_on_while_megabytes_are_decoded(images: ImageNormalizer) -> None:
    noise = Image.effect_noise((1400, 1000), 60)
    url = url_of(
        saved(Image.merge("RGB", (noise, noise, noise.transpose(Image.Transpose.ROTATE_180))), "PNG", compress_level=1)
    )
    task = asyncio.ensure_future(images.checked(chat_with(url)))
    turns = 0
    while not task.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert urls_of(task.result())[0] is url
    assert turns > 20  # with the GIL held throughout it would be a few


BEGINNINGS = [
    data[:cut]
    for data in (PNG, JPEG, WHOLE["webp"], WHOLE["webp lossless"], WHOLE["webp with alpha"])
    for cut in (0, 4, 16, 40, 400)
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(BEGINNINGS), st.binary(max_size=600))
def test_any_bytes_are_refused_or_become_a_canonical_url(
    images: ImageNormalizer, beginning: bytes, rest: bytes
) -> None:
    never_another_end(images, beginning + rest)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(sorted(WHOLE)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6),
)
def test_any_wrong_bytes_are_refused_or_become_a_canonical_url(
    images: ImageNormalizer, name: str, wrong: list[tuple[int, int]]
) -> None:
    data = bytearray(WHOLE[name])
    for place, value in wrong:
        data[place % len(data)] = value
    never_another_end(images, bytes(data))


@settings(max_examples=6, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_wrong_bytes_of_a_gif_are_refused_or_become_a_canonical_url(
    images: ImageNormalizer, wrong: list[tuple[int, int]]
) -> None:
    data = bytearray(CONVERTED["gif animated"][0])
    for place, value in wrong:
        data[6 + place % (len(data) - 6)] = value
    never_another_end(images, bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_for_base64_is_refused(images: ImageNormalizer, payload: str) -> None:
    refusal(images, "data:image/png;base64," + payload)


def never_another_end(images: ImageNormalizer, data: bytes) -> None:
    try:
        url, _ = images.check(url_of(data), PARAM)
    except InvalidImage as error:
        no_warning_behind(error)
    else:
        opened(url)
