"""What a parsed request says: turns, limits, thinking, tools."""

import json
from typing import Any

import pytest

from gateway.chat.request import CalledFunction, Chat
from tests.fakes.chats import chat, named, tool

IMAGE = "data:image/png;base64,iVBORw0KGgo="


def test_minimal_request_sets_nothing_else() -> None:
    taken = chat()
    assert (taken.model, taken.messages[0].text, taken.stream, taken.has_images, taken.wants_usage) == (
        "standard",
        "Hello",
        None,
        False,
        False,
    )
    assert (taken.token_limit, taken.stops, taken.effort, taken.offered, taken.forced) == (None, [], None, [], [])


@pytest.mark.parametrize("name", [name for name in Chat.__struct_fields__ if name not in ("model", "messages")])
def test_null_field_counts_as_absent(name: str) -> None:
    assert chat(**{name: None}) == chat()


# Turns


def test_content_parts_stay_in_one_message() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}},
        {"type": "text", "text": "b"},
    ]
    taken = chat(messages=[{"role": "user", "content": parts}])
    assert len(taken.messages) == 1
    assert (taken.messages[0].text, taken.messages[0].images, taken.has_images) == ("a\nb", [IMAGE], True)


def test_refusal_part_is_text_of_the_message() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "no"}]
    assert chat(messages=[{"role": "assistant", "content": parts}]).messages[0].text == "a\nno"


@pytest.mark.parametrize(
    ("fields", "thought"),
    [
        ({}, None),
        ({"reasoning": "a"}, "a"),
        ({"reasoning_content": "b"}, "b"),
        ({"reasoning": "a", "reasoning_content": "b"}, "a"),
    ],
)
def test_earlier_reasoning_is_accepted_under_both_names(fields: dict[str, str], thought: str | None) -> None:
    assert chat(messages=[{"role": "assistant", "content": "x", **fields}]).messages[0].thought == thought


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


@pytest.mark.parametrize(
    "off", [{"reasoning_effort": "none"}, {"think": False}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_thinking_can_be_turned_off_with_three_fields(off: dict[str, Any]) -> None:
    assert chat(**off).effort == "none"


@pytest.mark.parametrize("on", [{"think": True}, {"chat_template_kwargs": {"enable_thinking": True}}])
def test_thinking_is_turned_on_without_an_effort(on: dict[str, Any]) -> None:
    assert chat(**on).effort is True


@pytest.mark.parametrize(
    ("said", "meant"),
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
def test_effort_is_mapped_to_one_that_all_engines_support(field: str, said: str, meant: str) -> None:
    assert chat(**{field: {"effort": said} if field == "reasoning" else said}).effort == meant


def test_openais_thinking_field_takes_precedence_over_the_engines() -> None:
    template = {"enable_thinking": True}
    assert (
        chat(reasoning_effort="low", reasoning={"effort": "high"}, think=False, chat_template_kwargs=template).effort
        == "low"
    )
    assert chat(reasoning={"effort": "high"}, think=False).effort == "high"
    assert chat(think=False, chat_template_kwargs=template).effort == "none"


@pytest.mark.parametrize(
    "unsaid",
    [{"reasoning": {}}, {"reasoning": {"effort": "odd"}}, {"chat_template_kwargs": {"add_generation_prompt": 1}}],
)
def test_unknown_thinking_options_set_no_effort(unsaid: dict[str, Any]) -> None:
    assert chat(**unsaid).effort is None


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
    ],
)
def test_tool_choice_decides_offered_and_forced_functions(choice: Any, offered: list[str], forced: list[str]) -> None:
    taken = chat(tools=BOTH, tool_choice=choice)
    assert [one.function.name for one in taken.offered] == offered
    assert [one.name for one in taken.forced] == forced


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_empty_list_of_tools_offers_and_forces_nothing(choice: str | None) -> None:
    taken = chat(tools=[], tool_choice=choice)
    assert (taken.offered, taken.forced) == ([], [])


# Calls of earlier turns


@pytest.mark.parametrize(
    ("said", "sent"),
    [
        ('{"a": 1}', b'{"a": 1}'),
        ("", b"{}"),
        (" ", b"{}"),
        ('{"a":', b'{"arguments":"{\\"a\\":"}'),
        ("[]", b'{"arguments":"[]"}'),
        ("5", b'{"arguments":"5"}'),
        ('{"a":' * 65 + "1" + "}" * 65, None),
    ],
)
def test_arguments_that_are_not_an_object_are_wrapped_in_one(said: str, sent: bytes | None) -> None:
    """A call may have been cut off, and Ollama and the templates read JSON."""
    whole = CalledFunction("f", said).whole_arguments
    assert isinstance(json.loads(whole), dict)
    assert whole == (json.dumps({"arguments": said}, separators=(",", ":")).encode() if sent is None else sent)
