"""Kind `openai`: what is sent, and every recorded answer read to what it says."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.base import MAX_ANSWER, ModelFacts
from gateway.backends.openai import OpenAi, OpenAiReading
from gateway.errors import ContextLengthExceeded, InvalidRequest, UpstreamError
from gateway.grammars import portable
from gateway.protocol import Chat, SchemaFormat
from gateway.views import Delta, Usage, assemble
from tests.backends.recorded import CHATS, body_of, name, said, unfolded
from tests.fakes.chats import USER, WEATHER, called, chat, named, schema_format, tool
from tests.golden import Recording, load

DIALECT = OpenAi()
UNKNOWN = ModelFacts()


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


def chunk(
    content: str | None = None, finish: str | None = None, *, delta: dict[str, Any] | None = None, logprobs: Any = None, **fields: Any
) -> bytes:
    said = delta or ({} if content is None else {"content": content})
    choice = {"index": 0, "delta": said, "logprobs": logprobs, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"choices": [choice], **fields}).encode()


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
    read = DIALECT.parse_answer(body)
    message = choice["message"]
    assert (read.content, read.reasoning, read.finish) == (message["content"] or "", message.get("reasoning") or "", choice["finish_reason"])
    assert read.usage == Usage(usage["prompt_tokens"], usage["completion_tokens"])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    assert [(call.name, call.arguments) for call in read.calls or ()] == calls
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    assert msgspec.to_builtins(read.logprobs or []) == logprobs


@pytest.mark.parametrize("server", ["ollama-0.33", "ollama-0.24"])
def test_recorded_tool_call_of_a_stream_is_read(server: str) -> None:
    answer = assemble(read(body_of(load(server)["chat_tool_call_stream"])))
    assert [(call.index, call.name, call.arguments) for call in answer.calls] == [(0, "get_weather", '{"city":"Seoul"}')]
    assert (answer.content, answer.finish) == ("", "tool_calls")


@pytest.mark.parametrize("server", ["vllm-0.32.0", "ollama-0.33", "ollama-0.24"])
def test_recorded_logprobs_are_read_with_their_bytes_and_alternatives(server: str) -> None:
    read = DIALECT.parse_answer(json.dumps(load(server)["chat_logprobs"].body).encode())
    assert read.logprobs is not None
    assert len(read.logprobs) == 6
    assert all(len(chosen.top_logprobs) == 2 and chosen.bytes == list(chosen.token.encode()) for chosen in read.logprobs)


# Tool calls and logprobs of a stream


def test_tool_call_that_comes_in_pieces_is_one() -> None:
    pieces: list[dict[str, Any]] = [
        {"index": 0, "id": "a", "type": "function", "function": {"name": "f", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"a"'}},
        {"index": 0, "function": {"arguments": ":1}"}},
        {"index": 1, "id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    body = b"".join(chunk(delta={"tool_calls": [piece]}) for piece in pieces) + chunk(finish="tool_calls") + DONE
    answer = assemble(read(body))
    assert [(call.index, call.name, call.arguments) for call in answer.calls] == [(0, "f", '{"a":1}'), (1, "g", "{}")]
    assert answer.finish == "tool_calls"


def test_calls_without_an_index_are_counted() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    assert [(call.index, call.name) for call in DIALECT.reading().feed(chunk(delta={"tool_calls": calls}))[0].calls or ()] == [(0, "f"), (1, "g")]


def test_logprobs_stand_at_the_tokens_that_they_are_of() -> None:
    entries = [{"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []} for text in ("a", "b")]
    body = b"".join(chunk(entry["token"], logprobs={"content": [entry]}) for entry in entries)
    deltas = DIALECT.reading().feed(body)
    assert [(delta.content, [chosen.token for chosen in delta.logprobs or ()]) for delta in deltas] == [("a", ["a"]), ("b", ["b"])]


def test_logprobs_of_a_token_without_text_are_not_lost() -> None:
    """A letter of several bytes comes in several tokens; only the last of them has a text."""
    entries = [{"token": "", "logprob": -0.5, "bytes": [byte]} for byte in "é".encode()]
    body = chunk("", logprobs={"content": entries[:1]}) + chunk("é", logprobs={"content": entries[1:]}) + chunk(finish="stop") + DONE
    answer = assemble(read(body))
    assert answer.logprobs is not None
    assert b"".join(bytes(chosen.bytes or ()) for chosen in answer.logprobs).decode() == answer.content == "é"


def test_short_way_is_not_taken_where_there_are_logprobs() -> None:
    entry = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
    reading = DIALECT.reading()
    event = chunk("a", logprobs=entry)
    reading.feed(event)
    assert reading.texts(event) is None


@given(st.lists(st.binary(max_size=40) | st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1].encode()), max_size=20))
def test_what_is_known_to_be_sound_is_judged_as_if_it_were_not(insides: list[bytes]) -> None:
    known, fresh = DIALECT.reading(), [OpenAiReading() for _ in insides]
    event = chunk("a").replace(b": ", b":").replace(b", ", b",")
    for reading in (known, *fresh):
        reading.feed(event)
    assert known.texts(event) == [b"a"]
    before, after = event.split(b'a"', 1)
    events = [b'%b%b"%b' % (before, inside, after) for inside in insides]
    wanted = [reading.texts(other) for reading, other in zip(fresh, events, strict=True)]
    for _ in range(2):
        assert [known.texts(other) for other in events] == wanted


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


def rendered(facts: ModelFacts = UNKNOWN, dialect: OpenAi = DIALECT, **fields: Any) -> dict[str, Any]:
    asked = chat(**fields)
    sent: dict[str, Any] = json.loads(dialect.render(asked, "the-model", facts, bool(asked.stream)))
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
    engines = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "chat_template_kwargs": {"enable_thinking": True}, "think": True}
    sent = rendered(**fields, **engines, keep_alive="1h", user="u", n=1, tools=[], logit_bias={"1": 2})
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


def test_tools_are_sent_with_their_choice_and_nothing_else_of_the_clients() -> None:
    sent = rendered(tools=[tool(description="d", strict=False, x=1) | {"x": 1}], tool_choice="auto", parallel_tool_calls=False)
    function = {"name": "get_weather", "description": "d", "parameters": WEATHER, "strict": False}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("auto", False)


@pytest.mark.parametrize(("choice", "expected"), [("required", "required"), (named("get_weather"), named("get_weather")), (None, None)])
def test_choice_of_tool_is_sent(choice: Any, expected: Any) -> None:
    assert rendered(tools=[tool()], tool_choice=choice).get("tool_choice") == expected


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": [tool()], "tool_choice": "none"}, {"tool_choice": "none"}, {"tool_choice": "auto"}])
def test_no_tools_are_none_at_all(fields: dict[str, Any]) -> None:
    """vLLM refuses an empty list."""
    assert set(rendered(**fields, parallel_tool_calls=True)) == {"model", "messages"}


def test_logprobs_are_asked_for() -> None:
    assert {key: value for key, value in rendered(logprobs=True, top_logprobs=3).items() if "log" in key} == {"logprobs": True, "top_logprobs": 3}
    assert not [key for key in rendered(logprobs=False) if "log" in key]


@pytest.mark.parametrize("wanted", [{"type": "json_object"}, schema_format(), schema_format(strict=True, description="d")])
def test_format_of_the_answer_is_sent(wanted: dict[str, Any]) -> None:
    assert rendered(response_format=wanted)["response_format"] == wanted


def test_plain_format_is_what_there_is_without() -> None:
    assert "response_format" not in rendered(response_format={"type": "text"})


@pytest.mark.parametrize(
    ("fields", "sent"), [({"think": False}, "none"), ({"reasoning_effort": "xhigh"}, "high"), ({"think": True}, None), ({}, None)]
)
def test_effort_is_sent_by_openais_name(fields: dict[str, Any], sent: str | None) -> None:
    assert rendered(**fields).get("reasoning_effort") == sent


def test_calls_and_results_of_earlier_turns_are_sent() -> None:
    turns = [
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [called(arguments="")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
    ]
    sent = rendered(messages=[*USER, *turns])["messages"]
    assert sent[1]["content"] == ""
    assert sent[1]["reasoning"] == "hm"
    assert sent[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == "call_1"
    assert sent[2] == {"role": "tool", "content": "12 C", "tool_call_id": "call_1"}


def test_turns_whose_content_is_a_list_keep_their_calls_and_ids() -> None:
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [
        {"role": "assistant", "content": text, "reasoning": "hm", "tool_calls": [called()]},
        {"role": "tool", "tool_call_id": "call_1", "content": text},
    ]
    sent = rendered(messages=[*USER, *turns])["messages"]
    assert (sent[1]["content"], sent[1].get("reasoning")) == ("a\nb", "hm")
    assert [call["id"] for call in sent[1].get("tool_calls", [])] == ["call_1"]
    assert sent[2] == {"role": "tool", "content": "a\nb", "tool_call_id": "call_1"}


@pytest.mark.parametrize(("limit", "sent"), [(4095, 4095), (4096, None), (9000, None), (None, None)])
def test_limit_beyond_the_context_is_the_rest_of_the_context(limit: int | None, sent: int | None) -> None:
    assert rendered(ModelFacts(4096), max_tokens=limit).get("max_tokens") == sent


def test_limit_is_sent_as_it_is_where_the_context_is_not_known() -> None:
    assert rendered(max_tokens=9000)["max_tokens"] == 9000


def test_limit_that_does_not_fit_beside_the_prompt_is_left_out_when_the_backend_refuses_it() -> None:
    asked = chat(max_tokens=4000, max_completion_tokens=4000)
    amended = DIALECT.amended(asked, ContextLengthExceeded(4096))
    assert amended is not None
    assert (amended.token_limit, amended.messages) == (None, asked.messages)
    assert DIALECT.amended(amended, ContextLengthExceeded(4096)) is None
    assert DIALECT.amended(asked, InvalidRequest("x")) is None


# Models


def test_models_are_read_with_their_context() -> None:
    found = DIALECT.models(b'{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b"}]}')
    assert found == {"a": ModelFacts(4096), "b": ModelFacts()}


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"[]", b'{"data":7}'])
def test_what_is_no_list_of_models_is_told_apart_from_an_empty_one(body: bytes) -> None:
    assert DIALECT.models(body) is None
    assert DIALECT.models(b'{"data":[]}') == DIALECT.models(b'{"data":null}') == {}


# Schemas that the server refuses


UNABLE = InvalidRequest("x", param="response_format")
ODD = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}, "uniqueItems": True}


def test_schema_that_the_server_refuses_is_asked_for_once_in_the_form_that_others_get() -> None:
    asked = chat(response_format=schema_format(ODD), tools=[tool(parameters=ODD)], tool_choice="required")
    amended = DIALECT.amended(asked, UNABLE)
    assert isinstance(amended, Chat)
    assert isinstance(amended.response_format, SchemaFormat)
    assert amended.response_format.json_schema.schema == portable(ODD)
    assert [each.function.parameters for each in amended.tools or ()] == [portable(ODD)]
    assert DIALECT.amended(amended, UNABLE) is None


def test_schema_that_is_in_that_form_is_not_asked_for_again() -> None:
    assert DIALECT.amended(chat(response_format=schema_format(), tools=[tool()]), UNABLE) is None
    assert DIALECT.amended(chat(), UNABLE) is None


def test_schema_that_harms_the_server_is_never_sent() -> None:
    harmful = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a{5000}$"}}}
    sent = json.loads(DIALECT.render(chat(response_format=schema_format(harmful), tools=[tool(parameters=harmful)]), "m", ModelFacts(), True))
    assert sent["response_format"]["json_schema"]["schema"] == sent["tools"][0]["function"]["parameters"] == portable(harmful)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_turn_of_plain_text_is_sent_as_that_of_one_part(role: str) -> None:
    turns = [{"role": role, "content": content} for content in ("hi", [{"type": "text", "text": "hi"}])]
    plain, parted = (DIALECT.request(chat(messages=[turn, *USER]), "m", UNKNOWN, False).messages for turn in turns)
    assert plain == parted
