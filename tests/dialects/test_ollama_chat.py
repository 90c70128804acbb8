"""Answers in the form of Ollama's own API."""

import json
import re
from typing import Any

import pytest

from gateway.chat.answer import (
    MAX_ARGUMENTS,
    Answer,
    CallDelta,
    ChosenLogprob,
    Delta,
    TimedUsage,
    Timings,
    TokenLogprob,
    Usage,
)
from gateway.dialects.ollama_chat import (
    GenerateErrors,
    GenerateForm,
    LineForm,
    LineRenderer,
    OllamaChat,
    OllamaErrors,
    OllamaGenerate,
)
from gateway.errors import InvalidRequest, ModelNotFound, QueueFull, UpstreamError

CREATED = 1_790_000_000
USAGE = Usage(7, 3)
LOGPROBS = [ChosenLogprob("a", -0.5, [97])]
COUNTS = ["total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"]


def clock() -> Timings:
    return Timings(1.5, 0.25, 0.5, 0.75)


def lines(body: bytes) -> list[dict[str, Any]]:
    assert body.endswith(b"\n")
    return [json.loads(line) for line in body.splitlines()]


def renderer(form: type[LineForm] = LineForm) -> LineRenderer:
    return form("standard", True).stream("1", CREATED)


def streamed(deltas: list[Delta], form: type[LineForm] = LineForm) -> list[dict[str, Any]]:
    stream = renderer(form)
    return lines(b"".join([stream.opening(), *map(stream.render, deltas), stream.end(clock)]))


def test_a_stream_has_ollamas_fields_in_their_order() -> None:
    first, second, last = streamed([Delta("Hel"), Delta("lo"), Delta(finish="stop"), Delta(usage=USAGE)])
    assert list(first) == ["model", "created_at", "message", "done"]
    assert first["message"] == {"role": "assistant", "content": "Hel"}
    assert second["message"]["content"] == "lo"
    assert list(last) == ["model", "created_at", "message", "done", "done_reason", *COUNTS]
    assert (last["message"], last["done"], last["done_reason"]) == ({"role": "assistant", "content": ""}, True, "stop")
    assert [last[name] for name in COUNTS] == [1_500_000_000, 250_000_000, 7, 500_000_000, 3, 750_000_000]
    assert not first["done"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", first["created_at"])


def test_spliced_text_equals_rendered_text() -> None:
    stream = renderer()
    assert stream.splice([b"a\\n", b"b"]) == stream.render(Delta("a\n")) + stream.render(Delta("b"))
    before, after = stream.around_text
    assert before + b"a" + after == stream.render(Delta("a"))


def test_generate_writes_the_response_beside_the_model() -> None:
    first, last = streamed([Delta("Hello"), Delta(finish="length"), Delta(usage=USAGE)], GenerateForm)
    assert list(first) == ["model", "created_at", "response", "done"]
    assert (first["response"], last["response"], last["done_reason"]) == ("Hello", "", "length")


def test_thoughts_come_as_thinking() -> None:
    first, second, _ = streamed([Delta(reasoning="hm"), Delta("so"), Delta(finish="stop")])
    assert first["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
    assert second["message"] == {"role": "assistant", "content": "so"}
    plain = json.loads(
        GenerateForm("m", False).answer("1", CREATED, Answer("so", "hm", "stop", USAGE, [], None), clock)
    )
    assert (plain["response"], plain["thinking"]) == ("so", "hm")


def test_tool_calls_come_whole_with_their_arguments_as_objects() -> None:
    pieces = [
        Delta(calls=[CallDelta(0, "call_1", "f")]),
        Delta(calls=[CallDelta(0, arguments='{"b": 1,\n "a"')]),
        Delta(calls=[CallDelta(0, arguments=': "x"}'), CallDelta(1, "call_2", "g")]),
        Delta(finish="tool_calls"),
    ]
    called, last = streamed(pieces)
    assert called["message"]["tool_calls"] == [
        {"id": "call_1", "function": {"index": 0, "name": "f", "arguments": {"b": 1, "a": "x"}}},
        {"id": "call_2", "function": {"index": 1, "name": "g", "arguments": {}}},
    ]
    assert (called["done"], last["done_reason"]) == (False, "stop")


def test_a_call_that_was_cut_off_is_left_out() -> None:
    cut = [CallDelta(0, "call_1", "f", '{"a": 1}'), CallDelta(1, "call_2", "g", '{"a": ')]
    plain = json.loads(LineForm("m", False).answer("1", CREATED, Answer("", "", "length", USAGE, cut, None), clock))
    assert [call["function"]["name"] for call in plain["message"]["tool_calls"]] == ["f"]
    assert plain["done_reason"] == "length"


def test_line_ends_of_unicode_are_escaped() -> None:
    text = "a\u2028b\u2029c\u0085d"
    stream = renderer()
    body = stream.render(Delta(text)) + stream.render(
        Delta(calls=[CallDelta(0, "call_1", "f", json.dumps({"a": text}, ensure_ascii=False))], finish="stop")
    )
    assert len(body.decode().splitlines()) == 2
    first, second = lines(body)
    assert first["message"]["content"] == text
    assert second["message"]["tool_calls"][0]["function"]["arguments"] == {"a": text}


def test_a_plain_answer_has_the_fields_of_a_last_line() -> None:
    body = LineForm("m", False).answer("1", CREATED, Answer("Hello", "", "stop", USAGE, [], LOGPROBS), clock)
    plain = json.loads(body)
    assert list(plain) == ["model", "created_at", "message", "done", "done_reason", "logprobs", *COUNTS]
    assert plain["logprobs"] == [{"token": "a", "logprob": -0.5, "bytes": [97]}]


def test_log_probabilities_lack_what_is_empty_as_at_ollama() -> None:
    alternatives = [TokenLogprob("b", -1.0, [98]), TokenLogprob("\u2028", -2.0)]
    logprobs = [ChosenLogprob("a", -0.5, [], alternatives), ChosenLogprob("c", -3.0)]
    (line,) = lines(renderer().render(Delta("ac", logprobs=logprobs)))
    assert [list(token) for token in line["logprobs"]] == [["token", "logprob", "top_logprobs"], ["token", "logprob"]]
    assert line["logprobs"][0]["top_logprobs"] == [
        {"token": "b", "logprob": -1.0, "bytes": [98]},
        {"token": "\u2028", "logprob": -2.0},
    ]


def test_the_last_line_has_its_own_time() -> None:
    first, last = streamed([Delta("a"), Delta(finish="stop")])
    assert first["created_at"] == "2026-09-21T14:13:20.000000Z"
    assert last["created_at"] == "2026-09-21T14:13:21.500000Z"


def counts(usage: Usage, times: Timings) -> dict[str, int]:
    body = LineForm("m", False).answer("1", CREATED, Answer("a", "", "stop", usage, [], None), lambda: times)
    answer = json.loads(body)
    return {name: answer[name] for name in COUNTS}


def test_the_engines_own_durations_take_precedence() -> None:
    """Of the time before the first token, the load is what the engine calls so."""
    found = counts(TimedUsage(7, 3, 0.25, 0.125, 0.5), Timings(2.0, 0.5, 1.0, 0.375))
    assert list(found.values()) == [2_000_000_000, 750_000_000, 7, 125_000_000, 3, 500_000_000]


@pytest.mark.parametrize("usage", [USAGE, TimedUsage(7, 3, 0.5, 0.5, 0.75), TimedUsage(7, 3, 0.0, 0.0, 5.0)])
@pytest.mark.parametrize("times", [Timings(1.0, 0.0, 1.0, 0.0), Timings(0.0, 0.0, 0.0, 0.0), Timings(2.0, 0.5, 1, 0.5)])
def test_no_duration_is_zero_and_the_total_covers_its_parts(usage: Usage, times: Timings) -> None:
    """Programs compute tokens a second from them; an answer may arrive as one piece."""
    found = counts(usage, times)
    assert all(value > 0 for value in found.values())
    parts = found["load_duration"] + found["prompt_eval_duration"] + found["eval_duration"]
    assert found["total_duration"] >= parts


def test_the_time_of_an_answer_in_one_piece_is_that_of_its_tokens() -> None:
    assert counts(USAGE, Timings(1.0, 0.25, 0.75, 0.0))["eval_duration"] == 750_000_000


def test_unknown_counts_are_left_out() -> None:
    (last,) = streamed([Delta(finish="stop")])
    assert "eval_count" not in last
    assert "prompt_eval_count" not in last


def test_a_keepalive_is_a_line_without_content() -> None:
    (line,) = lines(renderer().keepalive())
    assert line["message"] == {"role": "assistant", "content": ""}
    assert not line["done"]


def test_errors_have_ollamas_form_before_and_within_a_stream() -> None:
    error = UpstreamError("stream_error")
    assert lines(renderer().error(error)) == [{"error": error.message}]
    errors = OllamaErrors()
    assert json.loads(errors.error_body(error)) == {"error": error.message}
    assert errors.error_status(ModelNotFound("no")) == 404
    assert json.loads(errors.error_body(ModelNotFound("No.", model="x"))) == {"error": "model 'x' not found. No."}
    assert len(errors.error_body(ModelNotFound("No.", model="x" * 10_000))) < 400
    assert errors.error_lines(QueueFull("full", retry_after=3)) == b"retry-after: 3\r\n"


@pytest.mark.parametrize(
    ("form", "message", "expected"),
    [
        (OllamaErrors(), "'messages[2].content[1].image_url.url' is bad", "'messages[2].images[1]' is bad"),
        (GenerateErrors(), "'messages[1].content[0].image_url.url' is bad", "'images[0]' is bad"),
        (OllamaErrors(), "'response_format.json_schema.schema' is bad", "'format' is bad"),
    ],
)
def test_errors_name_the_fields_of_ollamas_api(form: OllamaErrors, message: str, expected: str) -> None:
    assert json.loads(form.error_body(InvalidRequest(message))) == {"error": expected}


@pytest.mark.parametrize(
    ("dialect", "fields"),
    [(OllamaChat(), {"messages": []}), (OllamaGenerate(), {"prompt": ""})],
    ids=["chat", "generate"],
)
@pytest.mark.parametrize(("keep_alive", "reason"), [("5m", "load"), (0, "unload")])
def test_a_request_without_content_is_answered_with_its_reason(
    dialect: OllamaChat | OllamaGenerate, fields: dict[str, Any], keep_alive: Any, reason: str
) -> None:
    call, _ = dialect.parse(json.dumps({"model": "m", "keep_alive": keep_alive, **fields}).encode(), 1 << 20)
    assert (call.action, call.form.is_stream) == (reason, False)
    body = json.loads(call.form.answer("1", CREATED, Answer("", "", "stop", None, [], None), clock))
    assert (body["done"], body["done_reason"]) == (True, reason)
    assert "total_duration" not in body


def test_stream_does_not_keep_tool_calls_without_end() -> None:
    """The calls are one line at the end, so the gateway keeps them."""
    lines = renderer()
    lines.render(Delta(calls=[CallDelta(0, "a", "f", "x" * MAX_ARGUMENTS)]))
    with pytest.raises(UpstreamError) as caught:
        lines.render(Delta(calls=[CallDelta(0, arguments="x")]))
    assert caught.value.reason == "too_large"
