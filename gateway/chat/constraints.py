"""vLLM's fields for structured output: `structured_outputs`, and `guided_*` of vLLM before 0.12. Pure.

`json` and `json_object` mean the same as `response_format`. A choice, a regular expression and a
grammar have no equivalent in OpenAI's API.
"""

from collections.abc import Iterator
from typing import Annotated, Any

import orjson
from msgspec import Meta, Struct

from gateway.chat.schema_repair import repair
from gateway.errors import InvalidRequest, UnsupportedParameter

MAX_CHOICES, MAX_PATTERN, MAX_GRAMMAR = 1000, 2000, 16 * 1024
MAX_SCHEMA_TEXT = 128 * 1024
"""Maximum length of a JSON Schema that is given as text, whose white space does not count as schema."""
MAX_NESTING = 32
"""Maximum nesting of brackets in a pattern or grammar: the compilers of the engines recurse."""

Choices = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=1000)]], Meta(min_length=1, max_length=MAX_CHOICES)
]
Pattern = Annotated[str, Meta(min_length=1, max_length=MAX_PATTERN)]
Grammar = Annotated[str, Meta(min_length=1, max_length=MAX_GRAMMAR)]


class StructuredOutputs(Struct, frozen=True):
    """Constraint of the answer, of which one kind may be set (vllm/sampling_params.py, 0.32).

    Options for the form of JSON, such as `whitespace_pattern`, are ignored.
    """

    json: dict[str, Any] | str | None = None
    json_object: bool | None = None
    choice: Choices | None = None
    regex: Pattern | None = None
    grammar: Grammar | None = None
    structural_tag: Any = None


class ChoiceFormat(Struct, frozen=True):
    """The answer is one of these texts. `param` is the name of the request's field."""

    choices: list[str]
    param: str


class RegexFormat(Struct, frozen=True):
    """The whole answer matches the pattern."""

    pattern: str
    param: str


class GrammarFormat(Struct, frozen=True):
    """The answer follows a grammar in EBNF, in the form that vLLM reads."""

    grammar: str
    param: str


Constraint = ChoiceFormat | RegexFormat | GrammarFormat


def constraint(outputs: StructuredOutputs, prefix: str) -> Constraint | None:
    """Return the constraint in `outputs`, None if it is JSON or none. `prefix` begins its name."""
    if outputs.choice is not None:
        return ChoiceFormat(outputs.choice, f"{prefix}choice")
    if outputs.regex is not None:
        return RegexFormat(outputs.regex, f"{prefix}regex")
    if outputs.grammar is not None:
        return GrammarFormat(outputs.grammar, f"{prefix}grammar")
    return None


def schema_of(json: dict[str, Any] | str, param: str) -> dict[str, Any]:
    """Return a JSON Schema that may be given as text.

    Raises:
        InvalidRequest: it is not the JSON of an object, or too long to be parsed.
    """
    if isinstance(json, dict):
        return json
    if len(json) > MAX_SCHEMA_TEXT:
        raise InvalidRequest(f"'{param}' has more than {MAX_SCHEMA_TEXT} characters.", param=param)
    try:
        schema = orjson.loads(json)
    except orjson.JSONDecodeError:
        schema = None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"'{param}' is not a JSON Schema.", param=param)
    repair(schema)
    return schema


def given(outputs: StructuredOutputs | None, guided: dict[str, Any]) -> list[str]:
    """Return the names of the constraints in `structured_outputs` and in the `guided_*` fields.

    Raises:
        InvalidRequest: `structured_outputs` has none.
        UnsupportedParameter: it has one that the gateway does not serve.
    """
    names = [name for name, value in guided.items() if value is not None]
    if outputs is None:
        return names
    if outputs.structural_tag is not None:
        name = "structured_outputs.structural_tag"
        raise UnsupportedParameter(f"'{name}' is not supported. Send 'tools' or a JSON Schema.", param=name)
    own = [f"structured_outputs.{name}" for name in _set_names(outputs)]
    if not own:
        raise InvalidRequest(
            "'structured_outputs' must have 'json', 'json_object', 'choice', 'regex' or 'grammar'.",
            param="structured_outputs",
        )
    return own + names


def _set_names(outputs: StructuredOutputs) -> Iterator[str]:
    for name in ("json", "json_object", "choice", "regex", "grammar"):
        if getattr(outputs, name) is not None:
            yield name


def check_nesting(text: str, param: str) -> None:
    """Check the nesting of brackets in a pattern or grammar, whatever they mean there.

    Raises:
        InvalidRequest: it is too deep.
    """
    depth = 0
    for char in text:
        if char in "([{":
            depth += 1
            if depth > MAX_NESTING:
                raise InvalidRequest(f"'{param}' is nested more than {MAX_NESTING} levels deep.", param=param)
        elif char in ")]}":
            depth = max(0, depth - 1)
