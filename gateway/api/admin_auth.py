"""Who may use `/ops` and `/metrics`. Pure.

With a key: `Authorization: Bearer`. Without one: callers on loopback, and of them only programs on this machine that speak to it directly; a
web page open in a browser here (a foreign `Origin`, or a `Host` that DNS was bent to) and what a proxy passes on are not.
"""

import hmac
from collections.abc import Iterable, Mapping
from hashlib import sha256
from ipaddress import ip_address
from urllib.parse import urlsplit

from gateway.api.auth import Headers, bearer
from gateway.errors import Forbidden, InvalidApiKey

_FORWARDING = (b"forwarded", b"via")

LOCAL = "local"
"""Who a caller without a key is."""


class AdminAccess:
    """One guarded part of the gateway; any of `keys` opens it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def check(self, peer: str | None, headers: Headers) -> str:
        """Let the request pass and say who it is, by the key's id; `peer` is the address that it came from.

        Raises:
            InvalidApiKey: a key is set, and this is not it.
            Forbidden: none is set, and the caller is not a program on this machine.
        """
        if self._digests:
            key = bearer(headers)
            digest = sha256(key or b"").digest()
            if key is None or not any(hmac.compare_digest(digest, known) for known in self._digests):
                raise InvalidApiKey
            return digest.hex()[:8]
        if not _is_local_program(peer, headers):
            raise Forbidden(
                "Without GATEWAY_ADMIN_KEY only programs on the gateway's own machine may do this. Set the key, or call it from there."
            )
        return LOCAL


def _is_local_program(peer: str | None, headers: Headers) -> bool:
    fields: Mapping[bytes, bytes] = dict(headers)
    if peer is None or not _is_loopback(peer):
        return False
    if any(name in _FORWARDING or name.startswith(b"x-forwarded-") for name in fields):
        return False
    if not _is_local_host(fields.get(b"host", b"").decode("latin-1")):
        return False
    origin = fields.get(b"origin")
    return origin is None or origin == b"http://" + fields.get(b"host", b"")


def _is_loopback(host: str) -> bool:
    try:
        address = ip_address(host)
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_local_host(authority: str) -> bool:
    try:
        host = urlsplit(f"//{authority}").hostname or ""
    except ValueError:
        return False
    return host == "localhost" or _is_loopback(host)
