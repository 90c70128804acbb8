"""Half surrogate pairs in JSON."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.surrogates import MAX_ESCAPES, HalfPairReplacer, text_without_halves, without_halves

HALVES = st.lists(
    st.sampled_from(
        ["a", "\\\\", "\\n", '\\"', "\\ud83d", "\\uDE00", "\\ud83d\\ude00", "\\uD7FF", "ud83d", "\\\\ud83d", "\\u0041"]
    ),
    max_size=12,
).map("".join)


def as_go(text: str) -> str:
    """Return `text` with each half of a pair, as Python's parser leaves it, replaced."""
    return "".join("\ufffd" if 0xD800 <= ord(char) <= 0xDFFF else char for char in text)


@given(HALVES)
def test_halves_become_replacement_characters_and_nothing_else_changes(inner: str) -> None:
    mended = without_halves(f'{{"{inner}":"{inner}"}}'.encode())
    expected = as_go(json.loads(f'"{inner}"'))
    assert msgspec.json.decode(mended) == {expected: expected}


@given(HALVES, st.integers(1, 9))
def test_pieces_are_mended_as_the_whole(inner: str, size: int) -> None:
    replacer = HalfPairReplacer()
    shown = [replacer.feed(inner[start : start + size]) for start in range(0, len(inner), size)]
    assert "".join((*shown, replacer.rest())) == text_without_halves(inner)


@pytest.mark.parametrize("half", [b"\xed\xa0\xbd", b"\xed\xb8\x80"])
def test_half_that_is_encoded_on_its_own_is_replaced(half: bytes) -> None:
    assert msgspec.json.decode(without_halves(b'"a%bb"' % half)) == "a\ufffdb"


@pytest.mark.parametrize(
    "text",
    [
        b'"a"',
        b'"\\ud83d\\ude00"',
        b'"\xed\x95\x9c"',
        b'"\\\\ud83d"',
        b'"\\ud83d' + b'\0"',
        b'"\\ud800"' * MAX_ESCAPES * 2,
    ],
)
def test_text_without_halves_or_beyond_mending_is_returned_itself(text: bytes) -> None:
    assert without_halves(text) is text
