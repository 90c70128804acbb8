"""Repair of the schemas of tools that careless generators write."""

import copy
from typing import Any

import pytest

from gateway.chat.checks import check
from gateway.chat.json_schema import check as check_schema
from gateway.chat.schema_repair import repair
from gateway.errors import InvalidRequest
from tests.chat.test_json_schema import ACCEPTED
from tests.fakes.chats import chat, named, tool


def repaired(schema: dict[str, Any]) -> dict[str, Any]:
    copied = copy.deepcopy(schema)
    repair(copied)
    return copied


def within(property: Any, **siblings: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"a": property}, **siblings}


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "draft 4 bounds": (
        within({"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 9, "exclusiveMaximum": False}),
        within({"type": "integer", "exclusiveMinimum": 0, "maximum": 9}),
    ),
    "draft 4 bound without its number": (within({"exclusiveMaximum": True}), within({})),
    "null keywords": (
        within(
            {"type": "string", "enum": None, "description": None, "items": None, "minLength": None},
            required=None,
            description=None,
            additionalProperties=None,
            title=None,
        ),
        within({"type": "string"}),
    ),
    "null values": (
        within({"default": None, "const": None, "enum": [None, 1]}),
        within({"default": None, "const": None, "enum": [None, 1]}),
    ),
    "null properties": ({"type": "object", "properties": None}, {"type": "object"}),
    "empty list of properties": ({"type": "object", "properties": []}, {"type": "object", "properties": {}}),
    "draft 3 required": (
        within({"type": "string", "required": True}, required=["b"]),
        within({"type": "string"}, required=["b", "a"]),
    ),
    "draft 3 not required": (within({"required": False}), within({})),
    "required of nothing": ({"type": "object", "required": True}, {"type": "object"}),
    "required as one name": (within({}, required="a"), within({}, required=["a"])),
    "required with other values": (within({}, required=["a", None, 5]), within({}, required=["a"])),
    "nested required": (
        within(within({"required": True})),
        within({"type": "object", "properties": {"a": {}}, "required": ["a"]}),
    ),
    "type any": (within({"type": "any"}), within({})),
    "type any among others": (within({"type": ["string", "any"]}), within({})),
    "types of other languages": (
        within({"type": "STRING"}, type="OBJECT", **{"$defs": {"b": {"type": ["int", "float", "bool"]}}}),
        within({"type": "string"}, **{"$defs": {"b": {"type": ["integer", "number", "boolean"]}}}),
    ),
    "type object or null": (within({}, type=["object", "null"]), within({})),
    "description that is no text": (within({"description": ["x"]}), within({})),
    "properties that are named as keywords": (
        {"properties": {"required": {"type": "any"}, "type": {"enum": None}, "properties": {}}},
        {"properties": {"required": {}, "type": {}, "properties": {}}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_careless_schema_is_repaired_and_then_valid(name: str) -> None:
    schema, expected = CASES[name]
    assert repaired(schema) == expected
    check_schema(repaired(schema), "x")


@pytest.mark.parametrize("name", ACCEPTED)
def test_valid_schema_is_unchanged(name: str) -> None:
    assert repaired(ACCEPTED[name]) == ACCEPTED[name]


ODD = {
    "dangling reference": within({"$ref": "#/$defs/nowhere"}),
    "unknown type": within({"type": "file"}),
    "property that is no schema": within("string"),
    "another document": within({"$ref": "https://example.com/x.json"}),
    "empty enum": within({"enum": []}),
}


@pytest.mark.parametrize("name", ODD)
def test_schema_beyond_repair_is_refused_only_where_a_grammar_is_made_of_it(name: str) -> None:
    def tools() -> list[dict[str, Any]]:
        return [tool("fine"), tool("odd", copy.deepcopy(ODD[name]))]

    for choice in (None, "auto", "none", named("fine")):
        check(chat(tools=tools(), tool_choice=choice))
    for choice in ("required", named("odd")):
        with pytest.raises(InvalidRequest) as caught:
            check(chat(tools=tools(), tool_choice=choice))
        assert caught.value.param == "tools[1].function.parameters"
        assert "of the function 'odd'" in caught.value.message
        if name != "another document":
            assert "at 'properties.a" in caught.value.message


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_one_careless_tool_does_not_fail_the_request(name: str, choice: str) -> None:
    request = chat(tools=[tool("fine"), tool("careless", copy.deepcopy(CASES[name][0]))], tool_choice=choice)
    check(request)
    assert request.tools is not None
    assert request.tools[1].function.parameters == CASES[name][1]
