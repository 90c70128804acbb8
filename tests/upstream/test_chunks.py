"""Chunks that need no parser."""

import pytest

from gateway.upstream.chunks import SIZE_LINES, ends_between_chunks


def test_size_line_follows_from_the_length_of_the_whole_chunk() -> None:
    for size in (*range(1, 300), 2047):
        assert SIZE_LINES[len(b"%x\r\n%b\r\n" % (size, bytes(size)))] == b"%x\r\n" % size
    assert len(SIZE_LINES) == 2047, "no two sizes have chunks of the same length"


@pytest.mark.parametrize(
    ("last", "read", "is_outside"),
    [
        (b"a\n", b"2\r\na\n\r\n", True),
        (b"\n", b"\n\r\n", True),
        (b"a\n\n", b"1\r\nb\r\n3\r\na\n\n\r\n", True),
        (b"a\n", b"2\r\na\n", False),
        (b"a\n", b"2\r\na\n\r", False),
        (b"a\n", b"2\r\na\n\r\n3", False),
        (b"a\n", b"2\r\na\n\r\n3\r\n", False),
        (b"\n", b"\n", False),
        (b"a\r\n", b"3\r\na\r\n\r\n", False),
        (b"a\n\r\n", b"9\r\na\n\r\n", False),
    ],
)
def test_read_ends_between_chunks_only_behind_the_crlf_of_a_line(last: bytes, read: bytes, is_outside: bool) -> None:
    """A piece that ends with CRLF itself may be a part of a chunk, so nothing is certain then."""
    buffer = bytearray(b"\n" * 64)
    buffer[: len(read)] = read
    assert ends_between_chunks(last, memoryview(buffer), len(read)) is is_outside
