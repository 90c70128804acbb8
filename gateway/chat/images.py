"""Images of a request: check and conversion of its `data:` URLs.

The result is an image that every engine reads alike, or an error. The work of a request has a
budget, and keys take turns at the workers.
"""

import asyncio
import base64
import binascii
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

import msgspec

from gateway.chat import image_file
from gateway.chat.image_structure import BadImage, kind_of
from gateway.chat.image_turns import FairTurns
from gateway.chat.image_workers import Converted, ImageWorkers, Job, OutOfTime
from gateway.chat.message import ImagePart, ImageUrl
from gateway.chat.request import Chat
from gateway.errors import GatewayError, InvalidImage, InvalidImageUrl, QueueTimeout

MAX_IMAGES = 500
"""Maximum number of images in a request, the same as OpenAI's. vLLM's own limit is 999."""
MAX_REQUEST_PIXELS = 500_000_000
"""Maximum number of pixels of all images in a request.

A few KB can contain 64 million pixels, and each million takes at least 10 ms of CPU.
"""
MAX_REQUEST_SECONDS = 30.0
"""Maximum CPU time for all images in a request.

500 million pixels of ordinary images take less. Noise and JPEGs of many scans take ten times as
long as others of their size.
"""
MAX_CONVERTED_SIZE = 1 << 25
"""Maximum number of base64 characters of all converted images in a request.

A request whose images are longer may have as many after the conversion as before. A converted image
is usually at most twice as large as its original, but a few KB can become megabytes, and rendering
32 MiB for the engine blocks the event loop for 40 ms.
"""
MAX_REQUEST_WAIT = 120.0
"""Maximum time for the images of a request in seconds, with the wait for turns.

Four times `MAX_REQUEST_SECONDS`, because keys share the workers.
"""
RETRY_AFTER = 30  # seconds; most of the work that a request waited for is done by then
WORKERS = 2
"""Number of images in progress. One of them may be large, so that small ones do not wait behind it."""
MAX_HEAD = 512
TEXT_STEP = 1 << 17  # base64 characters decoded in one call, which holds the GIL for about half a millisecond
BYTES_STEP = 3 << 15
GIL_PAUSE = 1e-4  # seconds; a waiting thread gets the GIL immediately only if this one sleeps


class Checked(NamedTuple):
    """Result of the check of one image."""

    url: str
    """The URL to send, the same string if possible."""
    pixels: int
    """Number of pixels, if it was checked."""
    seconds: float = 0.0
    """CPU time, also of the child process."""
    is_put_off: bool = False
    """True if nothing was done yet, because the image is large."""


class Budget:
    """The work that the images of one request may still take.

    Its methods raise `InvalidImage` once that is exceeded.
    """

    __slots__ = ("_pixels", "_seconds", "_size")

    def __init__(self, size: int = 0) -> None:
        """`size` is the number of characters of all images."""
        self._pixels = MAX_REQUEST_PIXELS
        self._seconds = MAX_REQUEST_SECONDS
        self._size = max(MAX_CONVERTED_SIZE, size)

    def spend_pixels(self, pixels: int) -> None:
        """Count an image before it is decoded."""
        self._pixels -= pixels
        if self._pixels < 0:
            raise InvalidImage(
                f"The images of a request may have at most {MAX_REQUEST_PIXELS} pixels in total. "
                "Send fewer or smaller images.",
                param="messages",
            )

    def spend_work(self, seconds: float, converted_size: int) -> None:
        """Count an image after it was checked."""
        self._seconds -= seconds
        if self._seconds < 0:
            raise InvalidImage(
                f"The images of a request take more than {MAX_REQUEST_SECONDS:g} s of computation in total. "
                "Send fewer or smaller images.",
                param="messages",
            )
        self._size -= converted_size
        if self._size < 0:
            raise InvalidImage(
                "The images of a request become too large when they are converted. "
                "Send fewer or smaller images, or send them as PNG or JPEG without transparency.",
                param="messages",
            )


def check_count(images: int) -> None:
    """Check the number of images of a request.

    Raises:
        InvalidImage: there are more than `MAX_IMAGES`.
    """
    if images > MAX_IMAGES:
        raise InvalidImage(f"A request may have at most {MAX_IMAGES} images; this one has {images}.", param="messages")


class ImageNormalizer:
    """Checks the images of requests, a few at a time.

    Small plain images are decoded in a thread. All others, and all conversions, are the work of
    child processes.
    """

    def __init__(self, workers: int = WORKERS) -> None:
        self._pool = ThreadPoolExecutor(workers, "images")
        self._turns = FairTurns(workers)
        self._large_turns = FairTurns(max(1, workers - 1))
        self._workers = ImageWorkers()

    async def checked(
        self, chat: Chat, key: str = "", on_size: Callable[[int], None] = lambda size: None, max_pixels: int = 0
    ) -> Chat:
        """Return `chat` with complete images that every engine accepts.

        This is the same object if no image changes. Images of a request are checked one after the
        other, and each waits for a turn of `key`: neither many images nor many requests of one key
        delay another key for longer than one image. On cancellation, the image in progress ends:
        its child process is killed, or the thread finishes, which takes little time. `on_size` is
        called with the number of characters of each converted image; its exceptions are raised.
        Images of more than `max_pixels`, if it is not 0, are scaled down.

        Raises:
            InvalidImageUrl: an image is not a `data:` URL in base64.
            InvalidImage: an image is not a complete PNG, JPEG, WebP or GIF of up to
                `image_structure.MAX_PIXELS`; there are more than `MAX_IMAGES`; or they exceed the
                `Budget` of a request.
            QueueTimeout: it takes longer than `MAX_REQUEST_WAIT`.
        """
        if not chat.has_images:
            return chat
        urls = urls_of(chat)
        check_count(len(urls))
        for place, url in urls.items():
            payload_start(url, path_of(*place))
        try:
            async with asyncio.timeout(MAX_REQUEST_WAIT):
                changed = await self._changed(urls, key, on_size, max_pixels)
        except TimeoutError:
            raise QueueTimeout(
                f"The images were not checked within {MAX_REQUEST_WAIT:g} s, because the gateway is busy with others. "
                "Try again later.",
                retry_after=RETRY_AFTER,
            ) from None
        return with_urls(chat, changed) if changed else chat

    def check(
        self,
        url: str,
        param: str,
        budget: Budget | None = None,
        job: Job | None = None,
        *,
        max_pixels: int = 0,
        may_be_large: bool = True,
    ) -> Checked:
        """Return the URL to send instead of `url`.

        This is slow: do not call it in the event loop. Once `job` has ended, the result is no
        longer needed. If a large image is not permitted now, nothing is done, and the result says
        so.

        Raises:
            InvalidImageUrl, InvalidImage: see `checked`.
            QueueTimeout: the machine is too busy for the image.
        """
        began, budget = time.thread_time(), budget or Budget(len(url))
        start = payload_start(url, param)
        if not may_be_large and (len(url) - start) * 3 // 4 > image_file.LARGE_BYTES:
            return Checked(url, 0, is_put_off=True)
        try:
            data, is_canonical = decode(url, start)
            declared = image_file.declared_pixels(data)
            image = image_file.begin(data) if declared is None else None
            pixels = image.pixels if image is not None else declared or 0
            if not may_be_large and image_file.is_large(data, pixels):
                return Checked(url, pixels, time.thread_time() - began, is_put_off=True)
            budget.spend_pixels(pixels)
            result = Converted(image_file.AS_IS, pixels, 0.0)
            is_too_large = bool(max_pixels) and pixels > max_pixels
            if image is None or is_too_large or not image.is_small_and_plain or not image_file.is_taken_as_is(image):
                result = self._workers.convert(data, pixels, job or Job(), max_pixels)
                budget.spend_pixels(max(0, result.pixels - pixels))  # a GIF's frame may exceed its screen
        except BadImage as error:
            raise InvalidImage(f"'{param}' is not a readable image: {error}.", param=param) from error
        except OutOfTime as error:
            raise QueueTimeout("The gateway is too busy to check the image.", retry_after=RETRY_AFTER) from error
        if result.data:
            sent = data_url(result.data)
        elif not is_canonical:
            sent = data_url(data)
        else:
            head = f"data:image/{kind_of(data)};base64,"
            sent = url if url.startswith(head) and start == len(head) else head + url[start:]
        return Checked(sent, result.pixels, result.seconds + time.thread_time() - began)

    def close(self) -> None:
        """Stop the threads and processes. Images in progress are lost."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._workers.close()

    async def _changed(
        self, urls: dict[tuple[int, int], str], key: str, on_size: Callable[[int], None], max_pixels: int
    ) -> dict[tuple[int, int], str]:
        """Return the URLs to send instead of some of `urls`."""
        changed: dict[tuple[int, int], str] = {}
        budget = Budget(sum(map(len, urls.values())))
        for place, url in urls.items():
            checked = await self._in_turn(url, path_of(*place), budget, key, max_pixels)
            is_changed = checked.url is not url
            budget.spend_work(checked.seconds, len(checked.url) if is_changed else 0)
            if is_changed:
                on_size(len(checked.url))
                changed[place] = checked.url
        return changed

    async def _in_turn(self, url: str, param: str, budget: Budget, key: str, max_pixels: int) -> Checked:
        """Check an image in a thread, in the turn of its key.

        Whether it is large may show only after its base64 was decoded. The bytes of a large one are
        dropped and decoded again in its turn, so that a request that waits does not hold them.
        """
        checked = await self._in_thread(url, param, budget, key, max_pixels, may_be_large=False)
        if checked.is_put_off:
            budget.spend_work(checked.seconds, 0)
            checked = await self._in_thread(url, param, budget, key, max_pixels, may_be_large=True)
        return checked

    async def _in_thread(
        self, url: str, param: str, budget: Budget, key: str, max_pixels: int, *, may_be_large: bool
    ) -> Checked:
        job = Job()
        taken: list[FairTurns] = []
        try:
            for turns in (self._large_turns, self._turns) if may_be_large else (self._turns,):
                await turns.take(key)
                taken.append(turns)
            work = self._pool.submit(
                self.check, url, param, budget, job, max_pixels=max_pixels, may_be_large=may_be_large
            )
        except BaseException:
            _release(taken)
            raise
        work.add_done_callback(_releasing(taken))  # after a cancellation too: the thread is busy until then
        waiting = [asyncio.wrap_future(work)]
        del work  # no local name for what holds the error, whose traceback holds this frame and the image
        try:
            return await waiting.pop()
        except asyncio.CancelledError:
            job.end()
            raise


def _release(taken: list[FairTurns]) -> None:
    for turns in taken:
        turns.release()


def _releasing(taken: list[FairTurns]) -> Callable[[Future[Checked]], None]:
    """Return a callback for any thread that releases the turns in the event loop."""
    loop = asyncio.get_running_loop()

    def callback(_: Future[Checked]) -> None:
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_release, taken)

    return callback


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


def data_url(data: bytes | bytearray) -> str:
    """Return the canonical `data:` URL of a PNG or JPEG."""
    pieces = [f"data:image/{kind_of(data)};base64,"]
    for at in range(0, len(data), BYTES_STEP):
        pieces.append(base64.b64encode(data[at : at + BYTES_STEP]).decode())
        if len(data) > BYTES_STEP:
            time.sleep(GIL_PAUSE)
    return "".join(pieces)


def urls_of(chat: Chat) -> dict[tuple[int, int], str]:
    """Return the URL of every image by the indices of its message and content part."""
    return {
        (index, number): part.url
        for index, message in enumerate(chat.messages)
        if isinstance(message.content, list)
        for number, part in enumerate(message.content)
        if isinstance(part, ImagePart)
    }


def path_of(message: int, part: int) -> str:
    """Return the path of an image in the request, for errors."""
    return f"messages[{message}].content[{part}].image_url.url"


def rename_place(error: GatewayError, chat: Chat, paths: Sequence[str]) -> None:
    """Have `error` name an image by its path in the client's request. `paths` are those of all images of `chat`."""
    for place, path in zip(urls_of(chat), paths, strict=False):
        if error.param == path_of(*place):
            error.message = error.message.replace(error.param, path)
            error.param = path
            return


def with_urls(chat: Chat, urls: dict[tuple[int, int], str]) -> Chat:
    """Return `chat` with other URLs for some images, by the indices of message and content part."""
    messages = list(chat.messages)
    for index in {index for index, _ in urls}:
        content = messages[index].content
        assert isinstance(content, list)
        parts = [
            ImagePart(ImageUrl(urls[index, number])) if (index, number) in urls else part
            for number, part in enumerate(content)
        ]
        messages[index] = msgspec.structs.replace(messages[index], content=parts)
    return msgspec.structs.replace(chat, messages=messages)
