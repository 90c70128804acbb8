"""Forms of a conversation that chat templates accept."""

import re
from typing import Any

import msgspec
import pytest

from gateway.chat.conversation import template_id, with_system_first, with_turns, without_system
from gateway.chat.message import Message

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def conversation(*messages: tuple[str, Any] | dict[str, Any]) -> list[Message]:
    full = [one if isinstance(one, dict) else {"role": one[0], "content": one[1]} for one in messages]
    return msgspec.convert(full, list[Message])


def shown(messages: list[Message] | None) -> list[tuple[str, str]] | None:
    return None if messages is None else [(message.role, message.text) for message in messages]


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([("system", "a"), ("system", "b"), ("user", "c")], [("system", "a\n\nb"), ("user", "c")]),
        ([("developer", "a"), ("system", "b"), ("user", "c")], [("system", "a\n\nb"), ("user", "c")]),
        (
            [("user", "a"), ("assistant", "b"), ("system", "c"), ("user", "d")],
            [("system", "c"), ("user", "a"), ("assistant", "b"), ("user", "d")],
        ),
        ([("system", "a"), ("user", "b"), ("developer", "c")], [("system", "a\n\nc"), ("user", "b")]),
        (
            [("system", ""), ("system", [{"type": "text", "text": "a"}]), ("user", "b")],
            [("system", "a"), ("user", "b")],
        ),
    ],
)
def test_system_messages_are_joined_in_front(messages: list[Any], expected: list[Any]) -> None:
    assert shown(with_system_first(conversation(*messages))) == expected


@pytest.mark.parametrize("messages", [[("user", "a")], [("developer", "a"), ("user", "b"), ("user", "c")]])
def test_conversation_without_a_late_system_message_is_returned_itself(messages: list[Any]) -> None:
    given = conversation(*messages)
    assert with_system_first(given) is given


def test_neighbours_of_the_same_role_are_joined_with_all_they_have() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    given = conversation(
        ("user", "a"),
        ("system", "s"),
        ("user", [{"type": "text", "text": "b"}, IMAGE]),
        {"role": "assistant", "content": "c", "reasoning": "r"},
        {"role": "assistant", "content": None, "reasoning_content": "q", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "d"},
        {"role": "tool", "tool_call_id": "a", "content": "e"},
        ("assistant", "f"),
    )
    joined = with_turns(given)
    assert shown(joined) == [
        ("system", "s"), ("user", "a\nb"), ("assistant", "c"), ("tool", "d"), ("tool", "e"), ("assistant", "f"),
    ]  # fmt: skip
    assert joined is not None
    assert joined[1].images == [IMAGE["image_url"]["url"]]  # type: ignore[index]
    assert (joined[2].reasoning_text, len(joined[2].tool_calls or ())) == ("r\n\nq", 1)
    assert with_turns(joined) is None


def test_text_of_the_system_goes_in_front_of_the_users_first_message() -> None:
    given = conversation(("system", "s"), ("assistant", "a"), ("user", "b"), ("user", "c"))
    assert shown(without_system(given)) == [("assistant", "a"), ("user", "s\n\nb"), ("user", "c")]
    assert without_system(conversation(("user", "a"))) is None
    assert without_system(conversation(("system", "a"), ("assistant", "b"))) is None


def test_id_that_a_template_may_refuse_gets_another_one_always_the_same() -> None:
    assert template_id("abcDEF123") == "abcDEF123"
    given = ["call_1", "call_2", "", "abcDEF12", "abcDEF1234", "abcDEF12é", "\ufffd" * 9, "chatcmpl-tool-0f"]
    made = [template_id(one) for one in given]
    assert len(set(made)) == len(given)
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in made)
    assert made == [template_id(one) for one in given]
