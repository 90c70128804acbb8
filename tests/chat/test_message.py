"""Tests of messages: the parts of their content, and earlier calls."""

import json
import re

import pytest

from gateway.chat.message import MAX_CONTAINERS, MAX_QUOTES, CalledFunction
from tests.fakes.chats import MIB, chat
from tests.fakes.processor_time import assert_at_most

IMAGE = "data:image/png;base64,iVBORw0KGgo="


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
    monkeypatch.setattr("gateway.chat.message.orjson", None)
    assert function.whole_arguments == function.arguments.encode()


@pytest.mark.parametrize("filling", ["]" * MIB, "[]" * (MIB // 2), "]" * 60 + "x" + "{}" * 90_000, "[" * MIB])
def test_arguments_full_of_brackets_cost_no_more_than_to_find_the_brackets(filling: str) -> None:
    arguments = json.dumps({"a": filling})
    assert isinstance(json.loads(CalledFunction("f", arguments).whole_arguments), dict)
    brackets = "[]" * (MIB // 2)
    assert_at_most(
        1, lambda: CalledFunction("f", arguments).whole_arguments, yardstick=lambda: re.findall(r"[][{}]", brackets)
    )
