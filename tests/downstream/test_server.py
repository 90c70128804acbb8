"""Graceful shutdown, signals and the listening socket."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.downstream import protocol
from gateway.downstream.limits import ServerLimits
from gateway.downstream.server import listen
from tests.downstream.server_thread import GET, PATIENCE, eventually, noted, read_all, read_response, serving

# Drain


def test_drain_finishes_requests_in_flight_and_accepts_new_ones_during_the_delay(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_delay=2, drain_timeout=60) as server:
        running = server.connect(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        kept = server.connect(GET)
        read_response(kept)
        eventually(lambda: len(server.app.scopes) == 2)
        server.stop()
        eventually(lambda: server.hooks == ["drain"])
        with server.connect(GET) as client:
            assert read_response(client)[0] == 200
        assert kept.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            server.connect()
        server.app.release.set()
        status, headers, body = read_response(running)
        assert (status, headers["connection"], body) == (200, "close", b"slow")
        assert running.recv(1) == b""
        server.thread.join(PATIENCE)
        assert server.app.lifespan[1:] == ["shutdown with 0 running"]
        assert server.hooks == ["drain"]
        running.close()
        kept.close()


def test_response_during_the_drain_delay_closes_its_connection(loop: str) -> None:
    """A client that sends more requests has moved to another connection before this one closes."""
    with serving(loop, ServerLimits(), drain_delay=60, drain_timeout=1) as server, server.connect(GET) as kept:
        assert "connection" not in read_response(kept)[1]
        server.stop()
        eventually(lambda: server.hooks == ["drain"])
        with server.connect() as new:
            eventually(lambda: server.connections == 2 and server.has_retired_all())
            for client in (kept, new):
                client.sendall(GET)
                status, headers, _ = read_response(client)
                assert (status, headers["connection"], client.recv(1)) == (200, "close", b"")
        server.stop()
        server.thread.join(PATIENCE)


def test_request_that_follows_its_connection_shortly_is_served_during_the_drain(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "_NEW_CONNECTION_SECONDS", PATIENCE)
    with serving(loop, ServerLimits(), drain_timeout=60) as server, server.connect() as client:
        eventually(lambda: len(server.uvicorn.server_state.connections) == 1)
        server.stop()
        eventually(lambda: server.hooks == ["drain"])
        client.sendall(GET)
        assert read_response(client)[0] == 200
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_drain_waits_for_a_buffered_body(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=60) as server, server.connect(noted(b"abc")) as client:
        read_response(client)
        client.sendall(noted(b"abc")[:-1])
        eventually(server.is_buffering_body)
        server.stop()
        eventually(lambda: server.hooks == ["drain"])
        client.sendall(b"c")
        status, headers, body = read_response(client)
        assert (status, headers["connection"], body) == (200, "close", b"abc")
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_connection_without_a_request_does_not_delay_the_shutdown(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=60) as server, server.connect() as client:
        eventually(lambda: len(server.uvicorn.server_state.connections) == 1)
        server.stop()
        assert client.recv(1) == b""
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()


def test_cutoff_lets_streams_end_with_a_last_event(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=0.2) as server:
        server.on_cutoff = server.app.cut.set
        clients = [server.connect(b"GET /until_cut HTTP/1.1\r\nHost: a\r\n\r\n") for _ in range(50)]
        eventually(lambda: len(server.app.scopes) == 50)
        server.stop()
        for client in clients:
            assert read_all(client).endswith(b"3\r\ncut\r\n0\r\n\r\n")
            client.close()
        server.thread.join(PATIENCE)
        assert server.hooks == ["drain", "cutoff"]
        assert server.app.lifespan[1:] == ["shutdown with 0 running"]


def test_requests_that_ignore_the_cutoff_are_ended_within_two_seconds(loop: str) -> None:
    with serving(loop, ServerLimits(), drain_timeout=0.1) as server:
        unresponsive = server.connect(b"GET /unresponsive HTTP/1.1\r\nHost: a\r\n\r\n")
        stalled = server.connect(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n", receive_buffer=4096)
        eventually(lambda: len(server.app.scopes) == 2)
        server.stop()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
        assert server.app.lifespan[1:] == ["shutdown with 0 running"]
        unresponsive.close()
        stalled.close()


# Signals


PROGRAM = """
import sys, uvicorn
from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from gateway.downstream.server import GracefulServer, listen

async def app(scope, receive, send):
    print("request", flush=True)
    await receive()
    await receive()

listener = listen("127.0.0.1", 0)
config = uvicorn.Config(app, http=bind_limits(ServerLimits()), loop=sys.argv[1], lifespan="off", log_config=None)

def announce():
    print(listener.getsockname()[1], flush=True)

server = GracefulServer(config, drain_timeout=120, on_open=announce, on_drain=lambda: print("drain", flush=True))
server.run(sockets=[listener])
print("ended", flush=True)
"""


def test_connections_are_accepted_when_on_open_is_called(loop: str) -> None:
    """A program that waits for the line with the address can connect at once."""
    command = [sys.executable, "-c", PROGRAM, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        with socket.create_connection(("127.0.0.1", int(process.stdout.readline())), timeout=PATIENCE):
            process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


def test_second_signal_ends_the_process_at_once_with_status_0(loop: str) -> None:
    command = [sys.executable, "-c", PROGRAM, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        address = ("127.0.0.1", int(process.stdout.readline()))
        with socket.socket() as client:
            client.connect(address)
            client.sendall(GET)
            assert process.stdout.readline() == "request\n"  # otherwise the drain has nothing to wait for
            process.send_signal(signal.SIGTERM)
            assert process.stdout.readline() == "drain\n"
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 0
            assert process.stdout.readline() == "ended\n"


def test_signals_after_the_shutdown_are_ignored(loop: str) -> None:
    """An impatient user at a terminal does not interrupt the last writes."""
    more_signals = (
        "\nimport os, signal\nfor number in (signal.SIGTERM, signal.SIGINT):\n    os.kill(os.getpid(), number)\n"
    )
    command = [sys.executable, "-c", PROGRAM + more_signals, loop]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0


# Listening socket


def test_listening_socket_detects_half_open_clients_within_a_minute() -> None:
    with listen("127.0.0.1", 0) as listener:
        listener.setblocking(True)
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            if sys.platform == "linux":
                probing = accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) * accepted.getsockopt(
                    socket.IPPROTO_TCP, socket.TCP_KEEPCNT
                )
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) + probing <= 60
                assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 60_000


def test_listen_supports_ipv6() -> None:
    try:
        listener = listen("::1", 0)
    except OSError:
        pytest.skip("this machine does not support IPv6")
    with listener:
        assert listener.family == socket.AF_INET6
