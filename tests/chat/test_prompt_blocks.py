"""Blocks of a prompt: equal exactly as far as two prompts are the same from the start."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.chat import prompt_blocks as prompt_blocks_module
from gateway.chat.prompt_blocks import (
    IMAGE_CHARACTERS,
    KEPT_ENDS,
    KEPT_TEXTS,
    LONGEST_KEPT,
    MAX_FIRST,
    MAX_PARTS,
    TAIL,
    WORTH_CACHING,
    PromptBlocks,
    prompt_blocks,
)
from gateway.chat.request import Chat


@pytest.fixture
def all_worth_caching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks.WORTH_CACHING", 0)


@pytest.fixture(autouse=True)
def _nothing_known() -> None:
    prompt_blocks_module._known_ends.clear()
    prompt_blocks_module._known_tools.clear()


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
    assert shared(blocks(user(text)), blocks(user(text[:20_000] + "y" * 32 + text[20_032:]))) == 16 * 1024
    assert shared(blocks(user(text)), blocks(user(text + "y"))) == 38 * 1024


@pytest.mark.parametrize("length", [1500, 4000, 9000, 15_000, 40_000, 130_000, 1_000_000])
def test_questions_about_one_document_share_nearly_all_of_it(length: int) -> None:
    document, known = "x" * length, set[int]()
    for number in range(12):
        asked = blocks(user(document + f"{number}" + "q" * (number * 7 % 12 * 20)))
        count = next((index for index, block in enumerate(asked.hashes) if block not in known), len(asked.hashes))
        known.update(asked.hashes)
    assert asked.ends[count - 1] >= 0.8 * length


def test_text_that_grows_shares_nearly_all_of_the_text_before() -> None:
    text, known, unknown = "x" * 20_000, set[int](), 0
    for number in range(100):
        asked = blocks(user(text))
        unknown += sum(end - begin for block, begin, end in _pieces(asked) if block not in known)
        known.update(asked.hashes)
        text += f"{number}" + "y" * 150
    assert unknown <= 100 * 0.1 * len(text)


def _pieces(prompt: PromptBlocks) -> list[tuple[int, int, int]]:
    return list(zip(prompt.hashes, [0, *prompt.ends], prompt.ends, strict=False))


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
    for name, description in (("g", "d"), ("f", "dd")):
        other = {"type": "function", "function": {"name": name, "description": description}}
        assert shared(with_tools, blocks(SYSTEM, user("one"), tools=[other])) == 0
    assert shared(blocks(user("one")), blocks(user("one"), model="other")) == 0


def tools(*names: str, description: str = "d") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "description": description}} for name in names]


@pytest.mark.usefixtures("all_worth_caching")
def test_tools_that_differ_in_the_middle_alone_are_told_apart() -> None:
    one, other = (blocks(SYSTEM, user("one"), tools=tools("f", name, "g")) for name in "ab")
    assert shared(one, other) == 0
    assert one.root != other.root


def test_blocks_end_in_order_whichever_tools_are_remembered() -> None:
    """Only some of the tools are looked at, so others may have the same number."""
    for length in (1, 5000):
        middle = tools("b", description="d" * length)
        found = blocks(SYSTEM, user("one"), tools=[*tools("a"), *middle, *tools("c", "d")])
        assert found.ends == sorted(found.ends)


@pytest.mark.parametrize("count", range(1, 6))
@pytest.mark.parametrize("missing", [0, 1])
def test_a_prompt_is_worth_caching_by_its_size_alone(count: int, missing: int) -> None:
    texts = ["x" * (WORTH_CACHING // count)] * (count - 1)
    texts.append("x" * (WORTH_CACHING - sum(map(len, texts)) - missing))
    chat = msgspec.convert({"model": "m", "messages": [user(text) for text in texts]}, Chat)
    assert (prompt_blocks(chat, "m") is None) is bool(missing)


def test_few_lists_of_tools_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks.KEPT_TOOLS", 5)
    found = [blocks(SYSTEM, user("one"), tools=tools(f"f{number}")) for number in range(12)]
    assert len(prompt_blocks_module._known_tools) <= 5
    for number, before in enumerate(found):
        again = blocks(SYSTEM, user("one"), tools=tools(f"f{number}"))
        assert (again.hashes, again.ends, again.root) == (before.hashes, before.ends, before.root)


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
    prompt_blocks_module._known_ends.clear()
    messages: list[dict[str, Any]] = [SYSTEM, *([call("1")] if has_call else [])]
    last: PromptBlocks | None = None
    for number, size in enumerate(sizes):
        messages += [user(f"{number}" + "q" * size)]
        turn = blocks(*messages)
        assert turn.ends == sorted(turn.ends)
        assert turn.size == sum(len(message.get("content", "1")) for message in messages)
        if last is not None:
            assert shared(last, turn) == last.size
        last = turn
        messages += [answer("a" * (size // 2))]


@pytest.mark.parametrize("count", range(1, 34))
def test_prompt_of_any_number_of_turns_is_known_whole_in_the_next(count: int) -> None:
    turns = [message for number in range(count) for message in (user(f"{number}"), answer("a" * number))]
    first, second = blocks(SYSTEM, *turns, user("last")), blocks(SYSTEM, *turns, user("last"), answer("b"), user("c"))
    assert shared(first, second) == first.size
    assert len(second.hashes) <= len(blocks(SYSTEM, user("0")).hashes) + 8


def test_calls_of_several_tools_at_once_are_one_answer() -> None:
    calls = {"role": "assistant", "tool_calls": [call("1")["tool_calls"][0], call("2")["tool_calls"][0]]}
    results = [{"role": "tool", "tool_call_id": "x", "content": "r" * size} for size in (10, 900)]
    turns = [SYSTEM, user("one"), answer("1"), user("two"), answer("2"), user("three")]
    first, second = blocks(*turns), blocks(*turns, calls, *results)
    assert shared(first, second) == first.size
    assert second.size == first.size + 2 + 910


def test_conversations_that_part_late_share_half_of_what_comes_before() -> None:
    turns = [message for number in range(20) for message in (user(f"{number}" + "q" * 700), answer("a" * 700))]
    one, other = blocks(SYSTEM, *turns, user("left")), blocks(SYSTEM, *turns[:30], user("right"))
    assert 5000 + 15 * 700 <= shared(one, other) <= 5000 + 30 * 702


def test_questions_after_one_long_answer_share_it() -> None:
    turns = [SYSTEM, user("one"), answer("a" * 9000)]
    assert shared(blocks(*turns, user("two")), blocks(*turns, user("three"))) == 5003 + 9000


def test_same_questions_after_answers_of_one_length_are_other_prompts() -> None:
    """As of a program that asks each model, or each person, the same."""
    turns = [[message for number in range(9) for message in (user(f"{number}"), answer(said))] for said in "ab"]
    one, other = (blocks(SYSTEM, *each, user("last")) for each in turns)
    assert shared(one, other) == 5001


TURNS = [user("q" * 700), answer("a" * 700), user("q" * 700)]


@pytest.mark.parametrize(
    "changed",
    [
        user("q" * (700 - TAIL) + "x" + "q" * (TAIL - 1)),
        user("q" * 699 + "x"),
        user("q" * 701),
        answer("a" * 700 + "q"),
        call("q"),
        image("q"),
    ],
)
def test_change_of_the_last_message_is_found(changed: dict[str, Any]) -> None:
    assert blocks(SYSTEM, *TURNS).hashes[-1] != blocks(SYSTEM, *TURNS[:-1], changed).hashes[-1]


def test_same_question_after_another_answer_is_another_prompt() -> None:
    assert blocks(SYSTEM, *TURNS).hashes[-1] != blocks(SYSTEM, TURNS[0], answer("a" * 699), TURNS[2]).hashes[-1]


def test_blocks_end_in_order_if_a_program_shortens_earlier_messages() -> None:
    """Programs for agents replace old results of tools to save tokens."""
    turns = [SYSTEM, user("one"), answer("a")]
    for number in range(20):
        turns += [user(f"{number}" + "q" * 900), answer("a" * 900)]
        blocks(*turns, user("next"))
        turns[len(turns) // 2] = user("q")
        assert (found := blocks(*turns, user("next"))).ends == sorted(found.ends)


def test_size_is_counted_unless_part_of_it_is_remembered() -> None:
    """A program may have shortened messages since that was counted."""
    turns = [SYSTEM, user("one")]
    for number in range(4):
        turns += [answer("a" * 3000), user(f"{number}")]
        found = blocks(*turns)
        assert found.is_counted == (number < 1)
    assert blocks(SYSTEM, user("two")).is_counted
    turns[2] = answer("a")
    found = blocks(*turns, answer("x"), user("y"))
    assert found.size > 5007 + 9000
    assert not found.is_counted


def test_few_of_very_many_parts_are_looked_at() -> None:
    text = {"type": "text", "text": "q" * 100}
    one, other = blocks(user([text] * 10_000)), blocks(user([text] * 9_999 + [{"type": "text", "text": "x" * 100}]))
    assert one.size <= MAX_PARTS * 101
    assert one.hashes[-1] != other.hashes[-1]
    assert one.home != other.home
    later = [blocks(user("one"), answer("a" * 300), user([text] * count)) for count in (9_999, 10_000)]
    assert later[0].hashes[-1] != later[1].hashes[-1]
    assert later[0].size == later[1].size <= 303 + MAX_PARTS * 101


@given(st.lists(st.integers(0, 200_000), min_size=1, max_size=5))
@settings(max_examples=60, deadline=None)
def test_long_texts_that_differ_in_their_last_characters_are_told_apart(sizes: list[int]) -> None:
    texts = ["q" * size for size in sizes]
    one, other = blocks(SYSTEM, user("".join(texts) + "x")), blocks(SYSTEM, user("".join(texts) + "y"))
    assert one.hashes[-1] != other.hashes[-1]
    assert one.home != other.home
    assert shared(one, other) <= one.size - 1


def test_text_beyond_the_last_place_is_one_block() -> None:
    text = "x" * ((1 << 24) + 5)
    one, other = blocks(user(text)), blocks(user(text + "y"))
    assert shared(one, other) == 15 << 20
    assert other.size == len(text) + 1


def test_system_messages_of_one_length_are_told_apart() -> None:
    texts = ["s" * 5000, "s" * 4999 + "t", "t" + "s" * 4999, "s" * 2500 + "t" * 8 + "s" * 2492]
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
    assert len(blocks(*[user("a")] * 2048).hashes) < 15
    assert len(blocks(*[user("a"), call("1")] * 1024).hashes) < 15
    assert len(blocks(*[answer("a")] * 2048).hashes) < MAX_FIRST + 15
    assert len(blocks(*[SYSTEM] * 2048).hashes) < MAX_FIRST * 7 + 15
    assert len(blocks(user("a" * 1_000_000)).hashes) < 64


def test_number_of_remembered_ends_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.chat.prompt_blocks.KEPT_ENDS", 5)
    turns = [SYSTEM, user("one"), answer("1"), user("two")]
    sizes = [blocks(*turns, answer("a" * number), user("three")).size for number in range(20)]
    assert sizes == [5012 + number for number in range(20)]
    assert len(prompt_blocks_module._known_ends) == 5 < KEPT_ENDS


@pytest.mark.parametrize(("length", "is_worth_it"), [(0, False), (WORTH_CACHING - 1, False), (WORTH_CACHING, True)])
def test_short_prompt_is_not_worth_caching(length: int, is_worth_it: bool) -> None:
    chat = msgspec.convert({"model": "m", "messages": [user("a" * length)]}, Chat)
    assert (prompt_blocks(chat, "m") is not None) == is_worth_it
    assert prompt_blocks(msgspec.structs.replace(chat, messages=[]), "m") is None, "a request to load a model"


@pytest.mark.usefixtures("all_worth_caching")
def test_half_a_surrogate_pair_in_the_beginning_is_no_error() -> None:
    assert blocks(user(b"\\ud83d".decode("unicode_escape"))).size == 1


def test_root_is_a_number_of_the_tools_and_the_system_message_in_every_process(all_worth_caching: None) -> None:
    weather = [{"type": "function", "function": {"name": "weather"}}]
    others = [{"type": "function", "function": {"name": "clock"}}]
    short = {"role": "system", "content": "Be brief."}
    roots = [
        blocks(SYSTEM, user("a")).root,
        blocks(short, user("a")).root,
        blocks(SYSTEM, user("a"), tools=weather).root,
        blocks(SYSTEM, user("a"), tools=others).root,
        blocks(user("a"), tools=weather).root,
    ]
    assert roots == [1007223391, 1622590782, 2778972689, 3076006838, 2578104398]
    assert blocks(SYSTEM, user("b"), {"role": "assistant", "content": "c"}, user("d")).root == roots[0]
    assert blocks(user("a")).root == 0
