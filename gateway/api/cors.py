"""Cross-origin resource sharing for browser programs (WHATWG Fetch, 3.3). Pure."""

import re
from collections.abc import Iterable, Mapping

Headers = list[tuple[bytes, bytes]]

_METHODS = b"GET, POST, OPTIONS"
_EXPOSED = (
    b"x-request-id, x-gateway-tier, x-gateway-reason, x-gateway-backend, x-gateway-model, x-gateway-queue-ms, "
    b"x-gateway-attempts, x-gateway-downgraded-from, x-gateway-budget-warning, retry-after, "
    b"x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    b"x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
_MAX_AGE = b"600"


def _pattern(origin: str) -> str:
    """Return the regular expression for an origin in which `*` stands for a part of it.

    As the port it stands for digits, elsewhere for what the host and the port of an origin consist
    of.
    """
    before, _, after = origin.partition("*")
    part = "[0-9]*" if before.endswith(":") and not after else r"[A-Za-z0-9._~:\[\]-]*"
    return re.escape(before) + part + re.escape(after)


class Cors:
    """CORS headers for the origins in the settings.

    Credentials are never allowed: programs send their key in a header that they set themselves.
    """

    def __init__(self, origins: Iterable[str]) -> None:
        plain = {origin.rstrip("/") for origin in origins}
        self._any = "*" in plain
        patterns = sorted(origin for origin in plain if "*" in origin)
        self._origins = frozenset(origin.encode() for origin in plain)
        self._matches = re.compile("|".join(map(_pattern, patterns)).encode()).fullmatch if patterns else None

    def headers(self, fields: Mapping[bytes, bytes]) -> Headers:
        """Return the response headers for a request with the header `fields`.

        The list is empty if the request has no `Origin`, or one that is not allowed.
        """
        origin = fields.get(b"origin")
        if origin is None or not self._origins or not self._allows(origin):
            return []
        return [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            (b"vary", b"Origin"),
            (b"access-control-expose-headers", _EXPOSED),
        ]

    def _allows(self, origin: bytes) -> bool:
        return self._any or origin in self._origins or (self._matches is not None and bool(self._matches(origin)))

    def header_lines(self, fields: Mapping[bytes, bytes]) -> bytes:
        """Return the headers as the bytes that are sent."""
        return b"".join([b"%b: %b\r\n" % pair for pair in self.headers(fields)]) if self._origins else b""

    def preflight_headers(self, fields: Mapping[bytes, bytes]) -> Headers | None:
        """Return the headers of the 204 response to a preflight request, which needs no key.

        Return None if the request is not a preflight request or its origin is not allowed.
        """
        if b"access-control-request-method" not in fields:
            return None
        headers = self.headers(fields)
        if not headers:
            return None
        asked = fields.get(b"access-control-request-headers", b"authorization, content-type")
        return [
            *headers,
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-allow-headers", asked),
            (b"access-control-max-age", _MAX_AGE),
        ]
