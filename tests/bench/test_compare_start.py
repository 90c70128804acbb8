import asyncio
import shlex
import socket
import sys

import pytest

from gateway import simulate
from gateway.bench.compare_start import NotStarted, StartedServer
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.target import Target
from tests.fakes.stand_ins import stand_in


def python(code: str) -> str:
    return shlex.join([sys.executable, "-c", code])


def serving(port: int) -> str:
    """Return the command of a server that answers every request, and has a child that would outlive it."""
    return python(
        "import http.server, subprocess, sys\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.send_header('content-length', '0'); self.end_headers()\n"
        f"http.server.HTTPServer(('127.0.0.1', {port}), Handler).serve_forever()"
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def client_of(port: int) -> HttpLoadClient:
    return HttpLoadClient(Target(f"http://127.0.0.1:{port}", "m"))


async def test_the_load_time_ends_when_the_server_answers_and_stop_ends_it_and_its_children() -> None:
    port = free_port()
    client, server = client_of(port), StartedServer(serving(port))
    seconds = await server.start(client)
    assert seconds > 0
    assert server._process is not None
    group = server._process.pid
    await server.stop()
    await client.close()
    with pytest.raises(OSError, match=r".*"):
        await asyncio.open_connection("127.0.0.1", port)
    await until_gone(group)
    await server.stop()


async def until_gone(group: int) -> None:
    """Wait until no process of the group runs; killed ones may be waiting for their parent."""
    from pathlib import Path

    def alive() -> bool:
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = status.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == group and fields[0] not in ("Z", "X"):
                return True
        return False

    async with asyncio.timeout(10):
        while alive():
            await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("no-such-program --port 1", "cannot be run: No such file"),
        ("'unfinished", "cannot be run: No closing quotation"),
        ("", "cannot be run"),
        (python("import sys; print('model not found'); sys.exit(3)"), "ended with status 3: model not found"),
        (python("import sys; sys.exit(1)"), "ended with status 1: it printed nothing"),
    ],
)
async def test_a_command_that_fails_says_why(command: str, reason: str) -> None:
    server = StartedServer(command)
    with pytest.raises(NotStarted, match=reason):
        await server.start(client_of(free_port()))
    await server.stop()


async def test_a_server_that_is_never_ready_is_stopped() -> None:
    server = StartedServer(python("import time; time.sleep(600)"))
    with pytest.raises(NotStarted, match=r"not ready within 0\.3 s"):
        await server.start(client_of(free_port()), ready_seconds=0.3)
    assert server._process is None


async def test_an_address_that_answers_already_is_not_started_again() -> None:
    async with stand_in(simulate.Options("vllm")) as running:
        with pytest.raises(NotStarted, match="answers already"):
            await StartedServer(serving(running.port)).start(client_of(running.port))
