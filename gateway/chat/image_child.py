"""Program of a child process: checks and converts one image after another (`image_file.py`).

`python image_child.py FOLDER…` finds Pillow and this package in the folders. It reads images from
standard input, each after its length and maximum size (`REQUEST`), and writes an answer to each on
standard output: `ANSWER`, then the result. It ends with its input.
"""

import sys

if __name__ == "__main__":
    sys.path += sys.argv[1:]  # the process has no environment that could name the folders

import fcntl
import os
import resource
import signal
import struct
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.chat.image_file import AS_IS, TOO_MUCH_MEMORY, begin, convert, is_taken_as_is
from gateway.chat.image_structure import BadImage

REQUEST = struct.Struct(">QQ")
"""Number of bytes of the image that follows, and its maximum number of pixels (0: none)."""
ANSWER = struct.Struct(">BQdQ")
"""Status, number of pixels, seconds of CPU, and number of bytes of the result that follows."""
DONE, BAD, FAILED = 0, 1, 2
"""Status of an answer.

`DONE`: the result is the image to use instead, or empty if the image can be used as it is. `BAD`:
it is the reason why the image is rejected. `FAILED`: it is the traceback of an error in this program.
"""
CPU_SECONDS = 15
"""CPU time for an image.

64 million pixels take up to 5 s. `RLIMIT_CPU` would add up over the images of a process.
"""
ORPHAN_SECONDS = 60
"""Time for an image, should the gateway be gone and not end the process."""
OVER_TIME = (-signal.SIGPROF, -signal.SIGALRM)
MEMORY = 2 << 30


def main() -> int:
    """Answer for one image after another until standard input ends."""
    os.nice(10)  # the gateway has priority
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the gateway, which ends this process
    if sys.platform != "darwin":  # macOS refuses to limit the address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):  # no image on disk
        resource.setrlimit(limit, (0, 0))
    os.set_blocking(sys.stderr.fileno(), False)  # it is read only once this process has ended
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    while len(head := source.read(REQUEST.size)) == REQUEST.size:
        length, max_pixels = REQUEST.unpack(head)
        data = source.read(length)
        if len(data) < length:
            break
        began = time.process_time()
        with _limits(source.fileno()):
            status, pixels, out = _answer(data, max_pixels)
        del data
        sink.write(ANSWER.pack(status, pixels, time.process_time() - began, len(out)))
        sink.write(out)
        sink.flush()
    return 0


@contextmanager
def _limits(source: int) -> Iterator[None]:
    """Have the kernel end this process if the image takes too long, or the gateway ends.

    The signals keep their default action, which no decoder can delay. `SIGIO` says that `source`
    was closed, because the gateway writes nothing before it has its answer (not on macOS).
    """
    flags = fcntl.fcntl(source, fcntl.F_GETFL)
    fcntl.fcntl(source, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(source, fcntl.F_SETFL, flags | fcntl.FASYNC)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, ORPHAN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        fcntl.fcntl(source, fcntl.F_SETFL, flags)


def _answer(data: bytes, max_pixels: int) -> tuple[int, int, bytes]:
    """Return the status, the number of pixels, and the result."""
    pixels = 0
    try:
        parsed = begin(data)
        pixels = parsed.pixels
        is_small = not max_pixels or pixels <= max_pixels
        as_is = is_small and parsed.is_plain and is_taken_as_is(parsed)
        return DONE, pixels, AS_IS if as_is else convert(parsed, max_pixels)
    except BadImage as error:
        return BAD, pixels, str(error).encode()
    except MemoryError:
        return BAD, pixels, TOO_MUCH_MEMORY.encode()
    except Exception:
        return FAILED, pixels, traceback.format_exc().encode()[-500:]


if __name__ == "__main__":
    sys.exit(main())
