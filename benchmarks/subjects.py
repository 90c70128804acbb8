"""Processes of `cost.py` and `saturation.py`: the cheap upstream, this gateway, other routers.

Each runs on its own cores, with its log in a file.
"""

import contextlib
import hashlib
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
from typing import NamedTuple

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
def gateway(setup: BenchSetup, upstream_port: int, command: list[str], name: str = OURS) -> Iterator[Subject]:
    """Run this gateway by `command`, in an empty directory so that no `.env` is read."""
    port = free_port()
    with _running(name, command, gateway_environment(port, upstream_port), setup, port) as pid:
        yield Subject(name, port, pid, "standard", "/healthz")


@contextlib.contextmanager
def full_gateway(
    setup: BenchSetup, upstream_port: int, command: list[str], name: str = f"{OURS}, full"
) -> Iterator[Subject]:
    """Run this gateway with a limited key, usage records, and two servers between which affinity chooses."""
    port = free_port()
    home = setup.scratch / f"full-{port}"
    home.mkdir()
    limits = {"requests_per_minute": 10**7, "tokens_per_minute": 10**10, "tokens_per_day": 10**12, "concurrency": 8192}
    key = {"name": "bench", "sha256": hashlib.sha256(KEY.encode()).hexdigest(), **limits}
    (home / "keys.yaml").write_text(json.dumps({"keys": [key]}))
    servers = [{"base_url": f"http://127.0.0.1:{upstream_port}{prefix}/v1"} for prefix in ("", "/second")]
    environment = gateway_environment(port, upstream_port) | {
        "GATEWAY_API_KEYS": "sk-another-key-of-the-bench",
        "GATEWAY_KEYS_FILE": str(home / "keys.yaml"),
        "GATEWAY_USAGE_FILE": str(home / "usage.db"),
        "GATEWAY__BACKENDS__VLLM__SERVERS": json.dumps(servers),
    }
    del environment["VLLM_BASE_URL"]
    with _running(name, command, environment, setup, port) as pid:
        yield Subject(name, port, pid, "standard", "/healthz")


@contextlib.contextmanager
def vllm_router(
    setup: BenchSetup, upstream_port: int, program: str, name: str = THEIRS, *, has_defaults: bool = False
) -> Iterator[Subject]:
    """Run vllm-router with its cheapest settings: one worker, round robin, no retries, a quiet log.

    Or with its defaults, of which the policy `cache_aware` and the log are the most costly.
    """
    port = free_port()
    command = [program, "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
    command += ["--worker-urls", f"http://127.0.0.1:{upstream_port}", "--worker-startup-check-interval", "1"]
    if not has_defaults:
        command += ["--policy", "round_robin", "--log-level", "error"]
    with _running(name, command, dict(os.environ), setup, port) as pid:
        yield Subject(name, port, pid, MODEL, "/liveness")


@contextlib.contextmanager
def smg(setup: BenchSetup, upstream_port: int, program: str) -> Iterator[Subject]:
    """Run SMG as `vllm_router` runs: one worker, round robin, no retries, a quiet log."""
    port = free_port()
    command = [program, "launch", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--worker-urls", f"http://127.0.0.1:{upstream_port}", "--policy", "round_robin"]
    command += ["--prometheus-port", str(free_port()), "--log-level", "error", "--disable-retries"]
    command += ["--backend", "vllm", "--disable-tokenizer-autoload", "--disable-load-monitoring"]
    command += ["--worker-startup-check-interval", "1"]
    with _running("SMG", command, dict(os.environ), setup, port) as pid:
        yield Subject("SMG", port, pid, MODEL, "/liveness")


_NGINX = """
worker_processes 1; daemon off; pid {home}/pid; error_log {home}/error crit; {user}
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/fastcgi; uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  upstream engine {{ server 127.0.0.1:{upstream_port}; keepalive 1024; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    }}
  }}
}}
"""


@contextlib.contextmanager
def nginx(setup: BenchSetup, upstream_port: int, program: str) -> Iterator[Subject]:
    """Run nginx with one worker process, which forwards each piece of an answer at once."""
    port = free_port()
    home = setup.scratch / f"nginx-conf-{port}"
    home.mkdir()
    user = "user root;" if os.geteuid() == 0 else ""
    config = home / "nginx.conf"
    config.write_text(_NGINX.format(home=home, user=user, port=port, upstream_port=upstream_port))
    command = [program, "-p", str(home), "-e", str(home / "error"), "-c", str(config)]
    with _running("nginx", command, dict(os.environ), setup, port) as pid:
        yield Subject("nginx", port, pid, MODEL, "/health")


@contextlib.contextmanager
def _running(name: str, command: list[str], environment: dict[str, str], setup: BenchSetup, port: int) -> Iterator[int]:
    log, home = setup.scratch / f"{port}.log", setup.scratch / f"{port}"
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


class Counts(NamedTuple):
    """Numbers of answers and tokens that the upstream has sent so far."""

    answers: int
    tokens: int


def counts(port: int) -> Counts:
    """Ask the cheap upstream on `port` for its counts.

    Raises:
        OSError: there was no HTTP response.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/counts")
        return Counts(**json.loads(connection.getresponse().read()))
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
