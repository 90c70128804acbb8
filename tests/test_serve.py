"""The gateway's process: ports, open files, and the end by a signal."""

import asyncio
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import tenacity

from gateway import config
from gateway.serve import admin_token
from gateway.usage.file import read_rows
from tests.cli.harness import ROOT, SECRET, invoke, process
from tests.fakes.keys import write_keys
from tests.real_engines.process import free_port

pytestmark = pytest.mark.usefixtures("empty_environment")


def status_of(url: str) -> int:
    """Return the status of a GET, retried until the port is open: one opens after the other."""
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(40), wait=tenacity.wait_fixed(0.05), reraise=True):
        with attempt:
            return httpx2.get(url, trust_env=False, timeout=20).status_code
    raise AssertionError


def test_gateway_serves_on_all_ports_until_sigterm_and_exits_with_0() -> None:
    metrics_port, ollama_port = free_port(), free_port()
    variables = {
        "GATEWAY_ADMIN_KEY": SECRET,
        "GATEWAY_METRICS_PORT": str(metrics_port),
        "GATEWAY_OLLAMA_PORT": str(ollama_port),
        "OLLAMA_BASE_URL": "http://127.0.0.1:1",
    }
    with process("serve", GATEWAY_PORT="0", GATEWAY__LOG_FORMAT="json", **variables) as started:
        assert started.stderr is not None
        try:
            events: list[dict[str, str]] = []
            while not events or not events[-1]["event"].startswith("serving "):
                events.append(json.loads(started.stderr.readline()))
            url = events[-1]["event"].split()[1].rstrip(";")
            assert status_of(f"{url}/healthz") == 200
            assert status_of(f"{url}/metrics") == 401
            paths = ("/healthz", "/metrics", "/ops/status", "/v1/models")
            assert [status_of(f"http://127.0.0.1:{metrics_port}{path}") for path in paths] == [200, 200, 404, 404]
            assert status_of(f"http://127.0.0.1:{ollama_port}/api/version") == 200
            assert any("GATEWAY_API_KEYS: not set" in event["event"] for event in events)
            assert SECRET not in str(events)
        finally:
            started.send_signal(signal.SIGTERM)
        assert started.wait(45) == 0


def test_idle_connection_closes_after_keep_alive_timeout() -> None:
    """With the default, it would stay open for 75 s. The level `warning` leaves only warnings in the log."""
    port = free_port()
    variables = {"GATEWAY_PORT": str(port), "GATEWAY__LOG_FORMAT": "json", "GATEWAY_LOG_LEVEL": "warning"}
    with process("serve", GATEWAY__KEEP_ALIVE_TIMEOUT="400ms", **variables) as started:
        try:
            assert status_of(f"http://127.0.0.1:{port}/ping") == 200
            with socket.create_connection(("127.0.0.1", port), timeout=40) as client:
                began = time.monotonic()
                client.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = b""
                while piece := client.recv(65536):
                    answer += piece
            assert answer.startswith(b"HTTP/1.1 200")
            assert 0.4 <= time.monotonic() - began < 40
        finally:
            started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=45)
    assert {json.loads(line)["level"] for line in errors.splitlines()} == {"warning"}


@contextmanager
def held_connection(port: int) -> Iterator[None]:
    """Hold a connection that was served. The ones before may not have ended yet at the gateway."""
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(40), reraise=True):
        client = socket.create_connection(("127.0.0.1", port), timeout=40)
        with attempt:
            client.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert client.recv(12) == b"HTTP/1.1 200"
        if attempt.retry_state.outcome is not None and not attempt.retry_state.outcome.failed:
            break
        client.close()
    with client:
        yield


def test_number_of_connections_of_an_address_is_limited_on_all_its_ports() -> None:
    port, ollama_port = free_port(), free_port()
    variables = {"GATEWAY_PORT": str(port), "GATEWAY_OLLAMA_PORT": str(ollama_port)}
    with process("serve", GATEWAY__MAX_CONNECTIONS_PER_ADDRESS="1", **variables) as started:
        try:
            for each in (port, ollama_port):
                status_of(f"http://127.0.0.1:{each}/ping")
            with held_connection(port), socket.create_connection(("127.0.0.1", ollama_port), timeout=40) as refused:
                assert refused.recv(12) == b"HTTP/1.1 429"
        finally:
            started.send_signal(signal.SIGTERM)
        assert started.wait(45) == 0


def test_file_of_client_keys_is_reread_while_the_gateway_runs(tmp_path: Path) -> None:
    """Without a settings file. An empty file leaves the old keys in force."""
    port, keys = free_port(), tmp_path / "keys"
    old, new = "old-key-0123456789abc", "new-key-0123456789abc"
    url = f"http://127.0.0.1:{port}/v1/models"

    def statuses() -> list[int]:
        headers = [{"authorization": f"Bearer {key}"} for key in (old, new)]
        return [httpx2.get(url, headers=each, trust_env=False, timeout=20).status_code for each in headers]

    keys.write_text(f"{old}\n")
    variables = {"GATEWAY_PORT": str(port), "GATEWAY_API_KEYS_FILE": str(keys), "GATEWAY__LOG_FORMAT": "json"}
    with process("serve", **variables) as started:
        assert started.stderr is not None
        try:
            assert status_of(url) == 401
            keys.write_text("")
            while "empty or unreadable; nothing changes" not in started.stderr.readline():
                pass
            assert statuses() == [200, 401]
            keys.write_text(f"{new}\n")
            while "settings: api_keys: changed" not in started.stderr.readline():
                pass
            assert statuses() == [401, 200]
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=45)


def test_keys_with_names_and_usage_outlive_the_process_that_serves_them(tmp_path: Path) -> None:
    """The second port takes requests without a key, as the named one; the first does not."""
    port, ollama_port = free_port(), free_port()
    url, keyless = (f"http://127.0.0.1:{each}" for each in (port, ollama_port))
    write_keys(tmp_path / "keys.yaml", local={"requests_per_minute": 5}, web={})
    variables = {
        "GATEWAY_PORT": str(port),
        "GATEWAY_OLLAMA_PORT": str(ollama_port),
        "GATEWAY_OLLAMA_AS_KEY": "local",
        "GATEWAY_KEYS_FILE": "keys.yaml",
        "GATEWAY_ADMIN_KEY": SECRET,
        "OLLAMA_BASE_URL": "http://127.0.0.1:1",
    }
    with process("serve", **variables) as started:
        assert started.stderr is not None
        for awaited in ("programs that expect Ollama", "not reachable"):
            while awaited not in (line := started.stderr.readline()):
                assert line
        try:
            assert status_of(f"{url}/v1/models") == 401
            assert status_of(f"{keyless}/v1/models") == 200
            body = {"model": "standard", "messages": [{"role": "user", "content": "x"}], "stream": False}
            answer = httpx2.post(f"{keyless}/api/chat", json=body, trust_env=False, timeout=20)
            assert (answer.status_code, answer.headers["x-ratelimit-remaining-requests"]) == (503, "4")
            headers = {"authorization": f"Bearer {SECRET}"}
            (row,) = httpx2.get(f"{url}/ops/usage?by=key", headers=headers, trust_env=False, timeout=20).json()["rows"]
            assert (row["key"], row["refused"]) == ("local", 1)
        finally:
            started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=45)
    assert started.returncode == 0, errors
    (kept,) = read_rows(tmp_path / "gateway-usage.db", ["key"], None, None)
    assert kept == row


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("hard", "warns"), [(4096, False), (300, True)])
def test_gateway_raises_its_limit_of_open_files_and_warns_if_it_is_low(tmp_path: Path, hard: int, warns: bool) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "GATEWAY_PORT": "0",
        "GATEWAY_STATE_FILE": "",
        "GATEWAY_USAGE_FILE": "",
    }
    command = ["sh", "-c", f'ulimit -Sn 256; ulimit -Hn {hard}; exec "$0" -m gateway serve', sys.executable]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as started:
        assert started.stderr is not None
        log = ""
        while "serving http" not in log:
            log += started.stderr.readline()
        limits = Path(f"/proc/{started.pid}/limits").read_text()
        started.terminate()
        started.stderr.read()
    files = next(line for line in limits.splitlines() if line.startswith("Max open files"))
    assert files.split()[3:5] == [str(hard)] * 2
    assert (f"the limit of open files is only {hard}" in log) is warns


def test_port_in_use_is_reported_with_its_own_variable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for variable, others in (("GATEWAY_PORT", {}), ("GATEWAY_METRICS_PORT", {"GATEWAY_PORT": "0"})):
            with process("serve", **{variable: port, **others}) as started:
                _, errors = started.communicate(timeout=45)
            assert started.returncode == 2
            assert errors.splitlines()[-1].startswith(f"{variable}: cannot listen on 127.0.0.1:{port}: ")


def test_port_in_use_exits_with_2_and_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process("serve", GATEWAY_PORT=port) as started:
            _, errors = started.communicate(timeout=45)
    assert started.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"GATEWAY_PORT: cannot listen on 127.0.0.1:{port}")


# Admin token


CLIENT_KEY = "a-client-key-0123456789"


@contextmanager
def proxy(port: int) -> Iterator[int]:
    """Run a proxy on loopback that adds no header, as nginx with `proxy_pass` alone; yield its port."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))

    opened: queue.Queue[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any], int]] = queue.Queue()

    async def run() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        task = asyncio.current_task()
        assert task is not None
        opened.put((asyncio.get_running_loop(), task, server.sockets[0].getsockname()[1]))
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        server.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    loop, task, proxy_port = opened.get(timeout=10)
    try:
        yield proxy_port
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)


def test_behind_a_proxy_on_the_same_machine_only_the_token_gives_access_to_ops() -> None:
    """A proxy that rewrites Host and adds no header is not distinguishable from a local program."""
    port = free_port()
    variables = {"GATEWAY_PORT": str(port), "GATEWAY_API_KEYS": CLIENT_KEY, "GATEWAY__LOG_FORMAT": "json"}
    file = Path(f"gateway-admin-token-{port}")
    with process("serve", **variables) as started, proxy(port) as proxy_port:
        try:
            assert status_of(f"http://127.0.0.1:{port}/healthz") == 200
            token = file.read_text()
            assert file.stat().st_mode & 0o777 == 0o600
            for base in (f"http://127.0.0.1:{proxy_port}", f"http://127.0.0.1:{port}"):
                for path in ("/ops/status", "/ops/rollout", "/metrics"):
                    for key, status in ((None, 401), (CLIENT_KEY, 401), ("guessed", 401), (token, 200)):
                        headers = {"host": f"127.0.0.1:{port}"} | ({"authorization": f"Bearer {key}"} if key else {})
                        answer = httpx2.get(f"{base}{path}", headers=headers, trust_env=False)
                        assert answer.status_code == status, (path, status)
                moved = httpx2.put(f"{base}/ops/rollout", json={"backend": "vllm"}, trust_env=False)
                assert moved.status_code == 401
            as_client = {"authorization": f"Bearer {token}"}
            models = httpx2.get(f"http://127.0.0.1:{port}/v1/models", headers=as_client, trust_env=False)
            assert models.status_code == 401
            for words, more in (
                (("status",), {"GATEWAY_PORT": str(port), "GATEWAY_API_KEYS": CLIENT_KEY}),
                (("switch", "vllm", "--force"), {"GATEWAY_URL": f"http://127.0.0.1:{port}"}),
                (("rollback",), {"GATEWAY_URL": f"http://localhost:{port}/v1", "GATEWAY_PORT": "not a port"}),
            ):
                result = invoke(*words, **more)
                assert result.exit_code == 0, result.stderr
        finally:
            started.send_signal(signal.SIGTERM)
        _, log = started.communicate(timeout=45)
    assert not file.exists()
    assert token not in log
    assert str(file.absolute()) in log


def test_token_that_cannot_be_written_closes_ops_and_the_log_says_so(tmp_path: Path) -> None:
    port = free_port()
    variables = {
        "GATEWAY_PORT": str(port),
        "GATEWAY_API_KEYS": CLIENT_KEY,
        "GATEWAY__LOG_FORMAT": "json",
        "GATEWAY_STATE_FILE": str(tmp_path / "missing" / "state.json"),
    }
    with process("serve", **variables) as started:
        try:
            assert status_of(f"http://127.0.0.1:{port}/healthz") == 200
            for path in ("/ops/status", "/metrics"):
                answer = httpx2.get(f"http://127.0.0.1:{port}{path}", trust_env=False, timeout=20)
                assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
                assert "GATEWAY_ADMIN_KEY" in answer.text
                assert str(tmp_path) not in answer.text
        finally:
            started.send_signal(signal.SIGTERM)
        _, log = started.communicate(timeout=45)
    assert "the admin token cannot be written to" in log
    assert "No such file or directory" in log


@pytest.mark.parametrize("variables", [{}, {"GATEWAY_API_KEYS": CLIENT_KEY, "GATEWAY_ADMIN_KEY": SECRET}])
def test_open_gateway_and_one_with_an_admin_key_have_no_token(variables: dict[str, str]) -> None:
    settings = config.load(environ=variables)
    with admin_token(settings, 8080) as token:
        assert token is None
    assert not list(Path().iterdir())


def test_host_is_checked_if_the_address_that_is_listened_on_is_loopback() -> None:
    """The setting alone does not tell: 127.1 is a spelling that only the resolver understands."""
    port = free_port()
    with process("serve", GATEWAY_HOST="127.1", GATEWAY_PORT=str(port)) as started:
        try:
            url = f"http://127.0.0.1:{port}"
            assert status_of(f"{url}/healthz") == 200
            for host, status in (("evil.example", 403), ("127.1", 200), ("localhost", 200)):
                answer = httpx2.get(f"{url}/v1/models", headers={"host": host}, trust_env=False, timeout=20)
                assert answer.status_code == status, host
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=45)


FRAGMENTS = """
import sys
from pathlib import Path
from gateway.serve import return_freed_memory

def used():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4 // 1024

if sys.argv[1] == "yes":
    return_freed_memory()
del_first = b"x" * 20_000_000
del del_first
before = used()
large, small = [], []
for _ in range(100):
    large.append(b"x" * 1_000_000)
    small.append(b"y" * 60_000)
large.clear()
print(used() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_memory_of_freed_bodies_goes_back_to_the_system() -> None:
    """Without the setting, small blocks keep the large ones before them in the heap."""
    left = [
        int(subprocess.run([sys.executable, "-c", FRAGMENTS, word], check=True, capture_output=True, cwd=ROOT).stdout)
        for word in ("no", "yes")
    ]
    assert left[0] > 50
    assert left[1] < 15
