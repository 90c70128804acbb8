"""Which request heads have exactly one reading. Pure: it judges what llhttp has parsed, and says what llhttp lets pass.

llhttp without leniency (httptools 0.9) refuses by itself: two lengths, a length beside chunks, a length that is no number, line ends other
than CRLF, folded lines, a blank before the colon, control characters, bad chunk sizes. The tests of the door hold it to that.
"""

import re
from typing import Any, NamedTuple
from urllib.parse import unquote

_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]+")
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)\r\n", re.IGNORECASE)
_MAX_DIGITS = 15  # of a length; more is left to llhttp


class HeadRefused(Exception):
    """A request that is not served: `answer` is status, code, message. Messages never quote the request."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.answer = (status, code, message)


class UpgradeWanted(Exception):
    """The head asks for another protocol."""


class RequestHead(NamedTuple):
    """A head that has one reading."""

    method: bytes
    target: tuple[bytes, bytes]
    """Path and query."""
    http11: bool
    headers: list[tuple[bytes, bytes]]
    """Names in lower case."""
    fields: dict[bytes, bytes]
    """The same by name; of a repeated one the last."""
    end: int
    """Bytes of the head."""
    size: int
    """Of the whole request; -1 when chunks tell."""

    def scope(self, root_path: str) -> dict[str, Any]:
        """What ASGI tells an application of it."""
        raw_path, query = self.target
        path = raw_path.decode("ascii")
        return {
            "http_version": "1.1" if self.http11 else "1.0",
            "method": self.method.decode("ascii"),
            "path": root_path + (unquote(path) if "%" in path else path),
            "raw_path": raw_path,
            "query_string": query,
            "headers": self.headers,
        }


def parse_head(
    raw: bytes, method: bytes, url: bytes, max_bytes: int, max_count: int, sound_host: bytes | None
) -> RequestHead:
    """The head at the beginning of `raw`, in which llhttp has found `method` and `url`. `sound_host` was found sound before.

    Raises:
        Refused: it has more than one reading, or more bytes or headers than it may.
        UpgradeWanted
    """
    end = raw.find(b"\r\n\r\n") + 4
    headers = read_fields(raw, end)
    fields = dict(headers)
    if b"upgrade" in fields:
        raise UpgradeWanted
    if end > max_bytes or len(headers) > max_count:
        raise too_large()
    http11 = raw.startswith(b"%b %b HTTP/1.1\r\n" % (method, url))
    if not http11:
        check_http10(raw, method, url, fields)
    host = fields.get(b"host")
    if (host is None and http11) or (host is not None and host != sound_host):
        check_host(host)
    if len(fields) != len(headers):
        check_repeats(headers)
    if b"transfer-encoding" in fields:
        if fields[b"transfer-encoding"].lower() != b"chunked":
            raise invalid("The only Transfer-Encoding that is served is 'chunked'.")
        size = -1
    else:
        size = end + int(fields.get(b"content-length", 0))
    return RequestHead(method, split_target(url, method), http11, headers, fields, end, size)


def invalid(message: str) -> HeadRefused:
    """A 400."""
    return HeadRefused(400, "invalid_value", message)


def too_large() -> HeadRefused:
    """A 431."""
    return HeadRefused(431, "headers_too_large", "The headers of the request are too large, or too many.")


def read_fields(raw: bytes, end: int) -> list[tuple[bytes, bytes]]:
    """The headers of a head that llhttp has found sound, and that ends at `end`: names in lower case, values without blanks around them.

    Cut and stripped in C: a quarter of what two searches cost, and these were cheaper than a callback for each.
    """
    lines = raw[: end - 4].split(b"\r\n")
    del lines[0]
    return [(name.lower(), value.strip(b" \t")) for name, _, value in [line.partition(b":") for line in lines]]


def check_http10(raw: bytes | bytearray, method: bytes, url: bytes, fields: dict[bytes, bytes]) -> None:
    """For a head that is not plainly 1.1: llhttp takes 0.9, 2.0, RTSP, ICE and further blanks in the request line too."""
    if not raw.startswith(b"%b %b HTTP/1.0\r\n" % (method, url)):
        raise invalid("The request line is not one of HTTP/1.1.")
    if b"transfer-encoding" in fields:
        raise invalid("HTTP/1.0 knows no Transfer-Encoding.")


def check_host(host: bytes | None) -> None:
    """RFC 9112 §3.2; an empty one is refused too, since every `http:` address has a host."""
    if host is None or _HOST.fullmatch(host) is None:
        raise invalid("The request needs one Host header with a host name or address.")


def check_repeats(headers: list[tuple[bytes, bytes]]) -> None:
    """For a head in which a name comes twice; llhttp has refused repeated lengths and encodings."""
    if [name for name, _ in headers].count(b"host") > 1:
        raise invalid("The request has more than one Host header.")


def split_target(url: bytes, method: bytes) -> tuple[bytes, bytes]:
    """Path and query of a target in origin form. No absolute form: nobody takes this gateway for his proxy, and its authority could differ."""
    path, _, query = url.partition(b"?")
    if b"#" in url or method == b"CONNECT" or not (path.startswith(b"/") or (path == b"*" and method == b"OPTIONS")):
        raise invalid("The request target must be a path that begins with '/'.")
    return path, query


def without_upgrade(raw: bytes | bytearray) -> bytes:
    """The same request without its wish for another protocol, which RFC 9110 §7.8 lets a server ignore."""
    head, blank, rest = bytes(raw).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"upgrade:")]
    return b"\r\n".join(lines) + blank + rest


class CachedHead:
    """A head that was found sound, for the requests behind it on the same connection: clients repeat theirs but for the length of the body.

    `scope` is what the application was told, without what belongs to one request alone. `notes` is the application's: what it has found
    out from these headers, with which no `Content-Length` may have to do.
    """

    __slots__ = ("_after", "_before", "_fields", "_headers", "_place", "_scope", "notes")

    def __init__(self, before: bytes, after: bytes, head: RequestHead, scope: dict[str, Any]) -> None:
        self._before = before
        self._after = after
        self._headers = head.headers
        self._fields = head.fields
        self._scope = scope
        self._place = [name for name, _ in head.headers].index(b"content-length")
        self.notes: dict[str, Any] = {}

    def length_and_rest(self, data: bytes) -> tuple[bytes, bytes] | None:
        """The digits of the length, and what follows the head, if `data` begins with this head."""
        before, after = self._before, self._after
        if not data.startswith(before):
            return None
        start = len(before)
        end = data.find(b"\r", start, start + _MAX_DIGITS)
        length = data[start:end]
        if not (length.isdigit() and data.startswith(after, end)):
            return None
        return length, data[end + len(after) :]

    def fields(self, length: bytes) -> dict[bytes, bytes]:
        return {**self._fields, b"content-length": length}

    def scope(self, length: bytes) -> dict[str, Any]:
        headers = self._headers.copy()
        headers[self._place] = (b"content-length", length)
        scope = self._scope.copy()
        scope["headers"] = headers
        return scope


def cache_head(raw: bytes, head: RequestHead, scope: dict[str, Any]) -> CachedHead | None:
    """`head`, at the beginning of `raw`, to be known again; None if a body that it announces may not simply follow."""
    length = _LENGTH.search(raw, 0, head.end)
    if length is None or b"expect" in head.fields:
        return None
    return CachedHead(raw[: length.start(1)], raw[length.end(1) : head.end], head, scope)
