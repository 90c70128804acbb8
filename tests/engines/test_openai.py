"""Tests of kind `openai`: requests, model lists and relaxed requests."""

import json
from typing import Any

import pytest

from gateway.chat.conversation import template_id
from gateway.chat.request import Chat, SchemaFormat
from gateway.engines.engine import ModelFacts
from gateway.engines.grammar.portable import portable
from gateway.engines.openai import OpenAi
from gateway.errors import ContextLengthExceeded, InvalidRequest, RolesRefused
from tests.fakes.chats import USER, WEATHER, called, chat, named, schema_format, tool

ENGINE = OpenAi()
UNKNOWN = ModelFacts()
IMAGE = "data:image/png;base64,AAAA"


def rendered(facts: ModelFacts = UNKNOWN, engine: OpenAi = ENGINE, **fields: Any) -> dict[str, Any]:
    request = chat(**fields)
    sent: dict[str, Any] = json.loads(engine.render(request, "the-model", facts, bool(request.stream)))
    return sent


def test_only_requested_fields_are_sent() -> None:
    assert rendered() == {"model": "the-model", "messages": [{"role": "user", "content": "Hello"}]}


def test_usage_is_requested_for_every_stream_and_only_for_streams() -> None:
    assert rendered(stream=True)["stream_options"] == {"include_usage": True}
    assert rendered(stream=True, stream_options={"include_usage": False})["stream_options"] == {"include_usage": True}
    assert "stream_options" not in rendered(stream_options={"include_usage": True})


def test_either_name_of_the_token_limit_is_sent_as_max_tokens() -> None:
    assert rendered(max_completion_tokens=5)["max_tokens"] == 5
    assert "max_completion_tokens" not in rendered(max_completion_tokens=5)


def test_only_openais_own_fields_are_sent() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "stop": ["x"],
    }
    engines = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "chat_template_kwargs": {"enable_thinking": True},
        "think": True,
    }
    sent = rendered(**fields, **engines, keep_alive="1h", user="u", n=1, tools=[], logit_bias={"1": 2})
    assert {key: value for key, value in sent.items() if key not in ("model", "messages")} == fields


def test_developer_role_is_sent_as_system() -> None:
    assert rendered(messages=[{"role": "developer", "content": "x"}])["messages"] == [
        {"role": "system", "content": "x"}
    ]


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered(messages=[{"role": "user", "content": parts}])["messages"] == [{"role": "user", "content": "a\nb"}]


def test_parts_with_an_image_keep_their_order_and_drop_unknown_fields() -> None:
    parts = [{"type": "image_url", "image_url": {"url": IMAGE, "detail": "low"}, "x": 1}, {"type": "text", "text": "b"}]
    sent = rendered(messages=[{"role": "user", "content": parts}])["messages"]
    assert sent == [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "b"}]}
    ]


def test_tools_are_sent_with_their_choice_and_without_unknown_fields() -> None:
    sent = rendered(
        tools=[tool(description="d", strict=False, x=1) | {"x": 1}], tool_choice="auto", parallel_tool_calls=False
    )
    function = {"name": "get_weather", "description": "d", "parameters": WEATHER, "strict": False}
    assert sent["tools"] == [{"type": "function", "function": function}]
    assert (sent["tool_choice"], sent["parallel_tool_calls"]) == ("auto", False)


@pytest.mark.parametrize(
    ("choice", "expected"), [("required", "required"), (named("get_weather"), named("get_weather")), (None, None)]
)
def test_tool_choice_is_sent(choice: Any, expected: Any) -> None:
    assert rendered(tools=[tool()], tool_choice=choice).get("tool_choice") == expected


@pytest.mark.parametrize(
    "fields",
    [{"tools": []}, {"tools": [tool()], "tool_choice": "none"}, {"tool_choice": "none"}, {"tool_choice": "auto"}],
)
def test_tool_fields_are_omitted_without_tools(fields: dict[str, Any]) -> None:
    """vLLM rejects an empty list."""
    assert set(rendered(**fields, parallel_tool_calls=True)) == {"model", "messages"}


def test_logprobs_are_requested() -> None:
    assert {key: value for key, value in rendered(logprobs=True, top_logprobs=3).items() if "log" in key} == {
        "logprobs": True,
        "top_logprobs": 3,
    }
    assert not [key for key in rendered(logprobs=False) if "log" in key]
    for fields in ({}, {"top_logprobs": 0}):  # llama.cpp returns none at all for 0
        assert rendered(logprobs=True, **fields)["top_logprobs"] == 1


@pytest.mark.parametrize(
    "wanted", [{"type": "json_object"}, schema_format(), schema_format(strict=True, description="d")]
)
def test_response_format_is_sent(wanted: dict[str, Any]) -> None:
    assert rendered(response_format=wanted)["response_format"] == wanted


def test_text_response_format_is_omitted() -> None:
    assert "response_format" not in rendered(response_format={"type": "text"})


@pytest.mark.parametrize(
    ("fields", "sent"),
    [({"think": False}, "none"), ({"reasoning_effort": "xhigh"}, "high"), ({"think": True}, None), ({}, None)],
)
def test_effort_is_sent_as_reasoning_effort(fields: dict[str, Any], sent: str | None) -> None:
    assert rendered(**fields).get("reasoning_effort") == sent


def test_earlier_calls_and_results_are_sent() -> None:
    messages = [
        {"role": "assistant", "content": None, "reasoning_content": "hm", "tool_calls": [called(arguments="")]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 C"},
    ]
    sent = rendered(messages=[*USER, *messages])["messages"]
    assert sent[1]["content"] == ""
    assert sent[1]["reasoning"] == "hm"
    assert sent[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": "{}"}
    assert sent[1]["tool_calls"][0]["id"] == sent[2]["tool_call_id"] == template_id("call_1")
    assert sent[2] == {"role": "tool", "content": "12 C", "tool_call_id": template_id("call_1")}


def test_messages_with_content_parts_keep_their_calls_and_ids() -> None:
    text = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "assistant", "content": text, "reasoning": "hm", "tool_calls": [called()]},
        {"role": "tool", "tool_call_id": "call_1", "content": text},
    ]
    sent = rendered(messages=[*USER, *messages])["messages"]
    assert (sent[1]["content"], sent[1].get("reasoning")) == ("a\nb", "hm")
    assert [call["id"] for call in sent[1].get("tool_calls", [])] == [template_id("call_1")]
    assert sent[2] == {"role": "tool", "content": "a\nb", "tool_call_id": template_id("call_1")}


@pytest.mark.parametrize(("limit", "sent"), [(4095, 4095), (4096, None), (9000, None), (None, None)])
def test_token_limit_beyond_the_context_is_omitted(limit: int | None, sent: int | None) -> None:
    assert rendered(ModelFacts(4096), max_tokens=limit).get("max_tokens") == sent


def test_token_limit_is_sent_unchanged_if_the_context_is_unknown() -> None:
    assert rendered(max_tokens=9000)["max_tokens"] == 9000


@pytest.mark.parametrize("error", [RolesRefused(), InvalidRequest("any other words")])
def test_relaxed_request_joins_neighbours_of_one_role(error: InvalidRequest) -> None:
    relaxed = ENGINE.relaxed(chat(messages=[*USER, *USER]), error)
    assert relaxed is not None
    assert [message.text for message in relaxed.messages] == [f"{USER[0]['content']}\n\n{USER[0]['content']}"]
    assert ENGINE.relaxed(relaxed, error) is None


def test_relaxed_request_gives_the_systems_text_to_the_user_if_only_that_is_left() -> None:
    request = chat(messages=[{"role": "system", "content": "s"}, *USER])
    relaxed = ENGINE.relaxed(request, RolesRefused())
    assert relaxed is not None
    assert [(one.role, one.text) for one in relaxed.messages] == [("user", f"s\n\n{USER[0]['content']}")]
    assert ENGINE.relaxed(relaxed, RolesRefused()) is None
    assert ENGINE.relaxed(request, InvalidRequest("any other words")) is None


def test_relaxed_request_drops_a_token_limit_that_does_not_fit_next_to_the_prompt() -> None:
    request = chat(max_tokens=4000, max_completion_tokens=4000)
    relaxed = ENGINE.relaxed(request, ContextLengthExceeded(4096))
    assert relaxed is not None
    assert (relaxed.token_limit, relaxed.messages) == (None, request.messages)
    assert ENGINE.relaxed(relaxed, ContextLengthExceeded(4096)) is None
    assert ENGINE.relaxed(request, InvalidRequest("x")) is None


# Models


def test_models_are_listed_with_their_context_length() -> None:
    found = ENGINE.models(b'{"object":"list","data":[{"id":"a","max_model_len":4096},{"id":"b"}]}')
    assert found == {"a": ModelFacts(4096), "b": ModelFacts()}


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"[]", b'{"data":7}'])
def test_invalid_model_list_differs_from_an_empty_one(body: bytes) -> None:
    assert ENGINE.models(body) is None
    assert ENGINE.models(b'{"data":[]}') == ENGINE.models(b'{"data":null}') == {}


# Schemas that the server rejects


UNABLE = InvalidRequest("x", param="response_format")
ODD = {"type": "object", "properties": {"a": {"type": "integer", "multipleOf": 5}}, "uniqueItems": True}


def test_rejected_schema_is_sent_once_more_in_its_portable_form() -> None:
    request = chat(response_format=schema_format(ODD), tools=[tool(parameters=ODD)], tool_choice="required")
    relaxed = ENGINE.relaxed(request, UNABLE)
    assert isinstance(relaxed, Chat)
    assert isinstance(relaxed.response_format, SchemaFormat)
    assert relaxed.response_format.json_schema.schema == portable(ODD)
    assert [each.function.parameters for each in relaxed.tools or ()] == [portable(ODD)]
    assert ENGINE.relaxed(relaxed, UNABLE) is None


def test_rejected_portable_schema_is_not_sent_again() -> None:
    assert ENGINE.relaxed(chat(response_format=schema_format(), tools=[tool()]), UNABLE) is None
    assert ENGINE.relaxed(chat(), UNABLE) is None


def test_harmful_schema_is_sent_in_its_portable_form() -> None:
    harmful = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a{5000}$"}}}
    sent = json.loads(
        ENGINE.render(
            chat(
                response_format=schema_format(harmful),
                tools=[tool(parameters=harmful), tool("g", parameters=harmful, strict=True)],
                tool_choice=named(),
            ),
            "m",
            ModelFacts(),
            True,
        )
    )
    assert (
        sent["response_format"]["json_schema"]["schema"]
        == sent["tools"][0]["function"]["parameters"]
        == sent["tools"][1]["function"]["parameters"]
        == portable(harmful)
    )


def test_schema_that_no_grammar_is_made_of_is_sent_unchanged() -> None:
    odd = {"type": "object", "properties": {"a": {"$ref": "#/nowhere", "pattern": "^a{5000}$"}, "b": "string"}}
    for choice in (None, "auto", named("g")):
        request = chat(tools=[tool(parameters=odd), tool("g")], tool_choice=choice)
        ENGINE.check(request)
        sent = json.loads(ENGINE.render(request, "m", ModelFacts(), True))
        assert sent["tools"][0]["function"]["parameters"] == odd


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_plain_text_is_sent_like_a_single_text_part(role: str) -> None:
    messages = [{"role": role, "content": content} for content in ("hi", [{"type": "text", "text": "hi"}])]
    plain, parted = (ENGINE.render(chat(messages=[message, *USER]), "m", UNKNOWN, False) for message in messages)
    assert plain == parted
