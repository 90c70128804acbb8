"""Tests of reading OpenAI-compatible answers, including every recorded one."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import CachedUsage, Delta, Usage, assemble
from gateway.engines.engine import MAX_ANSWER, MAX_ESCAPES, MAX_PLAIN_ANSWER, MAX_VALUES
from gateway.engines.openai import OpenAi
from gateway.engines.openai_response import OpenAiReader, usage_of
from gateway.errors import UpstreamError
from tests.engines.recorded import CHATS, body_of, recorded_text, recording_id, unfold
from tests.golden import Recording, load

ENGINE = OpenAi()


def events_of(recording: Recording) -> list[Any]:
    return [event for event in unfold(recording) if not isinstance(event, str)]


STREAMS = [recording for recording in CHATS if recording.is_stream and recording.path == "/v1/chat/completions"]
# When Ollama's /v1 gives up a stream (endless equal pieces), it looks complete but has no finish
# reason.
GIVEN_UP = [
    one
    for one in STREAMS
    if not any(choice["finish_reason"] for event in events_of(one) for choice in event["choices"])
]
PLAIN = [
    recording
    for recording in CHATS
    if not recording.is_stream and recording.status == 200 and recording.path == "/v1/chat/completions"
]


def read(body: bytes, size: int | None = None) -> list[Delta]:
    reader = ENGINE.reader()
    pieces = [body] if size is None else [body[start : start + size] for start in range(0, len(body), size)]
    deltas = [delta for piece in pieces if not reader.done for delta in reader.feed(piece)]
    if not reader.done:
        deltas += reader.end()
    assert reader.done or deltas[-1].finish or deltas[-1].usage
    return deltas


def chunk(
    content: str | None = None,
    finish: str | None = None,
    *,
    delta: dict[str, Any] | None = None,
    logprobs: Any = None,
    **fields: Any,
) -> bytes:
    rendered = delta or ({} if content is None else {"content": content})
    choice = {"index": 0, "delta": rendered, "logprobs": logprobs, "finish_reason": finish}
    return b"data: %b\n\n" % json.dumps({"choices": [choice], **fields}).encode()


DONE = b"data: [DONE]\n\n"


# Recordings


@pytest.mark.parametrize("recording", [one for one in STREAMS if one not in GIVEN_UP], ids=recording_id)
@pytest.mark.parametrize("size", [None, 1, 777])
def test_recorded_stream_is_read_completely(recording: Recording, size: int | None) -> None:
    answer = assemble(read(body_of(recording), size))
    events = events_of(recording)
    finish = next(choice["finish_reason"] for event in events for choice in event["choices"] if choice["finish_reason"])
    usage = next((event["usage"] for event in events if event.get("usage")), None)
    assert (answer.content, answer.reasoning, answer.finish) == (
        recorded_text(recording, "content"),
        recorded_text(recording, "reasoning"),
        finish,
    )
    assert answer.usage == (usage and Usage(usage["prompt_tokens"], usage["completion_tokens"]))


@pytest.mark.parametrize("recording", GIVEN_UP, ids=recording_id)
def test_recorded_stream_without_a_finish_reason_is_an_error(recording: Recording) -> None:
    reader = ENGINE.reader()
    assert "".join(delta.content for delta in reader.feed(body_of(recording))) == recorded_text(recording, "content")
    with pytest.raises(UpstreamError) as caught:
        reader.end()
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize("recording", PLAIN, ids=recording_id)
def test_recorded_answer_is_read_completely(recording: Recording) -> None:
    body = json.dumps(recording.body).encode()
    choice, usage = recording.body["choices"][0], recording.body["usage"]
    if choice["finish_reason"] is None:  # Ollama gave it up
        with pytest.raises(UpstreamError):
            ENGINE.parse_answer(body)
        return
    read = ENGINE.parse_answer(body)
    message = choice["message"]
    assert (read.content, read.reasoning, read.finish) == (
        message["content"] or "",
        message.get("reasoning") or "",
        choice["finish_reason"],
    )
    assert read.usage == Usage(usage["prompt_tokens"], usage["completion_tokens"])
    calls = [(call["function"]["name"], call["function"]["arguments"]) for call in message.get("tool_calls") or ()]
    assert [(call.name, call.arguments) for call in read.calls or ()] == calls
    logprobs = (choice.get("logprobs") or {}).get("content") or []
    assert msgspec.to_builtins(read.logprobs or []) == logprobs


@pytest.mark.parametrize("server", ["ollama-0.33", "ollama-0.24"])
def test_recorded_streamed_tool_call_is_read(server: str) -> None:
    answer = assemble(read(body_of(load(server)["chat_tool_call_stream"])))
    assert [(call.index, call.name, call.arguments) for call in answer.calls] == [
        (0, "get_weather", '{"city":"Seoul"}')
    ]
    assert (answer.content, answer.finish) == ("", "tool_calls")


@pytest.mark.parametrize("server", ["vllm-0.32.0", "ollama-0.33", "ollama-0.24"])
def test_recorded_logprobs_are_read_with_their_bytes_and_alternatives(server: str) -> None:
    read = ENGINE.parse_answer(json.dumps(load(server)["chat_logprobs"].body).encode())
    assert read.logprobs is not None
    assert len(read.logprobs) == 6
    assert all(
        len(chosen.top_logprobs) == 2 and chosen.bytes == list(chosen.token.encode()) for chosen in read.logprobs
    )


# Streamed tool calls and logprobs


def test_tool_call_in_pieces_is_combined() -> None:
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


def test_calls_without_an_index_are_numbered() -> None:
    calls = [{"function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    assert [
        (call.index, call.name) for call in ENGINE.reader().feed(chunk(delta={"tool_calls": calls}))[0].calls or ()
    ] == [(0, "f"), (1, "g")]


def test_logprobs_stay_with_their_tokens() -> None:
    entries = [
        {"token": text, "logprob": -0.5, "bytes": list(text.encode()), "top_logprobs": []} for text in ("a", "b")
    ]
    body = b"".join(chunk(entry["token"], logprobs={"content": [entry]}) for entry in entries)
    deltas = ENGINE.reader().feed(body)
    assert [(delta.content, [chosen.token for chosen in delta.logprobs or ()]) for delta in deltas] == [
        ("a", ["a"]),
        ("b", ["b"]),
    ]


def test_logprobs_of_a_token_without_text_are_not_lost() -> None:
    """A character of several bytes arrives as several tokens; only the last has text."""
    entries = [{"token": "", "logprob": -0.5, "bytes": [byte]} for byte in "é".encode()]
    body = (
        chunk("", logprobs={"content": entries[:1]})
        + chunk("é", logprobs={"content": entries[1:]})
        + chunk(finish="stop")
        + DONE
    )
    answer = assemble(read(body))
    assert answer.logprobs is not None
    assert b"".join(bytes(chosen.bytes or ()) for chosen in answer.logprobs).decode() == answer.content == "é"


def test_fast_path_is_not_used_with_logprobs() -> None:
    entry = {"content": [{"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}]}
    reader = ENGINE.reader()
    event = chunk("a", logprobs=entry)
    reader.feed(event)
    assert reader.plain_tokens(event) is None


@given(
    st.lists(
        st.binary(max_size=40)
        | st.text(max_size=20).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1].encode()),
        max_size=20,
    )
)
def test_remembered_texts_do_not_change_the_result(insides: list[bytes]) -> None:
    known, fresh = ENGINE.reader(), [OpenAiReader() for _ in insides]
    event = chunk("a").replace(b": ", b":").replace(b", ", b",")
    for reader in (known, *fresh):
        reader.feed(event)
    assert known.plain_tokens(event) == [b"a"]
    before, after = event.split(b'a"', 1)
    events = [b'%b%b"%b' % (before, inside, after) for inside in insides]
    wanted = [reader.plain_tokens(other) for reader, other in zip(fresh, events, strict=True)]
    for _ in range(2):
        assert [known.plain_tokens(other) for other in events] == wanted


@pytest.mark.parametrize("text", ["\u2028", "a\u2029", "\u0085b", "漢\u2028"])
def test_fast_path_is_not_used_for_what_a_dialect_escapes(text: str) -> None:
    reader = ENGINE.reader()
    event = chunk("a").replace(b": ", b":").replace(b", ", b",")
    reader.feed(event)
    odd, ordinary = (event.replace(b'"a"', b'"%b"' % inside.encode()) for inside in (text, "漢\u2027\u0084"))
    assert reader.plain_tokens(odd) is None
    assert reader.plain_tokens(ordinary) == ["漢\u2027\u0084".encode()]
    assert reader.feed(odd)[0].content == text


# End of a stream


def test_stream_may_end_without_done_after_a_finish_reason() -> None:
    assert assemble(read(chunk("a") + chunk(finish="stop"))).content == "a"


@pytest.mark.parametrize("body", [b"", chunk("a"), chunk("a") + DONE, DONE, b": ping\n\n"])
def test_stream_without_a_finish_reason_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="failed while generating") as caught:
        read(body)
    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    "error", [{"message": "EngineCore at /opt/x died", "type": "InternalServerError", "code": 500}, "it broke"]
)
def test_error_in_the_stream_ends_it_in_the_gateways_words(error: Any) -> None:
    reader = ENGINE.reader()
    reader.feed(chunk("a"))
    with pytest.raises(UpstreamError) as caught:
        reader.feed(b"data: %b\n\n" % json.dumps({"error": error}).encode() + DONE)
    assert caught.value.reason == "stream_error"
    assert caught.value.message == "The model backend failed while generating the response."


def test_abort_by_the_engine_is_an_error() -> None:
    with pytest.raises(UpstreamError) as caught:
        read(chunk("a", "abort") + DONE)
    assert caught.value.reason == "aborted"


@pytest.mark.parametrize(
    ("engine_reason", "expected"),
    [("repetition", "stop"), ("tool_calls", "tool_calls"), ("content_filter", "content_filter"), ("eos", "stop")],
)
def test_finish_reason_is_one_of_openais(engine_reason: str, expected: str) -> None:
    assert assemble(read(chunk("a", engine_reason) + DONE)).finish == expected


def test_bytes_after_the_end_are_ignored() -> None:
    assert assemble(read(chunk("a") + chunk(finish="stop") + DONE + chunk("b") + b"data: rubbish\n\n")).content == "a"


def test_usage_on_every_chunk_is_reported_once_and_last() -> None:
    usages = [
        {"usage": {"prompt_tokens": 3, "completion_tokens": number, "total_tokens": 3 + number}} for number in (1, 2)
    ]
    deltas = read(chunk("a", **usages[0]) + chunk("b", "stop", **usages[1]) + DONE)
    assert [delta.usage for delta in deltas] == [None, None, Usage(3, 2)]


def test_role_chunk_is_not_output() -> None:
    """It may precede the first token by a long time, and must not count as the first token."""
    role = json.dumps(
        {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
    ).encode()
    assert ENGINE.reader().feed(b"data: " + role + b"\n\n") == []


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_is_read_under_both_names(field: str) -> None:
    event = json.dumps({"choices": [{"index": 0, "delta": {field: "hm"}, "finish_reason": None}]}).encode()
    assert ENGINE.reader().feed(b"data: " + event + b"\n\n")[0].reasoning == "hm"


@pytest.mark.parametrize(
    "line",
    [
        b"data: {",
        b"data: [1]",
        b'data: {"choices":7}',
        b'data: {"choices":[{"delta":{"content":7}}]}',
        b'{"error":"x"}',
    ],
)
@pytest.mark.parametrize("is_finished", [False, True])
def test_event_that_cannot_be_read_is_a_failure_after_what_precedes_it(line: bytes, is_finished: bool) -> None:
    """What the event said is missing, so the answer may not look complete."""
    reader = ENGINE.reader()
    before = chunk("a", "stop" if is_finished else None)
    assert assemble(reader.feed(before + line + b"\n\n" + chunk("b", "stop") + DONE)).content == "a"
    assert isinstance(reader.failure, UpstreamError)
    assert (reader.failure.reason, reader.done) == ("malformed", False)


@pytest.mark.parametrize(
    "line",
    [
        b"event: x",
        b": y",
        b"id: 1",
        b"retry: 1",
        b"data:",
        b"data: ",
        b"data: {}",
        b'data: {"choices":null}',
        b'data: {"choices":[{"index":0,"delta":null}]}',
        b'data: {"choices":[{"index":0}]}',
    ],
)
def test_event_without_content_is_passed_over(line: bytes) -> None:
    assert assemble(read(chunk("a") + line + b"\n\n" + chunk("b", "stop") + DONE)).content == "ab"


@pytest.mark.parametrize(
    ("escaped", "content"),
    [(r"\ud83d", "\ufffd"), (r"\ude00x", "\ufffdx"), (r"\ud83d\ude00", "\U0001f600"), (r"\\ud83d", r"\ud83d")],
)
def test_half_pair_becomes_a_replacement_character(escaped: str, content: str) -> None:
    event = b'{"choices":[{"index":0,"%b":{"content":"' + escaped.encode() + b'"},"finish_reason":"stop"}]}'
    assert assemble(read(chunk("a") + b"data: " + event % b"delta" + b"\n\n" + DONE)).content == "a" + content
    assert ENGINE.parse_answer(event % b"message").content == content


def test_calls_of_a_plain_answer_are_numbered_by_their_place() -> None:
    calls = [{"index": 0, "id": name, "function": {"name": name, "arguments": "{}"}} for name in ("f", "g")]
    body = {"choices": [{"message": {"content": None, "tool_calls": calls}, "finish_reason": "tool_calls"}]}
    found = ENGINE.parse_answer(json.dumps(body).encode()).calls
    assert [(call.index, call.name) for call in found or ()] == [(0, "f"), (1, "g")]


def test_endless_line_is_an_error() -> None:
    reader = ENGINE.reader()
    with pytest.raises(UpstreamError) as caught:
        [reader.feed(b"data: " + b"x" * 100_000) for _ in range(20)]
    assert caught.value.reason == "line_too_long"


@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 40))
def test_any_text_is_read_unchanged_however_the_body_is_split(texts: list[str], size: int) -> None:
    body = b"".join(map(chunk, texts)) + chunk(finish="stop") + DONE
    assert assemble(read(body, size)).content == "".join(texts)


# Plain answers


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"choices":[]}',
        b'{"choices":[{"message":{"content":"a"},"finish_reason":null}]}',
        b"<html>",
    ],
)
def test_body_that_is_not_an_answer_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="invalid response"):
        ENGINE.parse_answer(body)


@pytest.mark.parametrize(
    "fields",
    [
        b'"content":"a"},"logprobs":{"content":[%b]}' % b",".join([b'{"token":"","logprob":0}'] * 30_000),
        b'"tool_calls":[%b]}' % b",".join([b"{}"] * 30_000),
        b'"content":"a"},"finish_reason":"stop"},{"message":{}},' + b",".join([b'{"message":{'] * 30_000),
        b'"content":"a","x":[%b0]}' % (b"0," * MAX_VALUES),
        b'"content":"%b"}' % (b"\\n" * (MAX_ESCAPES + 1)),
    ],
    ids=["logprobs", "calls", "choices", "values", "escapes"],
)
def test_plain_answer_of_too_many_objects_is_refused_before_it_is_parsed(fields: bytes) -> None:
    with pytest.raises(UpstreamError) as raised:
        ENGINE.parse_answer(b'{"choices":[{"message":{' + fields + b',"finish_reason":"stop"}]}')
    assert raised.value.reason == "too_large"


def test_longest_plain_answer_may_have_as_many_alternatives_as_can_be_requested() -> None:
    """1,024 tokens are asked for as a plain answer, and 20 alternatives to each."""
    entry = b'{"token":" word","logprob":-12.345678901234567,"bytes":[32,119,111,114,100]'
    token = entry + b',"top_logprobs":[' + b",".join([entry + b"}"] * 20) + b"]}"
    body = (
        b'{"choices":[{"message":{"content":"a"},"logprobs":{"content":[%b]},"finish_reason":"length"}]}'
        % b",".join([token] * 1024)
    )
    assert len(body) < MAX_PLAIN_ANSWER // 2
    assert len(ENGINE.parse_answer(body).logprobs or ()) == 1024


def test_answers_may_exceed_ten_megabytes() -> None:
    assert MAX_ANSWER > 10_000_000


@pytest.mark.parametrize(
    ("reason", "expected"), [('"END"', "END"), ("151645", None), ("null", None), ("{}", None), ('"\\ud83d"', "\ufffd")]
)
def test_only_a_text_as_stop_reason_is_a_stop_sequence(reason: str, expected: str | None) -> None:
    """vLLM names the token's id if that was not the usual end of an answer."""
    ending = '"finish_reason":"stop","stop_reason":' + reason
    plain = '{"choices":[{"message":{"content":"x"},%s}]}' % ending  # noqa: UP031  # braces
    assert OpenAi().parse_answer(plain.encode()).stop_sequence == expected
    streamed = 'data: {"choices":[{"delta":{"content":"x"},%s}]}\n\ndata: [DONE]\n\n' % ending  # noqa: UP031
    assert assemble(read(streamed.encode())).stop_sequence == expected


@pytest.mark.parametrize(
    ("details", "cached"),
    [({"cached_tokens": 2}, 2), ({"cached_tokens": 9}, None), ({"cached_tokens": "x"}, None), (None, None)],
)
def test_cached_tokens_of_the_prompt_are_read_if_they_are_possible(details: object, cached: int | None) -> None:
    """vLLM reports them with `--enable-prompt-tokens-details`."""
    text = json.dumps({"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": details}).encode()
    assert usage_of(text) == (Usage(3, 1) if cached is None else CachedUsage(3, 1, cached))
