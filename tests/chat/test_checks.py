"""Tests of the checks that a request's field types cannot express."""

from itertools import pairwise
from typing import Any

import pytest

from gateway.chat.checks import check, check_in_steps, needs_steps
from gateway.chat.json_schema import MAX_SCHEMA
from gateway.dialects.openai_chat_request import decode
from gateway.errors import InvalidRequest, UnsupportedParameter
from tests.fakes.chats import MIB, USER, allowed, chat, named, request, schema_format, tool

TEXT = {"type": "text", "text": "x"}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
CONTINUED = [*USER, {"role": "assistant", "content": "The sum is"}]


def rejected(**fields: Any) -> InvalidRequest:
    """Return the error of `check` for a request that can be decoded."""
    asked = decode(request(**fields), MIB)
    with pytest.raises(InvalidRequest) as caught:
        check(asked)
    return caught.value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [*USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*USER, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 2}, "top_logprobs"),
        ({"tools": [tool("a"), tool("a")]}, "tools[1].function.name"),
        *(
            ({"tools": [tool(parameters=schema, strict=strict)], "tool_choice": choice}, "tools[0].function.parameters")
            for strict, choice in ((None, "required"), (None, named()), (True, "auto"))
            for schema in (
                {"type": "string"},
                {"type": "object", "properties": 7},
                {"properties": {"a": {"$ref": "http://10.0.0.1/x"}}},
            )
        ),
        ({"tools": [tool(parameters={"description": "x" * MAX_SCHEMA})]}, "tools[0].function.parameters"),
        ({"tools": [tool()], "tool_choice": named("other")}, "tool_choice"),
        ({"tool_choice": named()}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": allowed("auto", "get_weather", "other")}, "tool_choice"),
        ({"tools": [tool()], "tool_choice": allowed("required")}, "tool_choice"),
        ({"tool_choice": allowed("auto", "get_weather")}, "tool_choice"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"mm_processor_kwargs": {"size": {"longest_edge": 2**25}}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {"a": [[-(2**25)]]}}, "mm_processor_kwargs"),
        ({"mm_processor_kwargs": {str(number): 1 for number in range(40)}}, "mm_processor_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {"continue_final_message": True, "messages": CONTINUED, "add_generation_prompt": True},
            "continue_final_message",
        ),
        (
            {"continue_final_message": True, "messages": [*USER, {"role": "assistant", "content": " "}]},
            "continue_final_message",
        ),
        ({"response_format": schema_format({"type": "thing"})}, "response_format.json_schema.schema"),
        ({"response_format": schema_format({"$ref": "file:///etc/passwd"})}, "response_format.json_schema.schema"),
        (
            {"tools": [tool(f"f{number}", {"description": "x" * (MAX_SCHEMA - 100)}) for number in range(5)]},
            "tools",
        ),
    ],
)
def test_invalid_value_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = rejected(**fields)
    assert type(error) is InvalidRequest
    assert error.param == param
    assert f"'{param}'" in error.message


def test_continuation_needs_no_generation_prompt() -> None:
    check(chat(messages=CONTINUED, continue_final_message=True, add_generation_prompt=False))
    check(chat(messages=CONTINUED, continue_final_message=False, add_generation_prompt=True))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "assistant", "content": None, "tool_calls": None, "reasoning": "hm"},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant"},
        {"role": "tool", "tool_call_id": "a", "content": None},
        {"role": "tool", "tool_call_id": "a"},
    ],
)
def test_no_content_of_an_assistant_or_a_tool_is_the_empty_text(message: dict[str, Any]) -> None:
    """A client sends back what it got, so a refusal would leave the conversation stuck."""
    asked = decode(request(messages=[*USER, message, *USER]), MIB)
    check(asked)
    assert asked.messages[1].text == ""


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"add_generation_prompt": False, "messages": CONTINUED}, "add_generation_prompt"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"function_call": "auto"}, "functions"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "system", "content": [IMAGE]}, *USER]}, "messages[0].content[0].type"),
        ({"messages": [*USER, {"role": "developer", "content": [TEXT, IMAGE]}]}, "messages[1].content[1].type"),
    ],
)
def test_unsupported_feature_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = rejected(**fields)
    assert isinstance(error, UnsupportedParameter)
    assert error.param == param
    assert f"'{param}'" in error.message


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": "object"},
        {"properties": {"a": True}},
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"type": "object"}}},
        {
            "definitions": {"a": {"type": "object", "properties": {"a": {"$ref": "#/definitions/a"}}}},
            "$ref": "#/definitions/a",
        },
        {"type": "object", "properties": {"$ref": {"type": "string"}}},
        {"type": "object", "properties": {"a": {"type": "integer", "maximum": 2**63 - 1}}},
    ],
)
def test_schema_of_either_draft_and_its_references_are_accepted(schema: dict[str, Any]) -> None:
    assert chat(tools=[tool(parameters=schema)], response_format=schema_format(schema)).tools


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "schema",
    [nested(150), nested(400), {"maximum": 2**64}, {"enum": [10**30]}],
    ids=["150 deep", "400 deep", "2^64", "10^30"],
)
def test_schema_beyond_the_validators_limits_is_rejected(schema: dict[str, Any]) -> None:
    """JSON allows such depth and numbers; the library that validates schemas does not."""
    for fields, param in (
        ({"tools": [tool(parameters=schema)]}, "tools[0].function.parameters"),
        ({"response_format": schema_format(schema)}, "response_format.json_schema.schema"),
    ):
        error = rejected(**fields)
        assert (error.code, error.param) == ("invalid_value", param)


def test_arguments_of_calls_are_read_in_steps() -> None:
    """Rendering needs what is found out about them, and each engine renders in one step."""

    def turn(arguments: str, count: int) -> dict[str, Any]:
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        return {"role": "assistant", "tool_calls": [call] * count}

    long, short = '{"a":"' + "x" * 64 * 1024 + '"}', '{"a":1}'
    asked = chat(messages=[*USER, turn(long, 8), *[turn(short, 128)] * 16])
    assert needs_steps(asked)
    assert not needs_steps(chat(messages=USER))
    functions = [call.function for message in asked.messages for call in message.tool_calls or ()]
    read = [sum("form" in function.__dict__ for function in functions) for _ in check_in_steps(asked)]
    assert read[:8] == [*range(8)]
    assert max(after - before for before, after in pairwise(read)) <= 256
    assert all("form" in function.__dict__ for function in functions)
