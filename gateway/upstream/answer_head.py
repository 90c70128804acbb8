"""Head of a plain answer, kept for the next answers of the same server. Pure.

A server repeats the head of its plain answers but for their length, and once a second the date. An
answer that arrives whole behind such a head needs no parser: the one that has read the head before
would say the same.
"""

import re

_LENGTH = re.compile(rb"\r\ncontent-length: ([0-9]+)\r\n", re.IGNORECASE)
_MAX_DIGITS = 12


class AnswerHead:
    """Head of an answer with status 200 after which the connection stays open.

    Attributes:
        headers: the header fields, names in lower case; of the first answer, as is its length.
        fields: the same as a dict.
    """

    __slots__ = ("_after", "_before", "_start", "fields", "headers")

    def __init__(
        self, before: bytes, after: bytes, headers: list[tuple[bytes, bytes]], fields: dict[bytes, bytes]
    ) -> None:
        self._before = before
        self._after = after
        self._start = len(before)
        self.headers = headers
        self.fields = fields

    def __repr__(self) -> str:
        return f"<AnswerHead of {self._start + len(self._after)} bytes>"

    def body(self, data: bytes) -> bytes | None:
        """Return the body if `data` is this head, with any length, and exactly its body; else None."""
        start = self._start
        # Slices are cheaper than startswith.
        if data[:start] != self._before:
            return None
        end = data.find(b"\r", start, start + _MAX_DIGITS)
        length = data[start:end]
        if not (length.isdigit() and data.startswith(self._after, end)):
            return None
        begin = end + len(self._after)
        return data[begin:] if 0 < int(length) == len(data) - begin else None


def answer_head(raw: bytes, headers: list[tuple[bytes, bytes]], fields: dict[bytes, bytes]) -> AnswerHead | None:
    """Return the head at the start of `raw`, which a parser has accepted, for `AnswerHead.body`.

    None if it is not one of a plain answer with a length, or not in the usual form.
    """
    end = raw.find(b"\r\n\r\n") + 4
    length = _LENGTH.search(raw, 0, end)
    if length is None or not raw.startswith(b"HTTP/1.1 200 ") or len(fields) != len(headers):
        return None
    return AnswerHead(raw[: length.start(1)], raw[length.end(1) : end], headers, fields)
