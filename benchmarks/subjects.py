"""Processes of `cost.py`: the cheap upstream, this gateway, vllm-router.

Each runs on its own cores, with its log in a file.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.process_stats import family, pinned
from benchmarks.report import OURS, THEIRS
from benchmarks.upstream import MODEL

KEY = "sk-bench-0123456789abcdef"
_ROOT = Path(__file__).resolve().parents[1]
_SETTINGS = ("GATEWAY", "LLM_", "OLLAMA", "VLLM")
_READY_SECONDS = 60.0
_STOP_SECONDS = 3.0
_PLENTY = "8192"


class DidNotRun(Exception):
    """A part of the benchmark failed to run; the message names it and has the end of its log."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A running program under test, or the upstream itself (`direct`)."""

    name: str
    port: int
    pid: int
    model: str
    """Model name that its clients send."""
    ping: str
    """Path that it answers without asking another server."""

    def processes(self) -> list[int]:
        return family(self.pid)


@dataclass(frozen=True, slots=True)
class BenchSetup:
    """Cores for the subject under test, cores for load and upstream (empty: any), and a directory
    for logs.
    """

    subject_cores: frozenset[int]
    helper_cores: frozenset[int]
    scratch: Path


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def gateway_environment(port: int, upstream_port: int) -> dict[str, str]:
    """Return the environment of a gateway with API keys and metrics, and with limits that no part
    of the benchmark reaches.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    return kept | {
        "PYTHONPATH": str(_ROOT),
        "GATEWAY_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "GATEWAY_API_KEYS": f"sk-another-key,{KEY}",
        "GATEWAY_ADMIN_KEY": "sk-bench-admin",
        "GATEWAY_STATE_FILE": "",
        "GATEWAY_USAGE_FILE": "",
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": _PLENTY,
        "LLM_BACKEND": "vllm",
        "VLLM_BASE_URL": f"http://127.0.0.1:{upstream_port}/v1",
        "VLLM_MODEL": MODEL,
    }


@contextlib.contextmanager
def upstream(setup: BenchSetup) -> Iterator[Subject]:
    """Run the cheap upstream, as the subject `direct`."""
    command = [sys.executable, "-m", "benchmarks.upstream"]
    with pinned(set(setup.helper_cores)):
        process = subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise DidNotRun("the cheap upstream did not start")
        yield Subject("direct", json.loads(line)["port"], process.pid, MODEL, "/health")
    finally:
        _stop(process)


@contextlib.contextmanager
def gateway(setup: BenchSetup, upstream_port: int, command: list[str]) -> Iterator[Subject]:
    """Run this gateway by `command`, in an empty directory so that no `.env` is read."""
    port = free_port()
    with _running(OURS, command, gateway_environment(port, upstream_port), setup, port) as pid:
        yield Subject(OURS, port, pid, "standard", "/healthz")


@contextlib.contextmanager
def vllm_router(setup: BenchSetup, upstream_port: int, program: str) -> Iterator[Subject]:
    """Run vllm-router with its cheapest settings: one worker, round robin, no retries, a quiet
    log.
    """
    port = free_port()
    command = [
        program,
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--worker-urls",
        f"http://127.0.0.1:{upstream_port}",
    ]
    command += ["--policy", "round_robin", "--prometheus-port", str(free_port()), "--log-level", "error"]
    command += ["--worker-startup-check-interval", "1"]
    with _running(THEIRS, command, dict(os.environ), setup, port) as pid:
        yield Subject(THEIRS, port, pid, MODEL, "/liveness")


@contextlib.contextmanager
def _running(name: str, command: list[str], environment: dict[str, str], setup: BenchSetup, port: int) -> Iterator[int]:
    log = setup.scratch / f"{name}-{port}.log"
    home = setup.scratch / f"{name}-{port}"
    home.mkdir()
    with log.open("wb") as output, pinned(set(setup.subject_cores)):
        try:
            process = subprocess.Popen(
                command, cwd=home, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
        except OSError as exc:
            raise DidNotRun(f"{name} did not start: {exc}") from exc
    try:
        _wait_until_ready(name, process, port, log)
        yield process.pid
    finally:
        _stop(process)


def _wait_until_ready(name: str, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    last_answer = "no answer yet"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            last_answer = f"status {get(port, '/v1/models')}"
            if last_answer == "status 200":
                return
        except OSError as exc:
            last_answer = str(exc)
        time.sleep(0.1)
    ended = "ended" if process.poll() is not None else f"was not ready after {_READY_SECONDS:.0f} s ({last_answer})"
    raise DidNotRun(f"{name} {ended}; its log ends with:\n{log.read_text(errors='replace')[-2000:]}")


def get(port: int, path: str) -> int:
    """Send a small GET with the benchmark's key and return the status.

    Raises:
        OSError: there was no HTTP response.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path, headers={"Authorization": f"Bearer {KEY}"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except http.client.HTTPException as exc:
        raise OSError(f"no HTTP response: {exc!r}") from exc
    finally:
        connection.close()


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End a process that was started here, and its descendants."""
    members = family(process.pid)[1:]
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
