"""The shortcut of plain tokens: from the bytes of one read to the bytes of one write, in one function.

Within a stream, the events of plain content are the same at the engine but for their texts, and so
are the client's. An engine sends each as a chunk of its own (RFC 9112 section 7.1). So a read that
consists of such chunks becomes a write without the layers in between: the text is cut out of the
known bytes around it, and put between those that the client gets.

A read that has anything else takes the usual way: the parser, the engine's reader, the renderer.
"""

from bisect import bisect_left
from collections.abc import Callable

from gateway.dialects.dialect import StreamRenderer
from gateway.engines.engine import ResponseReader
from gateway.relay.requests import ClientConnection
from gateway.telemetry.exchange import Meter
from gateway.telemetry.metrics import Histogram
from gateway.upstream.chunks import SIZE_LINES

MAX_SIZES = 16
"""Sizes of chunks for which a stream keeps what is around their text. Tokens have few lengths."""

CRLF = b"\r\n"


class _Frames:
    """What is around the texts of one stream: of the engine's chunks, and of the client's.

    Attributes:
        tail: the end of each of the engine's chunks.
        rest: the end of each of the client's chunks.
        sizes: by the size of a whole chunk of the engine: where its text begins, what is before
            that, and what the client gets before the text.
    """

    __slots__ = ("_before", "_client", "_ours", "rest", "sizes", "tail")

    def __init__(self, client: ClientConnection, theirs: tuple[bytes, bytes], ours: tuple[bytes, bytes]) -> None:
        self._client = client
        self._before = theirs[0]
        self._ours = ours
        self.tail = theirs[1] + CRLF
        self.rest = ours[1] + CRLF
        self.sizes: dict[int, tuple[int, bytes, bytes]] = {}

    def texts(self, data: bytes) -> list[bytes] | None:
        """Return the texts of whole chunks; None if `data` is anything else."""
        tail, sizes = self.tail, self.sizes
        end = len(tail)
        if not data.endswith(tail):
            return None
        texts = []
        for part in data[:-end].split(tail):
            size = sizes.get(len(part) + end) or self._size_of(part)
            if size is None:
                return None
            start, head, _ = size
            if part[:start] != head:
                return None
            texts.append(part[start:])
        return texts

    def _size_of(self, part: bytes) -> tuple[int, bytes, bytes] | None:
        """Return what is around the text of a chunk of a size that is not in `sizes`, and keep it if there is room.

        `part` is the chunk without its end. None if it is no such chunk.
        """
        size, ours = len(part) + len(self.tail), self._ours
        head = SIZE_LINES.get(size, b"none") + self._before
        if not part.startswith(head):
            return None
        line = self._client.chunk_line(len(ours[0]) + len(part) - len(head) + len(ours[1]))
        if line is None:
            return None
        found = len(head), head, line + ours[0]
        if len(self.sizes) < MAX_SIZES:
            self.sizes[size] = found
        return found


def splicer(
    client: ClientConnection, reader: ResponseReader, renderer: StreamRenderer, meter: Meter, gaps: Histogram
) -> Callable[[bytes], bool] | None:
    """Return the function that takes whole chunks of plain tokens (`Connection.on_chunks`).

    None if there is no shortcut: the engine's events, or the client's, have no fixed form.
    """
    theirs, ours = reader.around_text, renderer.around_text
    if theirs is None or ours is None or client.chunk_line(1) is None:
        return None
    frames = _Frames(client, theirs, ours)
    sizes, tail, rest, stop = frames.sizes, frames.tail, frames.rest, -len(frames.tail)
    known, is_plain, clock, write = reader.known_texts, reader.is_plain_text, meter.clock, client.write_chunk
    bounds, counts = gaps.bounds, gaps.counts

    def on_chunks(data: bytes) -> bool:
        """Handle one read: every token comes through here, so `observe_gap` is inlined."""
        size = sizes.get(len(data))
        if size is None:
            return several(data)
        start, head, line = size
        # Slices are cheaper than startswith.
        if data[:start] != head or data[stop:] != tail:
            return several(data)
        text = data[start:stop]
        if text not in known and not is_plain(text):
            return False
        now = clock()
        gap = now - meter.last_piece
        meter.last_piece = now
        meter.pieces += 1
        counts[bisect_left(bounds, gap)] += 1
        gaps.total += gap
        write(line + text + rest)
        return True

    def several(data: bytes) -> bool:
        """Handle several tokens that came together, or the first of a size."""
        texts = frames.texts(data)
        if texts is None or not (known.issuperset(texts) or all(map(is_plain, texts))):
            return False
        now = clock()
        gaps.observe_gap(now - meter.last_piece, len(texts))
        meter.last_piece = now
        meter.pieces += len(texts)
        client.write(renderer.splice(texts))
        return True

    return on_chunks
