"""Chunks of a body that arrive one or several whole ones in a read (RFC 9112 section 7.1). Pure.

A server that sends each token as a chunk needs no parser for them once it is known that a read begins
between two chunks.
"""

SIZE_LINES = {len(line) + size + 2: line for size in range(1, 2048) for line in (b"%x\r\n" % size,)}
"""Size line of a chunk by the length of the whole chunk, for chunks as small as a token."""


def ends_between_chunks(last: bytes, buffer: memoryview, nbytes: int) -> bool:
    """Return whether the read in the first `nbytes` of `buffer` certainly ends between two chunks.

    `last` is the last piece of the body in it, which ends with a line feed. The read ends between
    chunks if it ends with that line feed and CRLF, because a size line holds no line feed except its
    own.
    """
    return not last.endswith(b"\r\n") and buffer[nbytes - 3 : nbytes].tobytes() == b"\n\r\n"
