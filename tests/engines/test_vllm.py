"""Tests of kind `vllm`: OpenAI's API with vLLM's own fields."""

import json
from typing import Any

import pytest

from gateway.engines.engine import ModelFacts
from gateway.engines.vllm import MIN_TOP_P, Vllm
from tests.fakes.chats import chat, named, tool
from tests.golden import load

ENGINE = Vllm()


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


def test_other_vllm_fields_are_not_sent() -> None:
    """vLLM accepts extra fields, some of which return the prompt or change the request's priority."""
    names = (
        "priority",
        "prompt_logprobs",
        "return_prompt_text",
        "cache_salt",
        "mm_processor_kwargs",
        "ignore_eos",
        "request_id",
        "vllm_xargs",
    )
    assert extra_fields(**dict.fromkeys(names, 1)) == {}


def test_top_p_of_zero_is_sent_as_the_minimum_that_vllm_accepts() -> None:
    assert rendered(top_p=0)["top_p"] == MIN_TOP_P > 0


# Thinking


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"reasoning_effort": "none"}, {"chat_template_kwargs": {"enable_thinking": False}}),
        ({"think": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
        (
            {"chat_template_kwargs": {"enable_thinking": False, "x": 1}},
            {"chat_template_kwargs": {"enable_thinking": False}},
        ),
        ({"think": True}, {"chat_template_kwargs": {"enable_thinking": True}}),
        (
            {"reasoning_effort": "minimal"},
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "low"},
        ),
        (
            {"reasoning": {"effort": "high"}},
            {"chat_template_kwargs": {"enable_thinking": True}, "reasoning_effort": "high"},
        ),
        ({}, {}),
    ],
)
def test_thinking_is_also_set_in_the_chat_template(fields: dict[str, Any], sent: dict[str, Any]) -> None:
    assert extra_fields(**fields) == sent


# Tools


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
