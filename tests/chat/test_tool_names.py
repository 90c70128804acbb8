"""Tests of the names that tools have at the engines."""

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import CallDelta, Delta, assemble
from gateway.chat.normalizer import Normalizer
from gateway.chat.request import Chat
from gateway.chat.tool_names import client_names, engine_names, with_engine_names
from gateway.errors import InvalidRequest
from tests.fakes.chats import allowed, chat, named, tool

WEATHER, TIME = "날씨_조회", "時間"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("날씨_조회", "nalssi_johoe"),
        ("서울-날씨", "seoul-nalssi"),
        ("값읽기", "gapikgi"),
        ("größe", "groudfe"),
        ("обновить", "u43eu431u43du43eu432u438u442u44c"),
        ("時間", "u6642u9593"),
        ("get_온도", "get_ondo"),
        ("🌤", "u1f324"),
        ("가" * 64, "ga" * 32),
    ],
)
def test_name_becomes_one_that_engines_take_and_a_model_can_read(name: str, expected: str) -> None:
    assert engine_names(chat(tools=[tool(name)])) == {name: expected}


@pytest.mark.parametrize("name", ["get_weather", "a.b-c", "x" * 64])
def test_plain_name_stays(name: str) -> None:
    request = chat(tools=[tool(name)])
    assert with_engine_names(request) is request


@pytest.mark.parametrize("name", ["", "a b", "a\n", "a\u3000b", "a\u0085", 'a"b', "a/b", "가" * 65, "a\u2028b"])
def test_blanks_controls_and_punctuation_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(tools=[tool(name)])
    assert caught.value.param == "tools[0].function.name"


names = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], min_codepoint=0xA0), min_size=1, max_size=64
)


@given(st.lists(names | st.from_regex(r"[a-z0-9]{1,64}", fullmatch=True), min_size=1, max_size=8, unique=True))
def test_names_are_plain_distinct_and_lead_back(given_names: list[str]) -> None:
    request = chat(tools=[tool(name) for name in given_names])
    sent = [one.function.name for one in with_engine_names(request).tools or ()]
    assert len(set(sent)) == len(given_names)
    assert all(re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", name) for name in sent)
    back = client_names(request)
    assert [back.get(name, name) for name in sent] == given_names


def test_choice_follows_the_names() -> None:
    tools = [tool(WEATHER), tool(TIME)]
    for choice in (named(WEATHER), allowed("required", WEATHER)):
        sent = with_engine_names(chat(tools=tools, tool_choice=choice))
        assert [function.name for function in sent.forced] == ["nalssi_johoe"]


def calls_of(request: Chat, deltas: list[Delta]) -> list[tuple[str, Any]]:
    answer = assemble(Normalizer(request).normalize([*deltas, Delta(finish="stop")]))
    return [(call.name, json.loads(call.arguments)) for call in answer.calls]


def test_client_gets_its_own_name_back() -> None:
    tools = [tool(WEATHER), tool(TIME)]
    engine_call = [Delta(calls=[CallDelta(0, "x", "nalssi_johoe", '{"city":"Oslo"}')])]
    assert calls_of(chat(tools=tools), engine_call) == [(WEATHER, {"city": "Oslo"})]
    text = [Delta('{"name": "nalssi_johoe", "arguments": {"city":'), Delta('"Oslo"}}')]
    assert calls_of(chat(tools=tools, tool_choice="required"), text) == [(WEATHER, {"city": "Oslo"})]
    assert calls_of(chat(tools=tools, tool_choice=named(WEATHER)), [Delta('{"city":"Oslo"}')]) == [
        (WEATHER, {"city": "Oslo"})
    ]
