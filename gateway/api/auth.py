"""Client authentication: from an API key to a `Caller`. Only SHA-256 digests of keys are kept."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from gateway.errors import InvalidApiKey

Headers = list[tuple[bytes, bytes]]

KEY_HEADERS = frozenset({b"x-api-key", b"api-key"})
"""Headers that contain a key without a scheme."""


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
        """Return the caller whose key is in the headers: see `client_key`.

        `fields` are the same headers as a dict, if the caller already has one. The lookup is by
        digest, so its duration reveals nothing about a key.

        Raises:
            InvalidApiKey: The key is missing, ambiguous or unknown.
        """
        if not self._callers:
            return ANYONE
        # no name is repeated, and there is at most the usual header
        is_plain = fields is not None and len(fields) == len(headers) and fields.keys().isdisjoint(KEY_HEADERS)
        key = _token(fields.get(b"authorization")) if fields is not None and is_plain else client_key(headers)
        caller = self._callers.get(sha256(key).digest()) if key else None
        if caller is None:
            raise InvalidApiKey
        return caller


def client_key(headers: Headers) -> bytes | None:
    """Return the client's key: `Authorization: Bearer` (RFC 6750 section 2.1), `x-api-key` or `api-key`.

    The last two are those of Anthropic's and Azure's clients. A request may send several of them
    if they contain the same key. None if there is no key, a header is repeated, or two keys differ:
    what checks the key in front of the gateway may have looked at the other one.
    """
    names: set[bytes] = set()
    keys: set[bytes] = set()
    for name, value in headers:
        if name == b"authorization" or name in KEY_HEADERS:
            if name in names:
                return None
            names.add(name)
            key = value.strip() if name in KEY_HEADERS else _token(value)
            if key:
                keys.add(key)
    return keys.pop() if len(keys) == 1 else None


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
