"""Hints between replicas about servers: one that a replica found dead, well again, or failing.

A hint makes a replica look by itself, and decides nothing: addresses such as 127.0.0.1 can mean different
servers on different machines, and a server can be out of reach for one replica alone. So a hint that is
lost, late or wrong costs one probe at most.

1. `down`: the circuit breaker of the server has opened. Others whose circuit is closed probe it at once,
   with more than one attempt, and their own probe decides.
2. `up`: it has closed again. Others whose circuit is open probe the server at once, and do not wait for
   the next probe.
3. `ejected`: the server fails requests and answers probes, so a probe shows nothing. For a while, fewer
   failures of their own are enough for others to eject it (`OutlierDetector.warn`).
"""

from collections.abc import Callable, Mapping
from typing import Literal

import msgspec
from msgspec import Struct

from gateway.admission.limits import LaneName
from gateway.upstream.backend import Backend
from gateway.upstream.server import Server

PROBE_SECONDS = 1.0
"""Shortest time between two probes of a server because of hints."""

Event = Literal["down", "up", "ejected"]


class Hint(Struct, frozen=True):
    """One hint. `server` is an address; `model` and `lane` are those of an ejection."""

    replica: str
    server: str
    event: Event
    model: str = ""
    lane: LaneName = "text"


class Hints:
    """Sends the hints of `replica`, and follows those of others.

    `backends` holds the backends in force, and may change in place. `send` publishes a message.
    """

    def __init__(
        self,
        replica: str,
        backends: Mapping[str, Backend],
        send: Callable[[bytes], None],
        clock: Callable[[], float],
    ) -> None:
        self._replica = replica
        self._backends = backends
        self._send = send
        self._clock = clock
        self._probed: dict[str, float] = {}

    def tell(self, server: Server, event: Event, model: str = "", lane: LaneName = "text") -> None:
        """Tell the other replicas what happened to `server`."""
        self._send(msgspec.json.encode(Hint(self._replica, address_of(server), event, model, lane)))

    def receive(self, message: bytes) -> None:
        """Follow a message, unless it is this replica's own or no hint."""
        try:
            hint = msgspec.json.decode(message, type=Hint)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if hint.replica == self._replica:
            return
        for backend in self._backends.values():
            for server in backend.servers:
                if address_of(server) == hint.server:
                    self._follow(server, hint)

    def _follow(self, server: Server, hint: Hint) -> None:
        if hint.event == "ejected":
            if server.serves(hint.model):
                server.gate(hint.model, hint.lane).warn()
        elif server.circuit.state == ("closed" if hint.event == "down" else "open"):
            self._probe(server, hint.server)

    def _probe(self, server: Server, address: str) -> None:
        now = self._clock()
        if now - self._probed.get(address, -PROBE_SECONDS) >= PROBE_SECONDS:
            self._probed = {known: at for known, at in self._probed.items() if now - at < PROBE_SECONDS}
            self._probed[address] = now
            server.is_hinted = True
            server.doubted.set()


def address_of(server: Server) -> str:
    """Return the address of a server as replicas tell it to each other."""
    origin = server.pool.origin
    return f"{origin.address or origin.host}:{origin.port}{origin.prefix}"
