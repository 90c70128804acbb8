"""Who calls: an API key to a `Caller`. Keys are kept as SHA-256 digests only."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from gateway.errors import InvalidApiKey

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """`key_id`: the first 8 hex digits of the key's digest, for logs; empty on an open gateway."""

    key_id: str


ANYONE = Caller("")


class ApiKeys:
    """The client keys of this gateway; without any, everyone is let in."""

    def __init__(self, keys: Iterable[str]) -> None:
        digests = [sha256(key.encode()).digest() for key in keys]
        self._callers = {digest: Caller(digest.hex()[:8]) for digest in digests}

    @property
    def is_open(self) -> bool:
        return not self._callers

    def identify(self, headers: Headers, fields: Mapping[bytes, bytes] | None = None) -> Caller:
        """The caller whose key the `Authorization: Bearer` header holds (RFC 6750 section 2.1).

        `fields` are the same headers as a dict, where somebody has made one already.

        The digest is looked up, so the time it takes tells nothing of a key.

        Raises:
            InvalidApiKey: no such header, more than one, or a key that is none of ours.
        """
        if not self._callers:
            return ANYONE
        is_plain = fields is not None and len(fields) == len(headers)  # no name is repeated
        key = _token(fields.get(b"authorization")) if fields is not None and is_plain else bearer(headers)
        caller = self._callers.get(sha256(key).digest()) if key else None
        if caller is None:
            raise InvalidApiKey
        return caller


def bearer(headers: Headers) -> bytes | None:
    """The token of the one `Authorization: Bearer` header; None without one, and with two."""
    found: bytes | None = None
    for name, value in headers:
        if name == b"authorization":
            if found is not None:
                return None
            found = value
    return _token(found)


def _token(value: bytes | None) -> bytes | None:
    if value is None:
        return None
    scheme, _, token = value.partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else None
