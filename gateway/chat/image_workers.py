"""Child processes that convert images, each one image at a time.

A child is a fresh interpreter that runs `image_child.py`. It has none of the gateway's memory,
sockets or environment, and it is reused, because its start costs about 100 ms of CPU and most
conversions a few. The parent writes the length of an image and the image, then reads the answer:
a child that starts late, or reads slowly, loses nothing. Every way to end a job early is the same:
the child is killed, and the thread that reads from it gets the end of the file.
"""

import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import IO, NamedTuple, cast

import PIL

from gateway.chat import image_child
from gateway.chat.image_structure import BadImage

JOBS_PER_CHILD = 1000
"""A child is replaced after this number of images, so that no leak in a decoder adds up."""
RECYCLE_PIXELS = 1 << 24
"""A child is replaced after an image of more pixels, so that no idle child holds its memory."""
MAX_RESULT = 1 << 26
"""Maximum number of bytes in an answer. `MAX_CONVERTED_PIXELS` of noise take 50 MB as a PNG."""
JOB_SECONDS, PIXELS_A_SECOND = 10.0, 2_500_000
"""Time limit of an image: 10 s, and one second more for every 2.5 million pixels.

A million pixels takes 20 ms of CPU, or 200 ms if they are noise. The start of a child takes 0.1 s,
on a busy machine several seconds, because the gateway and the engines have priority.
"""
PIECE = 1 << 16
FOLDERS = [str(Path(PIL.__file__).parents[1]), str(Path(image_child.__file__).parents[2])]
"""Where a child finds Pillow and this package."""

TOO_LONG = "it takes too long to decode"
TOO_HEAVY = "it takes too much time or memory to decode"
UNWANTED = "its result is no longer needed"


class OutOfTime(Exception):
    """The child got too little CPU time on a busy machine. The image is not to blame."""


class Job:
    """Work on one image. Any thread may end it, which kills the child that is at work."""

    __slots__ = ("_child", "_lock", "_reason")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._reason: str | None = None

    def end(self, reason: str = UNWANTED) -> None:
        """End the job: `ImageWorkers.convert` raises `BadImage` with `reason`."""
        with self._lock:
            self._reason = self._reason or reason
            if self._child is not None:
                self._child.kill()

    def begin(self, child: "_Child") -> None:
        with self._lock:
            self.check()
            self._child = child

    def finish(self) -> None:
        """Let the child go. From now on `end` does not kill the child, which may serve another job."""
        with self._lock:
            self._child = None
            self.check()

    def check(self) -> None:
        """Raise `OutOfTime` if the time limit has ended the job, `BadImage` if something else has."""
        if self._reason == TOO_LONG:
            raise OutOfTime
        if self._reason is not None:
            raise BadImage(self._reason)


class Converted(NamedTuple):
    """Result of a job."""

    data: bytes | bytearray
    """The image to use instead; empty if the image can be used as it is."""
    pixels: int
    seconds: float
    """CPU time."""


class ImageWorkers:
    """A pool of child processes. They start when needed; there are as many as threads that convert."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[_Child] = []
        self._busy: set[_Child] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"<ImageWorkers {len(self._busy)} busy, {len(self._idle)} idle>"

    def convert(self, data: bytes, pixels: int, job: Job, max_pixels: int = 0) -> Converted:
        """Check and convert an image in a child. It blocks the thread.

        `pixels` is the size that the image declares, and `max_pixels` that of the result (0: any).
        A child that dies by itself is replaced once, because the kernel may have killed it for the
        memory of others.

        Raises:
            BadImage: The image is rejected, takes too much CPU time or memory, or the job ended.
            OutOfTime: The time limit has passed, and not the limit of CPU time.
            RuntimeError: The child does not work. The image is not to blame.
        """
        timer = threading.Timer(JOB_SECONDS + pixels / PIXELS_A_SECOND, job.end, [TOO_LONG])
        timer.daemon = True
        timer.start()
        try:
            for _ in range(2):
                child = self._take(job)
                is_reusable = False
                try:
                    job.begin(child)
                    answer = child.ask(data, max_pixels)
                    job.finish()
                    is_reusable = child.jobs < JOBS_PER_CHILD and pixels <= RECYCLE_PIXELS
                except (EOFError, OSError):
                    job.finish()
                    if child.is_over_time:
                        raise BadImage(TOO_LONG) from None
                    continue
                finally:
                    self._put_back(child, is_reusable)
                return _result(answer)
        finally:
            timer.cancel()
        raise BadImage(TOO_HEAVY)

    def close(self) -> None:
        """Kill all children and wait until they are gone. Images in progress are lost."""
        with self._lock:
            self._is_closed = True
            idle, self._idle = self._idle, []
            busy = list(self._busy)
        for child in (*idle, *busy):
            child.kill()
        for child in idle:
            child.end()
        for child in busy:  # the thread that reads from it closes the pipes
            child.wait()

    def _take(self, job: Job) -> "_Child":
        with self._lock:
            if self._is_closed:
                job.end()
            job.check()
            while self._idle:
                child = self._idle.pop()
                if child.is_alive:
                    break
                child.end()
            else:
                child = _Child()
            self._busy.add(child)
            return child

    def _put_back(self, child: "_Child", is_reusable: bool) -> None:
        with self._lock:
            self._busy.discard(child)
            if is_reusable and not self._is_closed:
                self._idle.append(child)
                return
        child.end()


class _Answer(NamedTuple):
    status: int
    pixels: int
    seconds: float
    out: bytearray


def _result(answer: _Answer) -> Converted:
    if answer.status == image_child.BAD:
        raise BadImage(answer.out.decode(errors="replace"))
    if answer.status != image_child.DONE:
        raise RuntimeError(f"{image_child.__file__} failed: {answer.out.decode(errors='replace')}")
    return Converted(answer.out, answer.pixels, answer.seconds)


class _Child:
    """One child process with its pipes."""

    def __init__(self) -> None:
        self.jobs = 0
        self._process = _start()
        pipes = self._process.stdin, self._process.stdout, self._process.stderr
        self._stdin, self._stdout, self._stderr = cast("tuple[FileIO, FileIO, FileIO]", pipes)

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def is_over_time(self) -> bool:
        """True if the dead child exceeded its own limit of CPU time or time."""
        return self._process.returncode in image_child.OVER_TIME

    def ask(self, data: bytes, max_pixels: int) -> _Answer:
        """Have the child convert an image.

        Raises:
            EOFError, OSError: the child was killed.
            RuntimeError: the child ended itself.
        """
        self.jobs += 1
        try:
            _write(self._stdin, image_child.REQUEST.pack(len(data), max_pixels))
            _write(self._stdin, data)
            status, pixels, seconds, length = image_child.ANSWER.unpack(_read(self._stdout, image_child.ANSWER.size))
            if length > MAX_RESULT:
                raise EOFError
            return _Answer(status, pixels, seconds, _read(self._stdout, length))
        except (EOFError, OSError, struct.error):
            self.kill()
            if self.wait() > 0:
                errors = self._stderr.read().decode(errors="replace")
                raise RuntimeError(f"{image_child.__file__} failed: {errors[-500:]}") from None
            raise

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> int:
        return self._process.wait()

    def end(self) -> None:
        """Kill the process and close its pipes. A second call does nothing."""
        self.kill()
        self.wait()
        for pipe in (self._stdin, self._stdout, self._stderr):
            pipe.close()


def _start() -> "subprocess.Popen[bytes]":
    command: Sequence[str] = [sys.executable, "-I", "-W", "ignore", image_child.__file__, *FOLDERS]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env={}, bufsize=0)  # noqa: S603 - trusted


def _write(pipe: FileIO, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[pipe.write(left[:PIECE]) :]


def _read(pipe: IO[bytes], length: int) -> bytearray:
    pieces = bytearray()
    while len(pieces) < length:
        piece = pipe.read(min(PIECE, length - len(pieces)))
        if not piece:
            raise EOFError
        pieces += piece
    return pieces  # a copy of 50 MB would hold the GIL for 10 ms
