"""Names of this machine: which `Host` headers and addresses are local. Pure."""

import re
from ipaddress import ip_address

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
