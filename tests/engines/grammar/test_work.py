"""Tests of the work that a client's JSON Schema may take: counted, and refused beyond its budget."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest

from gateway.chat.json_schema import MAX_SCHEMA, WorkBudget, check
from gateway.engines.grammar import regex
from gateway.engines.grammar.portable import MAX_WORK, portable, portable_calls, work_budget
from gateway.engines.ollama import Ollama
from gateway.engines.vllm import Vllm
from gateway.errors import GatewayError, InvalidRequest, SchemaTooComplex
from tests.fakes.chats import chat, schema_format, tool
from tests.fakes.processor_time import assert_at_most


def assert_quick(work: Callable[[], object]) -> None:
    """Check that `work` takes, or raises within, not much longer than an ordinary schema of the largest size."""

    def run() -> None:
        with suppress(GatewayError):
            work()

    assert_at_most(10, run, yardstick=lambda: portable(ORDINARY))


def record(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | more


STRING = {"type": "string"}
ORDINARY = record(
    {
        f"section_{number}": record(
            {name: STRING | {"description": f"The {name} of the section."} for name in ("title", "author", "text")}
            | {"pages": {"type": "array", "items": {"type": "integer"}}, "kind": {"enum": ["a", "b", "c"]}},
            required=["title", "text"],
        )
        for number in range(80)
    }
)
"""About as large as a schema may be, and within the budget."""


def ref(name: object) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{name}"}


def levels(keyword: str, repeats: int, count: int = 5, **lowest: Any) -> dict[str, Any]:
    """Return a schema whose levels each refer `repeats` times to the one below."""
    defs = {"l0": lowest} | {f"l{level}": {keyword: [ref(f"l{level - 1}")] * repeats} for level in range(1, count)}
    return record({"x": ref(f"l{count - 1}")}) | {"$defs": defs}


ENUMS = {"a": {"$anchor": "a", "enum": [1] * 1200}, "b": {"$anchor": "b", "enum": [2] * 1200}}
ANCHORS = {
    f"l{level}": {"$anchor": f"l{level}", "allOf": [{"$ref": f"#{name}"} for name in names] * 6}
    for level, names in enumerate([("a", "b"), ("l0",), ("l1",), ("l2",), ("l3",)])
}
NAMES = [f"n{number:03}" for number in range(700)]
HOSTILE: dict[str, dict[str, Any]] = {
    "enums under allOf": {"$defs": ENUMS | ANCHORS, "type": "object", "properties": {"x": {"$ref": "#l4"}}},
    "distinct enums under allOf": {
        "allOf": [{"enum": [f"v{number}" for number in range(start, start + 120)]} for start in range(20)]
    },
    "required under allOf": {
        "allOf": [part for number in range(600) for part in ({"required": [f"r{number}"]}, {"minLength": number})]
    },
    "properties under allOf": {
        "$defs": {"a": record(dict.fromkeys(NAMES, True)), "b": record({"z": True})},
        "allOf": [ref("a"), ref("b")] * 400,
    },
    "allOf at every level": levels("allOf", 6, type="object", required=NAMES),
    "anyOf at every level": levels("anyOf", 6, 7, enum=NAMES),
    "choice beside an enum": {"$defs": {"t": {"minLength": 1}}, "enum": NAMES, "anyOf": [ref("t")] * 1200},
    "choice beside properties": record(dict.fromkeys(NAMES, STRING), anyOf=[{"minProperties": 1}] * 400),
    "choices beside choices": {"$defs": {f"d{number}": {"type": "object", "anyOf": [ref(f"d{number + 1}")] * 8,
        "properties": {f"p{number}": {}}} for number in range(9)} | {"d9": {}}, "$ref": "#/$defs/d0"},
    "description written again": {
        "$defs": {"t": {"description": "x" * 20_000, "type": "string"}},
        "type": "string", "anyOf": [{"allOf": [ref("t"), {"maxLength": number}]} for number in range(150)],
    },
    "value written again": {
        "$defs": {"t": {"enum": ["x" * 20_000]}},
        "type": "string", "anyOf": [{"allOf": [ref("t"), {"maxLength": number}]} for number in range(150)],
    },
    "long pattern": {"pattern": "^[" + "ab-d" * 7000 + "]$"},
    "long patterns": record({f"p{number}": {"pattern": f"^[{'a-c' * 300}]{{{number}}}$"} for number in range(1, 33)}),
    "pattern of digits": {"pattern": "^a{" + "9" * 30_000 + "}$"},
    "path through definitions": {"$defs": {str(number): record({"a": ref(number + 1)}) for number in range(450)}
        | {"450": {}}, "$ref": "#/$defs/0"},
    "cycle of definitions": {"$defs": {str(number): record({"a": ref((number + 1) % 450)}) for number in range(450)},
        "$ref": "#/$defs/0"},
    "definitions that refer to all": {"$defs": {str(number): {"prefixItems": [ref(other) for other in range(36)]}
        for number in range(36)}, "$ref": "#/$defs/0"},
    "long pointer": {"$defs": {"%61" * 200: {"type": "string"}, "b": {"$ref": "#/$defs/" + "%61" * 200}},
        "anyOf": [{"minLength": 1, "allOf": [ref("b")]}] * 600},
    "taken names": {"$defs": {f"def-{number}": record({"a": {}}) for number in range(300)}, "type": "object",
        "properties": {"x" * 60: record({f"y{number}": record({"z": {}}) for number in range(100)})}
        | {str(number): ref(f"def-{number}") for number in range(300)}},
    "choices that begin alike": {"$defs": {f"d{number}": {"anyOf": [
        {"type": "array", "items": ref((number * 7 + 1) % 60)}, ref(f"d{number + 1}") if number < 59 else STRING,
        record({"k": ref(f"d{number // 2}")}, required=["k"])]} for number in range(60)}
        | {str(number): ref(f"d{number}") for number in range(60)}, "$ref": "#/$defs/0"},
    "pattern properties": {"patternProperties": {f"^{number}": {"anyOf": [{"enum": NAMES[:60]}, {"minLength": number}]}
        for number in range(60)}, "additionalProperties": False},
    "references into a value": {"x": {"y": {"enum": NAMES}},
        "allOf": [{"$ref": "#/x/y" + "/enum" * (number % 2)} for number in range(2)]},
}  # fmt: skip


def nested_targets() -> dict[str, Any]:
    """Return a schema with references to each level of a value that no keyword defines as a schema."""
    inner: dict[str, Any] = {"enum": NAMES}
    for _ in range(130):
        inner = {"x": inner}
    return {"x": inner, "allOf": [{"$ref": "#" + "/x" * depth} for depth in range(130, 1, -1)]}


HOSTILE["references into each other"] = nested_targets()


@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_hostile_schema_is_converted_or_refused_as_soon_as_an_ordinary_one(schema: dict[str, Any]) -> None:
    assert len(orjson.dumps(schema)) <= MAX_SCHEMA
    assert_quick(lambda: check(schema, "p"))
    assert_quick(lambda: portable(schema))
    assert_quick(lambda: portable_calls([("f", schema), ("g", schema)]))


@pytest.mark.parametrize(
    "name", ["properties under allOf", "choice beside an enum", "description written again", "value written again"]
)
def test_schema_beyond_the_budget_is_refused_by_name(name: str) -> None:
    with pytest.raises(SchemaTooComplex) as caught:
        portable(HOSTILE[name])
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_value", "response_format.json_schema.schema")
    assert "too complex" in error.message


def test_check_refuses_references_that_are_too_much_to_validate() -> None:
    with pytest.raises(SchemaTooComplex) as caught:
        check(nested_targets(), "tools[0].function.parameters")
    assert caught.value.param == "tools[0].function.parameters"


def test_work_is_counted_and_not_hoped_for() -> None:
    """The same schema takes the same number of units at every attempt, and the budget is for all."""

    def spent(times: int) -> int:
        budget = WorkBudget(10 * MAX_WORK, "p")
        for _ in range(times):
            portable(HOSTILE["pattern properties"], budget)
        return 10 * MAX_WORK - budget._left

    assert spent(1) > 0
    assert spent(3) == 3 * spent(1)
    with pytest.raises(SchemaTooComplex):
        work_budget().spend(MAX_WORK + 1)


def test_repeated_parts_are_merged_once() -> None:
    budget = work_budget()
    assert portable(HOSTILE["enums under allOf"], budget)["properties"] == {"x": {"$ref": "#/$defs/root"}}
    assert budget._left > MAX_WORK // 2


def test_result_is_small_however_often_a_text_is_used() -> None:
    for schema in HOSTILE.values():
        try:
            assert len(orjson.dumps(portable(schema))) < 16 * MAX_WORK
        except SchemaTooComplex:
            continue


def test_path_through_hundreds_of_definitions_is_converted() -> None:
    for name in ("path through definitions", "cycle of definitions"):
        assert len(portable(HOSTILE[name])["$defs"]) == 450 + (name == "path through definitions")


def test_long_pattern_is_dropped_unread() -> None:
    assert regex.portable("^" + "[ab]" * (regex.MAX_LENGTH // 4) + "$") is None
    assert regex.portable("^a{1234567}$") is None
    assert regex.portable("^[" + "ab" * 800 + "]$") == "^[a-b]$"


TOO_MUCH = HOSTILE["choice beside an enum"]


def test_ollama_refuses_before_it_is_asked() -> None:
    formatted = chat(response_format=schema_format(TOO_MUCH))
    forced = chat(tools=[tool(parameters=TOO_MUCH | {"type": "object"})], tool_choice="required")
    for request, param in ((formatted, "response_format.json_schema.schema"), (forced, "tools")):
        with pytest.raises(SchemaTooComplex) as caught:
            Ollama().check(request)
        assert caught.value.param == param
    Ollama().check(chat(tools=[tool(parameters=TOO_MUCH | {"type": "object"})]))  # no grammar


def test_vllm_refuses_only_what_has_to_be_converted() -> None:
    Vllm().check(chat(response_format=schema_format(TOO_MUCH)))
    harmful = TOO_MUCH | {"properties": {"a": {"pattern": "^a{1,999}$"}}, "type": "object"}
    with pytest.raises(SchemaTooComplex) as caught:
        Vllm().check(chat(tools=[tool(parameters=harmful)], tool_choice="required"))
    assert caught.value.param == "tools"
    Vllm().check(chat(tools=[tool(parameters=harmful)]))  # no grammar


def test_schema_that_is_too_complex_has_no_simpler_form_to_send_instead() -> None:
    refused = InvalidRequest("The model backend does not support it.", param="response_format")
    assert Vllm().relaxed(chat(response_format=schema_format(TOO_MUCH)), refused) is None
