"""Kind `openai`: what is sent, and every recorded answer read to what it says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.base import MAX_ANSWER
from gateway.backends.openai import OpenAi
from gateway.errors import UpstreamError
from gateway.protocol import parse
from gateway.views import Answer, Delta, Usage, assemble
from tests.backends.recorded import CHATS, body_of, name, said, unfolded
from tests.golden import Recording

DIALECT = OpenAi()


def events_of(recording: Recording) -> list[Any]:
    return [event for event in unfolded(recording) if not isinstance(event, str)]


STREAMS = [recording for recording in CHATS if recording.is_stream and recording.path == "/v1/chat/completions"]
# Ollama's /v1 ends a stream that it gives up (equal pieces without end) as if it were whole, but without a finish.
BROKEN_OFF = [one for one in STREAMS if not any(choice["finish_reason"] for event in events_of(one) for choice in event["choices"])]
PLAIN = [recording for recording in CHATS if not recording.is_stream and recording.status == 200 and recording.path == "/v1/chat/completions"]
IMAGE = "data:image/png;base64,AAAA"


def read(body: bytes, size: int | None = None) -> list[Delta]:
    reading = DIALECT.reading()
    pieces = [body] if size is None else [body[start : start + size] for start in range(0, len(body), size)]
    deltas = [delta for piece in pieces if not reading.over for delta in reading.feed(piece)]
    if not reading.over:
        deltas += reading.end()
    assert reading.over or deltas[-1].finish or deltas[-1].usage
    assert reading.malformed == 0
    return deltas


def chunk(content: str | None = None, finish: str | None = None, **fields: Any) -> bytes:
    delta = {} if content is None else {"content": content}
    return b"data: %b\n\n" % json.dumps({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **fields}).encode()


DONE = b"data: [DONE]\n\n"


# Recorded


@pytest.mark.parametrize("recording", [one for one in STREAMS if one not in BROKEN_OFF], ids=name)
@pytest.mark.parametrize("size", [None, 1, 777])
def test_recorded_stream_is_read_to_what_it_says(recording: Recording, size: int | None) -> None:
    answer = assemble(read(body_of(recording), size))
    events = events_of(recording)
    finish = next(choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"])
    usage = next((event["usage"] for event in events if event.get("usage")), None)
    assert (answer.content, answer.reasoning, answer.finish) == (said(recording, "content"), said(recording, "reasoning"), finish)
    assert answer.usage == (usage and Usage(usage["prompt_tokens"], usage["completion_tokens"]))


@pytest.mark.parametrize("recording", BROKEN_OFF, ids=name)
def test_recorded_stream_that_was_given_up_is_an_error(recording: Recording) -> None:
    reading = DIALECT.reading()
    assert "".join(delta.content for delta in reading.feed(body_of(recording))) == said(recording, "content")
    with pytest.raises(UpstreamError) as caught:
        reading.end()
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("recording", PLAIN, ids=name)
def test_recorded_answer_is_read_to_what_it_says(recording: Recording) -> None:
    body = json.dumps(recording.body).encode()
    choice, usage = recording.body["choices"][0], recording.body["usage"]
    if choice["finish_reason"] is None:  # given up by Ollama
        with pytest.raises(UpstreamError):
            DIALECT.parse_answer(body)
        return
    message = choice["message"]
    assert DIALECT.parse_answer(body) == Answer(
        message["content"] or "", message.get("reasoning") or "", choice["finish_reason"], Usage(usage["prompt_tokens"], usage["completion_tokens"])
    )


# The end of a stream


def test_stream_without_done_is_whole_after_its_finish() -> None:
    assert assemble(read(chunk("a") + chunk(finish="stop"))).content == "a"


@pytest.mark.parametrize("body", [b"", chunk("a"), chunk("a") + DONE, DONE, b": ping\n\n"])
def test_stream_without_a_finish_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="failed while generating") as caught:
        read(body)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("error", [{"message": "EngineCore at /opt/x died", "type": "InternalServerError", "code": 500}, "it broke"])
def test_error_in_the_stream_ends_it_in_our_words(error: Any) -> None:
    reading = DIALECT.reading()
    reading.feed(chunk("a"))
    with pytest.raises(UpstreamError) as caught:
        reading.feed(b"data: %b\n\n" % json.dumps({"error": error}).encode() + DONE)
    assert caught.value.reason == "stream_error"
    assert caught.value.message == "The model backend failed while generating the response."


def test_abort_of_the_engine_is_an_error() -> None:
    with pytest.raises(UpstreamError) as caught:
        read(chunk("a", "abort") + DONE)
    assert caught.value.reason == "aborted"


@pytest.mark.parametrize(
    ("theirs", "ours"), [("repetition", "stop"), ("tool_calls", "tool_calls"), ("content_filter", "content_filter"), ("eos", "stop")]
)
def test_finish_is_one_of_openais(theirs: str, ours: str) -> None:
    assert assemble(read(chunk("a", theirs) + DONE)).finish == ours


def test_nothing_after_the_end_is_read() -> None:
    assert assemble(read(chunk("a") + chunk(finish="stop") + DONE + chunk("b") + b"data: rubbish\n\n")).content == "a"


def test_usage_on_every_chunk_is_given_once_and_last() -> None:
    usages = [{"usage": {"prompt_tokens": 3, "completion_tokens": number, "total_tokens": 3 + number}} for number in (1, 2)]
    deltas = read(chunk("a", **usages[0]) + chunk("b", "stop", **usages[1]) + DONE)
    assert [delta.usage for delta in deltas] == [None, None, Usage(3, 2)]


def test_role_chunk_is_no_piece() -> None:
    """It may come long before the first token, which the time to first token must not be told by."""
    role = json.dumps({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}).encode()
    assert DIALECT.reading().feed(b"data: " + role + b"\n\n") == []


@pytest.mark.parametrize("name_of_it", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_both_names(name_of_it: str) -> None:
    event = json.dumps({"choices": [{"index": 0, "delta": {name_of_it: "hm"}, "finish_reason": None}]}).encode()
    assert DIALECT.reading().feed(b"data: " + event + b"\n\n")[0].reasoning == "hm"


def test_line_that_is_no_event_is_dropped_and_counted() -> None:
    reading = DIALECT.reading()
    deltas = reading.feed(b"data: {\n\n" + b"event: x\n: y\n" + chunk("a", "stop") + b"data: [1]\n\n" + DONE)
    assert (assemble(deltas).content, reading.malformed, reading.over) == ("a", 2, True)


def test_line_without_end_is_an_error() -> None:
    reading = DIALECT.reading()
    with pytest.raises(UpstreamError) as caught:
        [reading.feed(b"data: " + b"x" * 100_000) for _ in range(20)]
    assert caught.value.reason == "line_too_long"


@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 40))
def test_any_text_comes_through_however_it_is_cut(texts: list[str], size: int) -> None:
    body = b"".join(map(chunk, texts)) + chunk(finish="stop") + DONE
    assert assemble(read(body, size)).content == "".join(texts)


# A plain answer


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"{}", b'{"choices":[]}', b'{"choices":[{"message":{"content":"a"},"finish_reason":null}]}', b"<html>"]
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="invalid response"):
        DIALECT.parse_answer(body)


def test_answer_may_be_long() -> None:
    assert MAX_ANSWER > 10_000_000


# Requests


def rendered(**fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "Hello"}]} | fields).encode()
    chat = parse(body)
    sent: dict[str, Any] = json.loads(DIALECT.render(chat, "the-model", bool(chat.stream)))
    return sent


def test_only_what_was_asked_for_is_sent() -> None:
    assert rendered() == {"model": "the-model", "messages": [{"role": "user", "content": "Hello"}]}


def test_usage_is_always_asked_for_in_a_stream_and_never_without() -> None:
    assert rendered(stream=True)["stream_options"] == {"include_usage": True}
    assert rendered(stream=True, stream_options={"include_usage": False})["stream_options"] == {"include_usage": True}
    assert "stream_options" not in rendered(stream_options={"include_usage": True})


def test_either_name_of_the_token_limit_is_sent_as_max_tokens() -> None:
    assert rendered(max_completion_tokens=5)["max_tokens"] == 5
    assert "max_completion_tokens" not in rendered(max_completion_tokens=5)


def test_fields_of_openai_alone_are_sent() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "seed": 7, "presence_penalty": 1.0, "frequency_penalty": -1.0, "stop": ["x"]}
    sent = rendered(**fields, top_k=5, min_p=0.1, repetition_penalty=1.1, keep_alive="1h", user="u", n=1, tools=[])
    assert {key: value for key, value in sent.items() if key not in ("model", "messages")} == fields


def test_developer_speaks_as_the_system() -> None:
    assert rendered(messages=[{"role": "developer", "content": "x"}])["messages"] == [{"role": "system", "content": "x"}]


def test_parts_of_text_alone_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered(messages=[{"role": "user", "content": parts}])["messages"] == [{"role": "user", "content": "a\nb"}]


def test_parts_with_an_image_keep_their_order_and_nothing_else() -> None:
    parts = [{"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}, "x": 1}, {"type": "text", "text": "b"}]
    sent = rendered(messages=[{"role": "user", "content": parts}])["messages"]
    assert sent == [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "b"}]}]


# Models


def test_models_are_read_with_their_context() -> None:
    assert DIALECT.models(b'{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b"}]}') == {"a": 4096, "b": None}


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"[]", b'{"data":7}'])
def test_what_is_no_list_of_models_is_told_apart_from_an_empty_one(body: bytes) -> None:
    assert DIALECT.models(body) is None
    assert DIALECT.models(b'{"data":[]}') == DIALECT.models(b'{"data":null}') == {}
