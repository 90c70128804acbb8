"""Tests of the normalisation of answers: reasoning, tool calls, finish reasons and logprobs."""

import json
import re
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from gateway.chat.answer import Answer, CallDelta, ChosenLogprob, Delta, FinishReason, TokenLogprob, Usage, assemble
from gateway.chat.normalizer import MAX_COMPARED, MAX_LEADING_BLANKS, MAX_LOOKS, Normalizer, ReasoningSplitter
from gateway.chat.request import Chat
from gateway.engines.ollama import OllamaReader
from gateway.engines.openai_response import OpenAiReader
from gateway.errors import UpstreamError
from tests.engines.recorded import body_of
from tests.fakes.chats import TIME, chat, named, tool
from tests.golden import load

USAGE = Usage(7, 3)
FORCED = chat(tools=[tool()], tool_choice=named())
ANY_OF_ONE = chat(tools=[tool()], tool_choice="required")
ANY_OF_TWO = chat(tools=[tool(), tool("get_time", TIME)], tool_choice="required")
FREE = chat(tools=[tool(), tool("get_time", TIME)])
ARGUMENTS = '{"city": "Oslo"}'
CALL = json.dumps({"name": "get_time", "arguments": {"zone": "UTC"}})


def text_deltas(*texts: str, finish: FinishReason = "stop") -> list[Delta]:
    return [*(Delta(text) for text in texts), Delta(finish=finish), Delta(usage=USAGE)]


def normalized(chat_request: Chat, deltas: Iterable[Delta]) -> list[Delta]:
    """Return the deltas shown for an answer that arrives delta by delta."""
    normalizer = Normalizer(chat_request)
    return [one for delta in deltas for one in normalizer.normalize([delta])]


def streamed_answer(chat_request: Chat, deltas: Iterable[Delta]) -> Answer:
    return assemble(normalized(chat_request, deltas))


def plain_answer(
    chat_request: Chat, text: str, finish: FinishReason = "stop", calls: list[CallDelta] | None = None
) -> Answer:
    """Return the answer for the same text in a single delta, as a plain answer."""
    return assemble(Normalizer(chat_request).normalize([Delta(text, "", finish, USAGE, calls)]))


def split_evenly(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def calls_of(answer: Answer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


# Reasoning and content


def split_pieces(pieces: Iterable[str]) -> tuple[str, str]:
    """Return content and reasoning of a text in these pieces."""
    splitter = ReasoningSplitter()
    found = [splitter.feed(piece) for piece in pieces] + [splitter.rest()]
    return "".join(content for content, _ in found), "".join(reasoning for _, reasoning in found)


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("<think>why</think>Hello", "Hello", "why"),
        ("\n<think>why</think>\n\nHello", "Hello", "why"),
        ("<think></think>Hello", "Hello", ""),
        ("<think>why", "", "why"),
        ("<think>a < b </thin", "", "a < b </thin"),
        ("Hello <think>why</think>", "Hello <think>why</think>", ""),
        ("<thinking>why", "<thinking>why", ""),
        ("<thin", "<thin", ""),
        ("  Hello", "  Hello", ""),
        ("", "", ""),
        ("<think>a</think>b</think>c", "b</think>c", "a"),
        ("<think>a</think>b <think>c</think>", "b <think>c</think>", "a"),
    ],
)
def test_reasoning_at_the_start_is_split_off_however_the_text_is_split(text: str, content: str, reasoning: str) -> None:
    assert split_pieces([text]) == (content, reasoning)
    for place in range(len(text) + 1):
        assert split_pieces([text[:place], text[place:]]) == (content, reasoning)
    assert split_pieces(text) == (content, reasoning)


fragments = st.sampled_from(
    ["<think>", "</think>", "<thi", "nk>", "</", "think", ">", "<", " ", "\n", "a", "é", "🙂"]
) | st.text(max_size=3)
pieces = st.tuples(
    st.sampled_from([[], [" "], ["<think>"], ["\n", "<think>", "a"], ["<think>", "</think>"]]),
    st.lists(fragments, max_size=10),
).map(lambda parts: parts[0] + parts[1])


def expected_split(text: str) -> tuple[str, str]:
    """Return the expected result, computed from the whole text."""
    found = re.fullmatch(rf"\s{{0,{MAX_LEADING_BLANKS}}}<think>(.*?)(?:</think>\s*(.*))?", text, re.DOTALL)
    return (text, "") if found is None else (found[2] or "", found[1])


@given(pieces, st.lists(st.integers(0, 60), max_size=6))
def test_content_and_reasoning_do_not_depend_on_how_the_text_is_split(parts: list[str], places: list[int]) -> None:
    text = "".join(parts)
    cuts = [0, *sorted(place for place in places if place <= len(text)), len(text)]
    assert split_pieces([text[start:end] for start, end in pairwise(cuts)]) == expected_split(text)
    assert split_pieces(parts) == split_pieces([text]) == split_pieces(text) == expected_split(text)


def test_whitespace_only_answer_is_streamed() -> None:
    """Seen with a real vLLM: 3,900 blank lines, all of which arrived at the end."""
    splitter = ReasoningSplitter()
    contents = [splitter.feed("\n")[0] for _ in range(2 * MAX_LEADING_BLANKS)]
    assert contents == [""] * MAX_LEADING_BLANKS + ["\n" * (MAX_LEADING_BLANKS + 1)] + ["\n"] * (MAX_LEADING_BLANKS - 1)


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize(
    ("blanks", "expected"),
    [
        (MAX_LEADING_BLANKS, ("yes", "hm")),
        (MAX_LEADING_BLANKS + 1, (" " * (MAX_LEADING_BLANKS + 1) + "<think>hm</think>yes", "")),
    ],
)
def test_reasoning_starts_after_a_limited_amount_of_whitespace(
    blanks: int, expected: tuple[str, str], size: int
) -> None:
    assert split_pieces(split_evenly(" " * blanks + "<think>hm</think>yes", size)) == expected


def test_content_is_not_held_back_once_it_has_begun() -> None:
    assert [delta.content for delta in normalized(chat(), text_deltas("Hel", "lo <", "think>"))][:3] == [
        "Hel",
        "lo <",
        "think>",
    ]


def test_reasoning_is_streamed_as_it_arrives() -> None:
    assert [delta.reasoning for delta in normalized(chat(), text_deltas("<think>", "wh", "y"))][:2] == ["wh", "y"]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_text_between_think_tags_is_the_reasoning(size: int) -> None:
    text = "<think>why</think>Hello"
    for answer in (streamed_answer(chat(), text_deltas(*split_evenly(text, size))), plain_answer(chat(), text)):
        assert (answer.content, answer.reasoning, answer.finish, answer.usage) == ("Hello", "why", "stop", USAGE)


def test_truncated_reasoning_stays_reasoning() -> None:
    answer = streamed_answer(chat(), text_deltas("<think>wh", "y</thi", finish="length"))
    assert (answer.content, answer.reasoning, answer.finish) == ("", "why</thi", "length")


def test_reasoning_split_by_the_engine_is_unchanged() -> None:
    answer = streamed_answer(chat(), [Delta(reasoning="why"), Delta("Hel"), Delta("lo"), *text_deltas()])
    assert (answer.content, answer.reasoning) == ("Hello", "why")


# Answers that need no normalisation


@pytest.mark.parametrize(
    ("first", "needed"),
    [
        ([Delta("Hello")], False),
        ([Delta(" Hello")], False),
        ([Delta("<")], True),
        ([Delta(" \n")], True),
        ([Delta("\n"), Delta("<think>")], True),
        ([Delta("<think>")], True),
        ([Delta(reasoning="why")], True),
        ([Delta(finish="stop")], True),
        ([Delta(calls=[CallDelta(0, "", "f", "{}")])], True),
    ],
)
def test_only_plain_content_needs_no_normalisation(first: list[Delta], needed: bool) -> None:
    assert Normalizer.is_needed(chat(), first) is needed


@pytest.mark.parametrize(
    "fields", [{"tools": [tool()]}, {"tools": [tool()], "tool_choice": "none"}, {"logprobs": True}]
)
def test_answer_with_tools_or_logprobs_needs_normalisation(fields: dict[str, Any]) -> None:
    assert Normalizer.is_needed(chat(**fields), [Delta("Hello")])


@pytest.mark.parametrize(
    ("chat_request", "passes"), [(chat(), True), (FREE, True), (FORCED, False), (ANY_OF_TWO, False)]
)
def test_content_passes_once_it_has_begun_unless_a_call_is_forced(chat_request: Chat, passes: bool) -> None:
    normalizer = Normalizer(chat_request)
    assert not normalizer.passes
    normalizer.normalize([Delta("Hello")])
    assert normalizer.passes is passes


# Free calls


def test_calls_get_the_gateways_ids_and_indices_from_zero() -> None:
    deltas = [
        Delta(calls=[CallDelta(3, "engine", "get_weather", "")]),
        Delta(calls=[CallDelta(3, "", "", '{"city":')]),
        Delta(calls=[CallDelta(3, "", "", '"Oslo"}'), CallDelta(5, "engine", "get_time", "{}")]),
        Delta(finish="tool_calls"),
    ]
    found = normalized(FREE, deltas)
    assert [[(call.index, bool(call.id), call.name) for call in delta.calls or ()] for delta in found] == [
        [(0, True, "get_weather")],
        [(0, False, "")],
        [(0, False, ""), (1, True, "get_time"), (1, False, "")],
        [],
    ]
    answer = assemble(found)
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"}), ("get_time", {})]
    ids = [call.id for call in answer.calls]
    assert len(set(ids)) == 2
    assert all(re.fullmatch(r"[A-Za-z0-9]{9}", one) for one in ids)


SAME_INDEX = [
    CallDelta(0, "a1", "get_weather", '{"city":'),
    CallDelta(0, "a1", "", '"Oslo"}'),
    CallDelta(0, "b2", "get_time", ""),
    CallDelta(0, "", "", '{"zone":"UTC"'),
    CallDelta(0, "b2", "", "}"),
    CallDelta(0, "c3", "get_time", "{}"),
]


@pytest.mark.parametrize(
    "pieces",
    [
        SAME_INDEX,
        [  # without ids, whole calls only
            CallDelta(0, "", "get_weather", '{"city":"Oslo"}'),
            CallDelta(0, "", "get_time", '{"zone":"UTC"}'),
            CallDelta(0, "", "get_time", "{}"),
        ],
    ],
    ids=["ids", "no ids"],
)
@pytest.mark.parametrize("at_once", [False, True])
def test_calls_with_the_same_index_are_told_apart(pieces: list[CallDelta], at_once: bool) -> None:
    copies = [msgspec.structs.replace(piece) for piece in pieces]
    deltas = [Delta(calls=copies)] if at_once else [Delta(calls=[piece]) for piece in copies]
    answer = assemble(normalized(FREE, [*deltas, Delta(finish="tool_calls")]))
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"}), ("get_time", {"zone": "UTC"}), ("get_time", {})]
    assert [call.index for call in answer.calls] == [0, 1, 2]
    assert len({call.id for call in answer.calls}) == 3


def test_only_the_first_of_calls_with_the_same_index_is_kept_without_parallel_calls() -> None:
    copies = [msgspec.structs.replace(piece) for piece in SAME_INDEX]
    request = msgspec.structs.replace(FREE, parallel_tool_calls=False)
    answer = assemble(normalized(request, [*(Delta(calls=[piece]) for piece in copies), Delta(finish="tool_calls")]))
    assert calls_of(answer) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("request_", "deltas"),
    [
        (FREE, lambda pieces: [Delta(calls=[CallDelta(0, "", "" if n else "f", piece)]) for n, piece in pieces]),
        (FORCED, lambda pieces: [Delta(content=piece) for _, piece in pieces]),
        (ANY_OF_TWO, lambda pieces: [Delta(content=piece) for _, piece in pieces]),
    ],
    ids=["free", "named", "required"],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_half_pairs_in_arguments_are_replaced_and_pairs_kept(request_: Chat, deltas: Any, size: int) -> None:
    text = r'{"city":"\ud83d\ude00 \ud83d \\ud83d \ude00"}'
    if request_ is ANY_OF_TWO:
        text = f'{{"name":"get_weather","arguments":{text}}}'
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    answer = assemble(normalized(request_, [*deltas(enumerate(pieces)), Delta(finish="stop")]))
    assert json.loads(answer.calls[0].arguments) == {"city": "\U0001f600 \ufffd \\ud83d \ufffd"}


def test_call_that_is_cut_off_in_an_escape_keeps_it() -> None:
    answer = assemble(normalized(FREE, [Delta(calls=[CallDelta(0, "", "f", '{"a":"\\u00')]), Delta(finish="length")]))
    assert answer.calls[0].arguments == '{"a":"\\u00'


def test_repeated_call_name_is_sent_once() -> None:
    """Earlier versions of vLLM repeat it in each piece of a named call."""
    pieces = [Delta(calls=[CallDelta(0, "", "get_weather", piece)]) for piece in split_evenly(ARGUMENTS, 4)]
    found = normalized(FORCED, [*pieces, Delta(finish="stop")])
    assert [call.name for delta in found for call in delta.calls or ()] == ["get_weather", *[""] * len(pieces)]
    assert calls_of(assemble(found)) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize(
    ("chat_request", "deltas"),
    [
        (FREE, [Delta(calls=[CallDelta(0, "", "get_weather", ARGUMENTS)]), Delta(finish="stop")]),
        (FORCED, text_deltas(ARGUMENTS)),
        (ANY_OF_TWO, text_deltas(CALL)),
    ],
    ids=["free", "named", "required"],
)
def test_call_starts_with_its_name_and_continues_with_its_arguments(chat_request: Chat, deltas: list[Delta]) -> None:
    """As at OpenAI, the first piece has id and name only, and the others have arguments only."""
    first, *rest = [call for delta in normalized(chat_request, deltas) for call in delta.calls or ()]
    assert first.id
    assert (bool(first.name), first.arguments) == (True, "")
    assert rest
    assert all(call.arguments and not call.id and not call.name for call in rest)


def test_only_the_first_call_is_kept_without_parallel_calls() -> None:
    chat_request = chat(tools=[tool(), tool("get_time")], parallel_tool_calls=False)
    deltas = [
        Delta(calls=[CallDelta(0, "", "get_weather", "{")]),
        Delta(calls=[CallDelta(1, "", "get_time", "{"), CallDelta(0, "", "", "}")]),
        Delta(calls=[CallDelta(1, "", "", "}")]),
        Delta(finish="tool_calls"),
    ]
    answer = streamed_answer(chat_request, deltas)
    assert (calls_of(answer), answer.finish) == ([("get_weather", {})], "tool_calls")
    assert calls_of(
        plain_answer(
            chat_request, "", calls=[CallDelta(0, "", "get_weather", "{}"), CallDelta(1, "", "get_time", "{}")]
        )
    ) == [("get_weather", {})]


@pytest.mark.parametrize("parallel", [None, True])
def test_all_calls_are_kept_by_default(parallel: bool | None) -> None:
    chat_request = chat(tools=[tool(), tool("get_time")], parallel_tool_calls=parallel)
    assert (
        len(
            plain_answer(
                chat_request, "", calls=[CallDelta(0, "", "get_weather", "{}"), CallDelta(1, "", "get_time", "{}")]
            ).calls
        )
        == 2
    )


def test_content_before_a_free_call_is_kept() -> None:
    answer = streamed_answer(
        FREE,
        [Delta("Let me "), Delta("see."), Delta(calls=[CallDelta(0, "", "get_weather", ARGUMENTS)]), *text_deltas()],
    )
    assert (answer.content, len(answer.calls), answer.finish) == ("Let me see.", 1, "tool_calls")


@pytest.mark.parametrize(
    ("chat_request", "has_call", "engine_reason", "expected"),
    [
        (FREE, True, "stop", "tool_calls"),  # Ollama
        (FREE, True, "tool_calls", "tool_calls"),
        (FREE, True, "length", "length"),
        (FREE, False, "stop", "stop"),
        (ANY_OF_TWO, True, "stop", "tool_calls"),
        (FORCED, True, "stop", "stop"),  # OpenAI, for a function that the client named
        (FORCED, True, "tool_calls", "stop"),
        (FREE, False, "content_filter", "content_filter"),
    ],
)
def test_finish_reason_follows_openais_rules(
    chat_request: Chat, has_call: bool, engine_reason: FinishReason, expected: str
) -> None:
    calls = [Delta(calls=[CallDelta(0, "", "get_time", "{}")])] if has_call else []
    assert streamed_answer(chat_request, [*calls, Delta(finish=engine_reason)]).finish == expected


@pytest.mark.parametrize("chat_request", [FREE, FORCED, ANY_OF_TWO])
@pytest.mark.parametrize("before", [[], [Delta(reasoning="hm")], [Delta("<think>hm</think>")], [Delta(" <think>hm")]])
def test_a_reported_call_that_never_came_is_an_error(chat_request: Chat, before: list[Delta]) -> None:
    """vLLM without a reasoning parser ends a forced call so, if the model only thought."""
    with pytest.raises(UpstreamError) as caught:
        streamed_answer(chat_request, [*map(structs.replace, before), Delta(finish="tool_calls")])
    assert caught.value.reason == "lost_call"


def test_a_text_after_which_the_engine_reports_a_call_that_it_does_not_send_is_the_answer() -> None:
    answer = streamed_answer(FREE, [Delta("It is sunny."), Delta(finish="tool_calls")])
    assert (answer.content, answer.finish) == ("It is sunny.", "stop")


# Forced calls that arrive as text

Delivery = Callable[[Chat, str, FinishReason], Answer]
DELIVERIES: list[Any] = [
    pytest.param(plain_answer, id="whole"),
    *(
        pytest.param(
            lambda chat_request, text, finish, size=size: streamed_answer(
                chat_request, text_deltas(*split_evenly(text, size), finish=finish)
            ),
            id=f"pieces of {size}",
        )
        for size in (1, 2, 7)
    ),
]


@pytest.mark.parametrize("deliver", DELIVERIES)
@pytest.mark.parametrize(
    ("chat_request", "finish"), [(FORCED, "stop"), (ANY_OF_ONE, "tool_calls")], ids=["named", "required"]
)
@pytest.mark.parametrize(
    "text", [ARGUMENTS, f" \n{ARGUMENTS}\n", '{\n "city"\n:\n"Oslo"\n}', "<think>why</think>" + ARGUMENTS]
)
def test_text_becomes_the_arguments_of_the_only_forced_function(
    deliver: Delivery, chat_request: Chat, finish: str, text: str
) -> None:
    answer = deliver(chat_request, text, "stop")
    assert (answer.content, calls_of(answer), answer.finish) == ("", [("get_weather", {"city": "Oslo"})], finish)
    assert re.fullmatch(r"[A-Za-z0-9]{9}", answer.calls[0].id)


@pytest.mark.parametrize("deliver", DELIVERIES)
@pytest.mark.parametrize(
    "text", [CALL, f"\n{CALL} ", CALL.replace("arguments", "parameters"), f"<tool_call>\n{CALL}\n</tool_call>"]
)
def test_text_becomes_a_call_of_the_named_function_among_several(deliver: Delivery, text: str) -> None:
    answer = deliver(ANY_OF_TWO, text, "stop")
    assert (answer.content, calls_of(answer), answer.finish) == ("", [("get_time", {"zone": "UTC"})], "tool_calls")


@pytest.mark.parametrize("deliver", DELIVERIES)
@pytest.mark.parametrize("chat_request", [FORCED, ANY_OF_ONE], ids=["named", "required"])
def test_forced_call_in_the_models_own_syntax_is_recognised(deliver: Delivery, chat_request: Chat) -> None:
    text = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert calls_of(deliver(chat_request, text, "stop")) == [("get_weather", {"city": "Oslo"})]


@pytest.mark.parametrize("deliver", DELIVERIES)
def test_call_tags_within_the_arguments_are_kept(deliver: Delivery) -> None:
    arguments = {"zone": "<tool_call></tool_call>"}
    text = json.dumps({"name": "get_time", "arguments": arguments})
    for one in (text, f"<tool_call>\n{text}\n</tool_call>"):
        assert calls_of(deliver(ANY_OF_TWO, one, "stop")) == [("get_time", arguments)]


@pytest.mark.parametrize("deliver", DELIVERIES)
def test_truncated_arguments_of_the_only_forced_function_are_kept(deliver: Delivery) -> None:
    answer = deliver(FORCED, '{"city": "Os', "length")
    assert (answer.content, [(call.name, call.arguments) for call in answer.calls], answer.finish) == (
        "",
        [("get_weather", '{"city": "Os')],
        "length",
    )


@pytest.mark.parametrize("deliver", DELIVERIES)
def test_only_forced_function_is_called_even_without_arguments(deliver: Delivery) -> None:
    answer = deliver(FORCED, "", "length")
    assert ([(call.name, call.arguments) for call in answer.calls], answer.finish) == ([("get_weather", "")], "length")


CUT_OFF = [
    ('<tool_call>\n{"name": "get_time", "arguments": {"zone": "U', '{"zone": "U'),
    ('{"name": "get_time", "arguments": {"zone": "U', '{"zone": "U'),
    ('{"name": "get_time", "arg', ""),
    ('{"name": "get_time"', ""),
    ('{"name": "get_time", "arguments": {"zone": "UTC"}', '{"zone": "UTC"}'),
    (f"<tool_call>\n{CALL}\n</tool_c", '{"zone": "UTC"}'),
    (f"<tool_call>\n{CALL}", '{"zone": "UTC"}'),
]


@pytest.mark.parametrize("deliver", DELIVERIES)
@pytest.mark.parametrize(("text", "arguments"), CUT_OFF)
def test_truncated_call_among_several_functions_is_kept(deliver: Delivery, text: str, arguments: str) -> None:
    """vLLM sends a forced call that `max_tokens` cut off as plain content."""
    answer = deliver(ANY_OF_TWO, text, "length")
    assert (answer.content, answer.finish) == ("", "length")
    assert [call.name for call in answer.calls] == ["get_time"]
    assert answer.calls[0].arguments.replace(" ", "") == arguments.replace(" ", "")


@pytest.mark.parametrize("deliver", DELIVERIES)
@pytest.mark.parametrize("text", ["", " ", "{", '{"na', "<tool_call>", '<tool_call>\n{"name": "get_t'])
def test_call_truncated_before_its_name_is_dropped(deliver: Delivery, text: str) -> None:
    answer = deliver(ANY_OF_TWO, text, "length")
    assert (answer.calls, answer.finish) == ([], "length")


@pytest.mark.parametrize("place", range(1, len(CALL)))
def test_call_does_not_depend_on_how_its_text_is_split(place: int) -> None:
    assert calls_of(streamed_answer(ANY_OF_TWO, text_deltas(CALL[:place], CALL[place:]))) == [
        ("get_time", {"zone": "UTC"})
    ]


def test_arguments_of_the_only_function_are_streamed_as_they_arrive() -> None:
    found = normalized(FORCED, text_deltas(*split_evenly(ARGUMENTS, 4)))
    assert sum(bool(delta.calls) for delta in found) == len(split_evenly(ARGUMENTS, 4))
    assert not any(delta.content for delta in found)


def test_bare_json_that_ollama_parses_as_a_call_is_kept_as_a_call() -> None:
    """Seen with models whose own call syntax is bare JSON."""
    deltas = [Delta(calls=[CallDelta(0, "", "get_time", '{"zone":"UTC"}')]), *text_deltas()]
    answer = streamed_answer(ANY_OF_TWO, deltas)
    assert (calls_of(answer), answer.content, answer.finish) == ([("get_time", {"zone": "UTC"})], "", "tool_calls")


def test_reasoning_before_a_forced_call_is_not_part_of_it() -> None:
    answer = streamed_answer(FORCED, [Delta(reasoning="why"), Delta(ARGUMENTS), *text_deltas()])
    assert (answer.reasoning, calls_of(answer)) == ("why", [("get_weather", {"city": "Oslo"})])


# Logprobs


def logprob(token: str, tops: int = 0, raw: bool = True) -> ChosenLogprob:
    found = list(token.encode()) if raw else None
    return ChosenLogprob(token, -0.5, found, [TokenLogprob(str(number), -1.0, None) for number in range(tops)])


@pytest.mark.parametrize(("requested", "expected_count"), [(None, 0), (0, 0), (2, 2), (5, 3)])
def test_logprobs_have_the_requested_number_of_alternatives(requested: int | None, expected_count: int) -> None:
    chat_request = chat(logprobs=True, top_logprobs=requested)
    answer = streamed_answer(chat_request, [Delta("a", logprobs=[logprob("a", 3)]), *text_deltas()])
    assert answer.logprobs is not None
    assert len(answer.logprobs[0].top_logprobs) == expected_count


def test_missing_bytes_of_a_token_are_added() -> None:
    answer = streamed_answer(chat(logprobs=True), [Delta("é", logprobs=[logprob("é", raw=False)]), *text_deltas()])
    assert answer.logprobs is not None
    assert answer.logprobs[0].bytes == [0xC3, 0xA9]


@pytest.mark.parametrize(
    ("chat_request", "text"),
    [
        (chat(logprobs=True), "<think>why</think>Hello"),
        (chat(logprobs=True), "<thin"),
        (chat(logprobs=True), "   "),
        (chat(logprobs=True, tools=[tool()], tool_choice=named()), ARGUMENTS),
        (chat(logprobs=True, tools=[tool(), tool("get_time")], tool_choice="required"), CALL),
        (chat(logprobs=True, tools=[tool(), tool("get_time")], tool_choice="required"), "no call"),
    ],
)
@pytest.mark.parametrize("with_finish", [False, True])
def test_logprobs_of_held_back_text_are_kept(chat_request: Chat, text: str, with_finish: bool) -> None:
    deltas = [Delta(letter, logprobs=[logprob(letter)]) for letter in text]
    if with_finish:
        deltas[-1].finish = "stop"
    answer = streamed_answer(chat_request, deltas + ([] if with_finish else text_deltas()))
    assert answer.logprobs is not None
    assert "".join(one.token for one in answer.logprobs) == text


# Recordings


def recorded(server: str, case: str, dialect: Literal["ollama", "openai"]) -> list[Delta]:
    reader = OllamaReader() if dialect == "ollama" else OpenAiReader()
    return reader.feed(body_of(load(server)[case]))


@pytest.mark.parametrize("server", ["ollama-0.33", "ollama-0.24"])
def test_recorded_forced_call_of_ollama_becomes_a_call(server: str) -> None:
    answer = streamed_answer(FORCED, recorded(server, "api_chat_tool_forced_by_format_stream", "ollama"))
    assert answer.content == ""
    assert [call.name for call in answer.calls] == ["get_weather"]
    assert set(json.loads(answer.calls[0].arguments)) == {"city"}


@pytest.mark.parametrize("server", ["ollama-0.33", "ollama-0.24"])
def test_recorded_call_of_ollama_finishes_with_tool_calls(server: str) -> None:
    answer = streamed_answer(FREE, recorded(server, "api_chat_tool_call_stream", "ollama"))
    assert (calls_of(answer), answer.finish) == ([("get_weather", {"city": "Seoul"})], "tool_calls")


def test_recorded_forced_call_of_vllm_with_only_reasoning_has_no_call() -> None:
    answer = streamed_answer(FORCED, recorded("vllm-0.32.0", "chat_tools_named_stream", "openai"))
    assert (answer.calls, answer.content, answer.finish) == ([], "", "length")
    assert answer.reasoning


@pytest.mark.parametrize(
    "value",
    ['{"city":123456789012345678901234567890}', '{"city":"\\ud83d"}', '{"a":1E2}', '{"a":' * 300 + "1" + "}" * 300],
)
def test_arguments_of_a_forced_call_are_unchanged(value: str) -> None:
    normalizer = Normalizer(chat(tools=[tool("a"), tool("b")], tool_choice="required"))
    answer = assemble(normalizer.normalize([Delta('{"name":"a","arguments":' + value + "} \n"), Delta(finish="stop")]))
    assert [(call.name, call.arguments) for call in answer.calls] == [("a", value.replace(r"\ud83d", r"\ufffd"))]


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"tools": [tool("a")], "tool_choice": "required"}]
)
def test_grammar_output_sent_as_reasoning_becomes_the_answer(fields: dict[str, Any]) -> None:
    """Ollama 0.33 sends it as `thinking`."""
    normalizer = Normalizer(chat(reasoning_effort="none", **fields))
    answer = assemble(normalizer.normalize([Delta(reasoning='{"x"'), Delta(reasoning=":1}"), Delta(finish="stop")]))
    assert answer.reasoning == ""
    assert (
        [call.arguments for call in answer.calls] == ['{"x":1}'] if "tools" in fields else answer.content == '{"x":1}'
    )


@pytest.mark.parametrize(
    "fields", [{"response_format": {"type": "json_object"}}, {"tools": [tool("a")], "tool_choice": "required"}]
)
@pytest.mark.parametrize(
    "deltas", [[Delta("{}", "Let me {see}")], [Delta(reasoning=" Let"), Delta(reasoning=" me {see}"), Delta("{}")]]
)
def test_real_reasoning_of_a_model_told_not_to_think_stays_reasoning(
    fields: dict[str, Any], deltas: list[Delta]
) -> None:
    """This happens on a vLLM whose template cannot turn thinking off."""
    normalizer = Normalizer(chat(reasoning_effort="none", **fields))
    answer = assemble(normalizer.normalize([*(structs.replace(delta) for delta in deltas), Delta(finish="stop")]))
    assert answer.reasoning.strip() == "Let me {see}"
    assert [call.arguments for call in answer.calls] == ["{}"] if "tools" in fields else answer.content == "{}"


def test_forced_call_that_the_engine_has_made_is_not_made_again_from_text_after_it() -> None:
    normalizer = Normalizer(chat(tools=[tool()], tool_choice=named()))
    deltas = [
        Delta(calls=[CallDelta(0, "", "get_weather", '{"city":"Oslo"}')]),
        Delta('{"city":"Rome"}'),
        Delta(finish="stop"),
    ]
    answer = assemble([shown for delta in deltas for shown in normalizer.normalize([delta])])
    assert [(call.name, call.arguments) for call in answer.calls] == [("get_weather", '{"city":"Oslo"}')]
    assert answer.content == ""


def test_arguments_are_looked_at_a_few_times_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name with each piece and no id: whether the arguments are whole used to be found out for each of them."""
    looked: list[int] = []

    def recorded(text: str) -> Any:
        looked.append(len(text))
        raise ValueError

    monkeypatch.setattr("gateway.chat.normalizer.json.loads", recorded)
    normalizer = Normalizer(chat(tools=[tool()]))
    named_pieces = [CallDelta(0, "", "get_weather", "x" * 100) for _ in range(1000)]
    shown = [delta for piece in named_pieces for delta in normalizer.normalize([Delta(calls=[piece])])]
    assert len(looked) == MAX_LOOKS
    assert len(assemble([*shown, Delta(finish="stop")]).calls) == 1
    looked.clear()
    long = [CallDelta(1, "", "get_weather", "x" * (MAX_COMPARED + 1)), CallDelta(1, "", "get_weather", "x")]
    for piece in long:
        normalizer.normalize([Delta(calls=[piece])])
    assert looked == []
