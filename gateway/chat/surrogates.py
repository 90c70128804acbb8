"""Halves of surrogate pairs in JSON, which become U+FFFD. Pure: no I/O, no clock.

`JSON.stringify` writes `"\\ud83d"` where a program has cut an emoji in two, and Go reads it as
U+FFFD (encoding/json, Unmarshal). The parsers used here refuse it, and UTF-8 has no form for it.
"""

import re

MAX_ESCAPES = 200_000
"""Maximum number of surrogates in a text that is mended. It takes about 30 ms."""

_HIGH, _LOW = rb"\\u[dD][89abAB][0-9a-fA-F]{2}", rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_half = re.compile(rb"%b(?!%b)|(?<!%b)%b" % (_HIGH, _LOW, _HIGH, _LOW))
_half_in_bytes = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_unfinished = re.compile(
    r"(?<!\\)(?:\\\\)*+(\\(?:u(?:[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?|[0-9a-fA-F]{0,3}))?)\Z"
)
"""An escape at the end of a text that is incomplete, or may be the first half of a pair."""


def without_halves(json: bytes) -> bytes:
    """Return `json` with half surrogate pairs as U+FFFD; `json` itself if it has none.

    A half may be escaped, or encoded on its own (CESU-8).
    """
    mended = json
    if b"\xed" in json:
        mended = _half_in_bytes.sub(b"\xef\xbf\xbd", json)
    if b"\0" in json or not 0 < json.count(b"\\ud") + json.count(b"\\uD") <= MAX_ESCAPES:
        return json if mended == json else mended
    # An escaped backslash must not be taken for the begin of an escape. No JSON has a NUL.
    mended = _half.sub(rb"\\ufffd", mended.replace(b"\\\\", b"\0\0")).replace(b"\0\0", b"\\\\")
    return json if mended == json else mended


class HalfPairReplacer:
    """Does the same to JSON that arrives in pieces, which may cut a pair in two."""

    __slots__ = ("_held",)

    def __init__(self) -> None:
        self._held = ""

    def feed(self, piece: str) -> str:
        """Return the text up to an escape that is not complete yet."""
        text = self._held + piece
        if "\\" not in text:
            return text
        tail = _unfinished.search(text)
        end = len(text) if tail is None else tail.start(1)
        self._held = text[end:]
        return text_without_halves(text[:end])

    def rest(self) -> str:
        """Return the text that was held back, at the end."""
        held, self._held = self._held, ""
        return text_without_halves(held)


def text_without_halves(text: str) -> str:
    """Do the same as `without_halves` to JSON in a string."""
    return without_halves(text.encode()).decode() if "\\u" in text else text
