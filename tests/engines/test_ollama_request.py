"""Tests of rendering a chat for `/api/chat`."""

import json
from typing import Any

import pytest

from gateway.engines.engine import IMAGE_TOKENS, ModelFacts
from gateway.engines.grammar.portable import portable, portable_calls
from gateway.engines.ollama import Ollama
from tests.fakes.chats import TIME, USER, WEATHER, called, chat, named, schema_format, tool

IMAGE = "data:image/png;base64,AAAA"
THINKS = ModelFacts(capabilities=frozenset({"completion", "thinking"}))
CANNOT_THINK = ModelFacts(capabilities=frozenset({"completion"}))
UNKNOWN = ModelFacts()
ENGINE = Ollama()
NO_PARAMETERS = {"type": "object", "properties": {}}


def rendered(facts: ModelFacts = UNKNOWN, engine: Ollama = ENGINE, **fields: Any) -> dict[str, Any]:
    sent: dict[str, Any] = json.loads(engine.render(chat(**fields), "qwen3-vl:8b", facts, True))
    return sent


def extra_fields(facts: ModelFacts = UNKNOWN, **fields: Any) -> dict[str, Any]:
    """Return the fields that are not part of every request."""
    return {
        key: value
        for key, value in rendered(facts, **fields).items()
        if key not in ("model", "messages", "stream", "options", "truncate")
    }


def test_request_streams_and_disables_truncation() -> None:
    assert rendered() == {
        "model": "qwen3-vl:8b",
        "messages": [{"role": "user", "content": "Hello"}],
        "stream": True,
        "options": {},
        "truncate": False,
    }


def test_sampling_parameters_are_sent_as_ollama_options() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 7,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
    }
    sent = rendered(**fields, repetition_penalty=1.1, max_completion_tokens=9, stop="x")
    assert sent["options"] == fields | {"repeat_penalty": 1.1, "num_predict": 9, "stop": ["x"]}
    assert set(sent) == {"model", "messages", "stream", "options", "truncate"}


def test_ollama_settings_of_the_client_are_not_sent() -> None:
    sent = rendered(
        keep_alive="24h", num_ctx=99, truncate=True, format="json", options={"num_gpu": 0}, raw=True, shift=True
    )
    assert (sent["options"], sent["truncate"], set(sent)) == (
        {},
        False,
        {"model", "messages", "stream", "options", "truncate"},
    )


def test_operators_settings_are_sent() -> None:
    sent = rendered(engine=Ollama(keep_alive=-1, num_ctx=8192, truncate=True))
    assert (sent["keep_alive"], sent["options"]) == (-1, {"num_ctx": 8192})
    assert "truncate" not in sent


# Messages


def test_text_and_image_of_a_message_stay_together() -> None:
    """Ollama's own /v1 splits them into two messages."""
    parts = [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "What is it?"}]
    assert rendered(messages=[{"role": "user", "content": parts}])["messages"] == [
        {"role": "user", "content": "What is it?", "images": ["AAAA"]}
    ]


def test_several_images_keep_their_order_as_bare_base64() -> None:
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{data}"}}
        for kind, data in (("png", "AAAA"), ("jpeg", "BBBB"))
    ]
    assert rendered(messages=[{"role": "user", "content": parts}])["messages"][0]["images"] == ["AAAA", "BBBB"]


def test_developer_role_is_sent_as_system() -> None:
    """Qwen3-VL's renderer drops unknown roles."""
    assert rendered(messages=[{"role": "developer", "content": "x"}])["messages"] == [
        {"role": "system", "content": "x"}
    ]


@pytest.mark.parametrize("role", ["user", "system"])
def test_reasoning_of_a_message_that_is_not_the_models_is_not_sent(role: str) -> None:
    sent = rendered(messages=[{"role": role, "content": "a", "reasoning": "b"}, *USER])
    assert sent["messages"][0] == {"role": role, "content": "a"}


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_earlier_reasoning_is_sent_as_thinking(field: str) -> None:
    sent = rendered(messages=[{"role": "assistant", "content": "x", field: "hm"}])["messages"]
    assert sent == [{"role": "assistant", "content": "x", "thinking": "hm"}]


@pytest.mark.parametrize(
    ("arguments", "sent"),
    [('{"city":"Oslo"}', {"city": "Oslo"}), ("", {}), ('{"a":[1,2.5,null,"\\u00e9"]}', {"a": [1, 2.5, None, "é"]})],
)
def test_arguments_of_an_earlier_call_are_sent_as_an_object(arguments: str, sent: dict[str, Any]) -> None:
    message = rendered(
        messages=[*USER, {"role": "assistant", "content": None, "tool_calls": [called(arguments=arguments)]}]
    )["messages"][1]
    assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": sent}
    assert message["content"] == ""


def test_tool_result_is_sent_with_the_functions_name() -> None:
    messages = [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [called("one", "{}", "call_1"), called("two", "{}", "call_2")],
        },
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "b"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "a"},
        {"role": "tool", "tool_call_id": "unknown", "content": "c"},
    ]
    sent = rendered(messages=[*USER, *messages])["messages"][2:]
    assert [(message["content"], message.get("tool_name"), message["tool_call_id"]) for message in sent] == [
        ("b", "two", "call_2"),
        ("a", "one", "call_1"),
        ("c", None, "unknown"),
    ]


# Thinking


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"reasoning_effort": "none"}, False),
        ({"think": False}, False),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"think": True}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"enable_thinking": False}, False),
        ({"thinking": {"type": "disabled"}}, False),
        ({"thinking": {"type": "enabled"}}, True),
        ({"reasoning_effort": "minimal"}, "low"),
        ({"reasoning": {"effort": "medium"}}, "medium"),
        ({"think": "max"}, "high"),
    ],
)
@pytest.mark.parametrize("facts", [THINKS, UNKNOWN], ids=["thinks", "unknown"])
def test_reasoning_effort_is_sent_as_think(facts: ModelFacts, fields: dict[str, Any], sent: Any) -> None:
    assert extra_fields(facts, **fields) == {"think": sent}


def test_unset_effort_is_not_sent() -> None:
    assert "think" not in rendered(THINKS)


@pytest.mark.parametrize(
    "fields", [{"reasoning_effort": "high"}, {"reasoning_effort": "none"}, {"think": True}, {"think": False}]
)
def test_effort_is_dropped_for_a_model_without_thinking(fields: dict[str, Any]) -> None:
    """Ollama rejects it; other engines ignore it."""
    assert extra_fields(CANNOT_THINK, **fields) == {}


def test_fields_without_an_equivalent_are_not_sent() -> None:
    fields = {"min_tokens": 3, "ignore_eos": True, "mm_processor_kwargs": {"max_pixels": 9}}
    assert rendered(**fields) == rendered()


def test_last_message_of_the_assistant_is_sent_as_it_is_to_be_continued() -> None:
    messages = [*USER, {"role": "assistant", "content": "The sum is"}]
    assert rendered(messages=messages, continue_final_message=True)["messages"] == messages


# Format


@pytest.mark.parametrize(
    ("field", "sent"),
    [
        ({"guided_choice": ["yes", "아니요"]}, {"type": "string", "enum": ["yes", "아니요"]}),
        ({"structured_outputs": {"regex": "[ac]c|d"}}, {"type": "string", "pattern": "^([ac]c|d)$"}),
        ({"guided_regex": r"^\d{3}-x$"}, {"type": "string", "pattern": "^[0-9]{3}-x$"}),
        ({"structured_outputs": {"json": WEATHER}}, portable(WEATHER)),
        ({"guided_json": WEATHER}, portable(WEATHER)),
        ({"structured_outputs": {"json_object": True}}, "json"),
    ],
)
def test_structured_output_of_vllm_is_sent_as_a_format(field: dict[str, Any], sent: Any) -> None:
    assert extra_fields(**field) == {"format": sent}


@pytest.mark.parametrize(
    ("wanted", "sent"),
    [
        ({"type": "text"}, {}),
        ({"type": "json_object"}, {"format": "json"}),
        (schema_format(strict=True), {"format": WEATHER}),
    ],
)
def test_response_format_is_sent_as_format(wanted: dict[str, Any], sent: dict[str, Any]) -> None:
    assert extra_fields(response_format=wanted) == sent


# Tools


def test_tools_are_sent_in_ollamas_form() -> None:
    sent = rendered(tools=[tool(description="d", strict=True), {"type": "function", "function": {"name": "f"}}])
    assert sent["tools"] == [
        {"type": "function", "function": {"name": "get_weather", "description": "d", "parameters": WEATHER}},
        {"type": "function", "function": {"name": "f", "description": "", "parameters": NO_PARAMETERS}},
    ]
    assert "format" not in sent


@pytest.mark.parametrize("fields", [{"tools": []}, {"tools": [tool()], "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_tools_that_must_not_be_called_are_not_sent(fields: dict[str, Any]) -> None:
    assert extra_fields(**fields) == {}


def test_tool_parameters_unknown_to_ollama_are_not_sent() -> None:
    sent = extra_fields(tools=[tool()], tool_choice="auto", parallel_tool_calls=False)
    assert set(sent) == {"tools"}


@pytest.mark.parametrize("choice", ["required", named()])
def test_single_function_is_forced_by_the_grammar_of_its_arguments(choice: Any) -> None:
    sent = rendered(tools=[tool()], tool_choice=choice)
    assert sent["format"] == WEATHER
    assert len(sent["tools"]) == 1


def test_named_function_is_forced_among_several() -> None:
    sent = rendered(tools=[tool(), tool("get_time", TIME)], tool_choice=named("get_time"))
    assert sent["format"] == TIME
    assert len(sent["tools"]) == 2


def test_function_without_parameters_is_forced_by_an_empty_object() -> None:
    assert (
        rendered(tools=[{"type": "function", "function": {"name": "f"}}], tool_choice="required")["format"]
        == NO_PARAMETERS
    )


def test_choice_of_functions_is_forced_by_a_grammar_of_name_and_arguments() -> None:
    forms = rendered(tools=[tool(), tool("get_time", TIME)], tool_choice="required")["format"]["anyOf"]
    assert [form["properties"] for form in forms] == [
        {"name": {"const": "get_weather"}, "arguments": WEATHER},
        {"name": {"const": "get_time"}, "arguments": TIME},
    ]
    assert all(form["required"] == ["name", "arguments"] and form["additionalProperties"] is False for form in forms)


def test_forced_call_takes_precedence_over_the_response_format() -> None:
    assert rendered(tools=[tool()], tool_choice="required", response_format=schema_format(TIME))["format"] == WEATHER


# Logprobs


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"logprobs": True}, {"logprobs": True}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
        ({"logprobs": True, "top_logprobs": 0}, {"logprobs": True}),
        ({"logprobs": False, "top_logprobs": 0}, {}),
    ],
)
def test_logprobs_are_requested(fields: dict[str, Any], sent: dict[str, Any]) -> None:
    assert extra_fields(**fields) == sent


# Lengths


def token_limit(facts: ModelFacts, text: str = "x", images: int = 0, **fields: Any) -> int | None:
    parts: list[dict[str, Any]] = [
        {"type": "text", "text": text},
        *([{"type": "image_url", "image_url": {"url": IMAGE}}] * images),
    ]
    sent: int | None = rendered(facts, messages=[{"role": "user", "content": parts}], **fields)["options"].get(
        "num_predict"
    )
    return sent


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_token_limit_within_the_context_is_sent_unchanged(field: str) -> None:
    assert token_limit(ModelFacts(4096), **{field: 4095}) == 4095


@pytest.mark.parametrize("fields", [{}, {"max_tokens": 8192}, {"max_tokens": 10_000_000}])
def test_token_limit_beyond_the_context_becomes_the_rest_of_it(fields: dict[str, Any]) -> None:
    """Without a limit, Ollama continues for ten contexts and drops the beginning."""
    assert token_limit(ModelFacts(4096), "x" * 400, **fields) == 4096 - 100
    assert token_limit(ModelFacts(8192), images=2, **fields) == 8192 - 2 * IMAGE_TOKENS


def test_long_prompt_still_leaves_a_quarter_of_the_context() -> None:
    """The estimate of its length may be wrong. Ollama rejects what does not fit."""
    assert token_limit(ModelFacts(4096), "x" * 100_000) == 1024


def test_token_limit_is_the_clients_if_the_context_is_unknown() -> None:
    assert token_limit(UNKNOWN, max_tokens=10_000_000) == 10_000_000
    assert token_limit(UNKNOWN) is None


# Schemas that Ollama would reject


RECURSIVE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/node"}},
    "$defs": {"node": {"type": "object", "properties": {"v": {"not": {}}}}},
}


def test_schema_is_sent_in_its_portable_form() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^(?=x)a$"}, "b": {"$ref": "#"}}}
    for fields in (
        {"response_format": schema_format(schema)},
        {"tools": [tool(parameters=schema)], "tool_choice": "required"},
    ):
        assert rendered(**fields)["format"] == portable(schema)


def test_references_of_each_forced_function_resolve_to_its_own_definitions() -> None:
    other = {**RECURSIVE, "$defs": {"node": {"type": "integer"}}}
    sent = rendered(tools=[tool("f", RECURSIVE), tool("g", other)], tool_choice="required")["format"]
    assert sent == portable_calls([("f", RECURSIVE), ("g", other)])
    assert len(sent["$defs"]) == 2


def test_large_schema_is_padded_to_make_room_for_its_grammar() -> None:
    """0.24 allows a grammar four times as long as the schema."""
    schema = {
        "type": "object",
        "properties": {f"p{number}": {"type": "integer", "minimum": -98765, "maximum": 98765} for number in range(100)},
    }
    sent = rendered(response_format=schema_format(schema))["format"]
    assert sent | {"$comment": ""} == schema | {"$comment": ""}
    assert len(json.dumps(sent)) > 50_000
    assert set(sent["$comment"]) == {" "}


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"properties": {"a": True, "b": False}}, {"type": "object", "properties": {"a": {}}}),
        ({"type": "object"}, {"type": "object", "properties": {}}),
        (
            {"properties": {"a": {"anyOf": [True, {"type": "null"}]}}},
            {"type": "object", "properties": {"a": {"anyOf": [{}, {"type": "null"}]}}},
        ),
        (
            {"properties": {"a": {"properties": {"b": True}}}},
            {"type": "object", "properties": {"a": {"properties": {"b": {}}}}},
        ),
        (RECURSIVE, RECURSIVE),
    ],
)
def test_tool_schema_is_sent_in_the_form_of_ollamas_structs(
    parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    assert rendered(tools=[tool(parameters=parameters)])["tools"][0]["function"]["parameters"] == expected


@pytest.mark.parametrize(
    ("facts", "is_escaped"),
    [
        (UNKNOWN, True),
        (ModelFacts(capabilities=frozenset({"vision"})), True),
        (ModelFacts(capabilities=frozenset({"completion"})), False),
    ],
    ids=["unknown", "vision", "no vision"],
)
def test_placeholder_of_an_image_in_a_text_is_not_taken_for_an_image(facts: ModelFacts, is_escaped: bool) -> None:
    """Ollama would put an image there, or answer 400 if there is none."""
    text = "see [img-0] and [img-12], [im"
    image = {"type": "image_url", "image_url": {"url": IMAGE}}
    messages = [
        {"role": "system", "content": text},
        {"role": "user", "content": [{"type": "text", "text": text}, image]},
        {"role": "assistant", "content": text},
    ]
    contents = [message["content"] for message in rendered(facts, messages=messages)["messages"]]
    assert contents == [text.replace("[img", "[\u2060img") if is_escaped else text] * 3
    assert all(content.replace("\u2060", "") == text for content in contents)


def test_tool_schema_has_only_what_ollamas_structs_can_read() -> None:
    """Ollama refuses the whole request for a keyword of another type (api/types.go)."""
    odd = {
        "type": "object",
        "required": {"a": True},
        "properties": {
            "a": "string",
            "b": {"type": {"x": 1}, "enum": "x", "anyOf": {}, "properties": 7, "items": True, "required": 5},
        },
        "$defs": {"c": {"type": 7}},
    }
    sent = rendered(tools=[tool(parameters=odd), tool("g", {"properties": 7, "type": "string"})])["tools"]
    assert [one["function"]["parameters"] for one in sent] == [
        {"type": "object", "properties": {"a": {}, "b": {"items": True}}, "$defs": {"c": {"type": 7}}},
        {"type": "string", "properties": {}},
    ]
