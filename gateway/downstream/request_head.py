"""Request heads: parsing, checks against request smuggling, and a cache of the previous head.

Pure: it checks what llhttp has parsed, and rejects the ambiguous heads that llhttp accepts.

llhttp without leniency (httptools 0.9) itself rejects two lengths, a length beside chunks, a length
that is not a number, line ends other than CRLF, folded lines, a space before the colon, control
characters and bad chunk sizes. tests/downstream/test_request_head.py verifies this.
"""

import re
from typing import Any, NamedTuple
from urllib.parse import unquote

_HOST = re.compile(rb"[A-Za-z0-9\-._~%!$&'()*+,;=:\[\]]+")
_ABSOLUTE = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]+)\r\n", re.IGNORECASE)
_MAX_DIGITS = 15  # of a content length; llhttp accepts any number of zeros at its start

MAX_QUERY_MARKS = 100
"""Maximum number of `&` in a query. No endpoint has more than three parameters.

Starlette takes 90 ms for the 30,000 that fit into a head.
"""


class HeadRefused(Exception):
    """Refusal of a request: `answer` is the status, the error code and the message.

    Messages never quote the request.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        self.answer = (status, code, message)


class UpgradeWanted(Exception):
    """Signal that the head contains an `Upgrade` header."""


class RequestHead(NamedTuple):
    """Request head that has exactly one interpretation."""

    method: bytes
    target: tuple[bytes, bytes]
    """Path and query."""
    http11: bool
    headers: list[tuple[bytes, bytes]]
    """Names are in lower case."""
    fields: dict[bytes, bytes]
    """The headers by name; a repeated name has its last value."""
    end: int
    """Length of the head in bytes."""
    size: int
    """Length of the whole request in bytes; -1 with chunked encoding."""

    def scope(self, root_path: str) -> dict[str, Any]:
        """Return the keys of the ASGI scope that come from the head."""
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
    raw: bytes, method: bytes, url: bytes, max_bytes: int, max_count: int, valid_host: bytes | None
) -> RequestHead:
    """Parse the head at the start of `raw`, in which llhttp has found `method` and `url`.

    `valid_host` is a Host value that has already passed the check.

    Raises:
        HeadRefused: The head is ambiguous, or has too many bytes or headers.
        UpgradeWanted: The head contains an `Upgrade` header.
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
    if (host is None and http11) or (host is not None and host != valid_host):
        check_host(host)
    if len(fields) != len(headers):
        check_repeats(headers)
    if not url.startswith(b"/") and (absolute := _ABSOLUTE.match(url)):
        check_host(absolute[1])
        headers, fields = with_host(headers, fields, absolute[1])
        url = url[absolute.end() :]
        if not url.startswith(b"/"):
            url = b"/" + url
    if b"transfer-encoding" in fields:
        if fields[b"transfer-encoding"].lower() != b"chunked":
            raise invalid("Unsupported Transfer-Encoding: only 'chunked' is accepted.")
        size = -1
    else:
        length = fields.get(b"content-length", b"0")
        if len(length) > _MAX_DIGITS:
            raise invalid("The Content-Length has too many digits.")
        size = end + int(length)
    return RequestHead(method, split_target(url, method), http11, headers, fields, end, size)


def invalid(message: str) -> HeadRefused:
    """Return a refusal with status 400."""
    return HeadRefused(400, "invalid_value", message)


def too_large() -> HeadRefused:
    """Return a refusal with status 431."""
    return HeadRefused(431, "headers_too_large", "The request headers are too large or too many.")


def read_fields(raw: bytes, end: int) -> list[tuple[bytes, bytes]]:
    """Return the headers of a head that llhttp has accepted and that ends at `end`.

    Names are in lower case, values without surrounding spaces and tabs. The split and strip calls
    run in C and cost a quarter of two searches per header, which in turn were cheaper than a parser
    callback per header.
    """
    lines = raw[: end - 4].split(b"\r\n")
    del lines[0]
    return [(name.lower(), value.strip(b" \t")) for name, _, value in [line.partition(b":") for line in lines]]


def check_http10(raw: bytes | bytearray, method: bytes, url: bytes, fields: dict[bytes, bytes]) -> None:
    """Check a head whose request line is not exactly one of HTTP/1.1.

    llhttp also accepts HTTP/0.9, HTTP/2.0, RTSP, ICE and additional spaces in the request line.
    """
    if not raw.startswith(b"%b %b HTTP/1.0\r\n" % (method, url)):
        raise invalid("The request line is not valid HTTP/1.1.")
    if b"transfer-encoding" in fields:
        raise invalid("HTTP/1.0 does not support Transfer-Encoding.")


def check_host(host: bytes | None) -> None:
    """Check the Host header (RFC 9112 §3.2).

    An empty one is refused too, since every `http:` address has a host.
    """
    if host is None or _HOST.fullmatch(host) is None:
        raise invalid("The request must have one Host header with a valid host name or address.")


def check_repeats(headers: list[tuple[bytes, bytes]]) -> None:
    """Check a head with a repeated header name.

    llhttp has already refused repeated content lengths and transfer encodings.
    """
    if [name for name, _ in headers].count(b"host") > 1:
        raise invalid("The request has more than one Host header.")


def with_host(
    headers: list[tuple[bytes, bytes]], fields: dict[bytes, bytes], host: bytes
) -> tuple[list[tuple[bytes, bytes]], dict[bytes, bytes]]:
    """Return the headers with `host`, the authority of a target in absolute form, as Host.

    A server ignores the Host header beside such a target (RFC 9112 §3.2.2), so everything that
    checks the host has to see the target's.
    """
    return [(b"host", host), *(field for field in headers if field[0] != b"host")], {**fields, b"host": host}


def split_target(url: bytes, method: bytes) -> tuple[bytes, bytes]:
    """Return the path and the query of a target in origin form."""
    path, _, query = url.partition(b"?")
    if b"#" in url or method == b"CONNECT" or not (path.startswith(b"/") or (path == b"*" and method == b"OPTIONS")):
        raise invalid("The request target must be a path that begins with '/'.")
    if query.count(b"&") > MAX_QUERY_MARKS:
        raise invalid("The request target has too many query parameters.")
    return path, query


def without_upgrade(raw: bytes | bytearray) -> bytes:
    """Return the request without its Upgrade headers, which a server may ignore (RFC 9110 §7.8)."""
    head, blank, rest = bytes(raw).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"upgrade:")]
    return b"\r\n".join(lines) + blank + rest


class CachedHead:
    """Valid head, kept for the next requests on its connection.

    Clients usually repeat a head, except for its content length. The scope is kept without what
    belongs to a single request. `notes` holds what the application has derived from the headers; it
    must not depend on `Content-Length`. `other_fields` are all fields but that one.
    """

    __slots__ = ("_after", "_before", "_headers", "_length_index", "_scope", "notes", "other_fields")

    def __init__(self, before: bytes, after: bytes, head: RequestHead, scope: dict[str, Any]) -> None:
        self._before = before
        self._after = after
        self._headers = head.headers
        self.other_fields = {name: value for name, value in head.fields.items() if name != b"content-length"}
        self._scope = scope
        self._length_index = [name for name, _ in head.headers].index(b"content-length")
        self.notes: dict[str, Any] = {}

    def length_and_rest(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Return the digits of the content length and the bytes after the head.

        Return None if `data` does not begin with this head.
        """
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
        return {**self.other_fields, b"content-length": length}

    def scope(self, length: bytes) -> dict[str, Any]:
        headers = self._headers.copy()
        headers[self._length_index] = (b"content-length", length)
        scope = self._scope.copy()
        scope["headers"] = headers
        return scope


def cache_head(raw: bytes, head: RequestHead, scope: dict[str, Any]) -> CachedHead | None:
    """Return a cache entry for `head`, which is at the start of `raw`.

    Return None if the head has no content length, or if its client waits for `100 Continue` before
    it sends the body.
    """
    length = _LENGTH.search(raw, 0, head.end)
    if length is None or b"expect" in head.fields:
        return None
    return CachedHead(raw[: length.start(1)], raw[length.end(1) : head.end], head, scope)
