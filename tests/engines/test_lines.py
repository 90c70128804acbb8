"""Tests of line splitting, however the network splits the bytes."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.lines import MAX_LINE, LineBuffer, LineTooLong, data_of

# Characters that other splitters take for line ends: U+2028, U+2029, U+0085, vertical tab, form
# feed and ASCII's separators.
STRANGE = "\u2028\u2029\u0085\x0b\x0c\x1c\x1d\x1e"
text = st.text(st.sampled_from('ab :{}"' + STRANGE), max_size=12).map(str.encode)
end = st.sampled_from([b"\n", b"\r\n", b"\r", b"\n\n", b"\r\n\r\n"])


def read(pieces: list[bytes]) -> list[bytes]:
    lines = LineBuffer()
    return [line for piece in pieces for line in lines.feed(piece)] + lines.rest()


def cut(body: bytes, places: list[int]) -> list[bytes]:
    marks = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:stop] for start, stop in itertools.pairwise(marks)]


@given(st.lists(st.tuples(text, end), max_size=8), text, st.lists(st.integers(0, 500), max_size=20))
def test_lines_do_not_depend_on_how_the_body_is_split(
    lines: list[tuple[bytes, bytes]], last: bytes, places: list[int]
) -> None:
    body = b"".join(line + ending for line, ending in lines) + last
    expected = [line for line in (*(line for line, _ in lines), last) if line]
    assert read([body]) == expected
    assert read(cut(body, places)) == expected
    assert read([bytes([byte]) for byte in body]) == expected


@pytest.mark.parametrize("strange", STRANGE)
def test_only_cr_and_lf_end_a_line(strange: str) -> None:
    line = f'data: {{"content":"a{strange}b"}}'.encode()
    assert read([line + b"\n\n"]) == [line]


def test_line_is_returned_as_soon_as_it_is_complete() -> None:
    lines = LineBuffer()
    assert lines.feed(b"data: 1\ndata: 2") == [b"data: 1"]
    assert lines.feed(b"\n") == [b"data: 2"]
    assert lines.rest() == []


def test_last_line_needs_no_line_end() -> None:
    lines = LineBuffer()
    assert lines.feed(b'{"done"') == []
    assert lines.feed(b":true}") == []
    assert lines.rest() == [b'{"done":true}']
    assert lines.rest() == []


def test_line_of_the_maximum_length_is_accepted() -> None:
    line = b"x" * MAX_LINE
    assert read([line + b"\n"]) == [line]
    assert read([line[:100], line[100:], b"\n"]) == [line]


@pytest.mark.parametrize("size", [MAX_LINE + 1, 1000])
def test_endless_line_is_rejected_before_it_fills_the_memory(size: int) -> None:
    lines = LineBuffer()
    for _ in range(MAX_LINE // size):
        assert lines.feed(b"x" * size) == []
    with pytest.raises(LineTooLong):
        lines.feed(b"x" * size)


def test_complete_but_too_long_line_is_rejected() -> None:
    with pytest.raises(LineTooLong):
        LineBuffer().feed(b"x" * (MAX_LINE + 1) + b"\n")
    lines = LineBuffer()
    lines.feed(b"x" * MAX_LINE)
    with pytest.raises(LineTooLong):
        lines.feed(b"x" * 10 + b"\n")


def test_many_short_lines_may_exceed_the_line_limit_together() -> None:
    assert len(read([b"data: 1\n\n" * (MAX_LINE // 4)])) == MAX_LINE // 4


@pytest.mark.parametrize(
    ("line", "value"),
    [
        (b"data: {}", b"{}"),
        (b"data:{}", b"{}"),
        (b"data:  {}", b" {}"),
        (b"data:", b""),
        (b"data: [DONE]", b"[DONE]"),
        (b": keep-alive", None),
        (b"event: message", None),
        (b"id: 7", None),
        (b"database: x", None),
        (b" data: x", None),
        (b"data", None),
    ],
)
def test_only_data_fields_have_a_value(line: bytes, value: bytes | None) -> None:
    assert data_of(line) == value
