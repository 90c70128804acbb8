"""Addresses of images: which the gateway may fetch. Pure: no I/O, nothing is resolved.

Addresses are compared by their parts, not as text (RFC 3986): `https://cdn.example.com@evil.example/`
begins like an allowed one. What two parsers could read in two ways is refused.
"""

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import quote, urljoin, urlsplit

from msgspec import Struct

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_ADDRESS = 4096
"""Maximum length of an address in characters."""

_UNSAFE = re.compile(r"[\x00-\x20\x7f-\xa0\\^`{|}<>\"]")
_DOT_SEGMENT = re.compile(r"(?:^|/)(?:\.|%2e){1,2}(?:/|$)", re.IGNORECASE)
_HIDDEN_SEPARATOR = re.compile(r"%(?:2f|5c|00|25)", re.IGNORECASE)
_HOST = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_EMBEDDING = tuple(
    ipaddress.ip_network(network) for network in ("::/96", "64:ff9b::/96", "64:ff9b:1::/48", "2001::/32", "2002::/16")
)
"""IPv6 networks whose addresses contain an IPv4 address, to which a translator or tunnel may lead."""


class ImageAddress(Struct, frozen=True):
    """The parts of an https address, in the form in which they are compared."""

    host: str
    """In lower case, as IDNA's ASCII form; an IPv6 address without brackets."""
    port: int
    path: str
    query: str

    @property
    def target(self) -> str:
        """Target of the request (RFC 9112 section 3.2.1)."""
        return self.path + (f"?{self.query}" if self.query else "")

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == 443 else f"{host}:{self.port}"

    def begins_with(self, prefix: "ImageAddress") -> bool:
        """Return whether the address is `prefix`, or below it: `/a` is not a prefix of `/ab`."""
        if (self.host, self.port) != (prefix.host, prefix.port):
            return False
        folder = prefix.path if prefix.path.endswith("/") else prefix.path + "/"
        return self.path == prefix.path or self.path.startswith(folder)


def parse(text: str) -> ImageAddress | None:
    """Return the parts of an https address, None if it is none or is ambiguous."""
    if len(text) > MAX_ADDRESS or _UNSAFE.search(text):
        return None
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme != "https" or not host or "@" in parts.netloc or port == 0:
        return None
    name = _host(host.removesuffix("."))
    path = quote(parts.path or "/", safe="/%:=&~+!$,;'@()*[]")
    if name is None or _DOT_SEGMENT.search(path) or _HIDDEN_SEPARATOR.search(path):
        return None
    return ImageAddress(name, port or 443, path, quote(parts.query, safe="/%:=&~+!$,;'@()*[]?"))


def _host(text: str) -> str | None:
    if ":" in text:
        try:
            return None if "%" in text else str(ipaddress.IPv6Address(text))
        except ValueError:
            return None
    try:
        name = text.encode("idna").decode().lower()
    except UnicodeError:
        return None
    if not _HOST.fullmatch(name) or len(name) > 253:
        return None
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        try:
            return str(ipaddress.IPv4Address(name))  # `127.1` and `0x7f000001` are addresses for some resolvers
        except ValueError:
            return None
    return name


def parse_prefix(text: str) -> ImageAddress | None:
    """Return the parts of an allowed prefix, None if it is not an https address without a query."""
    found = parse(text.strip())
    return None if found is None or found.query or "#" in text or "?" in text else found


def redirected(address: ImageAddress, location: str) -> ImageAddress | None:
    """Return where the header `Location` of an answer leads, None if it is not an https address."""
    if len(location) > MAX_ADDRESS or _UNSAFE.search(location):
        return None
    try:
        return parse(urljoin(f"https://{address.authority}{address.target}", location))
    except ValueError:
        return None


def is_allowed(address: ImageAddress, prefixes: Iterable[ImageAddress]) -> bool:
    return any(map(address.begins_with, prefixes))


def is_public(address: IpAddress) -> bool:
    """Return whether the address is one of the public Internet.

    Private, loopback, link-local, multicast, shared (RFC 6598) and reserved ones are not, and
    neither is an IPv6 address with an IPv4 address in it, unless it stands for a public one.
    """
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return is_public(address.ipv4_mapped)
        if address.scope_id or address.is_site_local or any(address in network for network in _EMBEDDING):
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)
