"""Child processes for the tests of image workers: real ones that start late, hang, or have other limits."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, Any

import pytest

from gateway.chat import image_child, image_workers

Child = subprocess.Popen[bytes]
SOURCE = Path(image_child.__file__).read_text()
HANGING = "import time; time.sleep(60)"


class Children:
    """Every child process that was started, and the code of those to come."""

    def __init__(self) -> None:
        self.all: list[Child] = []
        self.codes: list[str | None] = []
        """Code that the next children run instead, in this order. None: the real one."""
        self.code: str | None = None
        """Code that all further children run instead."""
        self.started = threading.Event()

    @property
    def alive(self) -> list[Child]:
        return [child for child in self.all if child.poll() is None]


def watched(monkeypatch: pytest.MonkeyPatch) -> Children:
    children = Children()
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> Child:
        code = children.codes.pop(0) if children.codes else children.code
        if code is not None:
            command = [sys.executable, "-I", "-W", "ignore", "-c", code, *image_workers.FOLDERS]
        child = popen(command, **options)
        children.all.append(child)
        children.started.set()
        return child

    monkeypatch.setattr(image_workers.subprocess, "Popen", start)
    return children


def changed(*replacements: tuple[str, str]) -> str:
    """Return the child's code with other constants."""
    code = SOURCE
    for old, new in replacements:
        assert old in code
        code = code.replace(old, new)
    return code


class Gate:
    """A named pipe at which the first child that comes waits until the test lets it go on."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "gate"
        os.mkfifo(self._path)

    @property
    def late_start(self) -> str:
        return f"open({str(self._path)!r}).read()\n" + SOURCE

    @property
    def long_job(self) -> str:
        path = str(self._path)
        return changed(
            (
                "        parsed = begin(data)",
                f"        os.path.exists({path!r}) and open({path!r}).read(); parsed = begin(data)",
            )
        )

    def reached(self) -> IO[str]:
        """Wait until a child is there. It goes on when the result is closed."""
        opened = self._path.open("w")
        self._path.unlink()
        return opened
