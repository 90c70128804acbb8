"""Answers of backends for the search of the slowest input, and the gateway's work on them."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import cast

from gateway.chat.answer import Answer, Assembler, Delta, Timings, assemble
from gateway.chat.embedding import MAX_TEXTS, converted
from gateway.chat.normalizer import Normalizer
from gateway.dialects.anthropic_messages import MessageForm
from gateway.dialects.dialect import ChatForm, ChoicesForm
from gateway.dialects.json_body import LONG_BODY
from gateway.dialects.long_answers import LONG_LOGPROBS, LONG_TEXT, logprob_runs
from gateway.dialects.ollama_chat import GenerateForm, LineForm
from gateway.dialects.openai_chat import CompletionForm
from gateway.dialects.openai_chat_request import decode
from gateway.dialects.openai_completions import TextForm
from gateway.dialects.openai_embeddings import render_embeddings
from gateway.dialects.openai_responses import ResponseForm
from gateway.engines.completions import CompletionReader, OpenAiCompleter
from gateway.engines.embeddings import OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import MAX_PLAIN_ANSWER, LineReader
from gateway.engines.openai_response import OpenAiReader
from gateway.engines.vllm import Vllm
from gateway.errors import GatewayError
from gateway.relay.turns import YIELD_BYTES
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
    named = call.replace(b'"id":"a",', b"")
    turns = head + b'"reasoning":"a"' + tail + head + b'"content":"a"' + tail
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    return [
        EVENT * 100,
        call % b"{" + piece % (b"1" * 60) * 10_000 + piece % b"}" + finish,
        call % b"{" + piece % (b"\\n" * 5000) * 100 + finish,
        b"".join(call.replace(b'"a"', b'"%d"' % number) % b"{}" for number in range(8000)) + finish,
        turns * 8000 + finish,
        named % b"[1" + named % b",1" * 15_000 + finish,
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
    yield from _answered(Vllm().parse_answer(data), len(data))


def read_completion(data: bytes) -> Steps:
    """Read a text completion of vLLM, as plain answer and as event, and render it for its client."""
    yield from _answered(OpenAiCompleter(Vllm()).parse_answer(data), len(data))
    CompletionReader().feed(b"data: %b\n\n" % data)
    yield


def _answered(delta: Delta, size: int) -> Steps:
    """Normalise and render a plain answer, as the relay does."""
    yield
    normalizer = Normalizer(decode(_ASKED, MIB))
    deltas: list[Delta] = []
    is_long = size > LONG_BODY and (size > YIELD_BYTES or delta.logprobs is not None)
    if is_long:
        logprobs, delta.logprobs = delta.logprobs, None
        for run in logprob_runs(logprobs or []):
            yield
            deltas += normalizer.normalize([Delta(logprobs=run)])
    answer = assemble([*deltas, *normalizer.normalize([delta])])
    yield
    yield from _rendered(answer, is_long)


def _rendered(answer: Answer, is_long: bool) -> Steps:
    for form in _forms(is_stream=False):
        if is_long:
            yield from form.answer_steps("a", 1, answer, lambda: _TIMES)
        else:
            form.answer("a", 1, answer, lambda: _TIMES)
        yield


def read_assembled(data: bytes) -> Steps:
    """Read a stream of vLLM for the client of each API that wants a plain answer."""
    reader, normalizer, assembler = OpenAiReader(), Normalizer(decode(_ASKED, MIB)), Assembler()
    for start in range(0, len(data), READ_BYTES):
        assembler.add(normalizer.normalize(reader.feed(data[start : start + READ_BYTES])))
        assembler.check_size()
        yield
    assembler.add(normalizer.normalize(reader.end()))
    yield
    is_long = assembler.text_length > LONG_TEXT or assembler.logprob_count > LONG_LOGPROBS
    answer = assembler.answer()
    yield
    yield from _rendered(answer, is_long)
    choices = [answer] * 4
    for form in _forms(is_stream=False)[:2]:
        if is_long:
            yield from cast("ChoicesForm", form).choices_answer_steps("a", 1, choices, None)
        yield


def assembled_seeds() -> list[bytes]:
    head, tail = b'data: {"choices":[{"delta":{', b"}}]}\n\n"
    finish = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
    alternatives = b",".join([b'{"token":"b","logprob":-1}'] * 20)
    logprob = b'{"token":"a","logprob":-0.5,"top_logprobs":[%b]},'
    many = (head + b'"content":"a"},"logprobs":{"content":[' + (logprob % b"")[:-1] + b"]}}]}\n\n") * 50_000
    wide = (head + b'"content":"a"},"logprobs":{"content":[' + (logprob % alternatives)[:-1] + b"]}}]}\n\n") * 9000
    call = head + b'"tool_calls":[{"index":0,"id":"a","function":{"name":"f","arguments":"%b"}}]' + tail
    numbered = head + b'"tool_calls":[{"index":%d,"function":{"name":"f","arguments":"{%b}"}}]' + tail
    many_calls = b"".join(numbered % (number, b"\\n" * 450) for number in range(1000))
    long_text = (head + b'"content":"' + b"\\u0001" * 5000 + b'"' + tail) * 590
    return [
        EVENT * 100 + finish,
        many_calls + finish,
        *((call % (b"[" + piece * 10_000)) * 30 + call % b"1]" + finish for piece in (b"[],", b"\\n", b"1,")),
        *(text + finish for text in (many, wide, long_text, long_text.replace(b"content", b"reasoning"))),
    ]


COMPLETION_PIECES = [
    b'"a",', b"[", b"]", b",", b"{", b"}", b'"tokens":[', b'"token_logprobs":[', b'"top_logprobs":[{', b'"a":1,',
    b"null,", b"-0.5,", b'"text":"', b"\\n", b'{"a":-1},',
]  # fmt: skip


def completion_answer_seeds() -> list[bytes]:
    head, tail = b'{"choices":[{"text":"a","finish_reason":"stop","logprobs":{', b"}}]}"
    alternatives = b",".join(b'"%x":-1' % number for number in range(60_000))
    return [
        head + b'"tokens":["a"]' + tail,
        head + b'"tokens":[' + b'"a",' * 1_000_000 + b'"a"]' + tail,
        head + b'"tokens":[' + b'"a",' * 59_000 + b'"a"]' + tail,
        head + b'"tokens":["a"],"top_logprobs":[{' + alternatives + b"}]" + tail,
        head + b'"tokens":[' + b'"a",' * 20_000 + b'"a"],"top_logprobs":[' + b'{"b":1},' * 20_000 + b"{}]" + tail,
        head + b'"token_logprobs":[' + b"0," * 2_000_000 + b"0]" + tail,
        b'{"choices":[{"text":"' + b"\\u0001" * 499_000 + b'","finish_reason":"stop"}]}',
    ]


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
