"""Servers that tests start as processes: output in a file, ready within a deadline, always
stopped.
"""

import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self, TypeVar

import httpx2

LEASH = Path(__file__).with_name("leash.py")
TAIL_LINES = 40

Value = TypeVar("Value")


def free_port() -> int:
    """Return a free port of 127.0.0.1, for a server that cannot use port 0 or binds it only after
    seconds.

    It is below the ports of outgoing connections (from 32768 on), one of which might take it before
    the server binds it.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError("no free port among 100 tried between 20000 and 32000")


def wait_until(read: Callable[[], Value], holds: Callable[[Value], bool], what: str, seconds: float = 10.0) -> None:
    """Read a value repeatedly until `holds` is true for it.

    Raises:
        AssertionError: it was not within `seconds`; the message has the last value.
    """
    deadline = time.monotonic() + seconds
    while not holds(value := read()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last seen: {value!r}"
        time.sleep(0.02)


class Server:
    """A command that listens on `port` of 127.0.0.1, with its output in the file `log`.

    `start` does not wait, so several servers can start at once; `wait_until_ready` waits. As a
    context manager it does both, and calls `stop` at the end.
    """

    start_seconds = 60.0

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        port: int,
        health_path: str,
        log: Path,
        environment: Mapping[str, str],
        cwd: Path,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self._command = [str(part) for part in command]
        self._health_path = health_path
        self._environment = dict(environment)
        self._cwd = cwd
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert self._process is None, "already started"
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, LEASH, *self._command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._cwd,
            )

    def wait_until_ready(self) -> None:
        """Wait for a 200 from the health path.

        Raises:
            AssertionError: the command ended, or was not ready within `start_seconds`. The message
                has the last lines of its output.
        """
        assert self._process is not None, "not started"
        deadline = time.monotonic() + self.start_seconds
        with httpx2.Client(trust_env=False, verify=False, timeout=2.0) as client:
            while not self._answers(client):
                assert self._process.poll() is None, (
                    f"{self!r} ended with status {self._process.returncode}\n{self.tail()}"
                )
                assert time.monotonic() < deadline, (
                    f"{self!r} was not ready within {self.start_seconds} s\n{self.tail()}"
                )
                time.sleep(0.1)

    def stop(self) -> None:
        """End the command and all processes that it started; the leash limits how long that
        takes.
        """
        if self._process is None:
            return
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        finally:
            self._process = None

    def tail(self) -> str:
        """Return the last lines of the command's output."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-TAIL_LINES:])

    def _answers(self, client: httpx2.Client) -> bool:
        try:
            return client.get(self.url + self._health_path).status_code == 200
        except httpx2.TransportError:
            return False

    def __enter__(self) -> Self:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}, log {self.log}>"
