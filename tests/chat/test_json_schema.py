"""Tests of the checks of clients' JSON Schemas, and of reference resolution."""

import json
from typing import Any

import pytest

from gateway.chat.json_schema import MAX_DEPTH, MAX_NAME, MAX_NODES, MAX_SCHEMA, SchemaDocument, check, check_size
from gateway.errors import InvalidRequest

PARAM = "response_format.json_schema.schema"
INTEGER = {"type": "integer"}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = INTEGER
    for _ in range(levels - 1):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def deep_value(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def within(schema: Any, **siblings: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": schema}, "required": ["a"]} | siblings


ACCEPTED: dict[str, dict[str, Any]] = {
    "anything": {},
    "draft 7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "items": [INTEGER],
        "definitions": {"a": {"dependencies": {"a": ["b"]}}},
    },
    "boolean schemas": within(True, additionalProperties=False),
    "recursion through a property": {"$defs": {"a": within({"$ref": "#/$defs/a"})}, "$ref": "#/$defs/a"},
    "recursion to the root": within({"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "reference outside keywords": within({"$ref": "#/components/schemas/A"}, components={"schemas": {"A": INTEGER}}),
    "reference by an anchor": within({"$ref": "#here"}, **{"$defs": {"a": {"$anchor": "here", "type": "integer"}}}),
    "reference with escapes": within({"$ref": "#/$defs/a~1b%20~0c"}, **{"$defs": {"a/b ~c": INTEGER}}),
    "property named $ref": within(INTEGER) | {"properties": {"$ref": {"type": "string"}}},
    "bounds that leave one value": {"type": "integer", "minimum": 3, "maximum": 3, "minLength": 0, "maxLength": 0},
    "as deep as allowed": nested(MAX_DEPTH),
    "value that looks like a schema": {"const": {"enum": [], "minLength": 5, "maxLength": 1}},
    "64-bit bounds": {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
}
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong type": ({"type": "thing"}, "is not a valid JSON Schema"),
    "invalid subschema": (within({"minLength": "3"}), "is not a valid JSON Schema"),
    "empty anyOf": (within({"anyOf": []}), ""),
    "empty enum": (within({"enum": []}), "an empty 'enum'"),
    "lengths": (within({"minLength": 3, "maxLength": 2}), "'minLength'"),
    "items": (within({"minItems": 3, "maxItems": 2}), "'minItems'"),
    "numbers": (within({"minimum": 5, "maximum": 1}), "'minimum'"),
    "exclusive bounds": (within({"minimum": 5, "exclusiveMaximum": 5}), "'exclusiveMaximum'"),
    "properties": (within({"minProperties": 5, "maxProperties": 1}), "'minProperties'"),
    "another document": (within({"$ref": "https://example.com/x.json"}), "another document"),
    "file": (within({"$dynamicRef": "file:///etc/passwd"}), "another document"),
    "reference to nothing": (within({"$ref": "#/$defs/a"}), "cannot be resolved"),
    "reference to a missing anchor": (within({"$ref": "#nowhere"}), "cannot be resolved"),
    "reference to a string": (within({"$ref": "#/title"}, title="x"), "cannot be resolved"),
    "reference to something that is not a schema": (within({"$ref": "#/x"}, x={"type": 7}), "not a JSON Schema"),
    "reference to itself": ({"$ref": "#"}, "endless"),
    "circular references": (
        within({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
        "endless",
    ),
    "circular reference through a choice": (
        within({"$ref": "#/$defs/a"}, **{"$defs": {"a": {"anyOf": [INTEGER, {"$ref": "#/$defs/a"}]}}}),
        "endless",
    ),
    "circular reference outside keywords": (within({"$ref": "#/x"}, x={"allOf": [{"$ref": "#/x"}]}), "endless"),
    "too deep": (nested(MAX_DEPTH + 1), "levels"),
    "far too deep": (nested(400), ""),
    "too deep in a value": ({"default": deep_value(250)}, "nested too deeply"),
    "too many": ({"anyOf": [{}] * (MAX_NODES + 1)}, "subschemas"),
    "too long": ({"description": "x" * MAX_SCHEMA}, "bytes"),
    "too long property name": ({"properties": {"_" * (MAX_NAME + 1): INTEGER}}, "characters"),
    "number beyond 64 bits": ({"maximum": 10**30}, ""),
}


@pytest.mark.parametrize("schema", ACCEPTED.values(), ids=ACCEPTED)
def test_valid_schema_is_accepted(schema: dict[str, Any]) -> None:
    check(schema, PARAM)


@pytest.mark.parametrize(("schema", "words"), REJECTED.values(), ids=REJECTED)
def test_rejected_schema_is_named_by_its_path(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(schema, PARAM)
    assert caught.value.param == PARAM
    assert f"'{PARAM}'" in caught.value.message
    assert words in caught.value.message


@pytest.mark.parametrize(
    "fault",
    [
        {"minLength": 2, "maxLength": 1},
        {"$ref": "#/$defs/secret"},
        {"$ref": "secret"},
        {"enum": []},
        {"type": "secret"},
        {"$ref": "#/properties/secret"},
    ],
)
def test_message_names_the_place_and_repeats_nothing_else_of_the_schema(fault: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check({"properties": {"city": {"description": "secret"} | fault}}, PARAM, " of the function 'f'")
    assert "secret" not in caught.value.message
    assert f"'{PARAM}' of the function 'f' " in caught.value.message
    if fault != {"$ref": "secret"}:
        assert ", at 'properties.city" in caught.value.message


@pytest.mark.parametrize(("name", "shown"), [("x" * 300, "x" * 189 + "…'"), ("a\u2028\nb", "a??b'")])
def test_place_in_a_message_is_short_and_printable(name: str, shown: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check({"properties": {name[:250]: {"enum": []}}} if len(name) < 256 else {"properties": {name: 7}}, PARAM)
    assert f", at 'properties.{shown}." in caught.value.message


@pytest.mark.parametrize(
    "schema", [{"properties": 7}, {"type": "any"}, {"$ref": "http://10.0.0.1/x"}, {"required": True}]
)
def test_schema_that_is_only_shown_to_the_model_may_be_anything_small(schema: dict[str, Any]) -> None:
    assert check_size(schema, PARAM) == len(json.dumps(schema, separators=(",", ":")))
    with pytest.raises(InvalidRequest, match="levels deep"):
        check_size(schema | {"items": nested(MAX_DEPTH)}, PARAM)
    with pytest.raises(InvalidRequest, match="bytes"):
        check_size(schema | {"description": "x" * MAX_SCHEMA}, PARAM)


@pytest.mark.parametrize(
    ("reference", "found"),
    [
        ("#", "root"),
        ("", "root"),
        ("#/a", "a"),
        ("#/l/1", "second"),
        ("#/l/01", None),
        ("#/l/2", None),
        ("#/l/-1", None),
        ("#/title", None),
        ("#/yes", True),
    ],
)
def test_reference_is_resolved_as_a_json_pointer(reference: str, found: Any) -> None:
    root = {"title": "root", "a": {"title": "a"}, "l": [{"title": "first"}, {"title": "second"}], "yes": True}
    target = SchemaDocument(root).resolve(reference)
    assert (target["title"] if isinstance(target, dict) else target) == found
