"""Names of replicas, as operators see them."""

import platform

MAX_HOST = 63
"""Characters of a host's name that are kept, as many as a label of a domain name may have (RFC 1035, 2.3.4)."""


def replica_name(identity: str) -> str:
    """Return a name with this machine's host name and the beginning of an `identity`, such as `web-1-3f9c21ab`."""
    return f"{platform.node()[:MAX_HOST] or 'gateway'}-{identity[:8]}"
