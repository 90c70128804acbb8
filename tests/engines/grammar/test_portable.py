"""Tests of portable schemas: equal to the original where possible, and never stricter.

Covers: gateway/engines/grammar/converter.py
Covers: gateway/engines/grammar/merging.py
Covers: gateway/engines/grammar/values.py
"""

import copy
import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.chat.json_schema import check
from gateway.engines.grammar.converter import MAX_COUNT, MAX_COUNTS, MAX_OPTIONAL
from gateway.engines.grammar.portable import harmless, portable, portable_calls
from gateway.engines.grammar.values import MAX_INTEGER, anything
from gateway.errors import InvalidRequest

INTEGER: dict[str, Any] = {"type": "integer"}
STRING: dict[str, Any] = {"type": "string"}
NULL: dict[str, Any] = {"type": "null"}
ANY = anything()
is_schema = jsonschema_rs.Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"}).is_valid


def array(items: Any, **more: Any) -> dict[str, Any]:
    return {"type": "array", "items": items, **more}


def record(properties: dict[str, Any], *required: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": list(required)} if required else {}) | more


# Unchanged schemas

TREE = {
    "$defs": {
        "Node": record({"next": {"anyOf": [{"$ref": "#/$defs/Node"}, NULL], "default": None}, "n": INTEGER}, "n")
    },
    "$ref": "#/$defs/Node",
}
UNCHANGED: dict[str, dict[str, Any]] = {
    "object": record({"a": STRING, "b": INTEGER}, "a", additionalProperties=False, title="T", description="d"),
    "record": {"type": "object", "additionalProperties": INTEGER},
    "open object": record({"a": STRING}, additionalProperties=True),
    "recursion as in pydantic": TREE,
    "optional as in pydantic": record({"a": {"anyOf": [STRING, NULL], "default": None, "title": "A"}}),
    "literal": record({"kind": {"const": "cat", "type": "string", "title": "Kind"}}, "kind"),
    "enum": {"enum": ["a", 1, 1.5, None, True, {"b": [1]}]},
    "tuple": {"type": "array", "prefixItems": [INTEGER, STRING], "minItems": 2, "maxItems": 2},
    "list": array(STRING, minItems=1, maxItems=10),
    "lengths": {"type": "string", "minLength": 1, "maxLength": 50},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}$"},
    "date": {"type": "string", "format": "date-time"},
    "integer": {"type": "integer", "minimum": -5, "maximum": 120},
    "number": {"type": "number", "minimum": 0.5, "exclusiveMaximum": 2},
    "types": {"type": ["string", "null"]},
    "constant object": {"const": {"a": 1}},
}


@pytest.mark.parametrize("schema", UNCHANGED.values(), ids=UNCHANGED)
def test_common_schema_is_unchanged(schema: dict[str, Any]) -> None:
    assert portable(schema) == schema


def test_order_of_properties_is_kept() -> None:
    assert list(portable(record({"b": STRING, "a": STRING, "c": STRING}))["properties"]) == ["b", "a", "c"]


# Converted schemas

HUGE = 100_000
LONG = {"k" * 201 + str(number): INTEGER for number in range(4)}
CONVERTED: dict[str, tuple[Any, dict[str, Any]]] = {
    "true": (True, ANY),
    "{}": ({}, ANY),
    "no keyword that implies a type": ({"minimum": 3, "description": "d"}, ANY | {"description": "d"}),
    "not": ({"not": STRING}, ANY),
    "if": ({"type": "string", "if": STRING, "then": {"minLength": 2}}, STRING),
    "oneOf": ({"oneOf": [STRING, INTEGER]}, {"anyOf": [STRING, INTEGER]}),
    "nested choice": ({"anyOf": [{"anyOf": [STRING, INTEGER]}, INTEGER]}, {"anyOf": [STRING, INTEGER]}),
    "choice of one": ({"anyOf": [STRING, False]}, STRING),
    "choice of anything": ({"anyOf": [STRING, {}]}, ANY),
    "keywords next to a choice": (
        record({"b": INTEGER, "c": INTEGER}, anyOf=[{"required": ["b"]}, {"required": ["c"]}]),
        {"anyOf": [record({"b": INTEGER, "c": INTEGER}, "b"), record({"b": INTEGER, "c": INTEGER}, "c")]},
    ),
    "allOf": (
        {"allOf": [record({"b": INTEGER}, "b"), {"properties": {"c": STRING}}]},
        record({"b": INTEGER, "c": STRING}, "b"),
    ),
    "types with bounds": (
        {"type": ["integer", "null"], "minimum": 1},
        {"anyOf": [{"type": "integer", "minimum": 1}, NULL]},
    ),
    "unknown format": ({"type": "string", "format": "email", "maxLength": 9}, {"type": "string", "maxLength": 9}),
    "pattern that is not portable": (
        {"type": "string", "pattern": "^(?=x)a$", "minLength": 2},
        {"type": "string", "minLength": 2},
    ),
    "long length": ({"type": "string", "maxLength": HUGE, "minLength": 1}, {"type": "string", "minLength": 1}),
    "many items": (array(INTEGER, minItems=HUGE, maxItems=2 * HUGE), array(INTEGER)),
    "length without items": ({"type": "array", "minItems": 2}, array(ANY, minItems=2)),
    "no items": ({"type": "array", "items": False}, array(ANY, maxItems=0)),
    "uniqueItems and contains": (array(INTEGER, uniqueItems=True, contains=INTEGER), array(INTEGER)),
    "closed tuple": (
        {"type": "array", "prefixItems": [INTEGER], "items": False},
        {"type": "array", "prefixItems": [INTEGER], "maxItems": 1},
    ),
    "tuple of draft 7": (
        {"type": "array", "items": [INTEGER, STRING]},
        {"type": "array", "prefixItems": [INTEGER, STRING]},
    ),
    "open tuple": ({"type": "array", "prefixItems": [INTEGER], "items": STRING}, array({"anyOf": [INTEGER, STRING]})),
    "integer above a fraction": ({"type": "integer", "exclusiveMinimum": -1.5}, {"type": "integer", "minimum": -1}),
    "integer below a fraction": ({"type": "integer", "exclusiveMaximum": 1.5}, {"type": "integer", "maximum": 1}),
    "zod's integer": (
        {"type": "integer", "exclusiveMinimum": 0, "maximum": 2**53 - 1},
        {"type": "integer", "minimum": 1},
    ),
    "bounds without an integer in between": ({"type": "integer", "minimum": 1.2, "maximum": 1.8}, INTEGER),
    "multipleOf": ({"type": "integer", "multipleOf": 5}, INTEGER),
    "any additional property": (
        record({"a": INTEGER}, additionalProperties={}),
        record({"a": INTEGER}, additionalProperties=True),
    ),
    "pattern properties": (
        {"type": "object", "patternProperties": {"^a": INTEGER}, "additionalProperties": False},
        {"type": "object", "additionalProperties": INTEGER},
    ),
    "additional properties next to an unusual name": (
        record({"é-ä": INTEGER}, additionalProperties=STRING),
        record({"é-ä": INTEGER}),
    ),
    "additional properties next to long names": (record(LONG, additionalProperties=True), record(LONG)),
    "forbidden property": (record({"a": False, "b": INTEGER}, "a", "b"), record({"b": INTEGER}, "b")),
    "required but not described": (record({"a": INTEGER}, "a", "z"), record({"a": INTEGER}, "a")),
    "property named $ref": (record({"$ref": STRING, "a": INTEGER}), {"type": "object"}),
    "value with a $ref": ({"enum": [{"a": {"$ref": "#/x"}}, 1]}, ANY),
    "values of several types": ({"type": ["string", "null"], "enum": ["a", None]}, {"enum": ["a", None]}),
    "default that is not a scalar": ({"type": "integer", "default": {"$ref": 1}, "examples": [1]}, INTEGER),
    "keywords of the newest draft": (
        record({"a": INTEGER}, unevaluatedProperties=False, dependentRequired={"a": ["b"]}),
        record({"a": INTEGER}),
    ),
    "property names": (record({"a": INTEGER}, propertyNames=STRING), record({"a": INTEGER})),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "sent"), CONVERTED.values(), ids=CONVERTED)
def test_schema_is_converted_to_keywords_that_all_engines_support(schema: Any, sent: dict[str, Any]) -> None:
    assert portable(record({"x": schema}, "x")) == record({"x": sent}, "x")


def test_object_with_too_many_optional_properties_keeps_the_required_ones() -> None:
    names = [f"p{number}" for number in range(MAX_OPTIONAL + 2)]
    assert portable(record(dict.fromkeys(names, INTEGER), "p7")) == record(
        {"p7": INTEGER}, "p7", additionalProperties=True
    )


def test_sum_of_all_bounds_is_limited() -> None:
    sent = portable(
        record(
            {f"p{number}": {"type": "string", "maxLength": MAX_COUNT} for number in range(MAX_COUNTS // MAX_COUNT + 5)}
        )
    )
    assert sum(part.get("maxLength", 0) for part in sent["properties"].values()) == MAX_COUNTS


# References


def test_reference_to_the_root_becomes_a_definition() -> None:
    sent = portable(record({"a": {"anyOf": [{"$ref": "#"}, NULL]}}))
    assert sent == {
        "$ref": "#/$defs/root",
        "$defs": {"root": record({"a": {"anyOf": [{"$ref": "#/$defs/root"}, NULL]}})},
    }


def test_reference_to_any_place_becomes_a_definition() -> None:
    schema = record(
        {"a": {"$ref": "#/components/a~1b"}, "b": {"$ref": "#/definitions/c"}, "d": {"$ref": "#here"}},
        components={"a/b": INTEGER},
    )
    schema |= {"definitions": {"c": STRING, "unused": {"not": {}}}, "$defs": {"x": {"$anchor": "here", "type": "null"}}}
    sent = portable(schema)
    names = [part["$ref"].removeprefix("#/$defs/") for part in sent["properties"].values()]
    assert [sent["$defs"][name] for name in names] == [INTEGER, STRING, NULL]
    assert len(sent["$defs"]) == 3


def test_references_with_colliding_rule_names_get_distinct_names() -> None:
    sent = portable(
        record({"a": {"$ref": "#/$defs/x_y"}, "b": {"$ref": "#/$defs/x-y"}})
        | {"$defs": {"x_y": INTEGER, "x-y": STRING}}
    )
    assert [sent["$defs"][part["$ref"].removeprefix("#/$defs/")] for part in sent["properties"].values()] == [
        INTEGER,
        STRING,
    ]
    assert len({name.replace("_", "-") for name in sent["$defs"]}) == 2


@pytest.mark.parametrize("name", ["", "decimal_part", "string", "space", "root"])
def test_property_does_not_replace_the_converters_own_rule(name: str) -> None:
    schema = record({name: STRING})
    assert portable(schema) == {"$ref": "#/$defs/root", "$defs": {"root": schema}}


def test_long_path_is_shortened_by_a_definition() -> None:
    schema = INTEGER
    for number in range(10):
        schema = record({f"{number}" * 100: schema, "b": INTEGER})
    assert len(portable(schema)["$defs"]) >= 9


def test_expansion_of_recursive_allof_is_limited() -> None:
    node = {
        "allOf": [
            {"$ref": "#/$defs/base"},
            record({"left": {"$ref": "#/$defs/node"}, "right": {"allOf": [{"$ref": "#/$defs/node"}, {"title": "x"}]}}),
        ]
    }
    sent = portable({"$ref": "#/$defs/node", "$defs": {"node": node, "base": record({"n": INTEGER}, "n")}})
    assert len(json.dumps(sent)) < 10_000


# Ambiguous choices


def test_ambiguous_recursion_becomes_any_value_of_its_type() -> None:
    twice = {"anyOf": [array({"$ref": "#/$defs/t"}), array({"$ref": "#/$defs/t"}, minItems=1), INTEGER]}
    assert portable(record({"a": {"$ref": "#/$defs/t"}}) | {"$defs": {"t": twice}})["$defs"]["t"] == {
        "anyOf": [INTEGER, {"type": "array"}]
    }


def test_nested_choices_are_limited() -> None:
    schema: dict[str, Any] = INTEGER
    for number in range(8):
        schema = {"anyOf": [array(schema), array(schema, minItems=number + 1)]}
    check(record({"a": schema}), "p")
    assert len(json.dumps(portable(record({"a": schema})))) < 2_000


def cross_referencing(number: int) -> dict[str, Any]:
    """Return a definition that refers to a later and to an earlier one."""
    return {
        "anyOf": [
            array({"$ref": f"#/$defs/D{number + 1}"}),
            array({"$ref": f"#/$defs/D{number // 2}"}, minItems=number),
        ]
    }


@pytest.mark.parametrize(
    "schema",
    [
        {
            "$ref": "#/$defs/D0",
            "$defs": {f"D{number}": cross_referencing(number) for number in range(250)} | {"D250": INTEGER},
        },
        record({str(number): record({"x" * 200: record({"y": INTEGER})}) for number in range(100)}),
        {
            "allOf": [{"$ref": "#/$defs/a"}] * 1000,
            "$defs": {"a": record({f"p{number}": INTEGER for number in range(300)})},
        },
        {"anyOf": [record({"a": {"const": number}}, "a") for number in range(300)]},
    ],
    ids=["definitions", "names", "allOf", "anyOf"],
)
def test_large_schema_grows_at_most_twofold(schema: dict[str, Any]) -> None:
    check(schema, "p")
    assert len(json.dumps(portable(schema))) < 2 * len(json.dumps(schema))


# Calls


def test_call_keeps_the_definitions_of_each_function_apart() -> None:
    one = record({"a": {"$ref": "#/$defs/x"}}) | {"$defs": {"x": INTEGER}}
    other = record({"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#"}}) | {"$defs": {"x": STRING}}
    sent = portable_calls([("f", one), ("g", other)])
    check(sent, "p")
    takes = jsonschema_rs.Draft202012Validator(sent).is_valid
    assert takes({"name": "f", "arguments": {"a": 1}})
    assert takes({"name": "g", "arguments": {"a": "x", "b": {"a": "y"}}})
    assert not takes({"name": "f", "arguments": {"a": "x"}})
    assert not takes({"name": "g", "arguments": {"b": {"a": 1}}})
    assert not takes({"name": "h", "arguments": {}})


# Schemas that harm vLLM


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^a{129}$"},
        {"type": "string", "pattern": "x{1,5000}"},
        {"type": "object", "patternProperties": {"^a{5000}$": INTEGER}},
        record({f"p{number}": INTEGER for number in range(30)}, minProperties=15),
    ],
)
def test_schema_that_harms_vllm_becomes_portable(schema: dict[str, Any]) -> None:
    assert harmless(record({"a": schema})) == portable(record({"a": schema}))


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": r"\d{1,128}x{3}"},
        {"format": "email"},
        {"multipleOf": 3},
        {"not": {}},
        record({"a": INTEGER}, minProperties=1),
    ],
)
def test_harmless_schema_is_unchanged(schema: dict[str, Any]) -> None:
    assert harmless(record({"a": schema})) == record({"a": schema})


# Any schema

NAMES = st.sampled_from(["a", "b", "name", "", "é", "a-b", "type", "$ref", "decimal_part", "x]"])
NUMBERS = st.sampled_from([0, 1, 2, 3, 1.5, -1.5, 1000, 2**53 - 1, -(2**62), 1e300, MAX_INTEGER])
COUNTS = st.sampled_from([0, 1, 2, 3, 3.0, MAX_COUNT, HUGE])
TYPES = st.sampled_from(["object", "array", "string", "integer", "number", "boolean", "null"])
SCALARS = st.sampled_from([0, 1, 2, -1, 1.5, "a", "ab", "12", "", None, True, False, "2020-01-01"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)
PATTERNS = st.sampled_from(["a", "^a$", "^(?:ab|c)$", r"^\d+$", "^(?=a)a$", "^a{2,1000}$", "^.*$"])
REFERENCES = st.sampled_from(["#", "#/$defs/a", "#/$defs/b", "#/definitions/c"])


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    some = st.lists(inner, min_size=1, max_size=3)
    named = st.dictionaries(NAMES, inner, max_size=3)
    found: dict[str, st.SearchStrategy[Any]] = {
        "type": TYPES | st.lists(TYPES, min_size=1, max_size=3, unique=True),
        "enum": st.lists(VALUES, min_size=1, max_size=3), "const": VALUES,
        "properties": named, "required": st.lists(NAMES, max_size=2, unique=True), "additionalProperties": inner,
        "patternProperties": st.just({"^a": {}}),
        "items": inner, "prefixItems": some, "anyOf": some, "oneOf": some, "allOf": some, "not": inner, "if": inner,
        "$ref": REFERENCES, "minLength": COUNTS, "maxLength": COUNTS, "minItems": COUNTS, "maxItems": COUNTS,
        "minimum": NUMBERS, "maximum": NUMBERS, "exclusiveMinimum": NUMBERS, "pattern": PATTERNS,
        "format": st.sampled_from(["date", "email"]), "uniqueItems": st.just(True), "contains": inner,
        "default": VALUES, "title": st.just("t"),
    }  # fmt: skip
    pair = st.sampled_from(sorted(found)).flatmap(lambda name: st.tuples(st.just(name), found[name]))
    return st.lists(pair, min_size=1, max_size=4).map(dict)


SCHEMAS = st.recursive(st.booleans() | st.just({}) | TYPES.map(lambda name: {"type": name}), keywords, max_leaves=8)
DOCUMENTS = st.tuples(SCHEMAS.filter(lambda schema: isinstance(schema, dict)), SCHEMAS, SCHEMAS, SCHEMAS).map(
    lambda parts: parts[0] | {"$defs": {"a": parts[1], "b": parts[2]}, "definitions": {"c": parts[3]}}
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(DOCUMENTS, st.lists(VALUES, min_size=10, max_size=20))
def test_any_accepted_schema_becomes_one_that_accepts_at_least_as_much(
    schema: dict[str, Any], values: list[Any]
) -> None:
    try:
        check(schema, "p")
    except InvalidRequest:
        return
    before = copy.deepcopy(schema)
    sent = portable(schema)
    assert schema == before
    assert is_schema(sent)
    check(sent, "p")
    assert portable(sent) == sent
    strict, loose = jsonschema_rs.Draft202012Validator(schema), jsonschema_rs.Draft202012Validator(sent)
    for value in values:
        if strict.is_valid(value):
            assert loose.is_valid(value)


KEYS = st.sampled_from(
    ["a", "b", "type", "properties", "items", "anyOf", "$ref", "enum", "allOf", "minItems", "required", "pattern"]
)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["type", "properties", "anyOf", "allOf", "$ref", "$defs", "enum", "items"]), JSON, max_size=4
    )
)
def test_invalid_schema_does_not_fail(schema: dict[str, Any]) -> None:
    assert is_schema(portable(schema))
