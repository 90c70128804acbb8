"""Blocks of a prompt: equal exactly as far as two prompts are the same from the start."""

from typing import Any

import msgspec
import pytest

from gateway.chat.prompt_blocks import IMAGE_CHARACTERS, MAX_BLOCKS, SHORT, WORTH_CACHING, PromptBlocks, prompt_blocks
from gateway.chat.request import Chat


@pytest.fixture
def all_worth_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks.WORTH_CACHING", 0)


SYSTEM = {"role": "system", "content": "s" * 5000}


def blocks(*messages: dict[str, Any], model: str = "m", **fields: Any) -> PromptBlocks:
    found = prompt_blocks(msgspec.convert({"model": model, "messages": messages, **fields}, Chat), model)
    assert found is not None
    return found


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def shared(one: PromptBlocks, other: PromptBlocks) -> int:
    """Return the number of characters of the blocks that both begin with."""
    same = [end for a, b, end in zip(one.hashes, other.hashes, one.ends, strict=False) if a == b]
    assert one.hashes[: len(same)] == other.hashes[: len(same)]
    return same[-1] if same else 0


def test_next_turn_of_a_conversation_begins_with_the_blocks_of_the_last() -> None:
    first = blocks(SYSTEM, user("one"))
    second = blocks(SYSTEM, user("one"), {"role": "assistant", "content": "1"}, user("two"))
    assert shared(first, second) == first.size == 5003
    assert (first.is_continued, second.is_continued, first.home == second.home) == (False, True, True)


def test_requests_with_the_same_system_message_share_its_blocks_alone() -> None:
    one, other = blocks(SYSTEM, user("one")), blocks(SYSTEM, user("other"))
    assert shared(one, other) == 5000
    assert one.ends[one.common - 1] == 5000
    assert one.home != other.home


@pytest.mark.usefixtures("all_worth_caching")
def test_texts_that_differ_late_share_the_blocks_before_that() -> None:
    text = "x" * 40_000
    assert shared(blocks(user(text)), blocks(user(text[:20_000] + "y" + text[20_001:]))) == 16 * 1024
    assert shared(blocks(user(text)), blocks(user(text + "y"))) >= 36 * 1024


def call(arguments: str) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": function}]}


def image(data: str) -> dict[str, Any]:
    return user([{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}])


@pytest.mark.usefixtures("all_worth_caching")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([user("a")], [{"role": "system", "content": "a"}]),
        ([user("ab")], [user("a"), user("b")]),
        ([user([{"type": "text", "text": "a"}])], [user([{"type": "text", "text": "b"}])]),
        ([image("AAAA")], [image("BBBB")]),
        ([user("a"), call("1")], [user("a"), call("2")]),
    ],
)
def test_prompts_that_differ_have_different_blocks(one: list[Any], other: list[Any]) -> None:
    assert blocks(*one).hashes[-1] != blocks(*other).hashes[-1]


@pytest.mark.usefixtures("all_worth_caching")
def test_tools_and_model_come_before_everything() -> None:
    tool = {"type": "function", "function": {"name": "f", "description": "d"}}
    with_tools = blocks(SYSTEM, user("one"), tools=[tool])
    assert shared(with_tools, blocks(SYSTEM, user("one"))) == 0
    assert shared(with_tools, blocks(SYSTEM, user("two"), tools=[tool])) == 5002
    assert shared(blocks(user("one")), blocks(user("one"), model="other")) == 0


@pytest.mark.usefixtures("all_worth_caching")
def test_an_image_counts_as_much_text_as_it_has_tokens() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert blocks(user([image, {"type": "text", "text": "abc"}])).size == IMAGE_CHARACTERS + 3


def test_number_of_blocks_is_bounded_whatever_is_sent() -> None:
    assert len(blocks(*[user("a")] * 2048).hashes) == MAX_BLOCKS
    assert len(blocks(user("a" * 1_000_000)).hashes) < 64
    assert len(blocks(*[user("a" * 512 * SHORT)] * 300).hashes) < MAX_BLOCKS + 64


@pytest.mark.parametrize(("length", "is_worth_it"), [(0, False), (WORTH_CACHING - 1, False), (WORTH_CACHING, True)])
def test_short_prompt_is_not_worth_caching(length: int, is_worth_it: bool) -> None:
    chat = msgspec.convert({"model": "m", "messages": [user("a" * length)]}, Chat)
    assert (prompt_blocks(chat, "m") is not None) == is_worth_it
    assert prompt_blocks(msgspec.structs.replace(chat, messages=[]), "m") is None, "a request to load a model"


@pytest.mark.usefixtures("all_worth_caching")
def test_half_a_surrogate_pair_in_the_beginning_is_no_error() -> None:
    assert blocks(user(b"\\ud83d".decode("unicode_escape"))).size == 1
