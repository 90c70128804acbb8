"""Strings as JSON, in a form that no client breaks on. Pure: no I/O, no clock."""

import msgspec

_encode = msgspec.json.encode

SEPARATORS = ("\u2028", "\u2029", "\u0085")
"""Line ends of Unicode. Clients that split a stream into lines by Unicode's rules break at them."""

_ESCAPES = [(mark.encode(), b"\\u%04x" % ord(mark)) for mark in SEPARATORS]


def json_text(text: str) -> bytes:
    """Return `text` as a JSON string without line ends of Unicode."""
    return _encode(text) if text.isascii() else escaped(_encode(text))


def escaped(json: bytes) -> bytes:
    """Return `json` with the line ends of Unicode in its strings escaped, as Go does."""
    # `in` costs ten times as much: it tries the bytes as a number first, whose exception it formats.
    if json.find(b"\xe2\x80") >= 0 or json.find(b"\xc2\x85") >= 0:
        for mark, escape in _ESCAPES:
            json = json.replace(mark, escape)
    return json


def json_value(value: object) -> bytes:
    """Return any value as JSON without line ends of Unicode."""
    json = _encode(value)
    return json if json.isascii() else escaped(json)
