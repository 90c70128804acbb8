"""Blocks of a prompt: equal exactly as far as two prompts are the same from the start."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.chat import prompt_blocks as prompt_blocks_module
from gateway.chat.prompt_blocks import (
    IMAGE_CHARACTERS,
    KEPT_TEXTS,
    LONGEST_KEPT,
    MAX_BLOCKS,
    SHORT,
    STEP,
    WORTH_CACHING,
    PromptBlocks,
    prompt_blocks,
)
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
    """Return the number of characters at the beginning of `other` whose blocks are all in `one`."""
    known = [block in one.hashes for block in other.hashes]
    count = known.index(False) if False in known else len(known)
    assert not any(known[count:])
    assert [one.ends[one.hashes.index(block)] for block in other.hashes[:count]] == other.ends[:count]
    return other.ends[count - 1] if count else 0


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


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@given(st.lists(st.integers(0, 3000), min_size=2, max_size=40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_turn_of_a_growing_conversation_begins_with_all_of_the_last_prompt(
    sizes: list[int], has_call: bool
) -> None:
    messages: list[dict[str, Any]] = [SYSTEM, *([call("1")] if has_call else [])]
    last: PromptBlocks | None = None
    for number, size in enumerate(sizes):
        messages += [user(f"{number}" + "q" * size)]
        turn = blocks(*messages)
        assert turn.ends == sorted(turn.ends)
        assert turn.size == sum(len(message.get("content", "1")) for message in messages) + max(0, 2 * number - 1) * (
            not has_call
        )
        if last is not None:
            assert shared(last, turn) == last.size
        last = turn
        messages += [answer("a" * (size // 2))]


@pytest.mark.parametrize("length", [1023, 1024, 1025, 4096, 16 * 1024, 64 * 1024])
def test_prompt_that_ends_at_a_place_of_a_block_is_known_whole(length: int) -> None:
    turns = [SYSTEM, user("one"), answer("a" * (length - 4)), user("two")]
    first, second = blocks(*turns), blocks(*turns, answer("b" * 90), user("three"))
    assert shared(first, second) == first.size == 5003 + length


def test_text_beyond_the_last_place_is_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks._LATER_PLACES", [(0, 1024), (1024, 2048)])
    turns = [SYSTEM, user("one"), answer("a" * 9000), user("two")]
    first, second = blocks(*turns), blocks(*turns[:-1], user("not two"))
    assert len(first.hashes) == len(first.ends)
    assert first.size == 5003 + 9004
    assert shared(first, second) == 5003 + 2048


def test_conversations_that_part_late_share_what_comes_before() -> None:
    turns = [message for number in range(20) for message in (user(f"{number}" + "q" * 700), answer("a" * 700))]
    one, other = blocks(SYSTEM, *turns, user("left")), blocks(SYSTEM, *turns[:30], user("right"))
    assert 5000 + 16 * 1024 <= shared(one, other) <= 5000 + 30 * 702


@pytest.mark.parametrize(("place", "size"), [(0, STEP), (1, STEP), (300, STEP), (330, 1), (699, 1)])
def test_change_of_a_later_turn_is_found(place: int, size: int) -> None:
    """One of a few characters is found in what is new; in the earlier text only some characters are looked at."""
    turns = [user("q" * 700), answer("a" * 700), user("q" * 700)]
    changed = [*turns[:-1], user("q" * place + "x" * size + "q" * (700 - place - size))]
    assert blocks(SYSTEM, *turns).hashes[-1] != blocks(SYSTEM, *changed).hashes[-1]


def test_system_messages_of_one_length_are_told_apart() -> None:
    texts = ["s" * 5000, "s" * 4999 + "t", "t" + "s" * 4999, "s" * 2500 + "t" + "s" * 2499]
    found = [blocks({"role": "system", "content": text}, user("one")) for text in texts * 2]
    assert [each.hashes for each in found[:4]] == [each.hashes for each in found[4:]]
    assert len({each.hashes[-1] for each in found}) == len({each.home for each in found[:2]}) + 2 == 4
    assert all(each.common == found[0].common for each in found)


def test_number_of_remembered_texts_is_bounded() -> None:
    for length in range(5000, 5000 + 2 * KEPT_TEXTS):
        blocks({"role": "system", "content": "s" * length}, user("one"))
    blocks({"role": "system", "content": "s" * (LONGEST_KEPT + 1)}, user("one"))
    assert len(prompt_blocks_module._known_texts) == KEPT_TEXTS
    assert max(len(text) for text, *_ in prompt_blocks_module._known_texts.values()) <= LONGEST_KEPT


def test_number_of_blocks_is_bounded_whatever_is_sent() -> None:
    assert len(blocks(*[user("a")] * 2048).hashes) < 10
    assert len(blocks(*[user("a"), call("1")] * 1024).hashes) == MAX_BLOCKS
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


def test_root_is_a_number_of_the_tools_and_the_system_message_in_every_process(all_worth_caching: None) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    others = [{"type": "function", "function": {"name": "clock"}}]
    short = {"role": "system", "content": "Be brief."}
    roots = [
        blocks(SYSTEM, user("a")).root,
        blocks(short, user("a")).root,
        blocks(SYSTEM, user("a"), tools=tools).root,
        blocks(SYSTEM, user("a"), tools=others).root,
        blocks(user("a"), tools=tools).root,
    ]
    assert roots == [4025037178, 1622590782, 2738479636, 1368559592, 1288754030]
    assert blocks(SYSTEM, user("b"), {"role": "assistant", "content": "c"}, user("d")).root == roots[0]
    assert blocks(user("a")).root == 0
