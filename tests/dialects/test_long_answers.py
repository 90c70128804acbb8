"""Long plain answers: the steps give the bytes that one step gives, and each of them is short."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import (
    MAX_ARGUMENTS,
    MAX_CALLS,
    Answer,
    CallDelta,
    ChosenLogprob,
    Delta,
    Timings,
    TokenLogprob,
    Usage,
    assemble,
)
from gateway.dialects.anthropic_messages import MessageForm
from gateway.dialects.dialect import ChatForm
from gateway.dialects.json_body import completed
from gateway.dialects.long_answers import LOGPROBS_PER_SLICE, SLICE, Backlog, is_long, logprob_runs, text_slices
from gateway.dialects.ollama_chat import GenerateForm, LineForm
from gateway.dialects.openai_chat import CompletionForm
from gateway.dialects.openai_completions import TextForm
from gateway.dialects.openai_responses import ResponseForm
from gateway.errors import UpstreamError

FORMS: list[ChatForm] = [
    CompletionForm("m", False, wants_usage=False),
    CompletionForm("m", False, wants_usage=False, reasoning_field="both"),
    TextForm("m", False, wants_usage=False),
    ResponseForm("m", False, {}),
    MessageForm("m", False),
    LineForm("m", False),
    GenerateForm("m", False),
]
NAMES = [f"{type(form).__name__}{number}" for number, form in enumerate(FORMS)]
USAGE = Usage(3, 4)
ODD = 'a"\\\n\x01\u2028\u0085é\U0001f600'
LONG = ODD * 70_000


def clock() -> Timings:
    return Timings(1, 0, 0, 0)


def logprobs(count: int, alternatives: int = 0, raw: list[int] | None = None) -> list[ChosenLogprob]:
    others = [TokenLogprob(f"{ODD}{number}", -2.5) for number in range(alternatives)]
    return [ChosenLogprob(f"{ODD}{number}", -0.5, raw, others) for number in range(count)]


ANSWERS = {
    "nothing": Answer("", "", "stop", None, [], None),
    "short": Answer("a", "b", "length", USAGE, [CallDelta(0, "abc", "f", '{"a":1}')], logprobs(2, 1)),
    "no logprobs": Answer("a", "", "stop", USAGE, [], []),
    "text": Answer(LONG, "", "stop", USAGE, [], None),
    "reasoning": Answer("a", LONG, "stop", USAGE, [], None),
    "both": Answer(LONG, LONG[1:], "stop", USAGE, [], None),
    "calls": Answer(
        "", "", "tool_calls", USAGE, [CallDelta(n, "abc", "f", json.dumps({"a": ODD * 999})) for n in range(9)], None
    ),
    "logprobs": Answer("a", "", "stop", USAGE, [], logprobs(5000, 3, [97])),
    "one logprob after the other": Answer("a", "", "stop", USAGE, [], logprobs(LOGPROBS_PER_SLICE * 2)),
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_steps_render_what_one_step_renders(form: ChatForm, answer: Answer) -> None:
    parts = completed(form.answer_steps("abc", 5, answer, clock))
    assert json.loads(b"".join(parts)) == json.loads(form.answer("abc", 5, answer, clock))


@pytest.mark.parametrize("form", FORMS[:3], ids=NAMES[:3])
def test_steps_render_the_same_choices(form: Any) -> None:
    answers = [*ANSWERS.values(), None]
    parts = completed(form.choices_answer_steps("abc", 5, answers, USAGE))
    assert json.loads(b"".join(parts)) == json.loads(form.choices_answer("abc", 5, answers, USAGE))


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_no_slice_renders_more_than_its_share(form: ChatForm, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def watched(name: str) -> None:
        encode: Callable[[Any], bytes] = __import__("msgspec").json.encode

        def recorded(value: Any) -> bytes:
            lengths.append(len(value) if isinstance(value, str | list) else 0)
            return encode(value)

        monkeypatch.setattr(f"gateway.dialects.{name}", recorded)

    for name in ("json_text._encode", "long_answers.msgspec.json.encode"):
        watched(name)
    completed(form.answer_steps("abc", 5, ANSWERS["both"], clock))
    completed(form.answer_steps("abc", 5, ANSWERS["one logprob after the other"], clock))
    assert max(lengths) <= SLICE
    assert len(list(text_slices(LONG))) == -(-len(LONG) // SLICE)


def test_runs_of_logprobs_count_the_alternatives() -> None:
    everything = logprobs(5000, 3)
    runs = list(logprob_runs(everything))
    assert [one for run in runs for one in run] == everything
    assert {len(run) for run in runs[:-1]} == {LOGPROBS_PER_SLICE // 4}
    assert list(logprob_runs([])) == [[]]


def test_only_long_answers_need_steps() -> None:
    assert not is_long([ANSWERS["nothing"], ANSWERS["short"], None])
    for name in ("text", "reasoning", "logprobs"):
        assert is_long([None, ANSWERS[name]])
    assert is_long([Answer("x" * 3000, "", "stop", None, [], None)] * 100)


@pytest.mark.parametrize(
    "calls",
    [
        [CallDelta(number, "abc", "f", "{}") for number in range(MAX_CALLS + 1)],
        [CallDelta(number, "abc", "f", "[" * 11_000) for number in range(2)],
        [CallDelta(number, "abc", "f", "x" * (MAX_ARGUMENTS // 2 + 1)) for number in range(2)],
    ],
    ids=["too many", "too many brackets", "too long"],
)
def test_tool_calls_that_would_take_too_long_to_render_are_an_error(calls: list[CallDelta]) -> None:
    assert len(assemble([Delta(calls=calls[:1]), Delta("a")]).calls) == 1
    with pytest.raises(UpstreamError) as caught:
        assemble([Delta(calls=calls)])
    assert caught.value.reason == "too_large"


@given(
    st.lists(st.lists(st.sampled_from([b"", b"a", b"bb\n\n", b"c\n\nd\n\n", b"e" * 50]), max_size=6), max_size=5),
    st.lists(st.integers(1, 80), max_size=8),
)
def test_backlog_gives_everything_in_order_and_ends_after_whole_events(
    groups: list[list[bytes]], sizes: list[int]
) -> None:
    groups = [[*group, b"end\n\n"] for group in groups]
    whole = b"".join(b"".join(group) for group in groups)

    def filled() -> tuple[Backlog, bytes]:
        backlog = Backlog()
        for group in groups:
            backlog.add(iter(group))
        return backlog, b"".join(map(backlog.take, sizes))

    backlog, taken = filled()
    assert taken + b"".join(completed(backlog.take_all())) == whole
    backlog, taken = filled()
    cut = taken + backlog.cut()
    assert whole.startswith(cut)
    assert not cut or cut.endswith(b"\n\n")
    assert len(cut) == len(taken) or not taken.endswith(b"\n\n")
    assert backlog.take(1) == backlog.cut() == b""
