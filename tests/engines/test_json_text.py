"""Tests of reading a text out of a JSON string that arrives in pieces."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.json_text import JsonTextReader


def read(*pieces: str) -> str:
    reader = JsonTextReader()
    return "".join(reader.feed(piece) for piece in pieces)


@given(st.text(), st.booleans(), st.integers(1, 7), st.sampled_from(["", " ", "\n "]))
def test_text_is_the_same_however_it_is_split_and_escaped(text: str, ascii: bool, size: int, blank: str) -> None:
    sent = blank + json.dumps(text, ensure_ascii=ascii) + blank
    assert read(*(sent[start : start + size] for start in range(0, len(sent), size))) == text


@given(st.text(st.sampled_from('"\\\\ud83e0x{ n')), st.integers(1, 5))
def test_nothing_that_a_model_writes_fails(text: str, size: int) -> None:
    read(*(text[start : start + size] for start in range(0, len(text), size))).encode()


@pytest.mark.parametrize("text", ["yes", "{}", "  yes", "<think>"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert read(*text) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"yes', "yes"),
        ('"ye\\', "ye"),
        ('"a\\u00', "a"),
        ('"a" b', "a"),
        ('"\\ud83d', ""),
        ('"\\ud83dx"', "\ufffdx"),
        ('"\\ud83d\\n"', "\ufffd\n"),
        ('"\\udc00"', "\ufffd"),
    ],
)
def test_cut_and_broken_strings_give_what_is_certain(text: str, expected: str) -> None:
    assert read(*text) == expected
