"""Socket options of upstream connections, as the kernel reports them."""

import asyncio
import socket
import ssl
import sys
from pathlib import Path

import pytest

from gateway.upstream import socket_options
from gateway.upstream.pool import Origin, Pool
from gateway.upstream.transport_error import TransportError
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.networks import NAME, names
from tests.fakes.running_gateway import until

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"


@pytest.mark.both_loops
@pytest.mark.parametrize("has_tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("addresses", [None, ["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]], ids=["literal", "one", "two"])
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
async def test_every_connection_finds_out_that_its_host_has_vanished(
    has_tls: bool, addresses: list[str] | None
) -> None:
    context, trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=PEM)
    context.load_cert_chain(PEM)
    trusting.check_hostname = False
    with names(backend=addresses or []):
        async with FaultBackend("vllm", tls=context if has_tls else None) as backend:
            origin = Origin(NAME if addresses else "127.0.0.1", backend.port, trusting if has_tls else None)
            pool = Pool(origin, connect_timeout=5, idle_seconds=30)
            connection = await pool.connect()
            assert connection._transport is not None
            sock = connection._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            tcp = {
                name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))
                for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT")
            }
            assert tcp == {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 2, "TCP_USER_TIMEOUT": 20_000}
            pool.close()
            await until(lambda: pool.open_connections == 0)


class Refusing:
    """A socket of a system that has one of the options and refuses it."""

    def __init__(self) -> None:
        self.set: list[int] = []

    def setsockopt(self, level: int, optname: int, value: int, /) -> None:
        if level == socket.IPPROTO_TCP:
            raise OSError(92, "Protocol not available")
        self.set.append(optname)


def test_option_that_the_system_refuses_is_left_out() -> None:
    sock = Refusing()
    socket_options.set_keep_alive(sock)
    assert sock.set == [socket.SO_KEEPALIVE]


@pytest.mark.both_loops
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="only Linux has the option")
async def test_server_that_takes_no_byte_of_a_body_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel ends it, with an error that is told from a reset."""
    short = [
        (level, name, 200 if name == socket.TCP_USER_TIMEOUT else value)
        for level, name, value in socket_options.OPTIONS
    ]
    monkeypatch.setattr(socket_options, "OPTIONS", short)
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the kernel accepts, and nobody reads
        pool = Pool(Origin("127.0.0.1", listener.getsockname()[1]), connect_timeout=5, idle_seconds=30)
        async with asyncio.timeout(20):
            with pytest.raises(TransportError) as raised:
                await pool.request(pool.head("POST", "/", []), bytes(20 * 1024 * 1024))
    assert raised.value.fault == "unresponsive"
    await until(lambda: pool.open_connections == 0)
