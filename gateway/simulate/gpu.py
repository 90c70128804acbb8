"""A simulated GPU that several stand-ins share, in one process or in several: a file with what each holds.

An entry of a process that has ended holds nothing.
"""

import fcntl
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import orjson


class OutOfGpuMemory(RuntimeError):
    """The GPU has too little free memory."""


class SharedGpu:
    """One engine's part of the GPU's memory, in bytes. Without `path`, the engine has a GPU of its own."""

    def __init__(self, path: str, size: int) -> None:
        self._path = Path(path) if path else None
        self._size = size
        self._name = uuid.uuid4().hex

    def hold(self, size: int) -> None:
        """Hold `size` bytes, in place of what the engine held before.

        Raises:
            OutOfGpuMemory: there is not so much memory. The engine goes on to hold what it held.
        """
        if self._path is None:
            return
        with _opened(self._path) as state:
            others = sum(held for name, (held, _) in state["held"].items() if name != self._name)
            if others + size > self._size:
                state["refused"] += 1
                raise OutOfGpuMemory(f"{size} bytes wanted, {max(0, self._size - others)} free")
            state["held"].pop(self._name, None)
            if size:
                state["held"][self._name] = [size, os.getpid()]
            state["peak"] = max(state["peak"], others + size)
            state["most_engines"] = max(state["most_engines"], len(state["held"]))


@contextmanager
def _opened(path: Path) -> Iterator[dict[str, Any]]:
    """Lock the file, and write the state back at the end."""
    with path.open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        state = _read(file)
        try:
            yield state
        finally:
            file.truncate(0)
            file.write(orjson.dumps(state))
            file.flush()


def read_gpu(path: str | Path) -> dict[str, Any]:
    """Return the state of the GPU in a file.

    `held` has the bytes and the process of each engine, `peak` the most bytes that were held at once,
    `most_engines` the most engines that held some, and `refused` counts the allocations that failed.
    """
    with Path(path).open("a+b") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        return _read(file)


def _read(file: Any) -> dict[str, Any]:
    file.seek(0)
    content = file.read()
    state: dict[str, Any] = orjson.loads(content) if content else _empty()
    state["held"] = {name: entry for name, entry in state["held"].items() if _is_alive(entry[1])}
    return state


def _empty() -> dict[str, Any]:
    return {"held": {}, "peak": 0, "most_engines": 0, "refused": 0}


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
