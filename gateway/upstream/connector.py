"""Opens connections to a server that may have several addresses (Happy Eyeballs, RFC 8305).

The first address is tried. Another one follows when the one before has failed, or has not connected
within `ATTEMPT_DELAY`. The first connection that is complete, with TLS included, is used. The others
are closed.

An address that a later one has overtaken, or that closed its connection without an answer, is tried
last for a while (section 4: the history of addresses).
"""

import asyncio
import ssl
from collections.abc import Callable
from itertools import chain, zip_longest

from gateway.upstream.connection import Connection
from gateway.upstream.resolver import Address, Resolver

ATTEMPT_DELAY = 0.25
"""Seconds between two attempts to connect (section 5, "Connection Attempt Delay")."""
SHORTEST_DELAY = 0.01
"""Section 5: "MUST NOT" be less."""
TRIED_LAST_SECONDS = 60.0


class Connector:
    """Opens connections to one server.

    `new_connection` returns the protocol of a new connection. `on_change` is called with the
    addresses of the server's name when they have changed. With `address`, the server is at this
    address, whatever addresses its name has.
    """

    def __init__(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None,
        new_connection: Callable[[], Connection],
        on_change: Callable[[frozenset[str]], None],
        address: str | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._new_connection = new_connection
        self._resolver = Resolver(host, on_change)
        self._address = host if address is None and self._resolver.is_literal else address
        self._tried_last: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"<Connector {self._resolver!r}>"

    @property
    def is_resolving(self) -> bool:
        """True if no connection can be made before a lookup of the name has ended."""
        return self._resolver.is_waiting

    async def connect(self, timeout: float) -> Connection:  # noqa: ASYNC109  # the caller's deadline sets the delays
        """Open a connection. The caller cancels this after `timeout` seconds.

        Raises:
            OSError: the name has no address, or no address accepts a connection.
        """
        if self._address is not None:
            return await self._attempt(self._address)
        addresses = await self._resolver.addresses()
        if len(addresses) == 1:
            return await self._attempt(addresses[0].host)
        # All addresses get their turn within half of the time, however many there are.
        delay = max(SHORTEST_DELAY, min(ATTEMPT_DELAY, timeout / 2 / len(addresses)))
        return await self._race([address.host for address in self._ordered(addresses)], delay)

    def try_last(self, host: str) -> None:
        """Try the address `host` after the others for a while, because it failed."""
        if self._address is None:
            self._tried_last[host] = asyncio.get_running_loop().time() + TRIED_LAST_SECONDS

    async def _attempt(self, host: str) -> Connection:
        connection = self._new_connection()
        try:
            await asyncio.get_running_loop().create_connection(
                lambda: connection, host, self._port, ssl=self._tls, server_hostname=self._host if self._tls else None
            )
        except BaseException:
            connection.abort()
            connection.connection_lost(None)  # uvloop omits it if it is cancelled just as the connection is made
            raise
        return connection

    async def _race(self, hosts: list[str], delay: float) -> Connection:
        loop = asyncio.get_running_loop()
        attempts: dict[asyncio.Task[Connection], str] = {}
        failure: BaseException | None = None
        error: BaseException | None = None
        waiting = iter(hosts)
        try:
            host = next(waiting, None)
            while host is not None or attempts:
                if host is not None:
                    attempts[loop.create_task(self._attempt(host))] = host
                    host = next(waiting, None)
                done, _ = await asyncio.wait(
                    attempts, timeout=None if host is None else delay, return_when=asyncio.FIRST_COMPLETED
                )
                # Several may be done in one turn of the loop: the one that began first is used.
                for attempt in [attempt for attempt in attempts if attempt in done]:
                    error = attempt.exception()
                    if error is None:
                        winner = attempts.pop(attempt)
                        self._rank(hosts, winner)
                        return attempt.result()
                    failure = failure or error
                    del attempts[attempt]
            assert failure is not None
            raise failure
        finally:
            failure = error = None  # the traceback refers to this frame and to the caller's request: break the cycle
            for attempt in attempts:
                attempt.cancel()
                attempt.add_done_callback(_close)

    def _rank(self, hosts: list[str], winner: str) -> None:
        self._tried_last.pop(winner, None)
        for host in hosts[: hosts.index(winner)]:
            self.try_last(host)

    def _ordered(self, addresses: list[Address]) -> list[Address]:
        """Return the addresses with their families in turns (section 4), and the failed ones last."""
        now = asyncio.get_running_loop().time()
        hosts = {address.host for address in addresses}
        self._tried_last = {host: until for host, until in self._tried_last.items() if until > now and host in hosts}
        first = [address for address in addresses if address.host not in self._tried_last]
        last = [address for address in addresses if address.host in self._tried_last]
        return _interleaved(first) + _interleaved(last)


def _interleaved(addresses: list[Address]) -> list[Address]:
    families: dict[int, list[Address]] = {}
    for address in addresses:
        families.setdefault(address.family, []).append(address)
    return [address for address in chain.from_iterable(zip_longest(*families.values())) if address is not None]


def _close(attempt: asyncio.Task[Connection]) -> None:
    """Close the connection of an attempt that was not needed, if it was made all the same."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().abort()
