"""Cross-origin answers for browser programs (WHATWG Fetch, 3.3), for the origins of the settings. Pure."""

from collections.abc import Iterable, Mapping

Headers = list[tuple[bytes, bytes]]

_METHODS = b"GET, POST, OPTIONS"
_EXPOSED = b"x-request-id, x-gateway-tier, x-gateway-reason, x-gateway-backend, x-gateway-model, x-gateway-queue-ms, x-gateway-attempts, retry-after"
_MAX_AGE = b"600"


class Cors:
    """Which origins may read our answers. Credentials are never allowed: keys travel in a header that the program sets."""

    def __init__(self, origins: Iterable[str]) -> None:
        self._origins = frozenset(origin.rstrip("/").encode() for origin in origins)
        self._any = b"*" in self._origins

    def headers(self, fields: Mapping[bytes, bytes]) -> Headers:
        """What an answer to a request with the header `fields` carries; nothing for a request from no or another origin."""
        origin = fields.get(b"origin")
        if origin is None or not self._origins or not (self._any or origin in self._origins):
            return []
        return [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            (b"vary", b"Origin"),
            (b"access-control-expose-headers", _EXPOSED),
        ]

    def header_lines(self, fields: Mapping[bytes, bytes]) -> bytes:
        """The same as they are sent."""
        return b"".join([b"%b: %b\r\n" % pair for pair in self.headers(fields)]) if self._origins else b""

    def preflight_headers(self, fields: Mapping[bytes, bytes]) -> Headers | None:
        """The headers of the 204 to a preflight request; None for what is none, or from another origin. It needs no key."""
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
