"""Answers of backends for the search of the slowest input, and the gateway's work on them."""

from collections.abc import Callable, Iterator
from contextlib import suppress

from gateway.chat.answer import Timings, assemble
from gateway.chat.embedding import MAX_TEXTS, converted
from gateway.chat.normalizer import Normalizer
from gateway.dialects.anthropic_messages import MessageForm
from gateway.dialects.dialect import ChatForm
from gateway.dialects.ollama_chat import GenerateForm, LineForm
from gateway.dialects.openai_chat import CompletionForm, decode
from gateway.dialects.openai_completions import TextForm
from gateway.dialects.openai_embeddings import render_embeddings
from gateway.dialects.openai_responses import ResponseForm
from gateway.engines.embeddings import OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import MAX_PLAIN_ANSWER, LineReader
from gateway.engines.openai_response import OpenAiReader
from gateway.engines.vllm import Vllm
from gateway.errors import GatewayError
from gateway.upstream.connection import READ_BYTES

MIB = 1024 * 1024
Steps = Iterator[None]

_ASKED = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'


_TIMES = Timings(0, 0, 0, 0)


def _forms(is_stream: bool) -> list[ChatForm]:
    """Return the form of each client API."""
    return [
        CompletionForm("m", is_stream, wants_usage=False),
        TextForm("m", is_stream, wants_usage=False),
        ResponseForm("m", is_stream, {}),
        MessageForm("m", is_stream),
        LineForm("m", is_stream),
        GenerateForm("m", is_stream),
    ]


def read_answer(make: Callable[[], LineReader]) -> Callable[[bytes], Steps]:
    def read(data: bytes) -> Steps:
        reader = make()
        for start in range(0, len(data), READ_BYTES):
            reader.feed(data[start : start + READ_BYTES])
            yield
        reader.end()

    return read


def render_stream(data: bytes) -> Steps:
    """Read a stream of vLLM, and render it for the client of each API."""
    for form in _forms(is_stream=True):
        reader, normalizer, renderer = OpenAiReader(), Normalizer(decode(_ASKED, MIB)), form.stream("a", 1)
        with suppress(GatewayError):
            for start in range(0, len(data), READ_BYTES):
                for delta in normalizer.normalize(reader.feed(data[start : start + READ_BYTES])):
                    renderer.render(delta)
                yield
            renderer.end(lambda: _TIMES)
        yield


EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"usage":null}\n\n'
LINE = b'{"message":{"role":"assistant","content":"a"},"done":false}\n'
ANSWER_PIECES = [
    EVENT, LINE, b"\n", b"\r", b"data: ", b"data: [DONE]\n\n", b'"usage":{"prompt_tokens":', b"9" * 400, b"{}", b"[",
    b",", b'"', b'data: {"choices":[{"delta":{"tool_calls":[{"index":1,"function":{"name":"a","arguments":"b"}}]}}]}\n',
    b'{"error":"a"}\n',
]  # fmt: skip


def event_seeds() -> list[bytes]:
    logprob = b'{"token":"a","logprob":-0.5},'
    call = b'{"index":0,"function":{"name":"f","arguments":"{}"}},'
    head = b'data: {"choices":[{"index":0,"delta":{'
    return [
        EVENT * 100,
        head + b'"content":"a"},"logprobs":{"content":[' + logprob * 30_000 + logprob[:-1] + b"]}}]}\n",
        head + b'"tool_calls":[' + call * 15_000 + call[:-1] + b"]}}]}\n",
        b'data: {"error":[' + b"[]," * 300_000 + b"[]]}\n",
        head + b'"content":"' + b"\\n" * MIB,
    ]


def stream_seeds() -> list[bytes]:
    head, tail = b'data: {"choices":[{"delta":{', b"}}]}\n\n"
    call = head + b'"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":"%b"}}]' + tail
    piece = head + b'"tool_calls":[{"index":0,"function":{"arguments":"%b"}}]' + tail
    logprob = b'{"token":"a","logprob":-0.5,"top_logprobs":[{"token":"b","logprob":-1}]},' * 20
    turns = head + b'"reasoning":"a"' + tail + head + b'"content":"a"' + tail
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    return [
        EVENT * 100,
        call % b"{" + piece % (b"1" * 60) * 10_000 + piece % b"}" + finish,
        call % b"{" + piece % (b"\\n" * 5000) * 100 + finish,
        b"".join(call.replace(b'"a"', b'"%d"' % number) % b"{}" for number in range(8000)) + finish,
        turns * 8000 + finish,
        (head + b'"content":"a"},"logprobs":{"content":[' + logprob[:-1] + b"]}}]}\n\n") * 500 + finish,
        head + b'"content":"' + b"\\n" * (MIB // 2) + b'"' + tail + finish,
    ]


def line_seeds() -> list[bytes]:
    call = b'{"function":{"name":"f","arguments":{"a":[[]]}}},'
    return [
        LINE * 100,
        b'{"message":{"role":"assistant","content":"","tool_calls":[' + call * 20_000 + call[:-1] + b"]}}\n",
        b'{"message":{"content":"' + b"\\n" * (MIB // 2 - 100) + b'"}}\n',
        b'{"error":[' + b"[]," * 300_000 + b"[]]}\n",
    ]


def read_plain(data: bytes) -> Steps:
    """Read a plain answer of vLLM, or a part of it, and render it for the client of each API."""
    delta = Vllm().parse_answer(data)
    yield
    chat = decode(_ASKED, MIB)
    answer = assemble(Normalizer(chat).normalize([delta]))
    yield
    for form in _forms(is_stream=False):
        form.answer("a", 1, answer, lambda: _TIMES)
        yield


def answer_seeds() -> list[bytes]:
    head, tail = b'{"choices":[{"message":{"content":"', b'"},"finish_reason":"stop"}],"usage":null}'
    size = MAX_PLAIN_ANSWER - len(head) - len(tail)
    logprob = b'{"token":"a","logprob":-0.5},'
    call = b'{"function":{"name":"f","arguments":"{}"}},'
    return [
        *(head + unit * (size // len(unit)) + tail for unit in (b"a", b"\\n", b"\\u0001", b"\xea\xb0\x80", b"<", b" ")),
        head.replace(b"content", b"reasoning") + b"\\n" * (size // 2 - 2) + tail,
        head + b'"},"logprobs":{"content":[' + logprob * 29_000 + logprob[:-1] + b"]}," + tail[3:],
        head + b'","tool_calls":[' + call * 14_000 + call[:-1] + b"]}," + tail[3:],
        b'{"x":[' + b"1," * (size // 2) + b'1],"choices":[]}',
    ]


def read_vectors(data: bytes) -> Steps:
    """Read an answer with embeddings of either engine, and render it for the client."""
    for embedder in (OllamaEmbedder(), OpenAiEmbedder()):
        embedded = yield from embedder.parse(data)
        yield
        vectors = []
        for vector in [] if embedded is None else embedded.vectors[:MAX_TEXTS]:
            for in_base64 in (True, False):
                with suppress(ValueError):
                    vectors.append(converted(vector, in_base64))
                yield
        yield from render_embeddings(vectors, "m", 1)
        yield


VECTOR_PIECES = [
    b"[0.5,0.25]", b"[", b"]", b",", b"0,", b'"embedding":', b'"AAAA"', b'"embeddings":[', b'"data":[', b"{", b"}",
    b'"', b'{"index":0,"embedding":[]},', b"\\/", b" ", b"1e5,",
]  # fmt: skip


def vector_seeds() -> list[bytes]:
    numbers = b"[" + b"0.0123456789," * 1023 + b"1]"
    text = b'"%b"' % (b"AAAA" * 2048)
    item = b'{"index":0,"embedding":%b}'
    return [
        b'{"embeddings":[' + b",".join([numbers] * 1500) + b'],"prompt_eval_count":1}',
        b'{"data":[' + b",".join([item % numbers] * 1500) + b"]}",
        b'{"data":[' + b",".join([item % text] * 2048) + b"]}",
        b'{"embeddings":[[' + b"0," * 65_000 + b"1]]}",
        b'{"embeddings":[[' + b"1e-5, " * 5_000_000 + b"1]]}",
        b'{"data":[' + (item % b"[]" + b",") * 500_000 + b"1]}",
    ]
