"""The launcher of real vLLMs, with another server in place of vLLM's."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from tests.real_engines.process import wait_until

LAUNCHER = Path(__file__).parents[2] / "benchmarks" / "vllm_launcher.py"
PROGRAM = f"""
import runpy, subprocess, sys, time
launcher = runpy.run_path({str(LAUNCHER)!r})
def serve():
    if sys.argv[1:] == ["fail"]:
        sys.exit(3)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print(child.pid, flush=True)
    time.sleep(600)
launcher["serve_commands"](serve, sys.argv[1:])
"""


class Launcher:
    def __init__(self, *arguments: str, log: Path) -> None:
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
            )  # fmt: skip
        self.log = log
        assert self.answer() == "ready"

    def ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> str:
        out: IO[str] | None = self.process.stdout
        assert out is not None
        return out.readline().strip()

    def child(self) -> int:
        """Return the process that the server has started; its output goes to the log."""
        wait_until(self.log.read_text, lambda text: text.endswith("\n"), "the server has started its child")
        return int(self.log.read_text().split()[-1])

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(10.0) == 0
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(log=tmp_path / "log")
    yield launcher
    if launcher.process.poll() is None:
        launcher.close()


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_killed_server_is_reported_and_its_processes_end(launcher: Launcher) -> None:
    assert launcher.ask("poll") == "not started"
    pid = int(launcher.ask("start"))
    child = launcher.child()
    assert launcher.ask("poll") == "running"
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: launcher.ask("poll"), lambda status: status == "-9", "the end is reported")
    assert launcher.ask("poll") == "-9"
    wait_until(lambda: runs(child), lambda it_runs: not it_runs, "the child is killed, too")
    assert int(launcher.ask("start")) != pid


def test_exit_status_of_a_server_is_reported(tmp_path: Path) -> None:
    launcher = Launcher("fail", log=tmp_path / "log")
    launcher.ask("start")
    wait_until(lambda: launcher.ask("poll"), lambda status: status == "3", "the end is reported")
    launcher.close()


def test_server_does_not_outlive_its_owner(launcher: Launcher) -> None:
    pid = int(launcher.ask("start"))
    child = launcher.child()
    launcher.close()
    for member in (pid, child):
        wait_until(lambda member=member: runs(member), lambda it_runs: not it_runs, "it is killed")  # type: ignore[misc]
