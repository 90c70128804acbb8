"""Tests of the canonical chat request: messages, limits, thinking and tools.

Covers: gateway/chat/tools.py
"""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec import structs

from gateway.chat.request import RARE_FIELDS, Chat
from gateway.dialects.openai_chat import OpenAiChat
from tests.fakes.chats import MIB, allowed, chat, named, request, tool

IMAGE = "data:image/png;base64,iVBORw0KGgo="


def test_minimal_request_sets_nothing_else() -> None:
    parsed = chat()
    assert (parsed.model, parsed.messages[0].text, parsed.stream, parsed.has_images, parsed.wants_usage) == (
        "standard",
        "Hello",
        None,
        False,
        False,
    )
    assert (parsed.token_limit, parsed.stops, parsed.effort, parsed.offered, parsed.forced) == (None, [], None, [], [])


@pytest.mark.parametrize("name", [name for name in Chat.__struct_fields__ if name not in ("model", "messages")])
def test_null_field_counts_as_absent(name: str) -> None:
    assert chat(**{name: None}) == chat()


# What almost no request sets


RARE: dict[str, Any] = {
    "logprobs": False,
    "top_logprobs": 1,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "structured_outputs": {"json_object": True},
    "guided_json": {},
    "guided_choice": ["a"],
    "guided_regex": "a",
    "guided_grammar": "root ::= 'a'",
    "reasoning_effort": "low",
    "reasoning": {},
    "think": True,
    "thinking": True,
    "enable_thinking": False,
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "add_generation_prompt": True,
    "min_tokens": 0,
    "ignore_eos": False,
    "stop_token_ids": [1],
    "mm_processor_kwargs": {},
    "functions": [],
    "function_call": "none",
    "audio": {},
    "modalities": ["text"],
}
COMMON: dict[str, Any] = {
    "stream": True,
    "stream_options": {"include_usage": True},
    "max_tokens": 1,
    "max_completion_tokens": 1,
    "temperature": 1,
    "top_p": 1,
    "top_k": 1,
    "min_p": 1,
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "repetition_penalty": 1,
    "seed": 1,
    "stop": "a",
    "n": 2,
    "logit_bias": {"1": 1},
}


def test_every_field_is_common_or_rare() -> None:
    assert {"model", "messages", *COMMON} | RARE_FIELDS == set(Chat.__struct_fields__)
    assert set(RARE) == RARE_FIELDS


@pytest.mark.parametrize(("name", "value"), RARE.items())
def test_chat_with_a_rare_field_is_not_plain(name: str, value: object) -> None:
    body = request(**{name: value})
    assert not msgspec.json.decode(body, type=Chat).is_plain
    assert not OpenAiChat().parse(body, MIB)[0].chat.is_plain


@pytest.mark.parametrize("unknown", [{}, {"user": "a", "metadata": {"tools": 1}}])
def test_chat_with_all_common_fields_is_plain(unknown: dict[str, Any]) -> None:
    body = request(**COMMON, **unknown)
    assert msgspec.json.decode(body, type=Chat).is_plain
    assert OpenAiChat().parse(body, MIB)[0].chat.is_plain


def test_plain_chat_that_gets_a_rare_field_is_not_plain_any_more() -> None:
    parsed = OpenAiChat().parse(request(), MIB)[0].chat
    assert parsed.is_plain
    assert not structs.replace(parsed, reasoning_effort="low").is_plain


# Messages


@pytest.mark.parametrize(
    ("messages", "are_plain"),
    [
        ([("user", "a")], True),
        ([("system", "a"), ("user", "b"), ("assistant", ""), ("user", "c")], True),
        ([("assistant", "a"), ("user", "b")], True),
        ([("user", "a"), ("system", "b")], False),
        ([("system", "a"), ("system", "b")], False),
        ([("developer", "a"), ("user", "b")], False),
        ([("user", [{"type": "text", "text": "a"}])], False),
        ([("assistant", None), ("user", "b")], False),
    ],
)
def test_messages_are_plain_if_engines_get_them_as_they_are(
    messages: list[tuple[str, object]], are_plain: bool
) -> None:
    parsed = chat(messages=[{"role": role, "content": content} for role, content in messages])
    assert parsed.has_plain_messages == are_plain


@pytest.mark.parametrize(
    "more",
    [
        {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": ""}}]},
        {"role": "assistant", "tool_calls": []},
        {"role": "assistant", "reasoning": ""},
        {"role": "assistant", "reasoning_content": "thought"},
        {"role": "user", "tool_call_id": "a"},
        {"role": "tool", "tool_call_id": "a"},
    ],
)
def test_message_with_more_than_a_text_is_not_plain(more: dict[str, Any]) -> None:
    assert not chat(messages=[{"role": "user", "content": "a"}, {"content": "b"} | more]).has_plain_messages


# Limits


def test_newer_name_of_the_token_limit_takes_precedence() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert chat(max_tokens=5).token_limit == 5


def test_single_stop_becomes_a_list() -> None:
    assert chat(stop="x").stops == ["x"]
    assert chat(stop=["x", "y"]).stops == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "wants"),
    [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True)],
)
def test_usage_is_wanted_only_if_requested(options: Any, wants: bool) -> None:
    assert chat(stream=True, stream_options=options).wants_usage is wants


# Thinking


SWITCHES: list[Callable[[bool], dict[str, Any]]] = [
    lambda on: {"think": on},
    lambda on: {"reasoning": {"enabled": on}},
    lambda on: {"thinking": {"type": "enabled" if on else "disabled", "budget_tokens": 1024}},
    lambda on: {"thinking": on},
    lambda on: {"enable_thinking": on},
    lambda on: {"chat_template_kwargs": {"enable_thinking": on}},
    lambda on: {"chat_template_kwargs": {"thinking": on}},
]


@pytest.mark.parametrize("switch", SWITCHES)
def test_every_switch_turns_thinking_off_and_on(switch: Callable[[bool], dict[str, Any]]) -> None:
    assert chat(**switch(False)).effort == "none"
    assert chat(**switch(True)).effort is True
    assert chat(reasoning_effort="low", **switch(False)).effort == "low"


@pytest.mark.parametrize("kind", ["adaptive", "auto"])
def test_adaptive_thinking_is_left_to_the_model(kind: str) -> None:
    assert chat(thinking={"type": kind}).effort is None


@pytest.mark.parametrize(
    ("effort", "expected"),
    [
        ("none", "none"),
        ("minimal", "low"),
        ("low", "low"),
        ("medium", "medium"),
        ("high", "high"),
        ("xhigh", "high"),
        ("max", "high"),
        ("ultra", "high"),
    ],
)
@pytest.mark.parametrize("field", ["reasoning_effort", "reasoning", "think"])
def test_effort_is_mapped_to_one_that_all_engines_support(field: str, effort: str, expected: str) -> None:
    assert chat(**{field: {"effort": effort} if field == "reasoning" else effort}).effort == expected


def test_openais_thinking_field_takes_precedence_over_the_engines() -> None:
    template = {"enable_thinking": True}
    assert (
        chat(reasoning_effort="low", reasoning={"effort": "high"}, think=False, chat_template_kwargs=template).effort
        == "low"
    )
    assert chat(reasoning={"effort": "high"}, think=False).effort == "high"
    assert chat(think=False, chat_template_kwargs=template).effort == "none"


@pytest.mark.parametrize(
    "fields",
    [{"reasoning": {}}, {"reasoning": {"effort": "odd"}}, {"chat_template_kwargs": {"add_generation_prompt": 1}}],
)
def test_unknown_thinking_options_set_no_effort(fields: dict[str, Any]) -> None:
    assert chat(**fields).effort is None


# Tools

BOTH = [tool("one"), tool("two")]


@pytest.mark.parametrize(
    ("choice", "offered", "forced"),
    [
        (None, ["one", "two"], []),
        ("auto", ["one", "two"], []),
        ("none", [], []),
        ("required", ["one", "two"], ["one", "two"]),
        (named("two"), ["one", "two"], ["two"]),
        (allowed("auto", "two"), ["two"], []),
        (allowed("required", "two"), ["two"], ["two"]),
        (allowed("required", "two", "one"), ["one", "two"], ["one", "two"]),
        (allowed("auto"), [], []),
    ],
)
def test_tool_choice_decides_offered_and_forced_functions(choice: Any, offered: list[str], forced: list[str]) -> None:
    parsed = chat(tools=BOTH, tool_choice=choice)
    assert [one.function.name for one in parsed.offered] == offered
    assert [one.name for one in parsed.forced] == forced


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_empty_list_of_tools_offers_and_forces_nothing(choice: str | None) -> None:
    parsed = chat(tools=[], tool_choice=choice)
    assert (parsed.offered, parsed.forced) == ([], [])
