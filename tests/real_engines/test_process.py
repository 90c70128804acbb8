"""Servers that tests start: ready within their deadline, and never left running."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.real_engines.process import Server, free_port, wait_until

REPOSITORY = Path(__file__).parents[2]


def listener(port: int, folder: Path) -> Server:
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    return Server(command, port=port, health_path="/", log=folder / "log", environment=os.environ, cwd=folder)


def listens(port: int) -> bool:
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_server_runs_only_inside_the_block(tmp_path: Path) -> None:
    port = free_port()
    with listener(port, tmp_path):
        assert listens(port)
    assert not listens(port)


def test_failed_start_shows_the_last_lines_of_output(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    server = Server(
        command, port=free_port(), health_path="/", log=tmp_path / "log", environment=os.environ, cwd=tmp_path
    )
    with pytest.raises(AssertionError, match="no such model"), server:
        pass


def test_server_that_never_becomes_ready_is_stopped(tmp_path: Path) -> None:
    port = free_port()
    server = listener(port, tmp_path)
    server.start_seconds = 0.5
    server._health_path = "/nowhere"
    with pytest.raises(AssertionError, match="not ready within"), server:
        pass
    assert not listens(port)


def test_server_does_not_outlive_a_killed_owner(tmp_path: Path) -> None:
    port = free_port()
    owner = f"""
import os, sys, time
from pathlib import Path
from tests.real_engines.test_process import listener
server = listener({port}, Path({str(tmp_path)!r}))
server.start()
server.wait_until_ready()
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", owner],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert listens(port)
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: listens(port), lambda answers: not answers, "the server is gone")
