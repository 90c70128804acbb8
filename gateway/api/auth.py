"""Client authentication: from an API key to a `Caller`. Only SHA-256 digests of keys are kept.

A key is hashed and looked up by its digest, so the duration of a look-up says nothing about a key:
a digest that is close to a known one does not come from a key that is close to a known one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256

from gateway.api.hosts import HostCheck
from gateway.errors import InvalidApiKey
from gateway.keys.account import Account
from gateway.keys.accounts import Accounts

Headers = list[tuple[bytes, bytes]]

KEY_HEADERS = frozenset({b"x-api-key", b"api-key"})
"""Headers that contain a key without a scheme."""

ALL_KEY_HEADERS = KEY_HEADERS | {b"authorization"}


@dataclass(frozen=True, slots=True)
class Caller:
    """Client that sent a request."""

    key_id: str
    """The key's name, or of a key without a name the first 8 hex digits of its digest; empty on an open gateway."""
    account: Account | None = None
    """Account of the key; None: it has no limits."""


ANYONE = Caller("")


@dataclass(frozen=True, slots=True)
class KeylessPort:
    """A port on which requests without a key count as those of a key, by its name.

    Such a port is open, so on loopback `hosts` protects it as it does an open gateway.
    """

    port: int
    key: str
    hosts: HostCheck


class ApiKeys:
    """Client keys of this gateway; without any, every request is accepted.

    `keys` have no limits. `accounts` are the keys with names; None: the settings name no file of them.
    """

    def __init__(self, keys: Iterable[str], accounts: Accounts | None = None) -> None:
        self._changes = 0
        self._plain: dict[bytes, Caller] = {}
        self._accounts = accounts
        self._by_name: dict[str, Caller] = {}
        self.keyless_port: KeylessPort | None = None
        self.change(keys)
        if accounts is not None:
            accounts.on_change = self._collect

    def change(self, keys: Iterable[str]) -> None:
        """Accept these keys without limits from the next request on, also on connections that are open."""
        digests = [sha256(key.encode()).digest() for key in keys]
        self._plain = {digest: Caller(digest.hex()[:8]) for digest in digests}
        self._collect()

    def count_plain(self) -> int:
        """Return how many keys have no limits."""
        return len(self._plain)

    def _collect(self) -> None:
        """Accept the plain keys, and those of the accounts. One that is both has the account's limits."""
        named: dict[bytes, Caller] = {}
        if self._accounts is not None:
            known = self._by_name
            named = {
                digest: caller
                if (caller := known.get(each.name)) is not None and caller.account is each
                else Caller(each.name, each)
                for digest, each in self._accounts.by_digest.items()
            }
        self._callers = self._plain | named
        self._by_name = {caller.key_id: caller for caller in named.values()}
        self._changes += 1
        self.note = f"caller of keys {self._changes}"
        """Name of a connection's note with the caller. With other keys it is another one."""

    @property
    def is_open(self) -> bool:
        """True if every request is accepted."""
        return not self._plain and self._accounts is None

    def identify(self, headers: Headers, fields: Mapping[bytes, bytes] | None = None, server: object = None) -> Caller:
        """Return the caller whose key is in the headers: see `client_key`.

        `fields` are the same headers as a dict, if the caller already has one. `server` is the
        address and port that the request came to, as ASGI has them.

        Raises:
            InvalidApiKey: The key is missing, ambiguous or unknown.
            Forbidden: A request without a key names a foreign `Host`.
        """
        if self.is_open:
            return ANYONE
        # no name is repeated, and there is at most the usual header
        is_plain = fields is not None and len(fields) == len(headers) and fields.keys().isdisjoint(KEY_HEADERS)
        key = _token(fields.get(b"authorization")) if fields is not None and is_plain else client_key(headers)
        caller = self._callers.get(sha256(key).digest()) if key else None
        if caller is None:
            caller = self._keyless(headers, server)
        if caller is None:
            raise InvalidApiKey
        return caller

    def _keyless(self, headers: Headers, server: object) -> Caller | None:
        """Return the caller that a request without a key counts as, on the port where it may have none."""
        keyless = self.keyless_port
        if keyless is None or not isinstance(server, list | tuple) or server[1] != keyless.port:
            return None
        if any(name in ALL_KEY_HEADERS for name, _ in headers):
            return None
        keyless.hosts.check(dict(headers))
        return self._by_name.get(keyless.key)


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
