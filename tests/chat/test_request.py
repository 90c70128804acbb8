"""What a parsed request says: turns, limits, thinking, tools."""

import json
from typing import Any

import pytest

from gateway.chat.request import CalledFunction, Chat
from tests.fakes.chats import chat, named, tool

IMAGE = "data:image/png;base64,iVBORw0KGgo="


def test_smallest_request_says_nothing_else() -> None:
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
def test_null_is_as_good_as_absent(name: str) -> None:
    assert chat(**{name: None}) == chat()


# Turns


def test_parts_of_a_turn_stay_in_one_turn() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}},
        {"type": "text", "text": "b"},
    ]
    taken = chat(messages=[{"role": "user", "content": parts}])
    assert len(taken.messages) == 1
    assert (taken.messages[0].text, taken.messages[0].images, taken.has_images) == ("a\nb", [IMAGE], True)


def test_refusal_of_an_earlier_turn_is_its_text() -> None:
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
def test_thought_of_an_earlier_turn_is_taken_under_both_names(fields: dict[str, str], thought: str | None) -> None:
    assert chat(messages=[{"role": "assistant", "content": "x", **fields}]).messages[0].thought == thought


# Limits


def test_newer_name_of_the_token_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert chat(max_tokens=5).token_limit == 5


def test_one_stop_is_a_list_of_one() -> None:
    assert chat(stop="x").stops == ["x"]
    assert chat(stop=["x", "y"]).stops == ["x", "y"]


@pytest.mark.parametrize(
    ("options", "wants"),
    [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True)],
)
def test_usage_is_given_only_to_who_asks(options: Any, wants: bool) -> None:
    assert chat(stream=True, stream_options=options).wants_usage is wants


# Thinking


@pytest.mark.parametrize(
    "off", [{"reasoning_effort": "none"}, {"think": False}, {"chat_template_kwargs": {"enable_thinking": False}}]
)
def test_thinking_is_turned_off_by_each_of_three_words_alike(off: dict[str, Any]) -> None:
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
def test_effort_is_brought_to_what_all_engines_know(field: str, said: str, meant: str) -> None:
    assert chat(**{field: {"effort": said} if field == "reasoning" else said}).effort == meant


def test_openais_word_on_thinking_wins_over_the_engines_own() -> None:
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
def test_what_says_nothing_of_thinking_is_nothing(unsaid: dict[str, Any]) -> None:
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
def test_choice_of_tool_offers_and_forces(choice: Any, offered: list[str], forced: list[str]) -> None:
    taken = chat(tools=BOTH, tool_choice=choice)
    assert [one.function.name for one in taken.offered] == offered
    assert [one.name for one in taken.forced] == forced


@pytest.mark.parametrize("choice", [None, "none", "auto"])
def test_empty_list_of_tools_is_none(choice: str | None) -> None:
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
def test_arguments_that_are_no_object_go_back_to_the_model_inside_one(said: str, sent: bytes | None) -> None:
    """A call may have been cut off, and Ollama and the templates read JSON."""
    whole = CalledFunction("f", said).whole_arguments
    assert isinstance(json.loads(whole), dict)
    assert whole == (json.dumps({"arguments": said}, separators=(",", ":")).encode() if sent is None else sent)
