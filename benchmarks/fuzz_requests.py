"""Requests of the client APIs for the search of the slowest input, and the gateway's work on them.

A short body is parsed, checked and rendered for an engine without a break, as the endpoint does
when a slot is free. A long one is parsed in steps.
"""

from collections.abc import Callable, Iterator
from typing import Any

import orjson

from benchmarks.fuzz_schemas import MESSAGE, tools_body
from gateway.chat import checks
from gateway.chat.completion import Completion
from gateway.chat.request import Chat
from gateway.dialects.dialect import ChatDialect, EmbeddingDialect
from gateway.dialects.openai_chat_request import check_long_text, decode
from gateway.dialects.openai_embeddings import parse_long_embedding
from gateway.dialects.rerank import CohereRerank
from gateway.engines.completions import OllamaCompleter, OpenAiCompleter
from gateway.engines.engine import ModelFacts
from gateway.engines.ollama import Ollama
from gateway.engines.rerank import VllmReranker
from gateway.engines.vllm import Vllm
from gateway.relay.turns import YIELD_BYTES

MIB = 1024 * 1024
Steps = Iterator[None]

PIECES = [
    b"1,", b'"a",', b'"a":1,', b"{}", b"[]", b"{", b"[", b"}", b"]", b'\\"', b"\\\\", b"\\n", b"\\u0041",
    b"\\ud83d\\ude00",
    b"null,", b"1.5e-7,", b'"', b",", b":", b";base64,", b"\xea\xb0\x80", b" ", b'{"role":"user","content":"a"},',
    b'{"type":"text","text":"a"},', b'{"a":{"b":[1]}},', b"A" * 1024, b"\\/", b'"logit_bias":{', b'"stop":[',
    b'"audio":[',
]  # fmt: skip
_BODY = orjson.dumps({"model": "m", "messages": [MESSAGE]})


def _render(chat: Chat) -> Steps:
    """Render a chat for each engine. Each is a step."""
    if isinstance(chat, Completion):
        for completer in (OllamaCompleter(), OpenAiCompleter(Vllm())):
            for one in chat.for_each_prompt():
                completer.render(one, "m", ModelFacts(), True)
            yield
        return
    for engine in (Ollama(), Vllm()):
        engine.render(chat, "m", ModelFacts(), True)
        yield


def parse_chat(body: bytes) -> Steps:
    yield from check_long_text(body, MIB)
    yield
    chat = decode(body, MIB)
    yield
    yield from checks.check_in_steps(chat)
    yield
    yield from _render(chat)


def parse_with(dialect: ChatDialect) -> Callable[[bytes], Steps]:
    """Return the work on a request of another client API than `/v1/chat/completions`."""

    def parse(body: bytes) -> Steps:
        if len(body) <= YIELD_BYTES:
            chat = dialect.parse(body, MIB)[0].chat
            checks.check(chat)
        else:
            call, _ = yield from dialect.parse_steps(body, MIB)
            chat = call.chat
            yield
            yield from checks.check_in_steps(chat)
            yield
        if chat.messages:  # without any, the request only loads a model
            yield from _render(chat)

    return parse


def parse_embedding(body: bytes) -> Steps:
    yield from parse_long_embedding(body, len)


def parse_embedding_with(dialect: EmbeddingDialect) -> Callable[[bytes], Steps]:
    """Return the work on a request of another client API than `/v1/embeddings`."""

    def parse(body: bytes) -> Steps:
        if len(body) <= YIELD_BYTES:
            dialect.parse(body, MIB, len)
        else:
            yield from dialect.parse_steps(body, len)

    return parse


def parse_rerank(body: bytes) -> Steps:
    call = yield from CohereRerank().parse_steps(body, len)
    yield
    VllmReranker().render(call.rerank, "m")
    yield


def _full_arguments() -> str:
    """Return the arguments of a call with as many arrays as a request has room for."""
    return '{"a":[' + "[]," * 300_000 + "1]}"


def _turn(arguments: str, count: int = 1) -> dict[str, Any]:
    """Return a message with calls in the form of chat completions."""
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call] * count}


def chat_seeds() -> list[bytes]:
    few_arrays = '{"a":[' + "[]," * 9900 + "1]}"
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":[' + "[]" * 900 + "1]}"}}]
    short_calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}] * 128
    return [
        _BODY,
        orjson.dumps({"model": "m", "messages": [MESSAGE, {"role": "assistant", "tool_calls": calls * 100}]}),
        orjson.dumps({"model": "m", "messages": [MESSAGE, *[{"role": "assistant", "tool_calls": short_calls}] * 64]}),
        _BODY[:-1] + b',"x":[' + b"1," * 24_000 + b"1]}",
        _BODY[:-1] + b',"logit_bias":{' + b",".join([b'"%d":1' % token for token in range(24_000)]) + b"}}",
        orjson.dumps({"model": "m", "messages": [MESSAGE] * 2048}),
        tools_body([{"type": "object", "properties": {"a": {"enum": [*range(6000)]}}}] * 3),
        orjson.dumps({"model": "m", "messages": [MESSAGE, _turn(_full_arguments())]}),
        orjson.dumps({"model": "m", "messages": [MESSAGE, _turn(few_arrays, 30)]}),
        orjson.dumps({"model": "m", "messages": [MESSAGE], "guided_json": _full_arguments()}),
    ]


RESPONSE_PIECES = [
    *PIECES, b'{"type":"input_text","text":"a"},', b'{"type":"reasoning"},', b'"text":{"format":{"type":"json_schema",',
    b'{"type":"function_call","call_id":"1","name":"f","arguments":"{}"},',
    b'{"type":"function_call_output","call_id":"1","output":"a"},',
    b'"tools":[{"type":"function","name":"f"}],', b'"instructions":"a",',
]  # fmt: skip


def response_seeds() -> list[bytes]:
    parts = [{"type": "input_text", "text": "a"}] * 12_000
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"a":[' + "[]" * 100 + "1]}"}
    result = {"type": "function_call_output", "call_id": "1", "output": [{"type": "input_text", "text": "a"}] * 3}
    tools = [{"type": "function", "name": f"f{index}", "parameters": {"type": "object"}} for index in range(128)]
    return [
        b'{"model":"m","input":"a"}',
        orjson.dumps({"model": "m", "input": [{"role": "user", "content": parts}]}),
        orjson.dumps({"model": "m", "input": [{"role": "user", "content": "a"}] * 2048}),
        orjson.dumps({"model": "m", "input": [{"type": "message", "role": "user", "content": parts[:5]}] * 2000}),
        orjson.dumps({"model": "m", "input": [{"type": "reasoning", "content": [{"text": "a"}] * 14_000}]}),
        orjson.dumps({"model": "m", "input": [call, result] * 1000, "tools": tools}),
        orjson.dumps({"model": "m", "input": [call | {"arguments": _full_arguments()}]}),
    ]


MESSAGE_PIECES = [
    *PIECES, b'{"type":"tool_use","id":"1","name":"f","input":{}},', b'{"type":"thinking","thinking":"a"},',
    b'{"type":"tool_result","tool_use_id":"1","content":"a"},', b'"cache_control":{"type":"ephemeral"},',
    b'"tools":[{"name":"f","input_schema":{"type":"object"}}],', b'"stop_sequences":[', b'"system":"a",',
]  # fmt: skip


def message_seeds() -> list[bytes]:
    blocks = [{"type": "text", "text": "a"}] * 12_000
    results = [{"type": "tool_result", "tool_use_id": "1", "content": blocks[:1]}] * 5000
    calls = [{"type": "tool_use", "id": "1", "name": "f", "input": {}}] * 128
    tools = [{"name": f"f{index}", "input_schema": {"type": "object"}} for index in range(128)]
    return [
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [MESSAGE] * 2048}),
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": blocks}]}),
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": results}]}),
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "assistant", "content": calls}] * 50}),
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [MESSAGE], "system": blocks}),
        orjson.dumps({"model": "m", "max_tokens": 1, "messages": [MESSAGE], "tools": tools}),
    ]


OLLAMA_PIECES = [
    *PIECES, b'{"function":{"name":"f","arguments":{}}},', b'{"role":"tool","tool_name":"f","content":"a"},',
    b'"images":["AAAA"],', b'"thinking":"a",', b'"tools":[{"function":{"name":"f"}}],', b'"format":{"type":"object"},',
    b'"options":{"num_predict":1,"stop":["a"]},', b'"arguments":"{}"', b'{"role":"System","content":"a"},',
]  # fmt: skip


def ollama_seeds() -> list[bytes]:
    """Return requests to `/api/chat`."""
    calls = [{"function": {"name": "f", "arguments": {"a": [[]]}}}] * 128
    results = [{"role": "tool", "tool_name": "g", "content": "a"}] * 128
    tools = [{"function": {"name": f"f{index}", "parameters": {"type": "object"}}} for index in range(128)]
    images = {"role": "user", "content": "a", "images": ["AAAA"] * 20}
    turn = [{"role": "assistant", "tool_calls": calls}, *results]
    return [
        _BODY,
        orjson.dumps({"model": "m", "messages": [MESSAGE] * 2048}),
        orjson.dumps({"model": "m", "messages": [{"role": "assistant", "tool_calls": calls}] * 50}),
        orjson.dumps({"model": "m", "messages": turn * 15}),
        orjson.dumps({"model": "m", "messages": [MESSAGE], "tools": tools}),
        orjson.dumps({"model": "m", "messages": [images] * 2000}),
        orjson.dumps({"model": "m", "messages": [MESSAGE, _turn(_full_arguments())]}),
    ]


def generate_seeds() -> list[bytes]:
    """Return requests to `/api/generate`."""
    return [
        b'{"model":"m","prompt":"a"}',
        b'{"model":"m","system":"a","prompt":"' + b"[img" * (MIB // 4 - 20) + b'"}',
        b'{"model":"m","prompt":"' + b"\\n" * (MIB // 2 - 20) + b'"}',
        orjson.dumps({"model": "m", "prompt": "a", "images": ["AAAA"] * 1024}),
        orjson.dumps({"model": "m", "prompt": "a", "format": {"enum": [*range(6000)]}}),
    ]


def completion_seeds() -> list[bytes]:
    return [
        b'{"model":"m","prompt":"a"}',
        orjson.dumps({"model": "m", "prompt": ["word " * 1500] * 128}),
        b'{"model":"m","prompt":"' + b"\\n" * (MIB // 2 - 20) + b'"}',
        b'{"model":"m","prompt":[' + b"1," * 40_000 + b"1]}",
    ]


def embedding_seeds() -> list[bytes]:
    return [
        b'{"model":"m","input":"a"}',
        orjson.dumps({"model": "m", "input": ["word " * 100] * 2048}),
        b'{"model":"m","input":["' + b"\\n" * 9 * MIB + b'"]}',
        b'{"model":"m","input":["' + b"\\n" * 3 * MIB + b'","' + "\uac00".encode() * 3 * MIB + b'"]}',
        b'{"model":"m","x":"' + b"\\n" * 9 * MIB + b'","input":"a"}',
        b'{"model":"m","input":[' + b"[1,2,3]," * 20_000 + b"[1]]}",
    ]


def prompt_seeds() -> list[bytes]:
    """Return requests to `/api/embeddings`."""
    return [
        b'{"model":"m","prompt":"a"}',
        b'{"model":"m","prompt":"' + b"\\n" * 4 * MIB + b'"}',
        b'{"model":"m","prompt":"' + "\uac00".encode() * 2 * MIB + b'"}',
        b'{"model":"m","x":[' + b"1," * 24_000 + b'1],"prompt":"a"}',
    ]


RERANK_PIECES = [*PIECES, b'{"text":"a"},', b'"return_documents":true,', b'"rank_fields":["a"],', b'"top_n":1,']


def rerank_seeds() -> list[bytes]:
    return [
        b'{"model":"m","query":"a","documents":["a"]}',
        orjson.dumps({"model": "m", "query": "a", "documents": ["word " * 700] * 2048}),
        orjson.dumps({"model": "m", "query": "a", "documents": [{"text": "a", "x": [[]] * 10}] * 2048}),
        b'{"model":"m","query":"' + b"\\n" * 2 * MIB + b'","documents":["' + b"\\n" * 1_500_000 + b'"]}',
    ]
