"""Tests of rendering answers: OpenAI's own library accepts them, whatever the backend.

Covers: gateway/dialects/dialect.py
"""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.chat.answer import Answer, CallDelta, ChosenLogprob, Delta, ReasoningField, Timings, TokenLogprob, Usage
from gateway.dialects.openai_chat import CompletionForm, StreamRenderer, with_reasoning_field

CREATED = 1_795_000_000
USAGE = Usage(7, 3)
CALLS = [CallDelta(0, "call_1", "get_weather", '{"city":"Oslo"}'), CallDelta(1, "call_2", "get_time", "{}")]
LOGPROBS = [
    ChosenLogprob(
        "Hel", -0.25, [72, 101, 108], [TokenLogprob("Hel", -0.25, [72, 101, 108]), TokenLogprob("é", -1.5, None)]
    )
]
STREAM = [Delta("Hel"), Delta("lo"), Delta(finish="stop"), Delta(usage=USAGE)]


def renderer(wants_usage: bool = False, model: str = "standard") -> StreamRenderer:
    return StreamRenderer("chatcmpl-1", CREATED, model, wants_usage)


def _rendered(model: str, answer: Answer) -> bytes:
    return CompletionForm(model, False, False).answer("1", CREATED, answer, no_time)


def no_time() -> Timings:
    return Timings(0, 0, 0, 0)


def plain(content: str = "", reasoning: str = "", usage: Usage | None = None, **more: Any) -> Any:
    """Return a whole answer as it is rendered, with finish reason `stop`."""
    fields: dict[str, Any] = {"finish": "stop", "calls": [], "logprobs": None} | more
    return json.loads(_rendered("standard", Answer(content, reasoning, usage=usage, **fields)))


def events(body: bytes) -> list[Any]:
    """Parse the events of a stream. Each is one `data:` line and a blank line."""
    parts = body.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part[6:]) for part in parts]


def rendered(deltas: list[Delta], wants_usage: bool = False) -> list[Any]:
    stream = renderer(wants_usage)
    return events(stream.opening() + b"".join(map(stream.render, deltas)))


def deltas_of(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def test_stream_consists_of_role_deltas_and_finish() -> None:
    chunks = rendered(STREAM)
    assert deltas_of(chunks) == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {
        ("chatcmpl-1", CREATED, "standard")
    }


def test_usage_is_the_last_chunk_and_only_sent_if_requested() -> None:
    *rest, last = rendered(STREAM, wants_usage=True)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert all(chunk["usage"] is None for chunk in rest)
    assert not any("usage" in chunk for chunk in rendered(STREAM))


def test_stream_ends_with_done() -> None:
    assert renderer().end(no_time) == b"data: [DONE]\n\n"


def test_keepalive_adds_nothing() -> None:
    (chunk,) = events(renderer().keepalive())
    assert chunk["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]


def test_empty_delta_is_not_sent() -> None:
    assert renderer().render(Delta()) == b""


FIELDS: list[tuple[ReasoningField, set[str]]] = [
    ("reasoning", {"reasoning"}),
    ("reasoning_content", {"reasoning_content"}),
    ("both", {"reasoning", "reasoning_content"}),
]


@pytest.mark.parametrize(("field", "names"), FIELDS)
def test_reasoning_has_the_names_that_the_operator_chose(field: ReasoningField, names: set[str]) -> None:
    form = with_reasoning_field(CompletionForm("standard", True, False), field)
    (chunk,) = events(form.stream("1", CREATED).render(Delta("", "hm")))
    assert chunk["choices"][0]["delta"] == dict.fromkeys(names, "hm")
    message = json.loads(form.answer("1", CREATED, Answer("a", "hm", "stop", USAGE, [], None), no_time))
    assert {name for name in message["choices"][0]["message"] if name.startswith("reasoning")} == names


def test_reasoning_has_the_name_that_both_engines_use_by_default() -> None:
    (chunk,) = events(renderer().render(Delta("", "hm")))
    assert chunk["choices"][0]["delta"] == {"reasoning": "hm"}


def test_content_and_finish_of_one_event_become_two_chunks() -> None:
    """Ollama before 0.32.6 sends both in one event."""
    chunks = events(renderer().render(Delta("end", finish="length")))
    assert deltas_of(chunks) == [{"content": "end"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter", "tool_calls"])
def test_openais_types_accept_every_chunk(finish: Any) -> None:
    deltas = [Delta("a", "b"), Delta(finish=finish), Delta(usage=USAGE)]
    for chunk in [*rendered(deltas, wants_usage=True), *events(renderer().keepalive())]:
        ChatCompletionChunk.model_validate(chunk, strict=True)


@given(st.text(max_size=40), st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_any_text_is_rendered_unchanged(content: str, reasoning: str, model: str) -> None:
    stream = renderer(model=model)
    body = stream.render(Delta(content, reasoning, "stop"))
    found = deltas_of(events(body))
    assert "".join(delta.get("content", "") for delta in found) == content
    assert "".join(delta.get("reasoning", "") for delta in found) == reasoning
    assert all(chunk["model"] == model for chunk in events(body))
    answer = json.loads(_rendered(model, Answer(content, reasoning, "stop", None, [], None)))
    message = answer["choices"][0]["message"]
    assert (message["content"], message.get("reasoning", ""), answer["model"]) == (content, reasoning, model)


def test_openais_types_accept_a_plain_answer() -> None:
    body = _rendered("standard", Answer("Hello", "", "length", USAGE, [], None))
    answer = ChatCompletion.model_validate_json(body, strict=True)
    assert (answer.id, answer.model, answer.created) == ("chatcmpl-1", "standard", CREATED)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    assert "reasoning" not in json.loads(body)["choices"][0]["message"]


def test_plain_answer_without_token_counts_has_null_usage() -> None:
    assert plain()["usage"] is None


# Tool calls


def test_call_starts_with_id_type_and_name_and_continues_with_arguments() -> None:
    first, second = events(
        renderer().render(Delta(calls=[CallDelta(1, "call_1", "f", "")]))
        + renderer().render(Delta(calls=[CallDelta(1, arguments='{"a"')]))
    )
    assert first["choices"][0]["delta"] == {
        "tool_calls": [{"index": 1, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]
    }
    assert second["choices"][0]["delta"] == {"tool_calls": [{"index": 1, "function": {"arguments": '{"a"'}}]}


def test_openais_types_accept_streamed_calls() -> None:
    chunks = rendered(
        [Delta("Let me see."), Delta(calls=CALLS), Delta(finish="tool_calls"), Delta(usage=USAGE)], wants_usage=True
    )
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None, None, None, None, "tool_calls"]
    assert [len(delta.get("tool_calls", ())) for delta in deltas_of(chunks)] == [
        0,
        0,
        1,
        1,
        0,
    ]
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)


def test_openais_types_accept_calls_of_a_plain_answer_with_null_content() -> None:
    answer = plain(calls=CALLS, finish="tool_calls")
    read = ChatCompletion.model_validate(answer, strict=True)
    assert read.choices[0].message.tool_calls is not None
    assert [call.model_dump() for call in read.choices[0].message.tool_calls] == [
        {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
        for call in CALLS
    ]
    assert answer["choices"][0]["message"]["content"] is None
    assert "index" not in answer["choices"][0]["message"]["tool_calls"][0]


def test_content_next_to_a_call_is_kept_and_answers_without_calls_lack_the_field() -> None:
    assert plain("Let me see.", calls=CALLS)["choices"][0]["message"]["content"] == "Let me see."
    message = plain()["choices"][0]["message"]
    assert (message["content"], "tool_calls" in message) == ("", False)


# Logprobs


def test_logprobs_have_openais_shape_streamed_and_plain() -> None:
    shape = {
        "token": "Hel",
        "logprob": -0.25,
        "bytes": [72, 101, 108],
        "top_logprobs": [
            {"token": "Hel", "logprob": -0.25, "bytes": [72, 101, 108]},
            {"token": "é", "logprob": -1.5, "bytes": None},
        ],
    }
    (chunk,) = events(renderer().render(Delta("Hel", logprobs=LOGPROBS)))
    answer = plain("Hel", logprobs=LOGPROBS)
    assert chunk["choices"][0]["logprobs"] == answer["choices"][0]["logprobs"] == {"content": [shape], "refusal": None}
    ChatCompletionChunk.model_validate(chunk, strict=True)
    ChatCompletion.model_validate(answer, strict=True)


def test_unrequested_logprobs_are_null() -> None:
    assert plain()["choices"][0]["logprobs"] is None
    assert all(chunk["choices"][0]["logprobs"] is None for chunk in rendered(STREAM))


def test_logprobs_without_text_or_next_to_a_finish_are_rendered() -> None:
    for delta in (
        Delta(logprobs=LOGPROBS),
        Delta(finish="stop", logprobs=LOGPROBS),
        Delta(usage=USAGE, logprobs=LOGPROBS),
    ):
        chunks = events(renderer(wants_usage=True).render(delta))
        assert chunks[0]["choices"][0]["logprobs"]["content"][0]["token"] == "Hel"


LINE_ENDS = "a\u2028b\u2029c\u0085d"


def test_nothing_in_a_stream_or_an_answer_is_a_line_end_to_anybody() -> None:
    """Clients that split lines by Unicode's rules would cut the event in two."""
    call = [CallDelta(0, "abcDEF123", LINE_ENDS), CallDelta(0, arguments=LINE_ENDS)]
    logprobs = [ChosenLogprob(LINE_ENDS, -1.0)]
    stream = renderer(model=LINE_ENDS)
    deltas = [Delta(LINE_ENDS), Delta("", LINE_ENDS), Delta(calls=call), Delta(LINE_ENDS, logprobs=logprobs)]
    for event in (stream.opening(), *map(stream.render, deltas)):
        assert event.decode().splitlines() == event.decode().split("\n")[:-1]
    assert events(stream.render(deltas[0]))[0]["choices"][0]["delta"]["content"] == LINE_ENDS
    whole = [CallDelta(0, "abcDEF123", LINE_ENDS, LINE_ENDS)]
    answer = _rendered(LINE_ENDS, Answer(LINE_ENDS, LINE_ENDS, "stop", USAGE, whole, logprobs))
    assert len(answer.decode().splitlines()) == 1


# Fast path


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5), st.booleans())
def test_spliced_texts_equal_rendered_chunks(texts: list[str], wants_usage: bool) -> None:
    insides = [json.dumps(text, ensure_ascii=False)[1:-1].encode() for text in texts]
    assert events(renderer(wants_usage).splice(insides)) == [
        {**chunk, "choices": [{**chunk["choices"][0], "delta": {"content": text}}]}
        for text, chunk in zip(texts, events(renderer(wants_usage).keepalive() * len(texts)), strict=True)
    ]
    before, after = renderer(wants_usage).around_text
    assert renderer(wants_usage).splice(insides) == b"".join(before + inside + after for inside in insides)
