"""Tests of a tier's parameter changes, and of the settings for them."""

from typing import Any

import pytest

from gateway import config
from gateway.chat.parameter_policy import ParameterPolicy, problem
from gateway.chat.request import Chat
from gateway.config import ConfigError
from tests.fakes.chats import chat, tool


def applied(
    default: dict[str, Any] | None = None,
    force: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    cap: int | None = None,
    **fields: Any,
) -> Chat:
    return ParameterPolicy(default or {}, force or {}, drop, cap).apply(chat(**fields))


def test_default_applies_to_unset_parameters() -> None:
    assert applied(default={"temperature": 0.7}).temperature == 0.7
    assert applied(default={"temperature": 0.7}, temperature=None).temperature == 0.7
    assert applied(default={"temperature": 0.7}, temperature=0).temperature == 0


def test_forced_value_always_applies() -> None:
    assert applied(force={"temperature": 0.7}).temperature == 0.7
    assert applied(force={"temperature": 0.7}, temperature=0).temperature == 0.7


def test_dropped_parameter_is_removed() -> None:
    result = applied(drop=("seed", "logprobs", "top_logprobs"), seed=7, logprobs=True, top_logprobs=2, temperature=1)
    assert (result.seed, result.logprobs, result.top_logprobs, result.temperature) == (None, None, None, 1)


def test_dropped_parameter_gets_the_default() -> None:
    assert applied(default={"seed": 1}, drop=("seed",), seed=7).seed == 1


def test_unknown_name_to_drop_is_ignored() -> None:
    assert applied(drop=("prompt_logprobs",), seed=7) == chat(seed=7)


def test_dropped_tools_are_not_offered() -> None:
    result = applied(drop=("tools",), tools=[tool()], tool_choice="required")
    assert (result.offered, result.forced) == ([], [])


def test_conversation_is_unchanged() -> None:
    before = chat(stream=True, stream_options={"include_usage": True})
    after = applied(
        default={"temperature": 1},
        force={"seed": 1},
        drop=("stop",),
        cap=5,
        stream=True,
        stream_options={"include_usage": True},
    )
    assert (after.model, after.messages, after.stream, after.wants_usage) == (before.model, before.messages, True, True)


@pytest.mark.parametrize("params", [({}, {}, ()), ({}, {}, ("unknown",))])
def test_policy_without_changes_is_false(params: tuple[Any, Any, Any]) -> None:
    assert not ParameterPolicy(*params)


@pytest.mark.parametrize("params", [({"seed": 1}, {}, ()), ({}, {"seed": 1}, ()), ({}, {}, ("seed",)), ({}, {}, (), 5)])
def test_policy_with_changes_is_true(params: tuple[Any, ...]) -> None:
    assert ParameterPolicy(*params)


# Synonyms

TOKENS = ("max_tokens", "max_completion_tokens")
OFF: list[dict[str, Any]] = [
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"think": False},
    {"thinking": {"type": "disabled"}},
    {"enable_thinking": False},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
]
ON: list[dict[str, Any]] = [{"reasoning_effort": "high"}, {"reasoning": {"effort": "high"}}, {"think": "high"}]


@pytest.mark.parametrize("sent", TOKENS)
@pytest.mark.parametrize("setting", TOKENS)
def test_either_token_limit_overrides_a_default_but_not_a_forced_one(sent: str, setting: str) -> None:
    assert applied(default={setting: 100}, **{sent: 7}).token_limit == 7
    assert applied(force={setting: 100}, **{sent: 7}).token_limit == 100
    assert applied(default={setting: 100}).token_limit == 100


@pytest.mark.parametrize("sent", ON)
@pytest.mark.parametrize("setting", OFF)
def test_any_thinking_field_overrides_a_default_but_not_a_forced_one(
    sent: dict[str, Any], setting: dict[str, Any]
) -> None:
    assert applied(default=setting, **sent).effort == "high"
    assert applied(force=setting, **sent).effort == "none"
    assert applied(default=setting).effort == "none"


def test_default_applies_if_its_synonyms_are_dropped() -> None:
    assert applied(default={"reasoning_effort": "none"}, drop=("think",), think=True).effort == "none"


# Words of the chat template


@pytest.mark.parametrize("part", ["default", "force"])
@pytest.mark.parametrize("sent", [{}, {"think": True}, {"chat_template_kwargs": {"thinking": True, "word": "mine"}}])
def test_other_words_of_the_template_come_from_the_tier_only(part: str, sent: dict[str, Any]) -> None:
    assert chat(**sent).template_words == {}
    result = applied(**{part: {"chat_template_kwargs": {"word": 1}}}, **sent)
    assert result.template_words == {"word": 1}
    assert result.effort == (True if sent else None)


def test_forced_switch_in_the_template_comes_with_its_words() -> None:
    result = applied(force={"chat_template_kwargs": {"thinking": False, "word": 1}}, think=True)
    assert (result.effort, result.template_words) == ("none", {"word": 1})


# Cap


@pytest.mark.parametrize("sent", TOKENS)
@pytest.mark.parametrize(("limit", "result"), [(5, 5), (100, 100), (101, 100)])
def test_cap_applies_to_either_name_of_the_token_limit(sent: str, limit: int, result: int) -> None:
    assert applied(cap=100, **{sent: limit}).token_limit == result


def test_cap_applies_without_a_token_limit() -> None:
    assert applied(cap=100).token_limit == 100


def test_cap_applies_to_the_tiers_own_values() -> None:
    assert applied(default={"max_tokens": 500}, cap=100).token_limit == 100
    assert applied(force={"max_tokens": 500}, cap=100).token_limit == 100


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("stop", ["a"]),
        ("reasoning_effort", "none"),
        ("think", False),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("response_format", {"type": "json_object"}),
        ("tools", [tool()]),
        ("max_tokens", 5),
    ],
)
def test_tier_may_set_any_value_that_a_client_may_send(name: str, value: Any) -> None:
    assert problem(name, value) is None
    assert getattr(applied(force={name: value}), name) == getattr(chat(**{name: value}), name)


TIER = "tiers.standard.params"


def lines(params: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.build({"tiers": {"standard": {"models": {"ollama": "m"}, "params": params}}})
    return list(caught.value.lines)


@pytest.mark.parametrize("section", ["default", "force"])
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("heat", 1, "'heat' is not a parameter that the gateway accepts"),
        ("temperature", 9, "got 9"),
        ("temperature", "hot", "got 'hot'"),
        ("max_tokens", 0, "got 0"),
        ("reasoning_effort", "hard", "got 'hard'"),
        ("response_format", {"type": "xml"}, "got {'type': 'xml'}"),
        ("stop", ["a"] * 5, "got ['a'"),
        ("stream", True, "a tier cannot change 'stream'"),
        ("messages", [], "a tier cannot change 'messages'"),
    ],
)
def test_invalid_setting_is_reported_in_one_line_with_its_path(
    section: str, name: str, value: Any, message: str
) -> None:
    (line,) = lines({section: {name: value}})
    assert line.startswith(f"{TIER}.{section}.{name}:")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "value"), [("functions", [{"name": "f"}]), ("function_call", "auto"), ("audio", {"voice": "x"})]
)
@pytest.mark.parametrize("section", ["default", "force"])
def test_tier_cannot_set_what_clients_cannot_send(section: str, name: str, value: Any) -> None:
    """It would be accepted and have no effect."""
    (line,) = lines({section: {name: value}})
    assert line.startswith(f"{TIER}.{section}.{name}:")


def test_each_invalid_setting_has_its_own_line() -> None:
    found = lines({"default": {"heat": 1, "top_p": 2}, "force": {"seed": 1, "min_p": 5}, "drop": ["seed", "model"]})
    places = [line.partition(":")[0].removeprefix(f"{TIER}.") for line in found]
    assert sorted(places) == ["default.heat", "default.top_p", "drop[0]", "drop[1]", "force.min_p"]
