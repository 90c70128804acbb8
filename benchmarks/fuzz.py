"""Search for the slowest input: what a client or a backend can send to keep the event loop busy.

`make fuzz` runs it. For each target, inputs are mutated and the slowest are kept. The cost of an
input is the CPU time of its longest step, since other requests get a turn between steps. Exit
status 1 when a step takes more than `MOST_SECONDS`.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import msgspec
import orjson
from uvicorn import Config
from uvicorn.server import ServerState

from gateway.chat import checks, json_schema
from gateway.dialects.openai_chat import check_long_text, decode
from gateway.dialects.openai_embeddings import parse_long_embedding
from gateway.downstream.protocol import HttpProtocol
from gateway.engines.engine import LineReader, ModelFacts
from gateway.engines.grammar import regex
from gateway.engines.grammar.portable import portable, portable_calls
from gateway.engines.ollama import Ollama, OllamaReader
from gateway.engines.openai_response import OpenAiReader
from gateway.engines.vllm import Vllm
from gateway.errors import GatewayError
from gateway.upstream.connection import READ_BYTES

MOST_SECONDS = 0.05
MIB = 1024 * 1024
READ_FROM_CLIENT = 64 * 1024
"""Bytes that libuv reads from a socket at once."""
_KEPT = 12
"""Inputs of a target that are mutated on."""
_REPEATS = 5
"""Measurements of an input that seems to be slow. The least one counts."""

Input = TypeVar("Input")
Steps = Iterator[None]


@dataclass(frozen=True)
class Target(Generic[Input]):
    """Code under test: `run` does one step of the work on an input before each `yield`."""

    name: str
    run: Callable[[Input], Steps]
    seeds: Callable[[], list[Input]]
    mutated: Callable[[random.Random, list[Input]], Input]
    size: Callable[[Input], int]
    text: Callable[[Input], bytes]


@dataclass(order=True)
class Found:
    """A measured input."""

    seconds: float
    number: int
    size: int
    input: Any


def longest_step(steps: Steps) -> float:
    """Return the CPU time of the longest step in seconds. An input that is refused is one, too."""
    longest, is_running = 0.0, True
    while is_running:
        began = time.process_time()
        try:
            next(steps)
        except (StopIteration, GatewayError):
            is_running = False
        longest = max(longest, time.process_time() - began)
    return longest


def search(target: Target[Any], seconds: float, chance: random.Random) -> Found:
    """Return the slowest input found in `seconds`."""
    kept: list[Found] = []
    waiting = target.seeds()
    end = time.monotonic() + seconds
    number = 0
    while waiting or time.monotonic() < end:
        found = waiting.pop() if waiting else target.mutated(chance, [other.input for other in kept])
        number += 1
        spent = longest_step(target.run(found))
        if len(kept) < _KEPT or spent > kept[-1].seconds:
            for _ in range(_REPEATS):  # something else may have had the processor's caches
                spent = min(spent, longest_step(target.run(found)))
            kept = sorted([*kept, Found(spent, number, target.size(found), found)], reverse=True)[:_KEPT]
    return kept[0]


# Schemas


def _check_and_convert(schema: Any) -> Steps:
    json_schema.check(schema, "schema")
    yield
    msgspec.json.encode(portable(schema))
    yield


def _tools(schemas: list[Any]) -> bytes:
    functions = [{"name": f"f{number}", "parameters": schema} for number, schema in enumerate(schemas)]
    tools = [{"type": "function", "function": function} for function in functions]
    return orjson.dumps({"model": "m", "messages": [_MESSAGE], "tools": tools, "tool_choice": "required"})


def _convert_tools(schema: Any) -> Steps:
    """Send the schema with each tool, four times, which is as many as a request may have."""
    chat = decode(_tools([schema] * 4), MIB)
    yield
    yield from checks.check_in_steps(chat)
    yield
    portable_calls([(tool.function.name, tool.function.parameters or {}) for tool in chat.tools or ()])
    yield
    for engine in (Ollama(), Vllm()):
        engine.render(chat, "m", ModelFacts(), True)
        yield


def _schema_seeds() -> list[Any]:
    enum = {"enum": [1] * 1200}
    named = {"a": {"$anchor": "a", **enum}, "b": {"$anchor": "b", "enum": [2] * 1200}}
    levels = {
        f"l{level}": {"allOf": [{"$ref": f"#/$defs/{name}"} for name in names] * 6}
        for level, names in enumerate([("a", "b"), *((f"l{below}",) for below in range(4))])
    }
    choice = {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/t"}}, {"$ref": "#/$defs/t"}, {"type": "object"}]}
    properties = {f"p{number}": {"type": "string", "enum": ["a", "b"]} for number in range(300)}
    return [
        {"$defs": named | levels, "type": "object", "properties": {"x": {"$ref": "#/$defs/l4"}}},
        {"$defs": {"t": {"anyOf": [{"type": "object", "properties": {"a": choice}}] * 3}}, "$ref": "#/$defs/t"},
        {"type": "object", "properties": properties, "required": [*properties], "anyOf": [{"required": ["p1"]}] * 50},
        {"$defs": {f"d{number}": {"items": {"$ref": f"#/$defs/d{number + 1}"}} for number in range(400)}
         | {"d400": {}}, "$ref": "#/$defs/d0"},
        {"anyOf": [{"type": "object", "properties": {"k": {"const": number}}, "required": ["k"]}
                   for number in range(250)]},
        {"properties": {f"p{number}": {"pattern": f"^[a-z]{{1,{number}}}(x|y)?\\d+$"} for number in range(1, 100)}},
    ]  # fmt: skip


_SCHEMA_WORDS: list[Callable[[Any, str], Any]] = [
    lambda node, name: {"allOf": [node, {"$ref": f"#/$defs/{name}"}]},
    lambda node, name: {"anyOf": [node, {"$ref": f"#/$defs/{name}"}, {"type": "null"}]},
    lambda node, name: {"oneOf": [node, {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{name}"}}}]},
    lambda node, name: {"type": "array", "items": node},
    lambda node, name: {"type": "object", "properties": {"a": node, "b": node}, "required": ["a"]},
    lambda node, name: {"$ref": f"#/$defs/{name}"},
    lambda node, name: {"enum": [name, 1, None, {"a": [name]}]},
    lambda node, name: {"pattern": "^(a|b)?[^c]{1,9}$"},
    lambda node, name: {"patternProperties": {"^a": node, "b$": node}, "additionalProperties": False},
    lambda node, name: {"prefixItems": [node, node], "items": False},
]


def _holders(value: Any, found: list[Any]) -> list[Any]:
    """Return all lists and dicts within `value`."""
    rest = [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict | list):
            found.append(item)
            rest.extend(item.values() if isinstance(item, dict) else item)
    return found


def _mutated_schema(chance: random.Random, kept: list[Any]) -> Any:
    document = orjson.loads(orjson.dumps(chance.choice(kept)))
    names = [*document.setdefault("$defs", {}), "t"]
    for _ in range(chance.randint(1, 4)):
        holder = chance.choice(_holders(document, []))
        if not holder:
            continue
        key = chance.randrange(len(holder)) if isinstance(holder, list) else chance.choice([*holder])
        name = chance.choice(names)
        how = chance.randrange(5)
        if how == 0 and isinstance(holder, list):
            holder *= chance.choice([2, 3, 10, 100])
        elif how == 1:
            document["$defs"][f"t{chance.randrange(40)}"] = holder[key]
        elif how == 2:
            del holder[key]
        elif how == 3 and isinstance(holder, dict):
            for number in range(chance.choice([3, 30, 300])):
                holder[f"{key}{number}"] = holder[key]
        elif isinstance(holder[key], dict):
            holder[key] = chance.choice(_SCHEMA_WORDS)(holder[key], name)
        if len(orjson.dumps(document)) > json_schema.MAX_SCHEMA:  # refused before anything is done
            return _mutated_schema(chance, kept)
        if not isinstance(document.get("$defs"), dict):
            document["$defs"] = {}
    return document


# Bytes

_MESSAGE = {"role": "user", "content": "hello"}
_BODY = orjson.dumps({"model": "m", "messages": [_MESSAGE]})
_PIECES = [
    b"1,", b'"a",', b'"a":1,', b"{}", b"[]", b"{", b"[", b"}", b"]", b'\\"', b"\\\\", b"\\n", b"\\u0041",
    b"\\ud83d\\ude00",
    b"null,", b"1.5e-7,", b'"', b",", b":", b";base64,", b"\xea\xb0\x80", b" ", b'{"role":"user","content":"a"},',
    b'{"type":"text","text":"a"},', b'{"a":{"b":[1]}},', b"A" * 1024, b"\\/", b'"logit_bias":{', b'"stop":[',
    b'"audio":[',
]  # fmt: skip


def _mutator(pieces: list[bytes], most: int) -> Callable[[random.Random, list[bytes]], bytes]:
    def mutated(chance: random.Random, kept: list[bytes]) -> bytes:
        body = chance.choice(kept)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(body) + 1)
            how = chance.randrange(4)
            if how == 0:
                end = min(len(body), at + chance.choice([1, 8, 64, 4096]))
                room = max(0, most - len(body)) // max(1, end - at)
                body = body[:at] + body[at:end] * chance.randint(1, max(1, room)) + body[end:]
            elif how == 1:
                piece = chance.choice(pieces)
                room = max(0, most - len(body)) // len(piece)
                body = body[:at] + piece * chance.choice([1, chance.randint(0, room), room]) + body[at:]
            elif how == 2:
                body = body[:at] + body[at + chance.choice([1, 16, len(body) // 2]) :]
            else:
                other = chance.choice(kept)
                body = body[:at] + other[len(other) - max(0, min(len(other), most - at)) :]
        return body[:most]

    return mutated


def _parse_chat(body: bytes) -> Steps:
    yield from check_long_text(body, MIB)
    yield
    chat = decode(body, MIB)
    yield
    yield from checks.check_in_steps(chat)
    yield
    for engine in (Ollama(), Vllm()):
        engine.render(chat, "m", ModelFacts(), True)
        yield


def _parse_embedding(body: bytes) -> Steps:
    yield from parse_long_embedding(body, len)


def _chat_seeds() -> list[bytes]:
    calls = [{"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a":[' + "[]" * 900 + "1]}"}}]
    return [
        _BODY,
        orjson.dumps({"model": "m", "messages": [_MESSAGE, {"role": "assistant", "tool_calls": calls * 100}]}),
        _BODY[:-1] + b',"x":[' + b"1," * 24_000 + b"1]}",
        _BODY[:-1] + b',"logit_bias":{' + b",".join([b'"%d":1' % token for token in range(24_000)]) + b"}}",
        orjson.dumps({"model": "m", "messages": [_MESSAGE] * 2048}),
        _tools([{"type": "object", "properties": {"a": {"enum": [*range(6000)]}}}] * 3),
    ]


def _embedding_seeds() -> list[bytes]:
    return [
        b'{"model":"m","input":"a"}',
        orjson.dumps({"model": "m", "input": ["word " * 100] * 2048}),
        b'{"model":"m","input":["' + b"\\n" * 9 * MIB + b'"]}',
        b'{"model":"m","input":["' + b"\\n" * 3 * MIB + b'","' + "\uac00".encode() * 3 * MIB + b'"]}',
        b'{"model":"m","x":"' + b"\\n" * 9 * MIB + b'","input":"a"}',
        b'{"model":"m","input":[' + b"[1,2,3]," * 20_000 + b"[1]]}",
    ]


def _read_pattern(pattern: bytes) -> Steps:
    regex.portable(pattern.decode("latin-1"))
    yield


_PATTERN_PIECES = [
    b"^", b"$", b"(", b")", b"(?:", b"|", b"[a-z]", b"[^a]", b"[", b"]", b"a", b"{1,128}", b"{2}", b"?", b"*", b"+",
    b"\\d", b"\\w", b"\\-", b"(?P<a>", b".", b"-", b"{999999", b"\xe9",
]  # fmt: skip


# HTTP


class _Transport:
    """Transport that takes everything and sends nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **named: 0 if name == "get_write_buffer_size" else None

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return True


async def _app(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    scope["extensions"]["gateway.client"].answer(200, b"", b"")


class HttpServer:
    """HTTP server without a socket."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._config = Config(_app)
        self._config.load()

    def close(self) -> None:
        self._loop.close()

    def read(self, data: bytes) -> Steps:
        protocol = HttpProtocol(self._config, ServerState(), {}, self._loop)
        protocol.connection_made(cast("asyncio.Transport", _Transport()))
        for start in range(0, len(data), READ_FROM_CLIENT):
            protocol.data_received(data[start : start + READ_FROM_CLIENT])
            yield
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            yield
        protocol.connection_lost(None)


_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
_HEAD_PIECES = [
    b"\r\n", b"a:b\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n", b"0",
    b" ", b"%41", b"&a=b", b"?", b"1\r\nx\r\n", b"5;a=b\r\nhello\r\n", b"0\r\n", b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n", b"/", b"X" * 64, b"\t", b"GET / HTTP/1.1\r\n", b"\xff",
]  # fmt: skip


def _head_seeds() -> list[bytes]:
    return [
        _HEAD + b"Content-Length: 2\r\n\r\n{}",
        _HEAD + b"Content-Length: " + b"0" * 5000 + b"2\r\n\r\n{}",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n",
        b"GET /" + b"%41" * 20_000 + b" HTTP/1.1\r\nHost: gateway\r\n\r\n",
        (_HEAD + b"Content-Length: 2\r\n\r\n{}") * 500,
    ]


def _read_answer(make: Callable[[], LineReader]) -> Callable[[bytes], Steps]:
    def read(data: bytes) -> Steps:
        reader = make()
        for start in range(0, len(data), READ_BYTES):
            reader.feed(data[start : start + READ_BYTES])
            yield
        reader.end()

    return read


_EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"usage":null}\n\n'
_LINE = b'{"message":{"role":"assistant","content":"a"},"done":false}\n'
_ANSWER_PIECES = [
    _EVENT, _LINE, b"\n", b"\r", b"data: ", b"data: [DONE]\n\n", b'"usage":{"prompt_tokens":', b"9" * 400, b"{}", b"[",
    b",", b'"', b'data: {"choices":[{"delta":{"tool_calls":[{"index":1,"function":{"name":"a","arguments":"b"}}]}}]}\n',
    b'{"error":"a"}\n',
]  # fmt: skip


def targets(http: HttpServer) -> list[Target[Any]]:
    """Return all targets."""

    def of_bytes(
        name: str, run: Callable[[bytes], Steps], seeds: Callable[[], list[bytes]], pieces: list[bytes], most: int
    ) -> Target[bytes]:
        return Target(name, run, seeds, _mutator(pieces, most), len, bytes)

    def of_schemas(name: str, run: Callable[[Any], Steps]) -> Target[Any]:
        return Target(name, run, _schema_seeds, _mutated_schema, lambda schema: len(orjson.dumps(schema)), orjson.dumps)

    return [
        of_schemas("schema", _check_and_convert),
        of_schemas("tools", _convert_tools),
        of_bytes("pattern", _read_pattern, lambda: [b"^a$", b"^(?:[a-z]{2,9}|\\d+)?$"], _PATTERN_PIECES, 32 * 1024),
        of_bytes("chat", _parse_chat, _chat_seeds, _PIECES, 2 * MIB),
        of_bytes("embedding", _parse_embedding, _embedding_seeds, _PIECES, 20 * MIB),
        of_bytes("http", http.read, _head_seeds, _HEAD_PIECES, MIB // 2),
        of_bytes("events", _read_answer(OpenAiReader), lambda: [_EVENT * 100], _ANSWER_PIECES, MIB // 2),
        of_bytes("ndjson", _read_answer(OllamaReader), lambda: [_LINE * 100], _ANSWER_PIECES, MIB // 2),
    ]


def main() -> int:
    """Search for the slowest inputs, print them, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the random numbers")
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--save", type=Path, help="folder for the slowest input of each target")
    options = parser.parse_args()
    with closing(HttpServer()) as http:
        chosen = [target for target in targets(http) if not options.target or target.name in options.target]
        if not chosen:
            parser.error("no such target")
        return _search_all(chosen, options)


def _search_all(chosen: list[Target[Any]], options: argparse.Namespace) -> int:
    print(f"{'target':10} {'CPU ms':>8} {'bytes':>10} {'input':>8}   seed {options.seed}")
    slow = []
    for target in chosen:
        worst = search(target, options.seconds / len(chosen), random.Random(f"{options.seed} {target.name}"))
        text = target.text(worst.input)
        print(
            f"{target.name:10} {worst.seconds * 1000:8.1f} {worst.size:10} {worst.number:8}   {text[:60]!r}", flush=True
        )
        if options.save:
            options.save.mkdir(parents=True, exist_ok=True)
            (options.save / target.name).write_bytes(text)
        if worst.seconds > MOST_SECONDS:
            slow.append(target.name)
    if slow:
        print(f"Above {MOST_SECONDS * 1000:g} ms: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
