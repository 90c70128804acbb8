"""Values generated for JSON Schemas."""

from typing import Any

import pytest

from gateway.simulate.json_values import instance

ITEM = {"type": "object", "properties": {"n": {"type": "number"}}}


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        ({"type": "integer", "minimum": 0, "maximum": 2}, 2),
        ({"type": "integer", "exclusiveMinimum": 10}, 11),
        ({"type": "string", "maxLength": 3}, "wor"),
        ({"type": "string", "minLength": 6}, "wordxx"),
        ({"type": ["string", "null"]}, "word"),
        ({"enum": ["a", "b"]}, "a"),
        ({"const": None}, None),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, True),
        ({"type": "array", "items": {"type": "null"}, "minItems": 2}, [None, None]),
        ({"$defs": {"item": ITEM}, "type": "array", "items": {"$ref": "#/$defs/item"}}, [{"n": 4}]),
        ({"allOf": [ITEM]}, {"n": 4}),
        (True, {}),
    ],
)
def test_value_satisfies_its_schema(schema: Any, value: Any) -> None:
    assert instance(schema, "word") == value


def test_recursive_schema_ends() -> None:
    tree: dict[str, Any] = {"type": "object", "properties": {"child": {"$ref": "#"}}}
    assert "child" in instance(tree, "word")
