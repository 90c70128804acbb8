"""Portable JSON Schemas: the form that every engine can turn into a grammar. Pure.

A portable schema equals the original where possible, is looser where not, and is never stricter.

Most rules here are due to llama.cpp's converter (common/json-schema-to-grammar.cpp), which Ollama
runs in its own process (0.24) or in the model's (0.33). It stops at unknown keywords and
misinterprets others, and some schemas crash or hang it.
"""

import re
from collections.abc import Iterable

from gateway.chat.json_schema import Schema, WorkBudget, nodes
from gateway.engines.grammar import regex
from gateway.engines.grammar.converter import Converter

MAX_WORK = 42_000
"""Work that the schemas of a request may take: see `WorkBudget`.

It suffices for 100 KiB of ordinary schemas, and takes at most 30 ms. More is refused.
"""
MAX_COUNTED = 16
"""Maximum number of properties of an object with `minProperties` or `maxProperties`, on vLLM."""

_repetitions = re.compile(r"[{,](\d{1,19})(?=[,}])").findall


def work_budget(param: str = "response_format.json_schema.schema") -> WorkBudget:
    """Return the budget of one request. `param` is the path of its schemas."""
    return WorkBudget(MAX_WORK, param)


def portable(schema: Schema, budget: WorkBudget | None = None) -> Schema:
    """Return `schema` in the form that works on any engine.

    `json_schema.check` must have accepted it. Values valid under `schema` are valid under the
    result. The work is taken from `budget`, or from a new one.

    Raises:
        SchemaTooComplex: the budget is used up.
    """
    return Converter(budget or work_budget()).documents([schema])[0]


def harmless(schema: Schema, budget: WorkBudget | None = None) -> Schema:
    """Return `schema` unchanged if vLLM can handle it safely, otherwise its portable form.

    vLLM rejects schemas that it does not support.

    Raises:
        SchemaTooComplex: the budget is used up.
    """
    return portable(schema, budget) if any(_is_harmful(node) for node, _ in nodes(schema)) else schema


def _is_harmful(node: Schema) -> bool:
    """Return whether a schema node harms vLLM.

    xgrammar 0.2.8 fails on long repetitions while compiling, after vLLM has accepted the request.
    With a minimum number of properties, it enumerates the ways to choose them (15 of 30 take
    forever).
    """
    by_pattern = node.get("patternProperties")
    for pattern in (node.get("pattern"), *(by_pattern if isinstance(by_pattern, dict) else ())):
        if isinstance(pattern, str) and any(int(number) > regex.MAX_COUNT for number in _repetitions(pattern)):
            return True
    properties = node.get("properties")
    is_large = isinstance(properties, dict) and len(properties) > MAX_COUNTED
    return is_large and ("minProperties" in node or "maxProperties" in node)


def portable_calls(functions: Iterable[tuple[str, Schema]], budget: WorkBudget | None = None) -> Schema:
    """Return the schema for a call of one of `functions`, given as names and argument schemas.

    The call has the form `{"name": ..., "arguments": {...}}`.

    Raises:
        SchemaTooComplex: the budget is used up.
    """
    converter = Converter(budget or work_budget("tools"))
    named = list(functions)
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for (name, _), arguments in zip(named, converter.parts([schema for _, schema in named]), strict=True)
    ]
    return {"anyOf": calls} | converter.definitions()
