"""JSON Schemas for the search of the slowest input, and the gateway's work on them."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import orjson

from gateway.chat import checks, json_schema
from gateway.dialects.openai_chat_request import decode
from gateway.engines.engine import ModelFacts
from gateway.engines.grammar.portable import portable, portable_calls
from gateway.engines.ollama import Ollama
from gateway.engines.vllm import Vllm

MIB = 1024 * 1024
MESSAGE = {"role": "user", "content": "hello"}
Steps = Iterator[None]


def check_and_convert(schema: Any) -> Steps:
    json_schema.check(schema, "schema")
    yield
    msgspec.json.encode(portable(schema))
    yield


def tools_body(schemas: list[Any]) -> bytes:
    functions = [{"name": f"f{number}", "parameters": schema} for number, schema in enumerate(schemas)]
    tools = [{"type": "function", "function": function} for function in functions]
    return orjson.dumps({"model": "m", "messages": [MESSAGE], "tools": tools, "tool_choice": "required"})


def convert_tools(schema: Any) -> Steps:
    """Send the schema with each tool, four times, which is as many as a request may have."""
    chat = decode(tools_body([schema] * 4), MIB)
    yield
    yield from checks.check_in_steps(chat)
    yield
    portable_calls([(tool.function.name, tool.function.parameters or {}) for tool in chat.tools or ()])
    yield
    for engine in (Ollama(), Vllm()):
        engine.render(chat, "m", ModelFacts(), True)
        yield


def schema_seeds() -> list[Any]:
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


def mutated_schema(chance: random.Random, kept: list[Any]) -> Any:
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
            return mutated_schema(chance, kept)
        if not isinstance(document.get("$defs"), dict):
            document["$defs"] = {}
    return document
