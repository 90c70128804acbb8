"""The shortcut of plain tokens: it sends what the usual way sends, and leaves everything else to it."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.anthropic_messages import MessageForm
from gateway.dialects.dialect import StreamRenderer
from gateway.dialects.ollama_chat import LineForm
from gateway.dialects.openai_chat import CompletionForm
from gateway.engines.ollama import OllamaReader
from gateway.engines.openai_response import OpenAiReader
from gateway.relay.choices import ChoiceConnection
from gateway.relay.splicing import MAX_SIZES, splicer
from gateway.telemetry.exchange import Meter
from gateway.telemetry.metrics import INTER_TOKEN_LATENCY, Histogram

FORM = CompletionForm("standard", True, True)
FINISH = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}


class Client:
    """A client whose answer is sent in chunks, or not; it keeps the pieces of the body."""

    def __init__(self, is_chunked: bool = True) -> None:
        self.pieces: list[bytes] = []
        self._is_chunked = is_chunked

    def write(self, data: bytes) -> None:
        self.pieces.append(data)

    def chunk_line(self, size: int) -> bytes | None:
        return b"%x\r\n" % size if self._is_chunked else None

    def write_chunk(self, chunk: bytes) -> None:
        line, _, rest = chunk.partition(b"\r\n")
        assert len(rest) == int(line, 16) + 2
        assert rest.endswith(b"\r\n")
        self.pieces.append(rest[:-2])


def event(inside: bytes) -> bytes:
    """Return an event of plain content, `inside` being the content of its JSON string."""
    return b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % inside


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _untyped(client: Any) -> Any:
    """Return `client` without its type: it has only the methods that the shortcut uses."""
    return client


class Stream:
    """A stream after its first token."""

    def __init__(self, renderer: StreamRenderer | None = None, client: Any = None) -> None:
        self.client: Any = Client() if client is None else client
        self.reader = OpenAiReader()
        self.reader.feed(event(b"first"))
        self.renderer = renderer or FORM.stream("id", 1)
        self.now = 10.0
        self.meter = Meter(lambda: self.now)
        self.meter.last_piece = 10.0
        self.gaps = Histogram(INTER_TOKEN_LATENCY)
        self.take = splicer(self.client, self.reader, self.renderer, self.meter, self.gaps)


def usual(renderer: StreamRenderer, *events: bytes) -> bytes:
    """Return what the reader and the renderer make of the events."""
    return b"".join(renderer.render(delta) for delta in OpenAiReader().feed(b"".join(events)))


TEXTS = st.text(min_size=1, max_size=40).map(lambda text: json.dumps(text, ensure_ascii=False)[1:-1].encode())
INSIDES = (
    TEXTS | st.binary(max_size=12) | st.sampled_from([b" a", b"b", b"\\", b'"', b'\\"', b"\\n", b"\\u00e9", b"\n"])
)


@given(st.lists(st.lists(INSIDES, min_size=1, max_size=4), min_size=1, max_size=30))
def test_shortcut_sends_what_the_usual_way_sends(reads: list[list[bytes]]) -> None:
    stream = Stream()
    assert stream.take is not None
    taken = 0
    for insides in reads:
        before = len(stream.client.pieces)
        if stream.take(b"".join(chunk(event(inside)) for inside in insides)):
            sent = b"".join(stream.client.pieces[before:])
            assert len(stream.client.pieces) == before + 1  # one write
            expected = usual(FORM.stream("id", 1), *(event(inside) for inside in insides if inside))
            shown = [json.loads(line[6:]) for line in sent.splitlines() if line]
            assert [each for each in shown if each["choices"][0]["delta"]["content"]] == [
                json.loads(line[6:]) for line in expected.splitlines() if line
            ]
            taken += len(insides)
        else:
            assert len(stream.client.pieces) == before
    assert stream.meter.pieces == taken == sum(stream.gaps.counts)


def test_plain_tokens_take_the_shortcut_one_by_one_and_together() -> None:
    stream = Stream()
    assert stream.take is not None
    for inside in (b"a", b"b", b" \\n", b"caf\xc3\xa9"):
        assert stream.take(chunk(event(inside)))
    assert stream.take(chunk(event(b"c")) + chunk(event(b"dd")))
    assert b"".join(stream.client.pieces) == usual(
        FORM.stream("id", 1), *map(event, (b"a", b"b", b" \\n", b"caf\xc3\xa9", b"c", b"dd"))
    )


def test_gaps_are_those_between_the_reads() -> None:
    stream = Stream()
    assert stream.take is not None
    for now, data in ((10.2, chunk(event(b"a"))), (10.3, chunk(event(b"b"))), (10.9, chunk(event(b"c")) * 3)):
        stream.now = now
        assert stream.take(data)
    assert stream.gaps.total == pytest.approx(0.9)
    assert stream.gaps.counts[0] == 2  # the tokens that came with another one
    assert sum(stream.gaps.counts) == 5
    assert stream.meter.last_piece == 10.9


@pytest.mark.parametrize(
    "data",
    [
        chunk(event(b"a"))[:-1],
        chunk(event(b"a")) + b"5",
        chunk(event(b"a")) + chunk(event(b"b"))[:40],
        chunk(event(b"a")[:-1]),
        chunk(event(b"a")).replace(b"\r\n", b"\n"),
        b"0" + chunk(event(b"a")),
        chunk(event(b"a")).replace(b"\r\n", b";x=y\r\n", 1),
        chunk(event(b"a") + event(b"b")),
        chunk(event(b"a")) + b"0\r\n\r\n",
        chunk(b'data: {"id":"d","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'),
        chunk(b"data: %b\n\n" % json.dumps(FINISH).encode()),
        chunk(b'data: {"error":{"message":"x"}}\n\n'),
        chunk(b"data: [DONE]\n\n"),
        chunk(event("\u2028".encode())),
        chunk(event(b"\xff")),
        chunk(event(b"\\")) + chunk(event(b'"')),
        chunk(event(b"x" * 3000)),
        b"\r\n",
        b"",
    ],
)
def test_anything_else_is_left_to_the_usual_way(data: bytes) -> None:
    stream = Stream()
    assert stream.take is not None
    assert stream.take(chunk(event(b"z")))
    stream.client.pieces.clear()
    assert not stream.take(data)
    assert stream.client.pieces == []
    assert stream.meter.pieces == 1


def test_size_line_that_says_another_size_is_left_to_the_parser() -> None:
    stream = Stream()
    assert stream.take is not None
    right = chunk(event(b"ab"))
    assert stream.take(right)
    line = right.partition(b"\r\n")[0]
    assert not stream.take(right.replace(line, b"%x" % (int(line, 16) - 1), 1))


def test_memory_of_a_stream_does_not_grow_with_its_sizes() -> None:
    stream = Stream()
    assert stream.take is not None
    for size in [*range(1, 300), 1, 299]:
        assert stream.take(chunk(event(b"x" * size)))
    cells = stream.take.__closure__ or ()
    kept = [cell.cell_contents for cell in cells if isinstance(cell.cell_contents, dict)]
    assert [len(sizes) for sizes in kept] == [MAX_SIZES]


def test_client_api_without_a_fixed_form_has_no_shortcut() -> None:
    assert Stream(MessageForm("standard", True).stream("id", 1)).take is None


def test_lines_of_ollamas_api_take_the_shortcut() -> None:
    stream = Stream(LineForm("standard", True).stream("id", 1))
    assert stream.take is not None
    assert stream.take(chunk(event(b"a")))
    assert json.loads(stream.client.pieces[0])["message"]["content"] == "a"


def test_engine_and_client_without_chunks_have_no_shortcut() -> None:
    stream = Stream()
    ollama = OllamaReader()
    assert splicer(stream.client, ollama, stream.renderer, stream.meter, stream.gaps) is None
    assert splicer(stream.client, OpenAiReader(), stream.renderer, stream.meter, stream.gaps) is None  # no token yet
    assert Stream(client=Client(is_chunked=False)).take is None
    assert ChoiceConnection.chunk_line(None, 1) is None  # type: ignore[arg-type,func-returns-value]
