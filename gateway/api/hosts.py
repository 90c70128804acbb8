"""Names of this machine: which `Host` headers and addresses are local. Pure."""

import re
from collections.abc import Iterable, Mapping
from ipaddress import ip_address

from gateway.errors import Forbidden

_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^\[\]:/?#@\s]+))(?::[0-9]*)?")


def is_loopback(address: str) -> bool:
    """Return whether `address` is an IP address of the loopback interface."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return (mapped or parsed).is_loopback


def host_of(authority: str) -> str:
    """Return the host of `host[:port]` in lower case and without brackets; empty if it is malformed."""
    match = _AUTHORITY.fullmatch(authority)
    return (match[1] or match[2]).lower() if match else ""


def is_local_host(authority: str) -> bool:
    """Return whether `host[:port]` names this machine: a loopback address, or a name that has to be one.

    Browsers and resolvers take `localhost` and the names under it for loopback (RFC 6761 section
    6.3), so no foreign name server can answer for them.
    """
    host = host_of(authority)
    return host == "localhost" or host.endswith(".localhost") or is_loopback(host)


def is_loopback_name(host: str) -> bool:
    """Return whether `host`, an IP address or a name without a port, is local."""
    return is_loopback(host) or is_local_host(host)


class HostCheck:
    """Protection of an open gateway on loopback from DNS rebinding.

    A web page can make its own name resolve to 127.0.0.1, and is then of the same origin as the
    gateway, so the browser lets it read every answer. Only `Host` tells its requests from others.
    """

    def __init__(self, allowed: Iterable[str], *, is_on: bool) -> None:
        self._allowed = frozenset(host.lower() for host in allowed)
        self._is_on = is_on

    def check(self, fields: Mapping[bytes, bytes]) -> None:
        """Refuse a request whose `Host` is neither local nor in `allowed`.

        Raises:
            Forbidden: It is neither.
        """
        if not self._is_on:
            return
        authority = fields.get(b"host", b"").decode("latin-1")
        if not is_local_host(authority) and host_of(authority) not in self._allowed:
            raise Forbidden(
                "A gateway without client keys on loopback accepts only local names such as localhost or 127.0.0.1 in "
                "the Host header. Use one of them, or add the host to allowed_hosts in the gateway's settings."
            )
