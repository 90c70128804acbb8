"""Admin authorisation: access to `/ops` and `/metrics`. Pure.

With a key or a token, a request needs it as `Authorization: Bearer`. On a gateway with neither and
without client keys, only local programs that connect directly over loopback have access. A web page
in a local browser does not (it sends a foreign `Origin`, or with DNS rebinding a foreign `Host`),
and neither does a request that a proxy has marked as forwarded.
"""

import hmac
from collections.abc import Iterable, Mapping
from hashlib import sha256

from gateway.api.auth import Headers, bearer
from gateway.api.hosts import is_local_host, is_loopback
from gateway.errors import Forbidden, InvalidApiKey

_FORWARDING = frozenset(
    {b"cf-connecting-ip", b"forwarded", b"true-client-ip", b"via", b"x-client-ip", b"x-cluster-client-ip", b"x-real-ip"}
)

LOCAL = "local"
"""Identity of a caller on the gateway's machine: one with the token, or without a key."""


class AdminAccess:
    """Access to one protected part of the gateway; each of `keys` grants it, and so does `token`.

    `trusts_loopback` decides who has access if there are neither keys nor a token: local programs,
    or nobody.
    """

    def __init__(self, keys: Iterable[str], token: str | None = None, *, trusts_loopback: bool = True) -> None:
        digests = [sha256(key.encode()).digest() for key in keys]
        self._identities = [(digest, digest.hex()[:8]) for digest in digests]
        if token is not None:
            self._identities.append((sha256(token.encode()).digest(), LOCAL))
        self._trusts_loopback = trusts_loopback

    def check(self, peer: str | None, headers: Headers) -> str:
        """Authorise the request and return the id of its key, or `LOCAL`.

        `peer` is the address that the request came from.

        Raises:
            InvalidApiKey: Keys or a token are configured, and the request does not send one of them.
            Forbidden: None is configured, and the caller is not a local program or has no access.
        """
        if self._identities:
            key = bearer(headers)
            digest = sha256(key or b"").digest()
            found = [identity for known, identity in self._identities if hmac.compare_digest(digest, known)]
            if key is None or not found:
                raise InvalidApiKey
            return found[0]
        if not self._trusts_loopback:
            raise Forbidden(
                "The gateway could not write the file of its admin token, so nothing grants access; its log has the "
                "reason. Set GATEWAY_ADMIN_KEY and restart the gateway."
            )
        if not _is_local_program(peer, headers):
            raise Forbidden(
                "Without GATEWAY_ADMIN_KEY, only programs on the gateway's own machine have access. "
                "Set the key, or send the request from that machine."
            )
        return LOCAL


def _is_local_program(peer: str | None, headers: Headers) -> bool:
    fields: Mapping[bytes, bytes] = dict(headers)
    if peer is None or not is_loopback(peer):
        return False
    if any(name in _FORWARDING or name.startswith(b"x-forwarded-") for name in fields):
        return False
    if not is_local_host(fields.get(b"host", b"").decode("latin-1")):
        return False
    origin = fields.get(b"origin")
    return origin is None or origin == b"http://" + fields.get(b"host", b"")
