import json
from typing import Any

import pytest

from gateway.bench.answers import OllamaReader, OpenAIReader, error_code


def chunk(delta: Any, finish: str | None = None) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]}).encode() + b"\n\n"


def read(*parts: bytes) -> OpenAIReader:
    """Feed the parts at the times 1, 2, 3 …"""
    reader = OpenAIReader(stream=True, keeps_text=True)
    for number, part in enumerate(parts, 1):
        reader.feed(part, float(number))
    reader.close()
    return reader


def test_the_first_token_is_neither_a_role_nor_a_keep_alive() -> None:
    """A gateway commits a silent stream with a role chunk and sends empty deltas until the engine starts."""
    reader = read(
        chunk({"role": "assistant", "content": ""}), chunk({}), b": ping\n\n", chunk({"content": "a"}, "stop")
    )
    assert reader.first == 4.0


@pytest.mark.parametrize(
    "delta",
    [
        {"content": "a"},
        {"reasoning": "a"},
        {"reasoning_content": "a"},
        {"tool_calls": [{"index": 0}]},
        {"content": ""},
        {"role": "assistant", "content": "a"},
    ],
)
def test_every_kind_of_generated_token_is_a_piece(delta: dict[str, Any]) -> None:
    reader = read(chunk({"role": "assistant", "content": ""}), chunk(delta), chunk(delta), chunk({}, "stop"))
    assert (reader.first, reader.gaps) == (2.0, [1.0])


def test_the_finish_ends_the_latency_and_is_no_gap() -> None:
    reader = read(chunk({"content": "a"}), chunk({"content": "b"}), chunk({"content": ""}, "stop"), b"data: [DONE]\n\n")
    assert (reader.gaps, reader.last, reader.finish, reader.error) == ([1.0], 3.0, "stop", "")


def test_the_usage_chunk_counts_tokens() -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    reader = read(
        chunk({"content": "a"}, "stop"), b"data: %b\n\n" % json.dumps({"choices": [], "usage": usage}).encode()
    )
    assert (reader.prompt_tokens, reader.completion_tokens, reader.cached_tokens) == (9, 2, 4)
    assert reader.last == 1.0


def test_a_stream_may_be_split_anywhere() -> None:
    whole = chunk({"content": "가"}) + chunk({"content": "나"}, "stop") + b"data: [DONE]\n\n"
    for place in range(1, len(whole)):
        reader = read(whole[:place], whole[place:])
        assert (reader.text, reader.error, len(reader.gaps)) == ("가나", "", 1)


def test_lines_may_end_with_carriage_returns() -> None:
    reader = read(chunk({"content": "a"}, "stop").replace(b"\n", b"\r\n"))
    assert (reader.text, reader.error) == ("a", "")


def test_an_ollama_that_ends_without_done_is_cut() -> None:
    reader = OllamaReader(stream=True, keeps_text=False)
    reader.feed(b'{"message":{"content":"a"},"done":false}\n', 1.0)
    reader.close()
    assert reader.error == "cut"


def test_an_ollama_tells_tokens_and_load_time() -> None:
    reader = OllamaReader(stream=True, keeps_text=True)
    reader.feed(b'{"message":{"thinking":"t"},"done":false}\n{"message":{"content":"a"},"done":false}\n', 1.0)
    reader.feed(
        b'{"message":{"content":""},"done":true,"done_reason":"stop","prompt_eval_count":5,"eval_count":2,'
        b'"load_duration":1500000000}\n',
        2.0,
    )
    reader.close()
    assert (reader.first, reader.last, reader.gaps, reader.text) == (1.0, 2.0, [0.0], "a")
    assert (reader.prompt_tokens, reader.completion_tokens, reader.load_seconds, reader.error) == (5, 2, 1.5, "")


def test_an_ollama_that_fails_in_mid_stream_is_an_error() -> None:
    reader = OllamaReader(stream=True, keeps_text=False)
    reader.feed(b'{"message":{"content":"a"},"done":false}\n{"error":"unexpected EOF"}\n', 1.0)
    reader.close()
    assert reader.error == "stream_error"


@pytest.mark.parametrize(
    "body", [None, [], {}, {"error": "text"}, {"error": {"code": 500}}, {"error": {"code": "A b"}}]
)
def test_what_is_not_a_plain_word_is_no_code(body: Any) -> None:
    assert error_code(body) == ""


@pytest.mark.parametrize("stream", [True, False])
def test_a_web_page_is_no_answer(stream: bool) -> None:
    reader = OpenAIReader(stream=stream, keeps_text=False)
    reader.feed(b"<html>\n<p>welcome</p>\n</html>", 1.0)
    reader.close()
    assert reader.error == "invalid_answer"


@pytest.mark.parametrize(
    "event",
    [
        b'{"choices":["x"]}',
        b'{"choices":{"0":{}}}',
        b'{"choices":[{"delta":"text"}]}',
        b'{"choices":[],"usage":"none"}',
        b'{"choices":[],"usage":{"prompt_tokens_details":"none"}}',
    ],
)
def test_fields_of_another_kind_make_an_answer_invalid(event: bytes) -> None:
    reader = OpenAIReader(stream=True, keeps_text=False)
    reader.feed(b"data: " + event + b"\n\ndata: [DONE]\n\n", 1.0)
    reader.close()
    assert reader.error == "invalid_answer"


@pytest.mark.parametrize("body", [b'{"choices":["x"]}', b'{"choices":[{}],"usage":7}'])
def test_a_plain_answer_with_fields_of_another_kind_is_invalid(body: bytes) -> None:
    reader = OpenAIReader(stream=False, keeps_text=True)
    reader.feed(body, 1.0)
    reader.close()
    assert reader.error == "invalid_answer"


@pytest.mark.parametrize("count", [b'"7"', b"7.5", b"-7", b"null"])
def test_a_count_that_is_no_number_of_tokens_is_not_seen(count: bytes) -> None:
    reader = OpenAIReader(stream=True, keeps_text=False)
    usage = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":' + count + b"}}"
    reader.feed(
        b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: ' + usage + b"\n\n", 1.0
    )
    reader.close()
    assert (reader.error, reader.prompt_tokens, reader.completion_tokens) == ("", 3, None)
