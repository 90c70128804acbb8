"""What the client gets: the same shape whichever backend serves, as OpenAI's own library reads it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from gateway.views import Answer, Delta, StreamView, Usage, assemble, render_answer

CREATED = 1_795_000_000
USAGE = Usage(7, 3)
STREAM = [Delta("Hel"), Delta("lo"), Delta(finish="stop"), Delta(usage=USAGE)]


def view(wants_usage: bool = False, model: str = "standard") -> StreamView:
    return StreamView("chatcmpl-1", CREATED, model, wants_usage)


def events(body: bytes) -> list[Any]:
    """The documents of a stream; each is one `data:` line and a blank one."""
    parts = body.split(b"\n\n")
    assert parts.pop() == b""
    assert all(part.startswith(b"data: ") and b"\n" not in part for part in parts)
    return [json.loads(part[6:]) for part in parts]


def rendered(deltas: list[Delta], wants_usage: bool = False) -> list[Any]:
    stream = view(wants_usage)
    return events(stream.opening() + b"".join(map(stream.render, deltas)))


def deltas_of(chunks: list[Any]) -> list[Any]:
    return [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]


def test_stream_is_role_then_deltas_then_finish() -> None:
    chunks = rendered(STREAM)
    assert deltas_of(chunks) == [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert all(chunk["object"] == "chat.completion.chunk" for chunk in chunks)
    assert {(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks} == {("chatcmpl-1", CREATED, "standard")}


def test_usage_comes_last_in_a_chunk_without_choices_and_only_if_asked_for() -> None:
    *rest, last = rendered(STREAM, wants_usage=True)
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert all(chunk["usage"] is None for chunk in rest)
    assert not any("usage" in chunk for chunk in rendered(STREAM))


def test_stream_ends_with_done() -> None:
    assert view().done() == b"data: [DONE]\n\n"


def test_beat_adds_nothing() -> None:
    (chunk,) = events(view().beat())
    assert chunk["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": None}]


def test_empty_delta_is_not_sent() -> None:
    assert view().render(Delta()) == b""


def test_reasoning_goes_under_both_names() -> None:
    (chunk,) = events(view().render(Delta(reasoning="hm")))
    assert chunk["choices"][0]["delta"] == {"reasoning": "hm", "reasoning_content": "hm"}


def test_content_and_finish_of_one_event_are_two_chunks() -> None:
    """Ollama before 0.32.6 puts both into one."""
    chunks = events(view().render(Delta("end", finish="length")))
    assert deltas_of(chunks) == [{"content": "end"}, {}]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None, "length"]


@pytest.mark.parametrize("finish", ["stop", "length", "content_filter", "tool_calls"])
def test_openais_types_read_every_chunk(finish: Any) -> None:
    deltas = [Delta("a", "b"), Delta(finish=finish), Delta(usage=USAGE)]
    for chunk in [*rendered(deltas, wants_usage=True), *events(view().beat())]:
        ChatCompletionChunk.model_validate(chunk, strict=True)


@given(st.text(max_size=40), st.text(max_size=40), st.text(min_size=1, max_size=20))
def test_any_text_comes_through_unchanged(content: str, reasoning: str, model: str) -> None:
    stream = view(model=model)
    body = stream.render(Delta(content, reasoning, "stop"))
    found = deltas_of(events(body))
    assert "".join(delta.get("content", "") for delta in found) == content
    assert "".join(delta.get("reasoning", "") for delta in found) == reasoning
    assert all(chunk["model"] == model for chunk in events(body))
    answer = json.loads(render_answer("chatcmpl-1", CREATED, model, Answer(content, reasoning, "stop", None)))
    message = answer["choices"][0]["message"]
    assert (message["content"], message.get("reasoning", ""), answer["model"]) == (content, reasoning, model)


def test_plain_answer_is_read_by_openais_types() -> None:
    body = render_answer("chatcmpl-1", CREATED, "standard", Answer("Hello", "", "length", USAGE))
    answer = ChatCompletion.model_validate_json(body, strict=True)
    assert (answer.id, answer.model, answer.created) == ("chatcmpl-1", "standard", CREATED)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Hello", "length")
    assert answer.usage is not None
    assert answer.usage.total_tokens == 10
    assert "reasoning" not in json.loads(body)["choices"][0]["message"]


def test_plain_answer_without_counts_says_so() -> None:
    assert json.loads(render_answer("i", CREATED, "m", Answer("", "", "stop", None)))["usage"] is None


def test_pieces_make_the_answer() -> None:
    assert assemble([Delta(reasoning="h"), Delta("a", "m"), Delta("b"), Delta(finish="length"), Delta(usage=USAGE)]) == Answer(
        "ab", "hm", "length", USAGE
    )
