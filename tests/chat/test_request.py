"""Tests of the canonical chat request: messages, limits, thinking and tools."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from msgspec import structs

from gateway.chat.request import MAX_CONTAINERS, MAX_QUOTES, RARE_FIELDS, CalledFunction, Chat
from gateway.dialects.openai_chat import OpenAiChat
from tests.fakes.chats import MIB, allowed, chat, named, request, tool
from tests.fakes.processor_time import assert_at_most

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


def test_content_parts_stay_in_one_message() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}},
        {"type": "text", "text": "b"},
    ]
    parsed = chat(messages=[{"role": "user", "content": parts}])
    assert len(parsed.messages) == 1
    assert (parsed.messages[0].text, parsed.messages[0].images, parsed.has_images) == ("a\nb", [IMAGE], True)


def test_refusal_part_is_text_of_the_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    assert chat(messages=[{"role": "assistant", "content": parts}]).messages[0].text == "a\nno"


@pytest.mark.parametrize(
    ("fields", "reasoning"),
    [
        ({}, None),
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": "b"}, "a"),
    ],
)
def test_earlier_reasoning_is_accepted_under_both_names(fields: dict[str, str], reasoning: str | None) -> None:
    assert chat(messages=[{"role": "assistant", "content": "x", **fields}]).messages[0].reasoning_text == reasoning


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


# Earlier calls


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ('{"a": 1}', b'{"a": 1}'),
        ("", b"{}"),
        (" ", b"{}"),
        ('{"a":', b'{"arguments":"{\\"a\\":"}'),
        ("[]", b'{"arguments":"[]"}'),
        (r'{"\ud83d": "\ude00 \ud83d\ude00"}', rb'{"\ufffd": "\ufffd \ud83d\ude00"}'),
        ("5", b'{"arguments":"5"}'),
        ('{"a":' * 65 + "1" + "}" * 65, None),
    ],
)
def test_arguments_that_are_not_an_object_are_wrapped_in_one(arguments: str, expected: bytes | None) -> None:
    """The call may have been truncated, and Ollama and the templates parse JSON."""
    whole = CalledFunction("f", arguments).whole_arguments
    assert isinstance(json.loads(whole), dict)
    assert whole == (
        json.dumps({"arguments": arguments}, separators=(",", ":")).encode() if expected is None else expected
    )


@pytest.mark.parametrize(
    ("arguments", "is_whole"),
    [
        ('{"a":' * 64 + "1" + "}" * 64, True),
        ('{"a":"' + "]" * 1000 + '"}', True),
        ('{"a":"' + "]" * 1000 + "[" * 63 + '"}', True),
        ('{"a":"' + "x, " * 300_000 + '"}', True),
        ('{"a":"' + "[" * 1000 + '"}', False),
    ],
)
def test_nesting_of_arguments_is_limited_to_64(arguments: str, is_whole: bool) -> None:
    assert (CalledFunction("f", arguments).whole_arguments == arguments.encode()) is is_whole


@pytest.mark.parametrize(
    ("arguments", "is_whole"),
    [
        ('{"a":[' + "[]," * (MAX_CONTAINERS - 3) + "1]}", True),
        ('{"a":[' + "[]," * MAX_CONTAINERS + "1]}", False),
        ('{"a":[' + '{"b":[]},' * (MAX_CONTAINERS // 2) + "1]}", False),
        ('{"a":"' + "f(x)[0]{}; " * MAX_CONTAINERS + '"}', True),
        ('{"a":"' + r"f(\"x\")[0]{}\\" * MAX_CONTAINERS + '"}', True),
        ('{"a":[' + '"[]",' * MAX_QUOTES + "1]}", False),
    ],
)
def test_arguments_with_too_many_objects_are_not_parsed(arguments: str, is_whole: bool) -> None:
    """The parser takes the event loop 150 ms for 200,000 empty arrays. Those within strings cost nothing."""
    assert (CalledFunction("f", arguments).whole_arguments == arguments.encode()) is is_whole


def test_arguments_are_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    function = CalledFunction("f", '{"a": [1, {"b": 2}]}')
    assert function.form == "object"
    monkeypatch.setattr("gateway.chat.request.orjson", None)
    assert function.whole_arguments == function.arguments.encode()


@pytest.mark.parametrize("filling", ["]" * MIB, "[]" * (MIB // 2), "]" * 60 + "x" + "{}" * 90_000, "[" * MIB])
def test_arguments_full_of_brackets_cost_no_more_than_to_find_the_brackets(filling: str) -> None:
    arguments = json.dumps({"a": filling})
    assert isinstance(json.loads(CalledFunction("f", arguments).whole_arguments), dict)
    brackets = "[]" * (MIB // 2)
    assert_at_most(
        1, lambda: CalledFunction("f", arguments).whole_arguments, yardstick=lambda: re.findall(r"[][{}]", brackets)
    )
