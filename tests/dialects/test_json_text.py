"""Encoding of JSON that no client splits in the middle."""

import json

from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.json_text import escaped, json_text, json_value

TEXTS = st.text(st.sampled_from('a\u2027\u2028\u2029\u202a\u0085\u0084é漢\n\x0b\x1c\\"'), max_size=12)


@given(TEXTS | st.text(max_size=12))
def test_encoded_text_is_one_line_for_everybody_and_means_the_same(text: str) -> None:
    encoded = json_value({text: text})
    assert len(encoded.decode().splitlines()) == 1
    assert json.loads(encoded) == {text: text}
    assert b"{%b:%b}" % (json_text(text), json_text(text)) == encoded


def test_text_without_line_ends_is_returned_itself() -> None:
    given_text = '"é漢\u2027"'.encode()
    assert escaped(given_text) is given_text
