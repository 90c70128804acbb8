"""Images of a request: check and conversion of its `data:` URLs.

Each URL is decoded once, in a thread. The result is an image that every engine reads alike, or an
error.
"""

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

from gateway.chat import image_file
from gateway.chat.image_file import BadImage, ParsedImage
from gateway.chat.request import Chat, ImagePart, ImageUrl, Message
from gateway.errors import InvalidImage, InvalidImageUrl, InvalidRequest

MAX_IMAGES = 500
"""Maximum number of images in a request, the same as OpenAI's. vLLM's own limit is 999."""
MAX_REQUEST_PIXELS = 500_000_000
"""Maximum number of pixels of all images in a request.

A few KB can contain 64 million pixels, and each million takes a thread about 10 ms.
"""
WORKERS = 2
CHILD_SECONDS = 120.0
"""Time limit for the child process in seconds.

Its actual limit is its own CPU time. This one is for a machine too busy to give it any.
"""

CHILD_POLL = 0.2  # seconds
MAX_HEAD = 512
TEXT_STEP = 1 << 17  # base64 characters decoded in one call, which holds the GIL for about half a millisecond
BYTES_STEP = 3 << 15
GIL_PAUSE = 1e-4  # seconds; a waiting thread gets the GIL immediately only if this one sleeps


class ImageNormalizer:
    """Checks the images of requests in a small thread pool.

    Work that would block other threads, or needs much memory, runs in a process of its own.
    """

    def __init__(self, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, "images")
        self._children: set[subprocess.Popen[bytes]] = set()
        self._closing = threading.Event()

    async def checked(self, chat: Chat) -> Chat:
        """Return `chat` with complete images that every engine accepts.

        This is the same object if no image changes. Images of a request are checked one after the
        other, so that requests share the threads. On cancellation, the image in progress is
        finished in its thread, which takes little time; a child process is killed.

        Raises:
            InvalidImageUrl: an image is not a `data:` URL in base64. The gateway never fetches
                images.
            InvalidImage: an image is not a complete PNG, JPEG, WebP or GIF of up to
                `image_file.MAX_PIXELS`.
            InvalidRequest: more than `MAX_IMAGES` images, or more than `MAX_REQUEST_PIXELS` in
                total.
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
                    f"The images of a request may have at most {MAX_REQUEST_PIXELS} pixels in total.", param="messages"
                )
            if checked is not url:
                changed[place] = checked
        return _replaced(chat, changed) if changed else chat

    def check(self, url: str, param: str, unwanted: threading.Event | None = None) -> tuple[str, int]:
        """Return the URL to send instead of `url`, and the number of pixels.

        The URL is the same string if possible. This is slow: do not call it in the event loop. Once
        `unwanted` is set, the result is no longer needed.

        Raises:
            InvalidImageUrl, InvalidImage: see `checked`.
        """
        start = payload_start(url, param)
        try:
            data, is_canonical = decode(url, start)
            image = image_file.begin(data)
            converted = self._converted_or_same(image, unwanted or threading.Event())
        except BadImage as error:
            raise InvalidImage(f"'{param}' is not a readable image: {error}.", param=param) from error
        if converted:
            return data_url(converted), image.pixels
        if not is_canonical:
            return data_url(data), image.pixels
        head = f"data:image/{image.kind};base64,"
        return (url if url.startswith(head) and start == len(head) else head + url[start:]), image.pixels

    def close(self) -> None:
        """Stop the threads and processes. Images in progress are lost."""
        self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        for child in list(self._children):
            child.kill()

    def _converted_or_same(self, image: ParsedImage, unwanted: threading.Event) -> bytes:
        """Return the image to use instead, or nothing if it can be used as it is."""
        if image.is_bearable and image_file.is_taken_as_is(image):
            return image_file.AS_IS
        if image.is_light:
            return image_file.convert(image)
        return self._in_child(image.data, unwanted)

    def _in_child(self, data: bytes, unwanted: threading.Event) -> bytes:
        """Convert the image in a child process, with limits on time and memory and without secrets."""
        site = str(Path(PIL.__file__).parents[1])
        command = [sys.executable, "-I", "-W", "ignore", image_file.__file__, site]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}) as child:  # noqa: S603 - trusted
            self._children.add(child)
            try:
                if self._closing.is_set():
                    child.kill()
                out, errors = _communicate(child, data, unwanted)
            finally:
                self._children.discard(child)
                with suppress(ProcessLookupError):
                    child.kill()
        if child.returncode == image_file.BAD:
            raise BadImage(out.decode())
        if child.returncode < 0:
            raise BadImage("it takes too long or too much memory to decode")
        if child.returncode:
            raise RuntimeError(f"{image_file.__file__} failed: {errors.decode(errors='replace')[-500:]}")
        return out


def _communicate(child: subprocess.Popen[bytes], data: bytes, unwanted: threading.Event) -> tuple[bytes, bytes]:
    """Return the child's output. The child is killed once the result is unwanted."""
    ends = time.monotonic() + CHILD_SECONDS
    unsent: bytes | None = data  # sent once: the pipe keeps what it has not written yet
    while True:
        try:
            return child.communicate(unsent, CHILD_POLL)
        except subprocess.TimeoutExpired:
            unsent = None
            if unwanted.is_set() or time.monotonic() > ends:
                raise BadImage("it takes too long to decode") from None


def payload_start(url: str, param: str) -> int:
    """Return where the base64 of a `data:` URL (RFC 2397) begins.

    The declared media type is ignored.

    Raises:
        InvalidImageUrl: it is not such a URL.
    """
    head, comma, _ = url[:MAX_HEAD].partition(",")
    start = len(head) + 1
    head = head.lower()
    if not (comma and head.startswith("data:") and head.endswith(";base64")):
        raise InvalidImageUrl(
            "Images must be 'data:image/...;base64,...' URLs: put the image itself into the request.",
            param=param,
        )
    return start


def decode(url: str, start: int) -> tuple[bytes, bool]:
    """Decode the base64 from `start`, and return whether it is the canonical encoding.

    Whitespace and missing padding are accepted, as in every browser (WHATWG Infra,
    "forgiving-base64 decode"), but not by the engines.

    Raises:
        BadImage: it is not base64.
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
            time.sleep(GIL_PAUSE)
        pieces.append(binascii.a2b_base64(url[at : at + TEXT_STEP], strict_mode=True))
    return b"".join(pieces)


def _decode_forgivingly(url: str, start: int) -> bytes:
    pieces: list[bytes] = []
    rest = ""
    for at in range(start, len(url), TEXT_STEP):
        text = rest + "".join(url[at : at + TEXT_STEP].split())
        whole = max(0, len(text) - 4) // 4 * 4  # the last characters may be padding
        pieces.append(binascii.a2b_base64(text[:whole], strict_mode=True))
        if len(pieces[-1]) % 3:
            raise ValueError("padding in the middle")
        rest = text[whole:]
        time.sleep(GIL_PAUSE)
    rest = rest.rstrip("=")
    pieces.append(binascii.a2b_base64(rest + "=" * (-len(rest) % 4), strict_mode=True))
    return b"".join(pieces)


def data_url(data: bytes) -> str:
    """Return the canonical `data:` URL of a PNG or JPEG."""
    pieces = [f"data:image/{image_file.kind_of(data)};base64,"]
    for at in range(0, len(data), BYTES_STEP):
        pieces.append(base64.b64encode(data[at : at + BYTES_STEP]).decode())
        if len(data) > BYTES_STEP:
            time.sleep(GIL_PAUSE)
    return "".join(pieces)


def _urls(chat: Chat) -> dict[tuple[int, int], str]:
    """Return the URL of every image by the indices of its message and content part."""
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
