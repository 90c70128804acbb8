"""A stop sequence ends an answer at the same place, however the engine splits the answer."""

from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import Answer, CallDelta, Delta, Usage, assemble
from gateway.chat.stop_sequences import StopMatcher

LETTERS = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Return the text before the stop that ends first, and that stop, by trying each end."""
    for end in range(len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(places)]


def matched(deltas: list[Delta], stops: list[str]) -> tuple[Answer, StopMatcher]:
    matcher = StopMatcher(stops)
    return assemble([shown for delta in deltas for shown in matcher.feed([delta])]), matcher


@given(LETTERS, LETTERS, STOPS, st.lists(st.integers(0, 12)), st.lists(st.integers(0, 12)))
def test_an_answer_ends_at_the_stop_that_ends_first_however_it_is_split(
    reasoning: str, content: str, stops: list[str], cuts: list[int], content_cuts: list[int]
) -> None:
    deltas = [Delta(reasoning=piece) for piece in split(reasoning, cuts)]
    deltas += [Delta(piece) for piece in split(content, content_cuts)]
    answer, matcher = matched([*deltas, Delta(finish="length"), Delta(usage=Usage(1, 2))], stops)
    thought, found = first_stop(reasoning, stops)
    assert answer.reasoning == thought
    if found is None:
        text, found = first_stop(content, stops)
        assert answer.content == text
    else:
        assert answer.content == ""
    assert answer.stop_sequence == matcher.found == found
    assert answer.finish == ("length" if found is None else "stop")
    assert (answer.usage is None) == (found is not None)


@given(LETTERS, STOPS, st.lists(st.integers(0, 12)))
def test_no_text_is_shown_that_a_later_piece_could_take_back(text: str, stops: list[str], cuts: list[int]) -> None:
    matcher, shown, so_far = StopMatcher(stops), "", ""
    for piece in split(text, cuts):
        so_far += piece
        shown += "".join(delta.content for delta in matcher.feed([Delta(piece)]))
        assert first_stop(text, stops)[0].startswith(shown)
        held = len(so_far) - len(shown)
        assert matcher.found or held < max(map(len, stops))
    assert matcher.pieces <= len(split(text, cuts))


def test_a_call_releases_the_text_before_it_and_is_not_searched() -> None:
    calls = [CallDelta(0, "1", "f", '{"a": "END"}')]
    matcher = StopMatcher(["END"])
    found: list[Any] = matcher.feed([Delta("text E"), Delta("N"), Delta(calls=calls), Delta("D"), Delta(finish="stop")])
    assert [(delta.content, bool(delta.calls)) for delta in found] == [
        ("text ", False), ("EN", False), ("", True), ("D", False), ("", False),
    ]  # fmt: skip
    assert matcher.found is None


def test_nothing_follows_a_stop() -> None:
    matcher = StopMatcher(["\n"])
    shown = matcher.feed([Delta("a\nb", finish="length", usage=Usage(1, 1)), Delta("c")])
    assert [(delta.content, delta.finish, delta.stop_sequence) for delta in shown] == [
        ("a", None, None), ("", "stop", "\n"),
    ]  # fmt: skip
    assert matcher.feed([Delta("d")]) == []


def test_a_long_stop_sequence_costs_no_more_than_the_text_that_is_held_back() -> None:
    stop = "a" * 1000 + "b"
    matcher = StopMatcher([stop])
    shown = sum(len(delta.content) for _ in range(3000) for delta in matcher.feed([Delta("a")]))
    assert shown == 2000
    assert [delta.stop_sequence for delta in matcher.feed([Delta("b")])] == [stop]
