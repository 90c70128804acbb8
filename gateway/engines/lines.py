"""Bytes to lines: the framing that server-sent events and NDJSON share. Pure: no I/O, no clock.

Every server behind this gateway writes one JSON document a line, so an event needs no blank line to end it, and a line that is no
`data:` field is none of ours (comments, `event:`, `id:`). Lines end at CR and LF only: JSON strings may hold U+2028, U+2029 and U+0085.
"""

MAX_LINE = 1024 * 1024
"""Bytes. A longer line is no token of a model."""

DONE = b"[DONE]"


class LineTooLong(ValueError):
    """A line grew past `MAX_LINE` without an end."""


class LineBuffer:
    """Cuts pieces of a body, cut anywhere, into whole lines without their ends. Blank lines are left out."""

    __slots__ = ("_rest", "held")

    def __init__(self) -> None:
        self._rest: list[bytes] = []
        self.held = 0
        """Bytes of the line under way."""

    def feed(self, piece: bytes) -> list[bytes]:
        """The lines that `piece` completes.

        Raises:
            LineTooLong: the line under way has more than `MAX_LINE` bytes.
        """
        if b"\r" in piece:
            piece = piece.replace(b"\r", b"\n")
        end = piece.rfind(b"\n")
        if self._rest or end != len(piece) - 1:
            piece = self._join(piece, end)
        lines = [line for line in piece.split(b"\n") if line]
        if len(piece) > MAX_LINE and any(len(line) > MAX_LINE for line in lines):
            raise LineTooLong
        return lines

    def _join(self, piece: bytes, end: int) -> bytes:
        """What was left over and `piece` up to its last line end, keeping the tail for later."""
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
        """What stands after the last line end when the body is over: a last line without an end."""
        whole = b"".join(self._rest)
        self._rest, self.held = [], 0
        return [whole] if whole else []


def data_of(line: bytes) -> bytes | None:
    """The value of a `data` field, None for any other line (WHATWG HTML, 9.2.6: one space after the colon is not part of it)."""
    if not line.startswith(b"data:"):
        return None
    return line[6:] if line.startswith(b" ", 5) else line[5:]
