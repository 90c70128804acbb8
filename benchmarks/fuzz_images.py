"""Images for the search of the slowest input: bombs, odd formats, odd base64, many at once.

`fuzz.py` mutates request bodies from here. The work of one is done as the gateway does it, in an
event loop of its own, with the threads and the child processes that decode images.
"""

import asyncio
import base64
import binascii
import io
import os
import random
import re
import resource
import struct
import urllib.parse
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import orjson
from PIL import Image

from benchmarks.process_stats import cpu_seconds, family
from gateway.chat import checks, image_child
from gateway.chat.images import MAX_IMAGES, MAX_REQUEST_SECONDS, ImageNormalizer
from gateway.dialects.openai_chat_request import check_long_text, decode
from gateway.engines.engine import ModelFacts
from gateway.engines.long_strings import render_images
from gateway.engines.ollama import Ollama
from gateway.engines.vllm import Vllm
from gateway.errors import GatewayError
from gateway.rollout.canary import canary_bucket

MIB = 1024 * 1024
MAX_BODY = 20 * MIB
MOST_CHILD_SECONDS = MAX_REQUEST_SECONDS + image_child.CPU_SECONDS
"""CPU time of the child processes for one request: the budget, which the last image may exceed by its own."""
LARGEST_SIDE, LARGE_SIDE = 8000, 2048
"""Width and height of the largest seeds: as many pixels as an image may have, and fewer to save time."""
_TURN_SECONDS = 0.0005
"""Time that the event loop waits for threads and child processes in one step."""

Steps = Iterator[None]


class ImageRequests:
    """The gateway's work on a request with images, without a socket."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._images = ImageNormalizer()

    def close(self) -> None:
        self._images.close()
        self._loop.close()

    def read(self, body: bytes) -> Steps:
        """Parse `body`, check its images, and render it for each engine, in the event loop's steps.

        Raises:
            GatewayError: the request is refused.
        """
        yield from check_long_text(body, MIB)
        yield
        chat = decode(body, MIB)
        yield
        yield from checks.check_in_steps(chat)
        yield
        task = self._loop.create_task(self._images.checked(chat))
        while not task.done():
            self._loop.call_later(_TURN_SECONDS, self._loop.stop)
            self._loop.run_forever()
            yield
        chat = task.result()
        canary_bucket("key", b"", chat, 100)
        yield
        for engine in (Ollama(), Vllm()):
            yield from render_images(chat, lambda short: engine.render(short, "m", ModelFacts(), True))  # noqa: B023
            yield


def child_seconds(steps: Steps) -> float:
    """Return the CPU time in seconds that child processes take for the work of `steps`."""
    before = _of_children()
    try:
        for _ in steps:
            pass
    except GatewayError:
        pass
    return _of_children() - before


def _of_children() -> float:
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return ended.ru_utime + ended.ru_stime + cpu_seconds(family(os.getpid())[1:])


# Bodies


def _percent(payload: str) -> str:
    return urllib.parse.quote(payload, safe="")


_FORMS: dict[str, Callable[[str], str]] = {
    "plain": lambda payload: payload,
    "escaped slashes": lambda payload: payload.replace("/", "\\/").replace("+", "\\u002B"),
    "code points": lambda payload: re.sub("A", r"\\u0041", payload),
    "lines": lambda payload: re.sub("(.{76})", r"\1\\r\\n", payload),
    "blanks": lambda payload: re.sub("(....)", r"\1 ", payload),
    "tabs and newlines": lambda payload: re.sub("(..)", r"\1\\t\\n", payload),
    "unpadded": lambda payload: payload.rstrip("="),
    "padded twice": lambda payload: payload + "====",
    "padded within": lambda payload: payload[: len(payload) // 8 * 4] + "====" + payload[len(payload) // 8 * 4 :],
    "percent encoding": _percent,
    "base64url": lambda payload: payload.replace("+", "-").replace("/", "_"),
    "beyond ASCII": lambda payload: payload + "\uac00",
    "bits left over": lambda payload: payload[:-1] + "/",
}
_HEADS = [
    "data:image/png;base64,", "data:image/jpeg;base64,", "data:;base64,", "DATA:IMAGE/GIF;CHARSET=A;BASE64,",
    "data:image/webp;" + "a=b;" * 99 + "base64,", "data:image/bmp;base64, ", "data:text/plain;base64,", "data:,", "",
]  # fmt: skip
_URL = re.compile(rb'"url":"([^"\\]*+(?:\\.[^"\\]*+)*+)"')


def body_of(images: Sequence[bytes], form: str = "plain", head: str = _HEADS[0]) -> bytes:
    """Return a chat request with these images, of at most `MAX_BODY` bytes."""
    parts, left = [], MAX_BODY - 1024
    for image in images:
        payload = base64.b64encode(image[: left * 3 // 4]).decode()
        part = b'{"type":"image_url","image_url":{"url":"%b"}}' % (head + _FORMS[form](payload)).encode()
        left -= len(part) + 1
        if left < 0:
            break
        parts.append(part)
    content = b",".join([*parts, b'{"type":"text","text":"?"}'])
    return b'{"model":"m","messages":[{"role":"user","content":[%b]}]}' % content


def images_of(body: bytes) -> list[bytes]:
    """Return the images in a body that `body_of` made, as far as they are base64."""
    found = []
    for match in _URL.finditer(body):
        try:
            url = orjson.loads(b'"%b"' % match[1])
            found.append(base64.b64decode(urllib.parse.unquote(url.partition(",")[2]) + "=="))
        except (ValueError, binascii.Error):
            continue
    return found


# Images


def _saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _animated(kind: str, frames: int, side: int) -> bytes:
    first, *others = (Image.new("P", (side, side), number % 256) for number in range(frames))
    return _saved(first, kind, save_all=True, append_images=others)


def image_seeds(side: int) -> list[bytes]:
    """Return images of all formats: ordinary, tiny, large, animated, and of formats that are refused."""
    size, noise = (side, side), Image.effect_noise((512, 512), 100)
    tiny = Image.new("P", (16, 16), 1)
    return [
        *(_saved(tiny.convert("RGB"), kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "ICO")),
        *(_saved(noise.convert(mode), "PNG") for mode in ("RGBA", "LA", "P", "1", "I;16")),
        _saved(noise.convert("RGB"), "WEBP", lossless=True),
        _saved(noise.convert("RGB"), "JPEG", progressive=True, quality=100),
        _saved(noise.convert("RGB").convert("CMYK"), "JPEG"),
        _animated("GIF", 100, 16),
        _animated("WEBP", 20, 64),
        _animated("PNG", 50, 16),
        _saved(Image.new("RGBA", size), "PNG", compress_level=1),
        _saved(Image.new("P", size), "GIF"),
        _saved(Image.new("RGB", size), "JPEG", progressive=True),
        _saved(Image.new("RGBA", size), "WEBP", lossless=True, method=0),
    ]


def body_seeds(side: int) -> list[bytes]:
    """Return bodies with the seeds alone, with many tiny images, and with each form of base64."""
    images = image_seeds(side)
    tiny, noise = images[2], images[7]
    return [
        *(body_of([image]) for image in images),
        body_of([tiny] * MAX_IMAGES),
        body_of([images[0]] * MAX_IMAGES),
        *(body_of([noise] * 2, form) for form in _FORMS),
        body_of([_filled(images[0], MAX_BODY * 3 // 4 - 4096)]),
        body_of([_filled(images[1], MAX_BODY * 3 // 4 - 4096)]),
        body_of([b"\0" * (MAX_BODY * 3 // 4 - 4096)]),
        body_of([_filled(images[1], MAX_BODY * 3 // 5)], "escaped slashes"),
    ]


def _filled(data: bytes, size: int) -> bytes:
    """Return the image with metadata that makes it `size` bytes long, if its format has any."""
    if data.startswith(b"\x89PNG"):
        return data[:33] + _chunk(b"prVt", bytes(max(0, size - len(data) - 12))) + data[33:]
    if data.startswith(b"\xff\xd8"):
        segment = b"\xff\xe2\xff\xff" + bytes(65533)
        return data[:2] + segment * max(0, (size - len(data)) // len(segment)) + data[2:]
    return data + bytes(max(0, size - len(data)))


def _resized(data: bytes, width: int, height: int) -> bytes:
    """Return the image with another declared size and the same pixels."""
    if data.startswith(b"\x89PNG") and len(data) > 33:
        head = struct.pack(">II", width & 0x7FFFFFFF, height & 0x7FFFFFFF) + data[24:29]
        return data[:8] + _chunk(b"IHDR", head) + data[33:]
    width, height = width & 0xFFFF, height & 0xFFFF
    if data.startswith(b"GIF8"):
        return data[:6] + struct.pack("<HH", width, height) + data[10:]
    if data[12:16] == b"VP8X":
        return data[:24] + width.to_bytes(3, "little") + height.to_bytes(3, "little") + data[30:]
    if data[12:16] == b"VP8L":
        bits = (width & 0x3FFF) | (height & 0x3FFF) << 14
        return data[:21] + struct.pack("<I", bits) + data[25:]
    found = re.search(rb"\xff[\xc0-\xc2]\0[\x0b\x11\x14]\x08", data)
    return data if found is None else data[: found.end()] + struct.pack(">HH", height, width) + data[found.end() + 4 :]


_SIZES = [0, 1, 31, 33, 200, 2048, 8000, 8001, 16383, 65535, 2**31 - 1]


def _repeated(data: bytes, chance: random.Random) -> bytes:
    """Return the image with one of its parts (a PNG chunk, a JPEG scan, any bytes) many times."""
    mark = {b"\x89P": rb"IDAT|tEXt|fdAT|PLTE", b"\xff\xd8": rb"\xff[\xc4\xda\xdb\xe1\xfe]"}.get(data[:2])
    places = [found.start() for found in re.finditer(mark, data)] if mark else []
    begin = chance.choice(places) if places else chance.randrange(len(data) + 1)
    end = begin + chance.choice([1, 16, 256, 65536, len(data)])
    end = next((place for place in places if place > begin), end)
    part = data[begin:end]
    return data[:begin] + part * min(chance.choice([2, 20, 99, 4000]), max(1, MIB // max(1, len(part)))) + data[end:]


def _mutated_image(data: bytes, chance: random.Random, others: list[bytes]) -> bytes:
    how = chance.randrange(6)
    if how == 0:
        return _resized(data, chance.choice(_SIZES), chance.choice(_SIZES))
    if how == 1:
        return data[: chance.randrange(len(data) + 1)]
    if how == 2:
        return _repeated(data, chance)
    if how == 3:
        return _filled(data, chance.choice([4096, MIB, 4 * MIB + 1, MAX_BODY * 3 // 4 - 4096]))
    if how == 4 and data:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 8])):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        return bytes(changed)
    return chance.choice(others)


def mutated_body(chance: random.Random, kept: list[bytes]) -> bytes:
    """Return a body with a changed image of one of the kept bodies, in any form and number."""
    images = images_of(chance.choice(kept))[:1] or [b""]
    others = images_of(chance.choice(kept)) or images
    image = images[0]
    for _ in range(chance.randint(0, 2)):
        image = _mutated_image(image, chance, others)
    form = chance.choice([*_FORMS]) if chance.random() < 0.3 else "plain"
    head = chance.choice(_HEADS) if chance.random() < 0.3 else _HEADS[0]
    return body_of([image] * chance.choice([1, 1, 1, 8, MAX_IMAGES]), form, head)
