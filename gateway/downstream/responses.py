"""Responses in bytes: status lines, the heads of ASGI responses, and the errors of the server itself.

Pure. The cycle frames the body.
"""

import random
from collections.abc import Iterable
from http import HTTPStatus
from typing import NamedTuple

from gateway.errors import INVALID_REQUEST, envelope

STATUS_LINES = {status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus}
_CONNECTION_HEADERS = frozenset((b"transfer-encoding", b"connection"))
"""Headers of the application that the server does not send, but sets itself."""


class AsgiHead(NamedTuple):
    """Head of a response, as an ASGI application wants it."""

    lines: bytes
    """The status line and the headers, without those that the server sets itself."""
    content_length: bytes | None
    """The first one; its line is in `lines` too."""
    closes: bool
    """True if the application asks to close the connection after the response."""


def asgi_head(status: int, headers: Iterable[tuple[bytes, bytes]]) -> AsgiHead:
    """Read the headers of an `http.response.start`.

    Raises:
        RuntimeError: A header contains a line break or NUL, and would be read as more than one.
    """
    lines = [STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status]
    content_length: bytes | None = None
    closes = False
    for name, value in headers:
        name = name.lower()
        if name in _CONNECTION_HEADERS:
            closes = closes or (name == b"connection" and b"close" in value.lower())
            continue
        if name == b"content-length" and content_length is None:
            content_length = value
        lines.append(b"%b: %b\r\n" % (name, value))
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines) or b"\0" in head:
        raise RuntimeError("a response header contains a line break or NUL")
    return AsgiHead(head, content_length, closes)


def error_answer(
    status: int, code: str | None, message: str, kind: str = INVALID_REQUEST, header_lines: bytes = b""
) -> bytes:
    """Return a complete response in OpenAI's error format, with `Connection: close`."""
    body = envelope(message, kind, None, code)
    lines = (
        b"content-type: application/json\r\nx-request-id: req-%024x\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
    )
    return STATUS_LINES[status] + header_lines + lines % (random.getrandbits(96), len(body)) + body
