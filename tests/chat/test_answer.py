"""Tests of combining deltas into an answer."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import Answer, CallDelta, ChosenLogprob, Delta, TokenLogprob, Usage, assemble

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
