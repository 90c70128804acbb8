"""Line splitting for server-sent events and NDJSON. Pure: no I/O, no clock.

Every supported server writes one JSON document per line. An event therefore needs no blank line to
end it, and lines other than `data:` fields (comments, `event:`, `id:`) are ignored. Lines end at CR
and LF only: JSON strings may contain U+2028, U+2029 and U+0085.
"""

MAX_LINE = 1024 * 1024
"""Maximum line length in bytes. No token of a model is longer."""

DONE = b"[DONE]"

_CR = ord("\r")
"""A number: `b"\\r" in piece` would raise and discard an exception first, for every line of Ollama's."""


class LineTooLong(ValueError):
    """A line exceeded `MAX_LINE` bytes."""


class LineBuffer:
    """Splits the pieces of a body into complete lines without their line ends. Skips blank lines."""

    __slots__ = ("_rest", "held")

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self.held = 0
        """Number of bytes buffered for the incomplete line."""

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the lines that `piece` completes.

        Raises:
            LineTooLong: a line has more than `MAX_LINE` bytes.
        """
        if _CR in piece:
            piece = piece.replace(b"\r", b"\n")
        end = piece.rfind(b"\n")
        if self._rest or end != len(piece) - 1:
            piece = self._join(piece, end)
        lines = [line for line in piece.split(b"\n") if line]
        if len(piece) > MAX_LINE and any(len(line) > MAX_LINE for line in lines):
            raise LineTooLong
        return lines

    def _join(self, piece: bytes, end: int) -> bytes:
        """Return the buffered bytes plus `piece` up to its last line end. Buffer the tail."""
        whole = b""
        if end >= 0:
            whole = b"".join((*self._rest, piece[:end]))
            self._rest, self.held = [], 0
        tail = piece[end + 1 :]
        if tail:
            self._rest.append(tail)
            self.held += len(tail)
            if self.held > MAX_LINE:
                raise LineTooLong
        return whole

    def rest(self) -> list[bytes]:
        """Return the last line of a body that does not end with a line end, if there is one."""
        whole = b"".join(self._rest)
        self._rest, self.held = [], 0
        return [whole] if whole else []


def data_of(line: bytes) -> bytes | None:
    """Return the value of a `data` field, or None for any other line.

    One space after the colon is not part of the value (WHATWG HTML, 9.2.6).
    """
    if not line.startswith(b"data:"):
        return None
    return line[6:] if line.startswith(b" ", 5) else line[5:]
