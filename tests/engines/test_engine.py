"""Reading lines of a streamed answer, and facts about models, for all engines."""

import msgspec
import orjson
import pytest

from gateway.chat.answer import Delta
from gateway.engines.engine import MAX_REFUSAL, LineReader, ModelFacts, broken_off, decode
from gateway.engines.lines import MAX_LINE
from gateway.engines.ollama import OllamaReader
from gateway.engines.openai_response import OpenAiReader
from gateway.errors import GatewayError, UpstreamError


class WordReader(LineReader):
    """Reads a word a line. `end` is the end of the answer, `fail` a failure that the backend reports."""

    def _read(self, line: bytes, deltas: list[Delta]) -> None:
        if line == b"fail":
            raise broken_off("stream_error")
        if line == b"end":
            self.done = True
        elif line:
            deltas.append(Delta(content=line.decode()))

    def _end(self, deltas: list[Delta]) -> None:
        raise broken_off("truncated")


def words(deltas: list[Delta]) -> list[str]:
    return [delta.content for delta in deltas]


@pytest.mark.parametrize("cut", range(1, 12))
def test_lines_are_read_the_same_wherever_the_bytes_are_cut(cut: int) -> None:
    reader, body = WordReader(), b"one\ntwo\nend\n"
    assert words(reader.feed(body[:cut]) + reader.feed(body[cut:])) == ["one", "two"]
    assert (reader.done, reader.surplus, reader.failure) == (True, False, None)


def test_line_without_a_line_end_counts_at_the_end_of_the_body() -> None:
    reader = WordReader()
    assert words(reader.feed(b"one\nend")) == ["one"]
    assert reader.end() == []
    assert reader.done


def test_body_that_ends_without_the_marker_is_left_to_the_engine() -> None:
    reader = WordReader()
    reader.feed(b"one\n")
    with pytest.raises(UpstreamError) as raised:
        reader.end()
    assert raised.value.reason == "truncated"


def test_lines_after_the_end_are_surplus_and_not_read() -> None:
    reader = WordReader()
    assert words(reader.feed(b"one\nend\ntwo\nfail\n")) == ["one"]
    assert reader.surplus


def test_failure_behind_deltas_is_kept_until_they_are_delivered() -> None:
    reader = WordReader()
    assert words(reader.feed(b"one\nfail\ntwo\n")) == ["one"]
    assert isinstance(reader.failure, UpstreamError)


def test_failure_without_deltas_before_it_is_raised_at_once() -> None:
    reader = WordReader()
    with pytest.raises(UpstreamError) as raised:
        reader.feed(b"\nfail\n")
    assert raised.value.reason == "stream_error"


def test_line_without_an_end_is_an_upstream_error() -> None:
    reader = WordReader()
    with pytest.raises(UpstreamError) as raised:
        reader.feed(b"x" * (MAX_LINE + 1))
    assert raised.value.reason == "line_too_long"


def test_reader_has_no_shortcut_for_plain_tokens_by_default() -> None:
    assert WordReader().plain_tokens(b"one\n") is None


@pytest.mark.parametrize("body", [b"", b"{", b'"text"', b'{"a":"x"}', b'{"a":"\xff"}', b"[" * 100_000])
def test_document_of_another_shape_is_none(body: bytes) -> None:
    assert decode(msgspec.json.Decoder(dict[str, int]), body) is None


def test_document_of_the_right_shape_is_decoded() -> None:
    assert decode(msgspec.json.Decoder(dict[str, int]), b'{"a":1}') == {"a": 1}


def test_model_lacks_a_capability_only_where_the_server_lists_capabilities() -> None:
    assert not ModelFacts().lacks("vision")
    assert ModelFacts(capabilities=frozenset({"completion"})).lacks("vision")
    assert not ModelFacts(capabilities=frozenset({"vision"})).lacks("vision")


@pytest.mark.parametrize("reader", [OpenAiReader, OllamaReader])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("null", False), ("false", False), ('""', False), ("0", False), ("{}", False), ("[]", False),
        ('"out of memory"', True), ('{"message":"a"}', True), ("true", True), ("[1]", True), ("1", True),
    ],
)  # fmt: skip
def test_event_with_an_error_ends_the_stream(
    reader: type[OpenAiReader] | type[OllamaReader], value: str, expected: bool
) -> None:
    line = b'{"message":{"content":"a"},"choices":[{"delta":{"content":"a"}}],"error":%b}\n' % value.encode()
    made = reader()
    if reader is OpenAiReader:
        line = b"data: " + line
    if expected:
        with pytest.raises(GatewayError):
            made.feed(line)
    else:
        assert [delta.content for delta in made.feed(line)] == ["a"]


@pytest.mark.parametrize("reader", [OpenAiReader, OllamaReader])
def test_long_error_is_not_parsed_and_its_beginning_is_read(
    reader: type[OpenAiReader] | type[OllamaReader], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of 900 KB of empty lists used to take 240 ms."""
    seen: list[int] = []
    loads = orjson.loads

    def recorded(text: str) -> object:
        seen.append(len(text))
        return loads(text)

    monkeypatch.setattr(orjson, "loads", recorded)
    line = b'{"error":"CUDA error: out of memory on this device","other":[' + b"[]," * 300_000 + b"[]]}\n"
    with pytest.raises(UpstreamError) as raised:
        reader().feed(b"data: " + line if reader is OpenAiReader else line)
    assert raised.value.reason == "stream_error"
    assert seen
    assert max(seen) <= MAX_REFUSAL
