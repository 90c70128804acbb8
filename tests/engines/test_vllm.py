"""Tests of kind `vllm`: OpenAI's API with vLLM's own fields."""

import json
from typing import Any

import pytest

from gateway.chat.parameter_policy import ParameterPolicy
from gateway.chat.request import SchemaFormat
from gateway.engines.engine import ModelFacts
from gateway.engines.vllm import MIN_TOP_P, Vllm
from gateway.errors import InvalidRequest
from tests.fakes.chats import USER, allowed, called, chat, named, tool
from tests.golden import load

ENGINE = Vllm()
NOT_PORTABLE = {"type": "string", "not": {"const": "x"}}
IMAGE_MESSAGES = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}]}
]


def rendered(**fields: Any) -> dict[str, Any]:
    request = chat(**fields)
    sent: dict[str, Any] = json.loads(
        ENGINE.render(request, "Qwen/Qwen3-VL-8B-Instruct", ModelFacts(), bool(request.stream))
    )
    return sent


def extra_fields(**fields: Any) -> dict[str, Any]:
    return {key: value for key, value in rendered(**fields).items() if key not in ("model", "messages")}


def test_vllms_sampling_fields_are_sent() -> None:
    fields = {"temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    assert extra_fields(**fields) == fields


def test_vllms_fields_for_the_end_of_an_answer_are_sent() -> None:
    fields = {"min_tokens": 5, "ignore_eos": True, "stop_token_ids": [7, 8]}
    assert extra_fields(**fields) == fields
    assert extra_fields(min_tokens=0, ignore_eos=False, stop_token_ids=[]) == {}


def test_minimum_of_tokens_stays_within_the_tiers_limit() -> None:
    """vLLM refuses a minimum above the maximum, and the tier may have lowered the maximum."""
    request = ParameterPolicy({}, {}, (), 3).apply(chat(min_tokens=5, max_tokens=9))
    sent = json.loads(ENGINE.render(request, "m", ModelFacts(), False))
    assert (sent["min_tokens"], sent["max_tokens"]) == (3, 3)


def test_options_of_the_image_processor_are_sent_with_images_only() -> None:
    options = {"min_pixels": 784, "size": {"longest_edge": 9}}
    assert rendered(mm_processor_kwargs=options, messages=IMAGE_MESSAGES)["mm_processor_kwargs"] == options
    assert extra_fields(mm_processor_kwargs=options) == {}


def test_answer_continues_the_last_message_without_a_generation_prompt() -> None:
    messages = [*USER, {"role": "assistant", "content": "The sum is"}]
    sent = rendered(messages=messages, continue_final_message=True)
    assert (sent["continue_final_message"], sent["add_generation_prompt"]) == (True, False)
    assert not {"continue_final_message", "add_generation_prompt"} & set(rendered(messages=messages))


def test_other_vllm_fields_are_not_sent() -> None:
    """vLLM accepts extra fields, some of which return the prompt or change the request's priority."""
    names = (
        "priority",
        "prompt_logprobs",
        "return_prompt_text",
        "cache_salt",
        "request_id",
        "vllm_xargs",
    )
    assert extra_fields(**dict.fromkeys(names, 1)) == {}


def test_top_p_of_zero_is_sent_as_the_minimum_that_vllm_accepts() -> None:
    assert rendered(top_p=0)["top_p"] == MIN_TOP_P > 0


# Structured output


@pytest.mark.parametrize(
    ("name", "value"), [("choice", ["yes", "no"]), ("regex", r"[0-9]{3}.*"), ("grammar", 'root ::= "yes"')]
)
def test_choice_pattern_and_grammar_are_sent_in_vllms_current_field(name: str, value: Any) -> None:
    expected = {"structured_outputs": {name: value}}
    assert extra_fields(structured_outputs={name: value}) == extra_fields(**{f"guided_{name}": value}) == expected


def test_guided_json_is_sent_as_the_response_format() -> None:
    """vLLM since 0.12 ignores `guided_json`."""
    sent = extra_fields(guided_json={"type": "integer"})
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "integer"}
    relaxed = ENGINE.relaxed(chat(guided_json=NOT_PORTABLE), InvalidRequest("x", param="response_format"))
    assert relaxed is not None
    assert isinstance(relaxed.output_format, SchemaFormat)
    assert "not" not in relaxed.output_format.json_schema.schema


def test_pattern_that_would_be_compiled_without_end_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        ENGINE.check(chat(guided_regex="((a{99}){99}){99}"))
    assert caught.value.param == "guided_regex"


# Thinking

OFF = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
ON = {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"reasoning_effort": "none"}, OFF),
        ({"think": False}, OFF),
        ({"chat_template_kwargs": {"enable_thinking": False, "x": 1}}, OFF),
        ({"chat_template_kwargs": {"thinking": False}}, OFF),
        ({"thinking": {"type": "disabled"}}, OFF),
        ({"enable_thinking": False}, OFF),
        ({"think": True}, ON),
        ({"thinking": {"type": "enabled"}}, ON),
        ({"reasoning_effort": "minimal"}, ON | {"reasoning_effort": "low"}),
        ({"reasoning": {"effort": "high"}}, ON | {"reasoning_effort": "high"}),
        ({}, {}),
    ],
)
def test_thinking_is_also_set_in_the_chat_template(fields: dict[str, Any], sent: dict[str, Any]) -> None:
    assert extra_fields(**fields) == sent


def test_words_of_a_tier_reach_the_chat_template_with_and_without_a_switch() -> None:
    policy = ParameterPolicy({"chat_template_kwargs": {"builtin_tools": ["x"]}}, {}, ())
    for fields in ({}, {"think": False}):
        sent = json.loads(ENGINE.render(policy.apply(chat(**fields)), "m", ModelFacts(), False))
        expected = OFF["chat_template_kwargs"] if fields else {}
        assert sent["chat_template_kwargs"] == {"builtin_tools": ["x"]} | expected


# Tools


def test_allowed_tools_are_the_only_ones_offered() -> None:
    tools = [tool("one"), tool("two")]
    for mode in ("auto", "required"):
        sent = rendered(tools=tools, tool_choice=allowed(mode, "two"))
        assert ([one["function"]["name"] for one in sent["tools"]], sent["tool_choice"]) == (["two"], mode)
    assert not {"tools", "tool_choice"} & set(rendered(tools=tools, tool_choice=allowed("auto")))


def test_tool_names_in_other_letters_are_sent_in_ascii() -> None:
    name = "날씨_조회"
    sent = rendered(
        tools=[tool(name, description="Wetter")],
        tool_choice=named(name),
        messages=[
            *USER,
            {"role": "assistant", "tool_calls": [called(name)]},
            {"role": "tool", "tool_call_id": "call_1", "content": "x"},
        ],
    )
    function = sent["tools"][0]["function"]
    assert (function["name"], function["description"]) == ("nalssi_johoe", f"{name}: Wetter")
    assert sent["tool_choice"]["function"]["name"] == "nalssi_johoe"
    assert sent["messages"][1]["tool_calls"][0]["function"]["name"] == "nalssi_johoe"


@pytest.mark.parametrize("choice", ["required", named("one")])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_call_is_strict(choice: Any, stream: bool) -> None:
    """Without `strict`, the arguments may be any JSON.

    A tool that cannot be called stays as it is: its schema may be none that a grammar follows.
    """
    sent = rendered(tools=[tool("one", strict=False), tool("two")], tool_choice=choice, stream=stream)
    assert [(one["function"]["name"], one["function"].get("strict")) for one in sent["tools"]] == [
        ("one", True),
        ("two", True if choice == "required" else None),
    ]
    assert sent["tool_choice"] == choice


@pytest.mark.parametrize("choice", [None, "auto"])
def test_free_choice_keeps_the_clients_strict(choice: str | None) -> None:
    sent = rendered(tools=[tool("one", strict=False), tool("two")], tool_choice=choice)
    assert [one["function"].get("strict") for one in sent["tools"]] == [False, None]


# Models


def test_recorded_models_are_listed() -> None:
    recording = load("vllm-0.32.0")["models"]
    found = ENGINE.models(json.dumps(recording.body).encode())
    assert found == {entry["id"]: ModelFacts(entry["max_model_len"]) for entry in recording.body["data"]}
