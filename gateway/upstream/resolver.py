"""Addresses of a server's host name, resolved in a thread and shared by probes and requests.

`getaddrinfo` blocks, and neither it nor its thread can be cancelled. So there is at most one lookup
at a time for a server, which all connections share. Its thread is a daemon: a lookup that hangs
does not delay the end of the process.

`getaddrinfo` does not report the time to live of a record. Addresses count as current for
`CURRENT_SECONDS`. After that, the next connection resolves the name again. If the lookup fails or
takes long, the last known addresses are used (serve-stale, RFC 8767). If it reports that the name
does not exist, there are none, unless the resolver keeps the last ones even then.
"""

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

CURRENT_SECONDS = 2.0
"""Time for which the result of a lookup is used without another lookup."""
PATIENCE_SECONDS = 0.5
"""Time for which a connection waits for a lookup while earlier addresses are known."""
SLOW_SECONDS = 1.0
"""Time after which a lookup that has not ended is logged."""

_DENIED = {getattr(socket, name) for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY") if hasattr(socket, name)}
"""Error codes of `getaddrinfo` that say that the name has no address, and not that a lookup failed."""

_log = logging.getLogger(__name__)


class Address(NamedTuple):
    """An IP address that `loop.create_connection` takes without a lookup, and its family."""

    family: int
    host: str


class Resolver:
    """Addresses of one host.

    `on_change` is called with the new addresses when a lookup finds other addresses than the one
    before. With `keeps_last`, the last addresses are also used when the name no longer exists.
    """

    def __init__(
        self,
        host: str,
        on_change: Callable[[frozenset[str]], None] = lambda addresses: None,
        *,
        keeps_last: bool = False,
    ) -> None:
        self._host = host
        self._on_change = on_change
        self._keeps_last = keeps_last
        self.is_literal = _is_literal(host)
        """True if the host is an IP address, which needs no lookup."""
        self._addresses: list[Address] = []
        self._current_until = 0.0
        self._error: tuple[int, str] = (socket.EAI_NONAME, "")
        self.failure: str | None = None
        """Reason for which the last lookup found no address, or None if it found some."""
        self._lookup: asyncio.Future[None] | None = None
        self._began = 0.0
        self._late: asyncio.TimerHandle | None = None
        self._is_reported = False

    def __repr__(self) -> str:
        return f"<Resolver {self._host}: {[address.host for address in self._addresses]}>"

    @property
    def is_waiting(self) -> bool:
        """True if there are no addresses yet, because a lookup has not ended."""
        return self._lookup is not None and not self._addresses

    @property
    def known(self) -> list[Address]:
        """The addresses of the last lookup that found some, in no order; none before that."""
        return self._addresses

    def look_up(self) -> asyncio.Future[None]:
        """Begin a lookup, unless one is in progress. Return its end, which is never an exception."""
        return self._lookup or self._start(asyncio.get_running_loop())

    async def addresses(self) -> list[Address]:
        """Return the addresses, in the order of the lookup (RFC 6724).

        If none are known yet, this waits for a lookup without a limit of its own.

        Raises:
            OSError: the name has no address, or the lookup failed and there are no earlier addresses.
        """
        loop = asyncio.get_running_loop()
        if loop.time() < self._current_until:
            return self._addresses
        lookup = self._lookup or self._start(loop)
        if self._addresses:
            patience = self._began + PATIENCE_SECONDS - loop.time()
            if patience > 0:
                await asyncio.wait([lookup], timeout=patience)
        else:
            await asyncio.wait([lookup])
        if not self._addresses:
            raise socket.gaierror(*self._error)  # a new one, as its traceback holds the request of the caller
        return self._addresses

    def _start(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        self._lookup = lookup = loop.create_future()
        self._began = loop.time()
        self._late = loop.call_later(SLOW_SECONDS, self._report, f"no answer after {SLOW_SECONDS:.0f} s")
        try:
            threading.Thread(target=self._look_up, args=(loop,), name="resolver", daemon=True).start()
        except RuntimeError:  # the process may not have another thread
            self._end([], (socket.EAI_AGAIN, "a thread cannot be started"))
        return lookup

    def _look_up(self, loop: asyncio.AbstractEventLoop) -> None:
        """Resolve the name. Runs in a thread."""
        found: list[Address] = []
        error = None
        try:
            for family, _, _, _, address in socket.getaddrinfo(self._host, None, type=socket.SOCK_STREAM):
                if family in (socket.AF_INET, socket.AF_INET6):
                    found.append(Address(family, _with_scope(address)))
            if not found:
                error = socket.EAI_NONAME, "the name has no address"
        except socket.gaierror as failure:
            error = failure.errno or socket.EAI_FAIL, failure.strerror or str(failure)
        except OSError as failure:
            error = socket.EAI_AGAIN, failure.strerror or str(failure)
        except ValueError as failure:  # a label of the name is empty or too long
            error = socket.EAI_NONAME, str(failure)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._end, list(dict.fromkeys(found)), error)

    def _end(self, found: list[Address], error: tuple[int, str] | None) -> None:
        """Record the result of the lookup, and let those that wait for it continue."""
        lookup, self._lookup = self._lookup, None
        assert lookup is not None
        assert self._late is not None
        self._late.cancel()
        if error is None or (error[0] in _DENIED and not self._keeps_last):
            self._replace(found)
        self.failure = None if error is None else error[1]
        if error is not None:
            self._error = error
            self._report(error[1])
        elif self._is_reported:
            self._is_reported = False
            _log.info("the host name %s is resolved again", self._host)
        if self._addresses:
            self._current_until = asyncio.get_running_loop().time() + CURRENT_SECONDS
        lookup.set_result(None)

    def _replace(self, found: list[Address]) -> None:
        before, self._addresses = self._addresses, found
        if not found:
            self._current_until = 0.0
        if before and set(before) != set(found):
            self._on_change(frozenset(address.host for address in found))

    def _report(self, why: str) -> None:
        """Log that the name is not resolved. Only the first of several failures is logged.

        Without earlier addresses, the log says it with the probe that failed.
        """
        if self._addresses and not self._is_reported:
            self._is_reported = True
            _log.warning("the host name %s is not resolved (%s); its last addresses are used", self._host, why)


def without_scope(host: str) -> str:
    """Return an address without the scope of a link-local address (RFC 4007)."""
    return host.partition("%")[0]


def _with_scope(address: tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]) -> str:
    host = without_scope(str(address[0]))
    return f"{host}%{address[3]}" if len(address) == 4 and address[3] else host


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
