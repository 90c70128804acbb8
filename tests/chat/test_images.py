"""Tests of the images of a request: URLs, base64, limits, threads and processes."""

import asyncio
import base64
import gc
import random
import resource
import struct
import subprocess
import sys
import threading
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gateway.chat import image_file, image_workers
from gateway.chat import images as images_module
from gateway.chat.image_structure import BadImage
from gateway.chat.image_workers import Converted, OutOfTime
from gateway.chat.images import Budget, ImageNormalizer, decode
from gateway.chat.message import ImagePart, ImageUrl, Message, TextPart
from gateway.chat.request import Chat
from gateway.errors import InvalidImage, InvalidImageUrl, InvalidRequest, QueueTimeout
from tests.chat.child_samples import HANGING, Gate, watched
from tests.chat.image_samples import (
    CONVERTED,
    DRAWING,
    JPEG,
    PARAM,
    PNG,
    distance,
    drawing,
    exif,
    opened,
    rejection_message,
    saved,
    url_of,
    with_chunk,
)
from tests.fakes.processor_time import assert_at_most
from tests.fakes.running_gateway import until


def chat_with(*urls: str) -> Chat:
    return Chat(model="m", messages=[Message("user", [ImagePart(ImageUrl(url)) for url in urls])])


def urls_of(chat: Chat) -> list[str]:
    return [url for message in chat.messages for url in message.images]


def test_large_image_is_converted_in_a_child_process(images: ImageNormalizer) -> None:
    large = drawing((900, 700))
    result = opened(images.check(url_of(saved(large, "WEBP", quality=90)), PARAM)[0])
    assert result.format == "JPEG"
    assert distance(result, large) < 8


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
async def test_url_other_than_base64_data_is_rejected(images: ImageNormalizer, url: str) -> None:
    with pytest.raises(InvalidImageUrl) as caught:
        await images.checked(chat_with(url))
    assert caught.value.param == PARAM


def test_declared_media_type_is_ignored(images: ImageNormalizer) -> None:
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
def test_base64_with_line_ends_or_without_padding_is_accepted(length: int) -> None:
    data = random.Random(length).randbytes(length)
    text = base64.b64encode(data).decode()
    assert decode("data:," + text, 6) == (data, True)
    for changed in (wrapped(text), " " + text, text + "\n", wrapped(text.rstrip("="))):
        assert decode("data:," + changed, 6) == (data, False)
    assert decode("data:," + text.rstrip("="), 6) == (data, "=" not in text)


def test_base64_with_line_ends_becomes_canonical(images: ImageNormalizer) -> None:
    assert images.check("data:image/png;base64," + base64.encodebytes(PNG).decode(), PARAM)[0] == url_of(PNG)


def test_leftover_bits_in_the_last_character_are_not_canonical() -> None:
    assert decode("data:,QQ==", 6) == (b"A", True)
    assert decode("data:,QR==", 6) == (b"A", False)


@pytest.mark.parametrize(
    "payload", ["A", "AAAAA", "QQ==QQ==", "iVBO!w0KGgo=", "iVBORw0K-_o=", "iVBOR%77", "=AAA", "é" * 8, "\ud800AAA"]
)
def test_invalid_base64_is_rejected(images: ImageNormalizer, payload: str) -> None:
    assert "base64" in rejection_message(images, "data:image/png;base64," + payload)


def test_padding_between_two_pieces_is_rejected(images: ImageNormalizer) -> None:
    text = base64.b64encode(PNG * 200).decode()
    at = images_module.TEXT_STEP
    assert "base64" in rejection_message(images, "data:image/png;base64," + text[: at - 2] + "==" + text[at:])


async def test_request_without_images_is_the_same_object(images: ImageNormalizer) -> None:
    chat = Chat(model="m", messages=[Message("user", "hello"), Message("user", [TextPart("hello")])])
    assert await images.checked(chat) is chat


async def test_request_with_unchanged_images_is_the_same_object(images: ImageNormalizer) -> None:
    chat = chat_with(url_of(PNG), url_of(JPEG))
    assert await images.checked(chat) is chat


async def test_only_the_changed_image_is_replaced(images: ImageNormalizer) -> None:
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


async def test_error_names_the_image(images: ImageNormalizer) -> None:
    chat = Chat(
        model="m",
        messages=[Message("system", "x"), Message("user", [TextPart("x"), ImagePart(ImageUrl(url_of(PNG[:-5])))])],
    )
    with pytest.raises(InvalidImage) as caught:
        await images.checked(chat)
    assert caught.value.param == "messages[1].content[1].image_url.url"


async def test_more_images_than_the_maximum_are_rejected(images: ImageNormalizer) -> None:
    with pytest.raises(InvalidRequest, match="500 images"):
        await images.checked(chat_with(*[url_of(PNG)] * 501))


async def test_more_pixels_in_total_than_the_maximum_are_rejected(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_REQUEST_PIXELS", 2 * DRAWING.width * DRAWING.height)
    chat = chat_with(*[url_of(PNG)] * 2)
    assert await images.checked(chat) is chat
    with pytest.raises(InvalidRequest, match="pixels in total"):
        await images.checked(chat_with(*[url_of(PNG)] * 3))


async def test_pixels_are_counted_before_they_are_decoded(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = watched(monkeypatch)
    monkeypatch.setattr(images_module, "MAX_REQUEST_PIXELS", 50_000_000)
    flat = saved(Image.new("P", (7000, 8000)), "GIF")
    with pytest.raises(InvalidImage, match="pixels in total") as caught:
        await images.checked(chat_with(url_of(flat)))
    assert (caught.value.code, caught.value.param) == ("invalid_image", "messages")
    assert children.all == []


async def test_frame_larger_than_the_screen_of_its_gif_counts(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = Budget()
    monkeypatch.setattr(images_module, "MAX_REQUEST_PIXELS", 10_000)
    gif = bytearray(CONVERTED["gif"][0])
    gif[6:10] = struct.pack("<HH", 1, 1)
    assert images.check(url_of(bytes(gif)), PARAM, budget).pixels == DRAWING.width * DRAWING.height
    with pytest.raises(InvalidImage, match="pixels in total"):
        await images.checked(chat_with(url_of(bytes(gif))))


async def test_more_computation_in_total_than_the_maximum_is_rejected(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = url_of(saved(Image.new("P", (1500, 1500)), "GIF"))
    seconds = images.check(flat, PARAM).seconds
    assert seconds > 0.01
    monkeypatch.setattr(images_module, "MAX_REQUEST_SECONDS", seconds * 5)
    with pytest.raises(InvalidImage, match="computation in total") as caught:
        await images.checked(chat_with(*[flat] * 100))
    assert (caught.value.code, caught.value.param) == ("invalid_image", "messages")


async def test_computation_in_threads_counts_too(images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "MAX_REQUEST_SECONDS", 1e-6)
    with pytest.raises(InvalidImage, match="computation in total"):
        await images.checked(chat_with(url_of(PNG)))


async def test_converted_images_that_become_too_large_are_rejected(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    gif = url_of(CONVERTED["gif"][0])
    size = len(images.check(gif, PARAM).url)
    monkeypatch.setattr(images_module, "MAX_CONVERTED_SIZE", 3 * size)
    await images.checked(chat_with(*[gif] * 3, *[url_of(PNG)] * 9))
    with pytest.raises(InvalidImage, match="too large when they are converted") as caught:
        await images.checked(chat_with(*[gif] * 40))
    assert (caught.value.code, caught.value.param) == ("invalid_image", "messages")


async def test_converted_images_may_be_as_large_as_what_was_sent(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_CONVERTED_SIZE", 0)
    veiled = saved(Image.merge("RGBA", [Image.effect_noise((200, 200), 90)] * 4), "PNG")
    assert await images.checked(chat_with(*[url_of(veiled)] * 2))


async def test_hundreds_of_small_conversions_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 11, A3: 500 tiny GIFs took 54 s of child processes."""
    children = watched(monkeypatch)
    images = ImageNormalizer()
    gif = url_of(saved(drawing((16, 16)).quantize(64), "GIF"))
    before = cpu_seconds()
    result = await images.checked(chat_with(*[gif] * 500))
    images.close()
    assert cpu_seconds() - before < 10
    assert {opened(url).size for url in set(urls_of(result))} == {(32, 32)}
    assert len(children.all) <= images_module.WORKERS


def cpu_seconds() -> float:
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


async def test_keys_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key's requests with hundreds of images do not delay a single image of another key."""
    images = ImageNormalizer()
    order: list[str] = []
    check = images.check

    def noted(url: str, *args: Any, **options: Any) -> Any:
        order.append(url)
        return check(url, *args, **options)

    monkeypatch.setattr(images, "check", noted)
    gif, other = url_of(CONVERTED["gif"][0]), url_of(PNG)
    greedy = [asyncio.create_task(images.checked(chat_with(*[gif] * 100), "greedy")) for _ in range(8)]
    await until(lambda: len(order) > 10)
    before = len(order)
    await images.checked(chat_with(other), "modest")
    in_progress = 2 * images_module.WORKERS  # turns that were given already, and those given in the same round
    assert order.index(other) <= before + in_progress + 1
    assert not any(task.done() for task in greedy)
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)
    images.close()


async def test_small_image_does_not_wait_behind_large_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children, gate = watched(monkeypatch), Gate(tmp_path)
    images = ImageNormalizer()
    children.codes = [gate.long_job]
    large = chat_with(url_of(saved(Image.new("P", (2100, 2100)), "GIF")))
    tasks = [asyncio.create_task(images.checked(large, key)) for key in "aabbc"]
    go_on = await asyncio.to_thread(gate.reached)
    for url in (url_of(PNG), url_of(CONVERTED["gif"][0])):
        await images.checked(chat_with(url), "a")
    assert len(children.all) == 2
    assert not any(task.done() for task in tasks)
    go_on.close()
    for task in tasks:
        assert opened(urls_of(await task)[0]).size == (2100, 2100)
    images.close()


async def test_large_plain_image_is_decoded_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children = watched(monkeypatch)
    images = ImageNormalizer()
    url = url_of(saved(Image.new("L", (2100, 2100)), "PNG"))
    chat = chat_with(url)
    assert await images.checked(chat) is chat
    assert len(children.all) == 1
    images.close()


async def test_small_image_of_many_bytes_is_decoded_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    children = watched(monkeypatch)
    images = ImageNormalizer()
    chat = chat_with(url_of(with_chunk(PNG, b"teXt", bytes(image_file.LARGE_BYTES))))
    assert await images.checked(chat) is chat
    assert len(children.all) == 1
    images.close()


@pytest.mark.parametrize(
    "data",
    [
        b"GIF89a" + struct.pack("<HH", 8001, 8000) + bytes(30),
        b"RIFF\0\0\0\0WEBPVP8X" + bytes(8) + (9000).to_bytes(3, "little") * 2 + bytes(30),
    ],
    ids=["gif", "webp"],
)
def test_image_that_declares_too_many_pixels_needs_no_child(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    children = watched(monkeypatch)
    images = ImageNormalizer()
    assert "may be at most 64000000" in rejection_message(images, url_of(data))
    assert children.all == []
    images.close()


async def test_large_animated_png_loses_its_animation(images: ImageNormalizer) -> None:
    frame = drawing((700, 700))
    data = saved(frame, "PNG", save_all=True, append_images=[drawing((700, 700), 2)])
    result = opened(images.check(url_of(data), PARAM).url)
    assert getattr(result, "n_frames", 1) == 1
    assert distance(result, frame) < 0.5


async def test_client_that_leaves_ends_its_child_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    children, gate = watched(monkeypatch), Gate(tmp_path)
    images = ImageNormalizer()
    children.codes = [gate.long_job]
    task = asyncio.create_task(images.checked(chat_with(*[url_of(CONVERTED["gif"][0])] * 500)))
    go_on = await asyncio.to_thread(gate.reached)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: children.alive == [])
    go_on.close()
    assert urls_of(await images.checked(chat_with(url_of(CONVERTED["gif"][0])))), "the workers are free again"
    assert len(children.all) == 2
    images.close()


async def test_images_that_take_too_long_in_total_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    children = watched(monkeypatch)
    monkeypatch.setattr(images_module, "MAX_REQUEST_WAIT", 0.2)
    images = ImageNormalizer()
    children.codes = [HANGING]
    with pytest.raises(QueueTimeout) as caught:
        await images.checked(chat_with(url_of(CONVERTED["gif"][0])))
    assert caught.value.retry_after == 30
    await until(lambda: children.alive == [])
    images.close()


async def test_clients_that_leave_give_back_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageNormalizer()
    large = url_of(saved(Image.new("P", (2100, 2100)), "GIF"))
    for number in range(30):
        task = asyncio.create_task(images.checked(chat_with(*[url_of(PNG), large] * 3), str(number % 3)))
        for _ in range(number):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    await until(lambda: repr(images._turns) == "<FairTurns 2 free, 0 waiting>")
    await until(lambda: repr(images._large_turns) == "<FairTurns 1 free, 0 waiting>")
    images.close()


class Url(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


@pytest.mark.parametrize(
    ("url", "refused"),
    [(PNG, None), (CONVERTED["gif"][0], None), (PNG[:-5], InvalidImage), (CONVERTED["gif"][0][:60], InvalidImage)],
    ids=["plain", "converted", "truncated", "truncated, in a child"],
)
async def test_image_is_freed_with_its_request(
    images: ImageNormalizer, url: bytes, refused: type[Exception] | None
) -> None:
    """Without a garbage collection: no error or future refers back to the frames that hold the image."""
    chat = chat_with(Url(url_of(url)))
    image = weakref.ref(urls_of(chat)[0])
    gc.collect()
    gc.disable()
    try:
        if refused is None:
            await images.checked(chat)
        else:
            with suppress(refused):
                await images.checked(chat)
        del chat
        await until(lambda: image() is None)
    finally:
        gc.enable()


async def test_image_refused_gives_back_its_turn(images: ImageNormalizer) -> None:
    for _ in range(5):
        with pytest.raises(InvalidImage):
            await images.checked(chat_with(url_of(PNG[:-5])))
    assert await images.checked(chat_with(url_of(PNG)))


def test_images_among_many_messages_are_replaced_in_linear_time() -> None:
    messages = [Message("user", [ImagePart(ImageUrl("data:,"))]) for _ in range(30_000)]
    chat = Chat(model="m", messages=messages)
    many = {(index, 0): "data:new" for index in range(0, 30_000, 60)}
    one = {(0, 0): "data:new"}
    assert_at_most(
        50,
        lambda: images_module.with_urls(chat, many),
        yardstick=lambda: images_module.with_urls(chat, one),
    )
    result = images_module.with_urls(chat, many)
    assert urls_of(result).count("data:new") == 500
    assert urls_of(chat).count("data:new") == 0


async def test_result_for_a_client_that_left_is_dropped_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    at_work, released, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(found: image_file.ParsedImage) -> bool:
        at_work.set()
        released.wait(10)
        ended.set()
        raise BadImage("it came too late")

    monkeypatch.setattr(image_file, "is_taken_as_is", slow)
    complaints: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
    images = ImageNormalizer()
    task = asyncio.create_task(images.checked(chat_with(url_of(PNG))))
    assert await asyncio.to_thread(at_work.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    released.set()
    assert await asyncio.to_thread(ended.wait, 10)
    images._pool.shutdown(wait=True)
    await asyncio.sleep(0)
    assert complaints == []


async def test_close_kills_the_child_process_of_an_image_in_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    started = threading.Event()
    popen = subprocess.Popen

    def sleeper(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        child = popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)
        started.set()
        return child

    monkeypatch.setattr(image_workers.subprocess, "Popen", sleeper)
    images = ImageNormalizer()
    task = asyncio.create_task(images.checked(chat_with(url_of(CONVERTED["gif"][0]))))
    assert await asyncio.to_thread(started.wait, 10)
    images.close()
    with pytest.raises(InvalidImage):
        await task


def test_child_process_that_cannot_run_is_not_blamed_on_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = ImageNormalizer()
    monkeypatch.setattr(image_workers.PIL, "__file__", "/nowhere/PIL/__init__.py")
    popen = subprocess.Popen
    isolated = "import sys; sys.exit('no Pillow')"
    monkeypatch.setattr(
        image_workers.subprocess, "Popen", lambda command, **options: popen([sys.executable, "-c", isolated], **options)
    )
    with pytest.raises(RuntimeError, match="no Pillow"):
        images.check(url_of(CONVERTED["gif"][0]), PARAM)
    images.close()


async def test_event_loop_runs_while_megabytes_are_decoded(images: ImageNormalizer) -> None:
    noise = Image.effect_noise((1400, 1000), 60)
    url = url_of(
        saved(Image.merge("RGB", (noise, noise, noise.transpose(Image.Transpose.ROTATE_180))), "PNG", compress_level=1)
    )
    task = asyncio.ensure_future(images.checked(chat_with(url)))
    iterations = 0
    while not task.done():
        await asyncio.sleep(0.001)
        iterations += 1
    assert urls_of(task.result())[0] is url
    assert iterations > 20  # only a few if the GIL were held throughout


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_as_base64_is_rejected(images: ImageNormalizer, payload: str) -> None:
    rejection_message(images, "data:image/png;base64," + payload)


# Images that are scaled down


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
@pytest.mark.parametrize("size", [(600, 400), (400, 600), (3000, 40)])
async def test_image_of_more_than_the_tiers_pixels_is_scaled_down(
    images: ImageNormalizer, kind: str, size: tuple[int, int]
) -> None:
    large = drawing(size)
    (url,) = urls_of(await images.checked(chat_with(url_of(saved(large, kind))), max_pixels=60_000))
    result = opened(url)
    assert 50_000 < result.width * result.height <= 60_000
    assert result.format == ("JPEG" if kind in ("JPEG", "WEBP") else "PNG")
    if max(size) < 3000:  # an image that is too narrow is stretched
        assert abs(result.width / result.height / (size[0] / size[1]) - 1) < 0.01
    assert distance(result.convert("RGB"), large.resize(result.size, Image.Resampling.LANCZOS)) < 12


async def test_image_within_the_tiers_pixels_is_sent_as_it_came(images: ImageNormalizer) -> None:
    url = url_of(saved(drawing((200, 300)), "PNG"))
    assert urls_of(await images.checked(chat_with(url), max_pixels=60_000)) == [url]
    assert urls_of(await images.checked(chat_with(url_of(saved(drawing((600, 400)), "PNG"))), max_pixels=0))


async def test_photograph_that_is_scaled_down_stays_upright(images: ImageNormalizer) -> None:
    large = drawing((900, 600))
    data = saved(large, "JPEG", exif=exif(6), quality=95)
    (url,) = urls_of(await images.checked(chat_with(url_of(data)), max_pixels=60_000))
    result = opened(url)
    assert (result.width < result.height, result.width * result.height <= 60_000) == (True, True)
    expected = large.transpose(Image.Transpose.ROTATE_270).resize(result.size, Image.Resampling.LANCZOS)
    assert distance(result, expected) < 12


@given(st.integers(1, 9000), st.integers(1, 7000), st.integers(1024, 64_000_000))
def test_scaled_shape_is_within_the_limit_and_accepted_by_all_engines(width: int, height: int, limit: int) -> None:
    scaled = image_file.shape_for((width, height), limit)
    assert scaled[0] * scaled[1] <= limit
    assert min(scaled) >= image_file.MIN_SIDE
    assert max(scaled) / min(scaled) <= image_file.MAX_ASPECT


async def test_image_that_a_busy_machine_gives_no_time_is_not_blamed(
    images: ImageNormalizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starve(*_: object) -> Converted:
        raise OutOfTime

    monkeypatch.setattr(images._workers, "convert", starve)
    with pytest.raises(QueueTimeout) as error:
        await images.checked(chat_with(url_of(CONVERTED["webp"][0])))
    assert error.value.retry_after
