"""Networks that fail: host names with chosen addresses, addresses that swallow SYNs, hosts that vanish."""

import asyncio
import ipaddress
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import pytest

NAME = "backend.test"


class Names:
    """Resolver in place of `socket.getaddrinfo`: `addresses` of each name, in order. Literals resolve as ever."""

    def __init__(self) -> None:
        self._real = socket.getaddrinfo
        self.addresses: dict[str, list[str]] = {}
        self.lookups: list[str] = []
        self.failure: Exception | None = None
        self.answer: list[tuple[Any, ...]] | None = None
        """Answer to each lookup, in place of the addresses."""
        self.threads: set[str] = set()
        self.answers = threading.Event()
        """While it is not set, lookups hang."""
        self.answers.set()

    def look_up(self, host: str, port: Any, *args: Any, **named: Any) -> list[tuple[Any, ...]]:
        if _is_literal(host):
            return list(self._real(host, port, *args, **named))
        self.lookups.append(host)
        self.threads.add(threading.current_thread().name)
        assert self.answers.wait(60)
        if self.failure is not None:
            raise self.failure
        if self.answer is not None:
            return self.answer
        if not self.addresses.get(host):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [
            (socket.AF_INET6, socket.SOCK_STREAM, 6, "", (address, port or 0, 0, 0))
            if ":" in address
            else (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 0))
            for address in self.addresses[host]
        ]


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


@contextmanager
def names(**addresses: list[str]) -> Iterator[Names]:
    """Resolve `NAME` to `addresses["backend"]` while the block runs."""
    with pytest.MonkeyPatch.context() as patch:
        resolver = Names()
        resolver.addresses = {NAME: addresses.get("backend", [])}
        patch.setattr(socket, "getaddrinfo", resolver.look_up)
        try:
            yield resolver
        finally:
            resolver.answers.set()  # no thread stays behind
            # Who replaces it in this block restores this resolver afterwards, for all later tests.
            assert socket.getaddrinfo == resolver.look_up


@contextmanager
def swallowing(host: str, port: int = 0) -> Iterator[int]:
    """Listen at an address that accepts no connection and refuses none. Yield its port.

    With its backlog full, Linux drops a SYN.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(0)
        fillers = []
        try:
            for _ in range(4):
                filler = socket.socket(family)
                fillers.append(filler)
                filler.setblocking(False)
                with suppress(BlockingIOError):
                    filler.connect(listener.getsockname())
            yield listener.getsockname()[1]
        finally:
            for filler in fillers:
                filler.close()


class VanishingHost:
    """A TCP proxy in front of a server. When it vanishes, it forwards nothing, and closes nothing."""

    def __init__(self, host: str, port: int) -> None:
        self._target = host, port
        self._pairs: list[asyncio.Transport] = []
        self._listener: asyncio.Server | None = None
        self._vanished: set[asyncio.Transport] = set()
        self.accepts = True
        """False: a new connection is accepted by the kernel, and nothing answers on it."""
        self.port = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def stop_listening(self) -> None:
        """Refuse new connections. Those that exist are served on."""
        assert self._listener is not None
        self._listener.close()

    def vanish(self, *, refuses: bool = False) -> None:
        """Stop forwarding on all connections, for good, and serve no new ones until `come_back`."""
        for transport in self._pairs:
            self._vanished.add(transport)
            if not transport.is_closing():
                transport.pause_reading()
        self.accepts = False
        if refuses:
            self.stop_listening()

    async def come_back(self) -> None:
        """Serve new connections again. The old ones stay dead."""
        self.accepts = True
        if self._listener is not None and not self._listener.is_serving():
            await self.listen()

    async def listen(self) -> None:
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(lambda: _Side(self), "127.0.0.1", self.port)
        self.port = self._listener.sockets[0].getsockname()[1]

    def is_dead(self, transport: asyncio.Transport) -> bool:
        return transport in self._vanished

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.close()
        for transport in self._pairs:
            transport.abort()
        await asyncio.sleep(0)


class _Side(asyncio.Protocol):
    """One side of a proxied connection."""

    def __init__(self, host: VanishingHost, other: "_Side | None" = None) -> None:
        self._host = host
        self.other = other
        self.transport: asyncio.Transport | None = None
        self._early = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._host._pairs.append(transport)
        if self.other is not None:
            transport.write(self.other._early)
        elif self._host.accepts:
            self._connecting = asyncio.ensure_future(self._connect())
        else:
            self._host._vanished.add(transport)
            transport.pause_reading()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, self.other = await loop.create_connection(lambda: _Side(self._host, self), *self._host._target)
        except OSError:
            if self.transport is not None:
                self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.other.transport is None:
            self._early += data
        else:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        other = None if self.other is None else self.other.transport
        if other is not None and self.transport is not None and not self._host.is_dead(other):
            other.close()


@asynccontextmanager
async def vanishing(port: int, host: str = "127.0.0.1") -> AsyncIterator[VanishingHost]:
    """Run a proxy in front of a server on loopback."""
    proxy = VanishingHost(host, port)
    await proxy.listen()
    try:
        yield proxy
    finally:
        await proxy.close()
