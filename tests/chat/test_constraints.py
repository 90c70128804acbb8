"""Tests of vLLM's fields for structured output, as requests have them."""

import json
from typing import Any

import pytest

from gateway.chat.constraints import MAX_NESTING, MAX_SCHEMA_TEXT, ChoiceFormat, GrammarFormat, RegexFormat
from gateway.chat.parameter_policy import ParameterPolicy
from gateway.chat.request import JsonFormat, SchemaFormat
from gateway.errors import InvalidRequest, UnsupportedParameter
from tests.fakes.chats import WEATHER, chat, named, schema_format, tool

GRAMMAR = 'root ::= "yes" | "no"'


@pytest.mark.parametrize("schema", [WEATHER, json.dumps(WEATHER)])
@pytest.mark.parametrize("field", ["structured_outputs.json", "guided_json"])
def test_json_is_a_schema_as_object_or_text(field: str, schema: Any) -> None:
    outer, _, inner = field.partition(".")
    wanted = chat(**{outer: {inner: schema} if inner else schema}).output_format
    assert isinstance(wanted, SchemaFormat)
    assert wanted.json_schema.schema == WEATHER


def test_schema_as_text_is_parsed_only_if_it_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    padded = json.dumps(WEATHER).ljust(MAX_SCHEMA_TEXT)
    wanted = chat(guided_json=padded).output_format
    assert isinstance(wanted, SchemaFormat)
    monkeypatch.setattr("gateway.chat.constraints.orjson", None)
    with pytest.raises(InvalidRequest, match="has more than 131072 characters") as caught:
        chat(guided_json=padded + " ")
    assert caught.value.param == "guided_json"


def test_json_object_is_openais_format() -> None:
    assert chat(structured_outputs={"json_object": True}).output_format == JsonFormat()


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [("choice", ["a", "b"], ChoiceFormat), ("regex", "[0-9]+", RegexFormat), ("grammar", GRAMMAR, GrammarFormat)],
)
def test_either_spelling_is_one_constraint(name: str, value: Any, kind: type) -> None:
    assert chat(structured_outputs={name: value}).output_format == kind(value, f"structured_outputs.{name}")
    assert chat(**{f"guided_{name}": value}).output_format == kind(value, f"guided_{name}")
    both = chat(**{f"guided_{name}": value}, response_format={"type": "text"})
    assert isinstance(both.output_format, kind)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs"),
        ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs.choice"),
        ({"structured_outputs": {"choice": ["a"]}, "guided_regex": "a"}, "structured_outputs.choice"),
        ({"guided_choice": ["a"], "guided_regex": "a"}, "guided_choice"),
        ({"guided_choice": ["a"], "response_format": schema_format()}, "guided_choice"),
        ({"guided_json": WEATHER, "response_format": {"type": "json_object"}}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [""]}, "guided_choice[0]"),
        ({"guided_choice": [5]}, "guided_choice[0]"),
        ({"guided_choice": ["x" * 900] * 40}, "guided_choice"),
        ({"guided_json": "no JSON"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": {"type": "thing"}}, "guided_json"),
        ({"structured_outputs": {"json": {"$ref": "file:///x"}}}, "structured_outputs.json"),
        ({"guided_regex": "(" * (MAX_NESTING + 1)}, "guided_regex"),
        ({"guided_grammar": "(" * (MAX_NESTING + 1)}, "guided_grammar"),
        ({"guided_regex": "a", "tools": [tool()], "tool_choice": named()}, "guided_regex"),
        (
            {"structured_outputs": {"grammar": GRAMMAR}, "tools": [tool()], "tool_choice": "required"},
            "structured_outputs.grammar",
        ),
    ],
)
def test_constraint_that_cannot_be_followed_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert f"'{param}'" in caught.value.message


def test_structural_tags_are_not_supported() -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        chat(structured_outputs={"structural_tag": "{}"})
    assert caught.value.param == "structured_outputs.structural_tag"


def test_constraint_of_the_client_replaces_a_default_format_of_the_tier_but_not_a_forced_one() -> None:
    tiers = {"response_format": {"type": "json_object"}}
    asked = chat(guided_choice=["a"])
    assert isinstance(ParameterPolicy(tiers, {}, ()).apply(asked).output_format, ChoiceFormat)
    assert ParameterPolicy({}, tiers, ()).apply(asked).output_format == JsonFormat()
    assert ParameterPolicy({}, {}, ("guided_choice",)).apply(asked).output_format is None
