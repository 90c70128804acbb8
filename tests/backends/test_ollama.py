"""Kind `ollama`: what is sent to `/api/chat`, and every recorded answer read to what it says."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backends.ollama import REPETITION, Ollama
from gateway.errors import ContextLengthExceeded, UpstreamError
from gateway.protocol import parse
from gateway.views import Delta, Usage, assemble
from tests.backends.recorded import CHATS, body_of, name, said, unfolded
from tests.golden import Recording, load

DIALECT = Ollama()
STREAMS = [recording for recording in CHATS if recording.is_stream and recording.path == "/api/chat"]
WHOLE = [recording for recording in STREAMS if unfolded(recording)[-1]["done"]]
GIVEN_UP = [recording for recording in STREAMS if recording not in WHOLE]
IMAGE = "data:image/png;base64,AAAA"


def read(body: bytes, size: int | None = None) -> list[Delta]:
    reading = DIALECT.reading()
    pieces = [body] if size is None else [body[start : start + size] for start in range(0, len(body), size)]
    deltas = [delta for piece in pieces if not reading.over for delta in reading.feed(piece)]
    if not reading.over:
        deltas += reading.end()
    assert reading.over
    assert reading.malformed == 0
    return deltas


def line(content: str = "", done: bool = False, **fields: Any) -> bytes:
    return json.dumps({"model": "m", "message": {"role": "assistant", "content": content}, "done": done, **fields}).encode() + b"\n"


END = line(done=True, done_reason="stop", prompt_eval_count=7, eval_count=3)


# Recorded


@pytest.mark.parametrize("recording", WHOLE, ids=name)
@pytest.mark.parametrize("size", [None, 1, 777])
def test_recorded_stream_is_read_to_what_it_says(recording: Recording, size: int | None) -> None:
    answer = assemble(read(body_of(recording), size))
    last = unfolded(recording)[-1]
    assert (answer.content, answer.reasoning) == (said(recording, "content"), said(recording, "thinking"))
    assert answer.finish == last["done_reason"]
    assert answer.usage == Usage(last["prompt_eval_count"], last["eval_count"])


@pytest.mark.parametrize("recording", GIVEN_UP, ids=name)
@pytest.mark.parametrize("size", [None, 777])
def test_recorded_stream_that_repeats_itself_ends_with_a_stop(recording: Recording, size: int | None) -> None:
    """Ollama ends it without a last line: we count its pieces ourselves."""
    assert "repetition" in recording.case
    answer = assemble(read(body_of(recording), size))
    assert (answer.content, answer.finish) == (said(recording, "content"), "stop")
    assert answer.usage == Usage(0, len(unfolded(recording)))


# The end of a stream


@pytest.mark.parametrize(("count", "is_whole"), [(REPETITION, True), (REPETITION - 1, False)])
def test_thirty_equal_pieces_may_be_the_end(count: int, is_whole: bool) -> None:
    """Compared without the white space around them, as Ollama does."""
    body = line("other") + b"".join(line(" a" if number % 2 else "a ") for number in range(count))
    if is_whole:
        assert assemble(read(body)).usage == Usage(0, count + 1)
        return
    with pytest.raises(UpstreamError):
        read(body)


def test_equal_pieces_before_the_last_are_no_end() -> None:
    with pytest.raises(UpstreamError):
        read(line("a") * 40 + line("b"))


@pytest.mark.parametrize("body", [b"", b"\n", line("a"), line("a") + line("b")])
def test_end_without_done_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="failed while generating") as caught:
        read(body)
    assert caught.value.reason == "truncated"


def test_last_line_needs_no_line_end() -> None:
    assert assemble(read(line("a") + END.rstrip())).usage == Usage(7, 3)


def test_runner_that_dies_in_mid_stream_is_an_error_in_our_words() -> None:
    reading = DIALECT.reading()
    assert reading.feed(line("a")) == [Delta("a")]
    with pytest.raises(UpstreamError) as caught:
        reading.feed(b'{"error":"an error was encountered while running the model: unexpected EOF"}\n')
    assert caught.value.reason == "stream_error"
    assert caught.value.message == "The model backend failed while generating the response."


def test_clients_fault_that_shows_in_the_stream_stays_the_clients() -> None:
    with pytest.raises(ContextLengthExceeded):
        DIALECT.reading().feed(b'{"error":"the input length exceeds the context length"}\n')


@pytest.mark.parametrize(("theirs", "ours"), [("stop", "stop"), ("length", "length"), ("load", "stop"), (None, "stop")])
def test_finish_is_one_of_openais(theirs: str | None, ours: str) -> None:
    assert assemble(read(line("a") + line(done=True, done_reason=theirs))).finish == ours


def test_content_of_the_last_line_is_not_lost() -> None:
    assert assemble(read(line("a") + line("b", done=True, done_reason="stop"))).content == "ab"


def test_nothing_after_the_end_is_read() -> None:
    assert assemble(read(line("a") + END + line("b"))).content == "a"


def test_line_that_is_no_event_is_dropped_and_counted() -> None:
    reading = DIALECT.reading()
    deltas = reading.feed(b"{\n[]\n" + line("a") + b'{"message":7}\n' + END)
    assert (assemble(deltas).content, reading.malformed, reading.over) == ("a", 3, True)


def test_line_without_end_is_an_error() -> None:
    reading = DIALECT.reading()
    with pytest.raises(UpstreamError) as caught:
        [reading.feed(b"x" * 100_000) for _ in range(20)]
    assert caught.value.reason == "line_too_long"


@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 40))
def test_any_text_comes_through_however_it_is_cut(texts: list[str], size: int) -> None:
    assert assemble(read(b"".join(map(line, texts)) + END, size)).content == "".join(texts)


# Requests


def rendered(dialect: Ollama = DIALECT, **fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "Hello"}]} | fields).encode()
    sent: dict[str, Any] = json.loads(dialect.render(parse(body), "qwen3-vl:8b", True))
    return sent


def test_request_is_a_stream_that_is_not_cut_silently() -> None:
    assert rendered() == {
        "model": "qwen3-vl:8b",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "options": {},
        "truncate": False,
    }


def test_sampling_goes_into_the_options_by_ollamas_names() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 7, "presence_penalty": 1.0, "frequency_penalty": -1.0}
    sent = rendered(**fields, repetition_penalty=1.1, max_completion_tokens=9, stop="x")
    assert sent["options"] == fields | {"repeat_penalty": 1.1, "num_predict": 9, "stop": ["x"]}
    assert set(sent) == {"model", "messages", "stream", "options", "truncate"}


def test_clients_wish_for_ollamas_own_settings_is_not_sent() -> None:
    sent = rendered(keep_alive="24h", num_ctx=99, truncate=True, think=True, format="json", options={"num_gpu": 0}, raw=True)
    assert (sent["options"], sent["truncate"], set(sent)) == ({}, False, {"model", "messages", "stream", "options", "truncate"})


def test_operators_settings_are_sent() -> None:
    sent = rendered(Ollama(keep_alive=-1, num_ctx=8192, truncate=True))
    assert (sent["keep_alive"], sent["options"]) == (-1, {"num_ctx": 8192})
    assert "truncate" not in sent


def test_text_and_image_of_a_turn_are_one_message() -> None:
    """Ollama's own /v1 makes two turns of them."""
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What is it?"}]
    assert rendered(messages=[{"role": "user", "content": parts}])["messages"] == [{"role": "user", "content": "What is it?", "images": ["AAAA"]}]


def test_developer_speaks_as_the_system() -> None:
    """Qwen3-VL's renderer drops a role that it does not know."""
    assert rendered(messages=[{"role": "developer", "content": "x"}])["messages"][0]["role"] == "system"


# Models


@pytest.mark.parametrize("server", ["ollama-0.33", "ollama-0.24"])
def test_recorded_models_are_read_with_and_without_the_tag(server: str) -> None:
    recording = load(server)["api_tags"]
    found = DIALECT.models(json.dumps(recording.body).encode())
    assert found is not None
    assert {"llama", "llama:latest", "qwen3-vl", "qwen3-vl:latest"} <= set(found)
    lengths = {entry["name"]: (entry["details"] or {}).get("context_length") for entry in recording.body["models"]}
    assert {name: found[name] for name in lengths} == lengths


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"[]", b'{"models":7}'])
def test_what_is_no_list_of_models_is_told_apart_from_an_empty_one(body: bytes) -> None:
    assert DIALECT.models(body) is None
    assert DIALECT.models(b'{"models":[]}') == DIALECT.models(b'{"models":null}') == {}
