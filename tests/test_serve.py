"""The gateway's process: ports, open files, and the end by a signal."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import tenacity

from tests.cli.harness import ROOT, SECRET, process
from tests.real_engines.process import free_port

pytestmark = pytest.mark.usefixtures("empty_environment")


def status_of(url: str) -> int:
    """Return the status of a GET, retried until the port is open: one opens after the other."""
    for attempt in tenacity.Retrying(stop=tenacity.stop_after_delay(10), wait=tenacity.wait_fixed(0.05), reraise=True):
        with attempt:
            return httpx2.get(url, trust_env=False, timeout=20).status_code
    raise AssertionError


def test_gateway_serves_on_both_ports_until_sigterm_and_exits_with_0() -> None:
    metrics_port = free_port()
    variables = {
        "GATEWAY_ADMIN_KEY": SECRET,
        "GATEWAY_METRICS_PORT": str(metrics_port),
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
            assert any("GATEWAY_API_KEYS: not set" in event["event"] for event in events)
            assert SECRET not in str(events)
        finally:
            started.send_signal(signal.SIGTERM)
        assert started.wait(20) == 0


def test_idle_connection_closes_after_keep_alive_timeout() -> None:
    """With the default, it would stay open for 75 s. The level `warning` leaves only warnings in the log."""
    port = free_port()
    variables = {"GATEWAY_PORT": str(port), "GATEWAY__LOG_FORMAT": "json", "GATEWAY_LOG_LEVEL": "warning"}
    with process("serve", GATEWAY__KEEP_ALIVE_TIMEOUT="400ms", **variables) as started:
        try:
            assert status_of(f"http://127.0.0.1:{port}/ping") == 200
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                answer = client.recv(65536)
                answered_at = time.monotonic()
                while piece := client.recv(65536):
                    answer += piece
                    answered_at = time.monotonic()
            assert answer.startswith(b"HTTP/1.1 200")
            assert 0.3 < time.monotonic() - answered_at < 10
        finally:
            started.send_signal(signal.SIGTERM)
        _, errors = started.communicate(timeout=20)
    assert {json.loads(line)["level"] for line in errors.splitlines()} == {"warning"}


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
        started.communicate(timeout=20)


@pytest.mark.parametrize(("hard", "warns"), [(4096, False), (300, True)])
def test_gateway_raises_its_limit_of_open_files_and_warns_if_it_is_low(tmp_path: Path, hard: int, warns: bool) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GATEWAY_PORT": "0", "GATEWAY_STATE_FILE": ""}
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
                _, errors = started.communicate(timeout=20)
            assert started.returncode == 2
            assert errors.splitlines()[-1].startswith(f"{variable}: cannot listen on 127.0.0.1:{port}: ")


def test_port_in_use_exits_with_2_and_without_a_traceback() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with process("serve", GATEWAY_PORT=port) as started:
            _, errors = started.communicate(timeout=20)
    assert started.returncode == 2
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith(f"GATEWAY_PORT: cannot listen on 127.0.0.1:{port}")
