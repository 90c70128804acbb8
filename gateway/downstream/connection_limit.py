"""Limit of the connections of one client address."""

import ipaddress
import logging
import time
from collections.abc import Callable, Sequence

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IPV6_PREFIX = 64
"""Bits of an IPv6 address that count: a network has one prefix of this length at least."""
NOTE_SECONDS = 60.0
"""Time between two log lines about refused connections."""

_log = logging.getLogger(__name__)


class ConnectionLimit:
    """Counts the connections of each address, and refuses those above `most`.

    Addresses in `unlimited` have no limit: behind a reverse proxy or a load balancer, all clients
    have its address. IPv6 addresses with the same first 64 bits count as one.
    """

    def __init__(self, most: int, unlimited: Sequence[Network] = (), clock: Callable[[], float] = time.monotonic):
        self._most = most
        self._unlimited = unlimited
        self._clock = clock
        self._counts: dict[int | str, int] = {}
        self._refused = 0
        """Connections refused since the last log line."""
        self._note_at = 0.0

    def enter(self, address: str) -> int | str | None:
        """Count a new connection. Return what to call `leave` with, or None if it has no limit.

        Raises:
            TooManyConnections: the address has as many as it may have.
        """
        key = self._key(address)
        if key is None:
            return None
        count = self._counts.get(key, 0)
        if count >= self._most:
            self._note(address)
            raise TooManyConnections
        self._counts[key] = count + 1
        return key

    def leave(self, key: int | str) -> None:
        """Count the end of a connection."""
        count = self._counts[key] - 1
        if count:
            self._counts[key] = count
        else:
            del self._counts[key]

    def _key(self, address: str) -> int | str | None:
        try:
            parsed: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.ip_address(address)
        except ValueError:  # a kind of socket without addresses
            return address
        if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
            parsed = parsed.ipv4_mapped
        if any(parsed in network for network in self._unlimited):
            return None
        if isinstance(parsed, ipaddress.IPv4Address):
            return int(parsed)
        return f"{int(parsed) >> (128 - IPV6_PREFIX):x}"

    def _note(self, address: str) -> None:
        self._refused += 1
        if (now := self._clock()) >= self._note_at:
            self._note_at = now + NOTE_SECONDS
            _log.warning(
                "max_connections_per_address: %d connections refused, the last one of %s, which has %d",
                self._refused,
                address,
                self._most,
            )
            self._refused = 0


class TooManyConnections(Exception):
    """An address has as many connections as it may have."""
