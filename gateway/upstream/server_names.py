"""Host names in the settings each of whose addresses is a server of its own.

`ServerName` holds what is known about such a name. `Membership` follows its addresses: a server whose
address appears joins the backend, and one whose address is gone leaves it.

- A server that joins gets no requests until its first probe has ended. Nothing is known of its cache.
- A server that leaves gets no new requests. Those that run there continue, and it is forgotten when
  the last one has ended. If its address comes back before that, it is the same server as before.
- If no server would be left but those that join, the others leave when the first probes have ended.
- While the name cannot be resolved, or has no address, its last servers stay.
- Of more than `MAX_SERVERS` addresses, those that are servers already come first.

The name is looked up after each `probe_interval`, and at once when a server cannot be reached or
fails, but not more often than every `SHORTEST_SECONDS`.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from typing import Protocol

from gateway.config import BackendSettings, ServerSettings
from gateway.upstream.pool import Origin
from gateway.upstream.resolver import SLOW_SECONDS, Resolver
from gateway.upstream.server import Server
from gateway.upstream.server_factory import place

MAX_SERVERS = 256
"""Servers of one name. Each takes a probe in each interval, and some of the choice for each request."""
SHORTEST_SECONDS = 1.0
"""Shortest time between two lookups, and the time between them while the name has no server."""
FIRST_PROBES_SECONDS = 2.5
"""Longest wait for the first probes of servers that replace all others."""
BATCH = 8
"""Servers that join or leave in one step of the event loop."""
STEP_SECONDS = 0.05
"""Longest wait for the first probes of one step before the next servers join."""

_log = logging.getLogger(__name__)


class ServerName:
    """A host name in the settings of a backend, and the servers at its addresses.

    Attributes:
        servers: servers by address, without those that leave.
        leaving: servers by address that the name no longer has, and that requests still run on.
        ignored: addresses beyond `MAX_SERVERS` in the last answer.
        doubted: set to request a lookup soon.
    """

    def __init__(self, settings: ServerSettings, origin: Origin) -> None:
        self.settings = settings
        self.origin = origin
        self.resolver = Resolver(origin.host, keeps_last=True)
        self.servers: dict[str, Server] = {}
        self.leaving: dict[str, Server] = {}
        self.ignored = 0
        self.doubted = asyncio.Event()
        self._is_late = False

    def __repr__(self) -> str:
        return f"<ServerName {self.label}, {len(self.servers)} servers, {len(self.leaving)} leaving>"

    @property
    def label(self) -> str:
        """The name with its port and path, for logs, metrics and the status."""
        return place(self.origin)

    @property
    def failure(self) -> str | None:
        """Reason for which the last lookup gave no address; None if it gave some."""
        if self._is_late:
            return "no answer in time"
        if self.resolver.failure is None and not self.resolver.known:
            return "not looked up yet"
        return self.resolver.failure

    async def look_up(self, on_late: Callable[[], None]) -> None:
        """Look the name up, and call `on_late` if that takes long."""
        lookup = self.resolver.look_up()
        _, is_pending = await asyncio.wait([lookup], timeout=SLOW_SECONDS)
        if is_pending:
            self._is_late = True
            on_late()
            await asyncio.wait([lookup])
            self._is_late = False

    def chosen(self, taken: Collection[str]) -> set[str]:
        """Return the addresses that are to be servers, without the places in `taken`."""
        found = {address.host for address in self.resolver.known}
        known = found & self.servers.keys()
        new = sorted(address for address in found - known if place(self.origin, address) not in taken)
        wanted = known.union(islice(new, max(0, MAX_SERVERS - len(known))))
        self.ignored = len(known) + len(new) - len(wanted)
        return wanted


class Members(Protocol):
    """The backend whose servers `Membership` changes."""

    name: str
    settings: BackendSettings
    servers: list[Server]

    def build_at(self, name: ServerName, address: str) -> Server:
        """Return a new server at one of the addresses of `name`."""

    def join(self, servers: Collection[Server]) -> None:
        """Add new servers, or those that were leaving. They get no requests while `is_joining` is true."""

    def leave(self, servers: Collection[Server]) -> None:
        """Give servers no more requests."""


class Membership:
    """Follows the addresses of one name.

    `start_probes` starts to probe a server, unless it is probed already, and returns the end of its
    first probe. `on_left` is called when servers have left.
    """

    def __init__(
        self,
        backend: Members,
        name: ServerName,
        start_probes: Callable[[Server], "asyncio.Future[None]"],
        on_left: Callable[[], None],
    ) -> None:
        self._backend = backend
        self._name = name
        self._start_probes = start_probes
        self._on_left = on_left
        self._is_reported = False
        self.has_begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done after the first lookup, and the first probes of the servers that it found."""

    def __repr__(self) -> str:
        return f"<Membership of {self._backend.name}: {self._name!r}>"

    async def run(self) -> None:
        """Follow the name until this is cancelled."""
        name, backend = self._name, self._backend
        while True:
            name.doubted.clear()
            await name.look_up(self._report_failure)
            if not name.resolver.known:
                self._report_failure()
            first_probes = await self._update()
            if not self.has_begun.done():
                if first_probes:
                    await asyncio.wait(first_probes, timeout=FIRST_PROBES_SECONDS)
                self.has_begun.set_result(None)
            interval = backend.settings.probe_interval if name.servers else SHORTEST_SECONDS
            await asyncio.sleep(min(interval, SHORTEST_SECONDS))
            with suppress(TimeoutError):
                async with asyncio.timeout(interval - SHORTEST_SECONDS):
                    await name.doubted.wait()

    async def _update(self) -> "list[asyncio.Future[None]]":
        """Let servers join and leave. Return the ends of the first probes of those that join."""
        name, servers = self._name, self._backend.servers
        own = set(name.servers.values())
        was_ignored = name.ignored
        wanted = name.chosen({place(server.pool.origin) for server in servers if server not in own})
        self._report_ignored(was_ignored)
        new = sorted(wanted - name.servers.keys())
        left = sorted(name.servers.keys() - wanted)
        first_probes: list[asyncio.Future[None]] = []
        for addresses in _batches(new):
            probes = self._join(addresses)
            await asyncio.wait(probes, timeout=STEP_SECONDS)
            first_probes += probes
        leaving = {name.servers[address] for address in left}
        if first_probes and all(server.is_joining or server in leaving for server in servers):
            await asyncio.wait(first_probes, timeout=FIRST_PROBES_SECONDS)
        for addresses in _batches(left):
            self._leave(addresses)
            self._on_left()
            await asyncio.sleep(0)
        if new or left:
            self._report_change(len(new), len(left))
        return first_probes

    def _join(self, addresses: Iterable[str]) -> "list[asyncio.Future[None]]":
        name, backend = self._name, self._backend
        joining = {
            address: name.leaving.pop(address) if address in name.leaving else backend.build_at(name, address)
            for address in addresses
        }
        name.servers |= joining
        backend.join(joining.values())
        return [self._start_probes(server) for server in joining.values()]

    def _leave(self, addresses: Iterable[str]) -> None:
        name = self._name
        leaving = {address: name.servers.pop(address) for address in addresses}
        name.leaving |= leaving
        self._backend.leave(leaving.values())

    # Log messages

    def _report_failure(self) -> None:
        """Log that a name that has no server yet is not resolved; the resolver logs it for one that has."""
        if not self._name.resolver.known and not self._is_reported:
            self._is_reported = True
            _log.warning(
                "backend %s: the host name %s is not resolved (%s); requests to it fail until it is",
                self._backend.name,
                self._name.origin.host,
                self._name.failure,
            )

    def _report_ignored(self, before: int) -> None:
        if self._name.ignored and not before:
            _log.warning(
                "backend %s: the host name %s has %d addresses more than the %d that are used",
                self._backend.name,
                self._name.origin.host,
                self._name.ignored,
                MAX_SERVERS,
            )

    def _report_change(self, joined: int, left: int) -> None:
        self._is_reported = False
        _log.info(
            "backend %s: %d servers joined and %d left; %s has %d",
            self._backend.name,
            joined,
            left,
            self._name.label,
            len(self._name.servers),
        )


def _batches(addresses: list[str]) -> Iterator[list[str]]:
    return (addresses[start : start + BATCH] for start in range(0, len(addresses), BATCH))
