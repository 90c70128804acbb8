"""Tests of combining deltas into an answer."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import Answer, Assembler, CallDelta, ChosenLogprob, Delta, TokenLogprob, Usage, assemble
from tests.fakes.processor_time import assert_at_most

USAGE = Usage(7, 3)
LOGPROBS = [
    ChosenLogprob(
        "Hel", -0.25, [72, 101, 108], [TokenLogprob("Hel", -0.25, [72, 101, 108]), TokenLogprob("é", -1.5, None)]
    )
]


def test_assemble_combines_the_deltas() -> None:
    assert assemble(
        [Delta(reasoning="h"), Delta("a", "m"), Delta("b"), Delta(finish="length"), Delta(usage=USAGE)]
    ) == Answer("ab", "hm", "length", USAGE, [], None)


def test_assemble_combines_calls_in_the_order_of_their_indices() -> None:
    pieces = [
        Delta(calls=[CallDelta(1, "b", "g", "{")]),
        Delta(calls=[CallDelta(0, "a", "f", ""), CallDelta(1, arguments="}")]),
        Delta(calls=[CallDelta(0, arguments="{}")]),
        Delta(finish="tool_calls"),
    ]
    assert assemble(pieces).calls == [CallDelta(0, "a", "f", "{}"), CallDelta(1, "b", "g", "{}")]


def test_assemble_joins_the_logprobs() -> None:
    assert assemble([Delta("a", logprobs=LOGPROBS), Delta(finish="stop", logprobs=LOGPROBS)]).logprobs == LOGPROBS * 2


@given(st.text(), st.text(), st.sampled_from([None, "stop", "length"]), st.booleans(), st.booleans())
def test_assemble_treats_one_delta_like_several(
    content: str, reasoning: str, finish: Any, has_usage: bool, has_logprobs: bool
) -> None:
    delta = Delta(content, reasoning, finish, USAGE if has_usage else None, None, LOGPROBS if has_logprobs else None)
    assert assemble([delta]) == assemble([delta, Delta()])


def test_deltas_may_come_one_after_the_other() -> None:
    deltas = [
        Delta(reasoning="h", logprobs=LOGPROBS),
        Delta("a", "m", calls=[CallDelta(3, "i", "f", "{"), CallDelta(1, "j", "g", "[]")]),
        Delta("b", finish="length", usage=USAGE),
        Delta(calls=[CallDelta(3, "other", "other", "}")]),
    ]
    assembler = Assembler()
    assert assembler.answer() == Answer("", "", "stop", None, [], None)
    for delta in deltas:
        assembler.add([delta])
    calls = [CallDelta(1, "j", "g", "[]"), CallDelta(3, "i", "f", "{}")]
    assert assembler.answer() == assemble(deltas) == Answer("ab", "hm", "length", USAGE, calls, LOGPROBS)
    assert (assembler.text_length, assembler.logprob_count) == (8, 3)


def test_the_given_logprobs_are_not_changed() -> None:
    first = Delta("a", logprobs=[*LOGPROBS])
    assembler = Assembler()
    for _ in range(3):
        assembler.add([first])
    assert first.logprobs == LOGPROBS
    assert assembler.answer().logprobs == LOGPROBS * 3


@pytest.mark.parametrize("part", ["arguments", "logprobs"])
def test_work_grows_with_the_number_of_deltas_and_not_with_its_square(part: str) -> None:
    """Arguments and logprobs used to be copied with each delta: 20,000 of them took 0.8 s, 100,000 half a minute."""
    few, factor = 2000, 10
    delta = Delta(calls=[CallDelta(0, arguments="x" * 8)]) if part == "arguments" else Delta("a", logprobs=LOGPROBS)

    def assembled(count: int) -> None:
        assembler = Assembler()
        for _ in range(count):
            assembler.add([delta])
        answer = assembler.answer()
        assert len(answer.calls[0].arguments if part == "arguments" else answer.logprobs or ()) in (count, 8 * count)

    assert_at_most(2 * factor, lambda: assembled(factor * few), yardstick=lambda: assembled(few))
