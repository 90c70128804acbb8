"""Recording of the traffic for a later replay: arrival times and sizes, never contents or keys.

The file has one JSON object a line. The first describes the format, each other one is an exchange;
`docs/capacity.md` lists the fields. The event loop only collects what is known of an exchange; a
thread writes it, so that a slow or full disk delays no request.
"""

import asyncio
import base64
import binascii
import logging
import os
import queue
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import msgspec
from msgspec import Struct

from gateway.telemetry.exchange import Exchange
from gateway.telemetry.image_size import pixels

FORMAT, VERSION = "llm-gateway-traffic", 1
BATCH_SECONDS = 1.0
"""Longest time from the end of an exchange until it is handed to the thread."""
MAX_BATCHES = 64
"""Batches that wait for the disk; further ones are lost."""
MAX_BATCH = 5000
"""Exchanges of a batch that are kept; a gateway with more in `BATCH_SECONDS` loses the others."""
IMAGE_BEGINNING = 64 * 1024
"""Characters of an image's base64 in which its size is looked for."""
CLOSE_SECONDS = 2.0
OLDER = ".1"
"""End of the name of the file before."""

_log = logging.getLogger(__name__)
_encode = msgspec.json.encode


class RequestShape(Struct, frozen=True, gc=False, kw_only=True):
    """Sizes of a request.

    `characters` are those of all its texts. `images` are the beginning and the length of the base64
    of each. `conversation` and `prefix` are keyed hashes; empty: there is none.
    """

    messages: int
    characters: int
    max_tokens: int | None = None
    tools: int = 0
    images: tuple[tuple[str, int], ...] = ()
    conversation: str = ""
    prefix: str = ""
    prefix_characters: int = 0


class RecordedExchange(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line of the file. Times are in seconds, `at` is the arrival in Unix time.

    `images` has the pixels (None: unknown) and the bytes of each image.
    """

    at: float
    endpoint: str
    tier: str
    backend: str
    model: str
    stream: bool
    status: int
    messages: int
    characters: int
    duration: float
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    max_tokens: int | None = None
    tools: int = 0
    images: tuple[tuple[int | None, int], ...] = ()
    conversation: str = ""
    prefix: str = ""
    prefix_characters: int = 0
    queue_wait: float | None = None
    time_to_first_token: float | None = None
    outcome: str = "ok"


class TrafficRecording:
    """Recorder of exchanges, to a file that may change while the gateway runs.

    Two files of at most half of `size` bytes are kept: the file, and the one before it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._salt = os.urandom(16)
        """Key of the hashes. It is never written, so nobody can try out texts against them."""
        self._collected: list[tuple[Exchange, RequestShape, float]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writer: _Writer | None = None
        self._place: tuple[Path, int] | None = None
        self._has_lost = False

    def to(self, file: Path | None, size: int) -> "TrafficRecording | None":
        """Record to `file` from now on; return this object, or None if there is no file."""
        place = None if file is None else (file, size)
        if place != self._place:
            self.flush()
            if self._writer is not None:
                self._writer.finish()
            self._place = place
            self._writer = None if place is None else _Writer(*place)
        return None if self._writer is None else self

    def hashed(self, *pieces: bytes) -> str:
        """Return a hash of these texts that only this process can make."""
        digest = blake2b(key=self._salt, digest_size=8)
        for piece in pieces:
            digest.update(b"%d:" % len(piece))
            digest.update(piece)
        return digest.hexdigest()

    def add(self, exchange: Exchange, shape: RequestShape) -> None:
        """Record an exchange that has just ended."""
        if len(self._collected) >= MAX_BATCH:
            self._note_loss()
            return
        self._collected.append((exchange, shape, time.time() - exchange.duration))
        if self._timer is None:
            self._timer = self._loop.call_later(BATCH_SECONDS, self.flush)

    def flush(self) -> None:
        """Hand what was collected to the thread."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._collected = self._collected, []
        if not batch or self._writer is None:
            return
        if self._writer.write(batch):
            self._has_lost = False
        else:
            self._note_loss()

    async def close(self) -> None:
        """Write what was collected, and stop; a disk that does not answer is left after `CLOSE_SECONDS`."""
        self.flush()
        if self._writer is not None:
            self._writer.finish()
            await asyncio.to_thread(self._writer.join, CLOSE_SECONDS)
            self._writer, self._place = None, None

    def _note_loss(self) -> None:
        if not self._has_lost:
            self._has_lost = True
            _log.warning("record: requests arrive faster than the disk takes them; some are missing in the recording")


class _Writer:
    """Thread that appends batches to a file."""

    def __init__(self, file: Path, size: int) -> None:
        self._file = file
        self._most = size // 2
        self._batches: queue.Queue[list[tuple[Exchange, RequestShape, float]] | None] = queue.Queue(MAX_BATCHES)
        self._has_failed = False
        self._thread = threading.Thread(target=self._run, name="record", daemon=True)
        self._thread.start()

    def write(self, batch: list[tuple[Exchange, RequestShape, float]]) -> bool:
        """Hand over a batch; return False if it is lost."""
        with suppress(queue.Full):
            self._batches.put_nowait(batch)
            return True
        return False

    def finish(self) -> None:
        """Stop after the batches that wait."""
        with suppress(queue.Full):
            self._batches.put_nowait(None)

    def join(self, seconds: float) -> None:
        self._thread.join(seconds)

    def _run(self) -> None:
        while (batch := self._batches.get()) is not None:
            try:
                self._append(b"".join([_line(*item) for item in batch]))
                self._has_failed = False
            except OSError as error:
                self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        if not self._has_failed:
            self._has_failed = True
            problem = error.strerror or type(error).__name__
            _log.error("record: cannot write %s (%s); requests are not recorded until it works", self._file, problem)

    def _append(self, lines: bytes) -> None:
        """Append whole lines, or nothing.

        The file is opened for each batch: so one that was moved away, or whose disk was full, goes on
        without a restart.
        """
        descriptor = self._opened()
        try:
            before = os.fstat(descriptor).st_size
            if before and before + len(lines) > self._most:
                os.close(descriptor)
                descriptor = -1
                self._file.replace(self._file.with_name(self._file.name + OLDER))
                descriptor, before = self._opened(), 0
            self._write(descriptor, lines if before else _heading() + lines, before)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _opened(self) -> int:
        return os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def _write(self, descriptor: int, data: bytes, before: int) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except OSError:
            with suppress(OSError):  # half a line would spoil the next one
                os.ftruncate(descriptor, before)
            raise


def _heading() -> bytes:
    return _encode({"format": FORMAT, "version": VERSION, "started": round(time.time(), 3)}) + b"\n"


def _line(exchange: Exchange, shape: RequestShape, arrived: float) -> bytes:
    usage = exchange.usage
    recorded = RecordedExchange(
        at=round(arrived, 4),
        endpoint=exchange.endpoint,
        tier=exchange.tier,
        backend=exchange.backend,
        model=exchange.model,
        stream=exchange.stream,
        status=exchange.status,
        messages=shape.messages,
        characters=shape.characters,
        duration=exchange.duration,
        prompt_tokens=None if usage is None else usage.prompt_tokens,
        completion_tokens=None if usage is None else usage.completion_tokens,
        max_tokens=shape.max_tokens,
        tools=shape.tools,
        images=tuple(_image_sizes(shape.images)),
        conversation=shape.conversation,
        prefix=shape.prefix,
        prefix_characters=shape.prefix_characters,
        queue_wait=exchange.queue_wait,
        time_to_first_token=exchange.time_to_first_token,
        outcome=exchange.outcome,
    )
    return _encode(recorded) + b"\n"


def _image_sizes(images: Iterable[tuple[str, int]]) -> Iterable[tuple[int | None, int]]:
    for beginning, length in images:
        data = b""
        with suppress(binascii.Error, ValueError):
            data = base64.b64decode(beginning[: len(beginning) // 4 * 4])
        yield pixels(data), length * 3 // 4
