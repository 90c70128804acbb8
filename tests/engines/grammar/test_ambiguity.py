"""Tests of the limit on simultaneous parses of a grammar."""

import copy
from typing import Any

import pytest

from gateway.engines.grammar.ambiguity import MAX_ALIKE, MAX_PARSES, limit_ambiguity, referenced

INTEGER: dict[str, Any] = {"type": "integer"}
STRING: dict[str, Any] = {"type": "string"}
AGAIN = {"$ref": "#/$defs/t"}


def array(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def record(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {})


def limit(*choices: dict[str, Any], **definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the definition `t`, a choice of `choices` that refer to it, after limiting."""
    all_of_them = copy.deepcopy({"t": {"anyOf": list(choices)}} | definitions)
    limit_ambiguity([AGAIN], all_of_them)
    return all_of_them["t"]


def test_two_recursive_arrays_become_any_array() -> None:
    assert limit(array(AGAIN), array(AGAIN, minItems=1), INTEGER) == {"anyOf": [INTEGER, {"type": "array"}]}


def test_two_recursive_objects_that_begin_alike_become_any_object() -> None:
    assert limit(record({"a": AGAIN}, "a"), record({"a": AGAIN, "b": INTEGER}, "a"), INTEGER) == {
        "anyOf": [INTEGER, {"type": "object"}]
    }
    assert limit(record({"a": AGAIN}), record({"b": AGAIN}, "b")) == {"type": "object"}


def test_indirect_recursion_is_recognised() -> None:
    through = {"other": {"anyOf": [array({"anyOf": [STRING, AGAIN]}), INTEGER]}, "last": array(AGAIN)}
    choices = [{"$ref": "#/$defs/last"}, array({"$ref": "#/$defs/other"})]
    assert limit(*choices, **through) == {"type": "array"}
    mixed = limit(array(AGAIN), {"$ref": "#/$defs/other"}, **through)
    assert set(mixed["type"]) == {"object", "array", "string", "number", "boolean", "null"}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (record({"and": AGAIN}, "and"), record({"or": AGAIN}, "or")),
        (record({"op": {"const": "+"}, "a": AGAIN}, "op"), record({"op": {"const": "-"}, "a": AGAIN}, "op")),
        (
            record({"op": {"enum": ["+"]}, "a": AGAIN}, "op"),
            record({"op": {"$ref": "#/$defs/minus"}, "a": AGAIN}, "op"),
        ),
        (record({"a": AGAIN}, "a"), array(AGAIN)),
        (record({"name": STRING, "children": array(AGAIN)}, "name"), record({"name": STRING}, "name")),
    ],
    ids=["property", "value", "value elsewhere", "type", "one alone"],
)
def test_distinguishable_choices_stay(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert limit(one, other, minus={"const": "-"}) == {"anyOf": [one, other]}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = INTEGER
    for number in range(levels):
        schema = {"anyOf": [array(schema), array(schema, minItems=number + 1)]}
    return schema


def depth(schema: dict[str, Any]) -> int:
    if "anyOf" in schema:
        return 1 + max(depth(choice) for choice in schema["anyOf"])
    return depth(schema["items"]) if "items" in schema else 0


def test_nested_choices_are_kept_up_to_the_limit() -> None:
    levels = MAX_PARSES.bit_length() - 1
    few, many = nested(levels), nested(levels + 1)
    limit_ambiguity([few, many], {})
    assert depth(few) == levels
    assert many == {"type": "array"}


def test_choice_of_too_many_alike_becomes_any_of_their_type() -> None:
    choices = {"anyOf": [record({"a": {"const": number}}, "a") for number in range(MAX_ALIKE + 1)]}
    few = {"anyOf": choices["anyOf"][: MAX_ALIKE // 2]}
    before = copy.deepcopy(few)
    limit_ambiguity([choices, few], {})
    assert choices == {"type": "object"}
    assert few == before


def test_only_referenced_definitions_are_kept() -> None:
    definitions = {"a": array({"$ref": "#/$defs/b"}), "b": INTEGER, "c": array({"$ref": "#/$defs/a"})}
    assert referenced([record({"x": {"anyOf": [{"$ref": "#/$defs/a"}, STRING]}})], definitions) == {
        "a": definitions["a"],
        "b": INTEGER,
    }
