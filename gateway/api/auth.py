"""Client authentication: from an API key to a `Caller`. Only SHA-256 digests of keys are kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from gateway.errors import InvalidApiKey

Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Client that sent a request."""

    key_id: str
    """First 8 hex digits of the key's digest, for logs; empty on a gateway without keys."""


ANYONE = Caller("")


class ApiKeys:
    """Client keys of this gateway; without any, every request is accepted."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._changes = 0
        self._set(keys)

    def change(self, keys: Iterable[str]) -> None:
        """Accept these keys from the next request on, also on connections that are open."""
        self._changes += 1
        self._set(keys)

    def _set(self, keys: Iterable[str]) -> None:
        digests = [sha256(key.encode()).digest() for key in keys]
        self._callers = {digest: Caller(digest.hex()[:8]) for digest in digests}
        self.note = f"caller of keys {self._changes}"
        """Name of a connection's note with the caller. With other keys it is another one."""

    @property
    def is_open(self) -> bool:
        return not self._callers

    def identify(self, headers: Headers, fields: Mapping[bytes, bytes] | None = None) -> Caller:
        """Return the caller whose key is in `Authorization: Bearer` (RFC 6750 section 2.1).

        `fields` are the same headers as a dict, if the caller already has one. The lookup is by
        digest, so its duration reveals nothing about a key.

        Raises:
            InvalidApiKey: The header is missing or repeated, or the key is unknown.
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
    """Return the token of `Authorization: Bearer`; None if the header is missing or repeated."""
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
