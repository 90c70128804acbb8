"""The images of a request: each `data:` URL is decoded once, in a thread, and leaves as one that every engine reads alike, or not at all."""

import asyncio
import base64
import binascii
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import msgspec
import PIL

from gateway.chat import image_file as picture
from gateway.chat.image_file import BadImage, ParsedImage
from gateway.chat.request import Chat, ImagePart, ImageUrl, Message
from gateway.errors import InvalidImage, InvalidImageUrl, InvalidRequest

MAX_IMAGES = 500
"""In one request, as OpenAI has it; vLLM's own bound is 999."""
MAX_REQUEST_PIXELS = 500_000_000
"""Of all images of a request together: a few KB can hold 64 million, and each million takes a thread some 10 ms."""
WORKERS = 2
CHILD_SECONDS = 120.0
"""Its bound is its own CPU time; this one is for a machine so busy that it gets none."""

CHILD_POLL = 0.2  # seconds
MAX_HEAD = 512
TEXT_STEP = 1 << 17  # characters of base64 handled in one call, which holds the GIL: about half a millisecond
BYTES_STEP = 3 << 15
BREATH = 1e-4  # a waiting thread gets the GIL at once only from one that sleeps


class ImageNormalizer:
    """Checks the images of requests in a few threads of its own. What is costly for all others, or in memory, goes to a process of its own."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, "images")
        self._children: set[subprocess.Popen[bytes]] = set()
        self._closing = threading.Event()

    async def checked(self, chat: Chat) -> Chat:
        """`chat`, its images whole and fit for every engine: the same object if they were so already.

        One image of a request after the other, so that requests take turns. If this is cancelled, an image at work in a thread is worked on to
        its end, which is near; a process is ended.

        Raises:
            InvalidImageUrl: an image is no `data:` URL in base64; nothing is ever fetched for a client.
            InvalidImage: its bytes are no whole PNG, JPEG, WebP or GIF of up to `picture.MAX_PIXELS`.
            InvalidRequest: more than `MAX_IMAGES`, or more than `MAX_REQUEST_PIXELS` in all.
        """
        if not chat.has_images:
            return chat
        urls = _urls(chat)
        if len(urls) > MAX_IMAGES:
            raise InvalidRequest(
                f"A request may have at most {MAX_IMAGES} images; this one has {len(urls)}.", param="messages"
            )
        for (message, part), url in urls.items():
            payload_start(url, _path(message, part))
        changed: dict[tuple[int, int], str] = {}
        pixels = 0
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()
        for place, url in urls.items():
            try:
                checked, size = await loop.run_in_executor(self._pool, self.check, url, _path(*place), unwanted)
            except asyncio.CancelledError:
                unwanted.set()
                raise
            pixels += size
            if pixels > MAX_REQUEST_PIXELS:
                raise InvalidRequest(
                    f"The images of a request may have at most {MAX_REQUEST_PIXELS} pixels in all.", param="messages"
                )
            if checked is not url:
                changed[place] = checked
        return _replaced(chat, changed) if changed else chat

    def check(self, url: str, param: str, unwanted: threading.Event | None = None) -> tuple[str, int]:
        """The URL to send instead of `url`, the same string if it can be, and the number of pixels. Takes its time: not for the event loop.
        Nobody waits for it any more once `unwanted` is set.

        Raises:
            InvalidImageUrl, InvalidImage: see `checked`.
        """
        start = payload_start(url, param)
        try:
            data, is_canonical = decode(url, start)
            found = picture.begin(data)
            converted = self._settle(found, unwanted or threading.Event())
        except BadImage as error:
            raise InvalidImage(f"'{param}' is no image that can be read: {error}.", param=param) from error
        if converted:
            return data_url(converted), found.pixels
        if not is_canonical:
            return data_url(data), found.pixels
        head = f"data:image/{found.kind};base64,"
        return (url if url.startswith(head) and start == len(head) else head + url[start:]), found.pixels

    def close(self) -> None:
        """End the threads and processes; images at work are lost."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in list(self._children):
            child.kill()

    def _settle(self, found: ParsedImage, unwanted: threading.Event) -> bytes:
        """The picture to use instead; nothing for "as it is"."""
        if found.is_bearable and picture.is_taken_as_is(found):
            return picture.AS_IS
        if found.is_light:
            return picture.convert(found)
        return self._in_child(found.data, unwanted)

    def _in_child(self, data: bytes, unwanted: threading.Event) -> bytes:
        """The same in a process of its own, with bounds on its time and memory, without the gateway's secrets."""
        site = str(Path(PIL.__file__).parents[1])
        command = [sys.executable, "-I", "-W", "ignore", picture.__file__, site]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}) as child:  # noqa: S603 - all of it is ours
            self._children.add(child)
            try:
                if self._closing.is_set():
                    child.kill()
                out, complaint = _communicate(child, data, unwanted)
            finally:
                self._children.discard(child)
                with suppress(ProcessLookupError):
                    child.kill()
        if child.returncode == picture.BAD:
            raise BadImage(out.decode())
        if child.returncode < 0:
            raise BadImage("it takes too long or too much memory to decode")
        if child.returncode:
            raise RuntimeError(f"{picture.__file__} failed: {complaint.decode(errors='replace')[-500:]}")
        return out


def _communicate(child: subprocess.Popen[bytes], data: bytes, unwanted: threading.Event) -> tuple[bytes, bytes]:
    """What the child said; it is ended when nobody waits for it any more."""
    ends = time.monotonic() + CHILD_SECONDS
    given: bytes | None = data  # once: what is not written yet is kept
    while True:
        try:
            return child.communicate(given, CHILD_POLL)
        except subprocess.TimeoutExpired:
            given = None
            if unwanted.is_set() or time.monotonic() > ends:
                raise BadImage("it takes too long to decode") from None


def payload_start(url: str, param: str) -> int:
    """Where the base64 of a `data:` URL (RFC 2397) begins. The media type is not believed, so any will do.

    Raises:
        InvalidImageUrl: it is no such URL.
    """
    head, comma, _ = url[:MAX_HEAD].partition(",")
    start = len(head) + 1
    head = head.lower()
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise InvalidImageUrl(
            "Images are taken as 'data:image/...;base64,...' URLs only: put the image itself into the request.",
            param=param,
        )
    return start


def decode(url: str, start: int) -> tuple[bytes, bool]:
    """The bytes, and whether the base64 from `start` is just what they encode to.

    White space and missing padding are forgiven, as in every browser (WHATWG Infra, "forgiving-base64 decode"); the engines would not.

    Raises:
        BadImage: it is no base64.
    """
    try:
        try:
            data = _decode_strictly(url, start)
        except ValueError:
            return _decode_forgivingly(url, start), False
    except ValueError:
        raise BadImage("its base64 is not valid") from None
    tail = len(data) % 3 or 3
    return data, not data or base64.b64encode(data[-tail:]).decode() == url[-4:]


def _decode_strictly(url: str, start: int) -> bytes:
    pieces: list[bytes] = []
    for at in range(start, len(url), TEXT_STEP):
        if at > start:
            if len(pieces[-1]) % 3:
                raise ValueError("padding in the middle")
            time.sleep(BREATH)
        pieces.append(binascii.a2b_base64(url[at : at + TEXT_STEP], strict_mode=True))
    return b"".join(pieces)


def _decode_forgivingly(url: str, start: int) -> bytes:
    pieces: list[bytes] = []
    rest = ""
    for at in range(start, len(url), TEXT_STEP):
        text = rest + "".join(url[at : at + TEXT_STEP].split())
        whole = max(0, len(text) - 4) // 4 * 4  # the last ones may be padding
        pieces.append(binascii.a2b_base64(text[:whole], strict_mode=True))
        if len(pieces[-1]) % 3:
            raise ValueError("padding in the middle")
        rest = text[whole:]
        time.sleep(BREATH)
    rest = rest.rstrip("=")
    pieces.append(binascii.a2b_base64(rest + "=" * (-len(rest) % 4), strict_mode=True))
    return b"".join(pieces)


def data_url(data: bytes) -> str:
    """The canonical `data:` URL of a PNG or JPEG."""
    pieces = [f"data:image/{picture.kind_of(data)};base64,"]
    for at in range(0, len(data), BYTES_STEP):
        pieces.append(base64.b64encode(data[at : at + BYTES_STEP]).decode())
        if len(data) > BYTES_STEP:
            time.sleep(BREATH)
    return "".join(pieces)


def _urls(chat: Chat) -> dict[tuple[int, int], str]:
    """Every image's URL by the places of its message and of its part."""
    return {
        (index, number): part.image_url.url
        for index, message in enumerate(chat.messages)
        if isinstance(message.content, list)
        for number, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    }


def _path(message: int, part: int) -> str:
    return f"messages[{message}].content[{part}].image_url.url"


def _replaced(chat: Chat, urls: dict[tuple[int, int], str]) -> Chat:
    def with_urls(index: int, message: Message) -> Message:
        if not isinstance(message.content, list) or not any(place == index for place, _ in urls):
            return message
        parts = [
            ImagePart(ImageUrl(urls[index, number])) if (index, number) in urls else part
            for number, part in enumerate(message.content)
        ]
        return msgspec.structs.replace(message, content=parts)

    return msgspec.structs.replace(
        chat, messages=[with_urls(index, message) for index, message in enumerate(chat.messages)]
    )
