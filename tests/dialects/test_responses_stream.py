"""Long streams of OpenAI's Responses API: what is kept, and that nothing is rendered in one long step."""

import pytest

from gateway.chat.answer import MAX_LOGPROBS, MAX_TEXT, CallDelta, ChosenLogprob, Delta, TokenLogprob, Usage
from gateway.dialects.json_body import completed
from gateway.dialects.long_answers import SLICE, STEP
from gateway.dialects.responses_stream import MAX_ITEMS, SENT_AT_ONCE
from gateway.errors import UpstreamError
from tests.dialects.test_openai_responses import call, clock, events, streamed

USAGE = Usage(7, 3)


@pytest.mark.parametrize(
    "deltas",
    [
        [Delta("x" * MAX_TEXT), Delta("x")],
        [Delta(calls=[CallDelta(0, "a", "f", "x" * MAX_TEXT)]), Delta("x")],
        [Delta("x", logprobs=[ChosenLogprob("x", -1)] * MAX_LOGPROBS), Delta("x", logprobs=[ChosenLogprob("x", -1)])],
        [Delta(text, thought) for _ in range(MAX_ITEMS // 2) for text, thought in (("x", ""), ("", "x"))]
        + [Delta("x")],
    ],
    ids=["text", "arguments", "log probabilities", "items"],
)
def test_a_stream_that_would_have_to_be_kept_without_end_is_an_error(deltas: list[Delta]) -> None:
    """The last events repeat the whole answer, so the gateway keeps it."""
    renderer = call(stream=True).form.stream("1", 1)
    for delta in deltas[:-1]:
        renderer.render(delta)
    with pytest.raises(UpstreamError) as caught:
        renderer.render(deltas[-1])
    assert caught.value.reason == "too_large"
    assert b"response.failed" in renderer.error(caught.value)


LOGPROB = ChosenLogprob("\u2028", -1.5, [226, 128, 168], [TokenLogprob("b", -2.5)])


@pytest.mark.parametrize("last", [Delta(finish="stop"), Delta(calls=[CallDelta(0, "id", "f", "{}" * 400)])])
@pytest.mark.parametrize("is_cut", [False, True])
def test_a_long_stream_has_the_events_of_a_short_one(
    last: Delta, is_cut: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    deltas = [Delta("", "thought\u2029" * 600), *[Delta("\u2028", logprobs=[LOGPROB] * 2)] * 600, last]
    deltas += [Delta(finish="length" if is_cut else None, usage=USAGE)]
    for name in ("LONG_LOGPROBS", "LONG_TEXT"):
        monkeypatch.setattr(f"gateway.dialects.responses_stream.{name}", 10**9)
    short = streamed(*deltas)
    for name, value in (("LONG_LOGPROBS", 0), ("LONG_TEXT", 0)):
        monkeypatch.setattr(f"gateway.dialects.responses_stream.{name}", value)
    assert streamed(*deltas) == short
    stream = call(stream=True).form.stream("1", 10)
    found = [stream.opening(), *map(stream.render, deltas)]
    steps = stream.end_steps(clock)
    assert steps is not None
    assert events(b"".join([*found, *completed(steps)])) == short


def test_the_end_of_a_short_stream_has_no_steps() -> None:
    stream = call(stream=True).form.stream("1", 10)
    stream.render(Delta("x", logprobs=[LOGPROB]))
    assert stream.end_steps(clock) is None


@pytest.mark.parametrize(
    ("delta", "count", "step"),
    [
        (Delta("x", logprobs=[LOGPROB] * 50), MAX_LOGPROBS // 100, 4 * STEP),
        (Delta("x" * 3000), MAX_TEXT // 3000, 2 * SLICE),
        (Delta("", "x" * 3000), MAX_TEXT // 3000, 2 * SLICE),
    ],
    ids=["log probabilities", "text", "thoughts"],
)
def test_no_step_of_the_end_of_a_long_stream_is_long(delta: Delta, count: int, step: int) -> None:
    """Its events repeat the log probabilities four times: 70 MB, which took 100 to 250 ms in one step."""
    stream = call(stream=True).form.stream("1", 10)
    for _ in range(count):
        stream.render(delta)
    steps = stream.end_steps(clock)
    assert steps is not None
    turns, parts = 0, None
    while parts is None:
        try:
            next(steps)
            turns += 1
        except StopIteration as end:
            parts = end.value
    assert turns > sum(map(len, parts)) / step
    assert max(map(len, parts)) < 2 * SLICE


LONG = [Delta("x" * 2000, logprobs=[LOGPROB] * 50)] * 300
"""A message whose events have 3 MB each."""


@pytest.mark.parametrize("last", [Delta("", "a thought"), Delta(calls=[CallDelta(0, "id", "f", "{}")])])
def test_an_item_that_ends_within_the_stream_is_sent_with_the_deltas_that_follow(
    last: Delta, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its events repeat all of it three times, which took 80 ms and more in one step."""
    deltas = [*LONG, last, *[Delta("", "more")] * 20, Delta(finish="stop", usage=USAGE)]
    stream = call(stream=True).form.stream("1", 10)
    found = [stream.opening(), *map(stream.render, deltas)]
    behind = found[1 + len(LONG) :]
    assert max(map(len, behind)) <= SENT_AT_ONCE + 2 * STEP
    assert min(map(len, behind)) >= SENT_AT_ONCE
    steps = stream.end_steps(clock)
    assert steps is not None
    shown = events(b"".join([*found, *completed(steps)]))
    for name in ("LONG_LOGPROBS", "LONG_TEXT"):
        monkeypatch.setattr(f"gateway.dialects.responses_stream.{name}", 10**9)
    assert shown == streamed(*deltas)


@pytest.mark.parametrize("count", [1, 3, 500])
def test_a_keepalive_behind_a_long_item_is_a_part_of_it(count: int) -> None:
    stream = call(stream=True).form.stream("1", 10)
    deltas = [*LONG, Delta("", "a thought")]
    found = [stream.opening(), *map(stream.render, deltas), *(stream.keepalive() for _ in range(count))]
    assert all(found)
    shown = events(b"".join([*found, stream.render(Delta("", "more")), stream.end(clock)]))
    assert [event["sequence_number"] for event in shown] == list(range(len(shown)))
    kept_alive = [event["type"] for event in shown[2:]].count("response.in_progress")
    assert (kept_alive > 0) is (count == 500), "once nothing waits, it is an event of its own"


def test_deltas_pass_at_once_again_when_a_long_item_has_been_sent() -> None:
    stream = call(stream=True).form.stream("1", 10)
    for delta in [*LONG, *[Delta("", "more")] * 500]:
        stream.render(delta)
    (event,) = events(stream.render(Delta("", "last")))
    assert (event["type"], event["delta"]) == ("response.reasoning_text.delta", "last")


@pytest.mark.parametrize("count", [0, 1, 2, 50, 500])
def test_a_stream_that_fails_behind_a_long_item_ends_with_whole_events(count: int) -> None:
    stream = call(stream=True).form.stream("1", 10)
    found = [stream.opening(), *map(stream.render, [*LONG, *[Delta("", "more")] * count])]
    shown = events(b"".join([*found, stream.error(UpstreamError("stream_error"))]))
    assert [event["type"] for event in shown[-2:]] == ["error", "response.failed"]
