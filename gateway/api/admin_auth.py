"""Admin authorisation: access to `/ops` and `/metrics`. Pure.

With a key configured, a request needs it as `Authorization: Bearer`. Without one, only local
programs that connect directly over loopback have access. A web page in a local browser does not (it
sends a foreign `Origin`, or with DNS rebinding a foreign `Host`), and neither does a request that a
proxy has forwarded.
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
"""Identity of a caller that is admitted without a key."""


class AdminAccess:
    """Access to one protected part of the gateway; each of `keys` grants it."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def check(self, peer: str | None, headers: Headers) -> str:
        """Authorise the request and return the id of its key, or `LOCAL`.

        `peer` is the address that the request came from.

        Raises:
            InvalidApiKey: Keys are configured, and the request does not send one of them.
            Forbidden: No key is configured, and the caller is not a local program.
        """
        if self._digests:
            key = bearer(headers)
            digest = sha256(key or b"").digest()
            if key is None or not any(hmac.compare_digest(digest, known) for known in self._digests):
                raise InvalidApiKey
            return digest.hex()[:8]
        if not _is_local_program(peer, headers):
            raise Forbidden(
                "Without GATEWAY_ADMIN_KEY, only programs on the gateway's own machine have access. "
                "Set the key, or send the request from that machine."
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
