"""The rules that choose a tier for the model name `auto`."""

from typing import Any

import pytest

from gateway import config
from gateway.api.auto import AutoRules
from gateway.config import ConfigError
from gateway.errors import InvalidRequest
from tests.fakes.chats import chat, tool
from tests.fakes.images import png_data_url

TIERS: dict[str, Any] = {
    "small": {"models": {"ollama": "s"}, "aliases": ["simple"]},
    "middle": {"models": {"ollama": "m"}, "aliases": ["Medium"]},
    "Complex": {"models": {"ollama": "c"}},
}
RULES: list[dict[str, Any]] = [
    {"tier": "COMPLEX", "task": "complex"},
    {"tier": "Complex", "images": True, "longer_than": 10},
    {"tier": "middle", "images": True},
    {"tier": "middle", "tools": True},
    {"tier": "Complex", "longer_than": 20},
]
IMAGE = {"type": "image_url", "image_url": {"url": png_data_url()}}


def settings(**more: Any) -> config.Settings:
    return config.build({"tiers": TIERS, **more})


def user_message(text: str, *parts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}, *parts]}]


@pytest.mark.parametrize(
    ("fields", "task", "tier", "reason"),
    [
        ({}, None, "small", "no rule holds"),
        ({}, b"complex", "Complex", "rule 1: task=complex"),
        ({}, b" COMPLEX ", "Complex", "rule 1: task=complex"),
        ({}, b"simple", "small", "no rule holds"),
        ({"messages": user_message("look", IMAGE)}, None, "middle", "rule 3: images=true"),
        ({"messages": user_message("look at this", IMAGE)}, None, "Complex", "rule 2: images=true, longer_than=10"),
        ({"messages": user_message("look at this", IMAGE)}, b"complex", "Complex", "rule 1: task=complex"),
        ({"tools": [tool()]}, None, "middle", "rule 4: tools=true"),
        ({"tools": [tool()], "tool_choice": "none"}, None, "small", "no rule holds"),
        ({"messages": user_message("x" * 20)}, None, "small", "no rule holds"),
        ({"messages": user_message("é" * 21)}, None, "Complex", "rule 5: longer_than=20"),
        (
            {"messages": [*user_message("x" * 11), {"role": "assistant", "content": "y" * 10}]},
            None,
            "Complex",
            "rule 5: longer_than=20",
        ),
    ],
    ids=[
        "nothing special",
        "task",
        "task in other case",
        "task without a rule",
        "image",
        "image and long text",
        "task before images",
        "tools",
        "tools not allowed",
        "text of exactly the limit",
        "long text",
        "long text in two messages",
    ],
)
def test_first_matching_rule_selects_the_tier(
    fields: dict[str, Any], task: bytes | None, tier: str, reason: str
) -> None:
    assert AutoRules(settings(auto=RULES)).choose(chat(**fields), task) == (tier, reason)


@pytest.mark.parametrize(
    ("task", "chosen"),
    [
        (b"simple", ("small", "rule 1: task=simple")),
        (b"medium", ("middle", "rule 2: task=medium")),
        (b"complex", ("Complex", "rule 3: task=complex")),
        (None, ("middle", "no rule holds")),
    ],
)
def test_without_rules_a_task_selects_the_tier_of_that_name(task: bytes | None, chosen: tuple[str, str]) -> None:
    assert AutoRules(settings(default_tier="middle")).choose(chat(), task) == chosen


def test_task_without_a_tier_of_that_name_selects_the_default_tier() -> None:
    tiers = {"one": {"models": {"ollama": "o"}, "aliases": ["simple"]}, "two": {"models": {"ollama": "t"}}}
    found = config.build({"tiers": tiers, "default_tier": "two"})
    assert AutoRules(found).choose(chat(), b"complex") == ("two", "no rule holds")


def test_empty_list_of_rules_selects_the_default_tier() -> None:
    assert AutoRules(settings(auto=[])).choose(chat(), b"complex") == ("small", "no rule holds")


@pytest.mark.parametrize("task", [b"hard", b"", b"simple,complex", "köm".encode()])
def test_unknown_task_is_refused(task: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AutoRules(settings()).choose(chat(), task)
    assert caught.value.param == "x-gateway-task"
    assert "'simple', 'medium' or 'complex'" in caught.value.message


@pytest.mark.parametrize(
    ("rules", "line"),
    [
        (
            [{"tier": "smal", "images": True}],
            "auto[0].tier: 'smal' is not a tier; expected one of: small, middle, Complex; did you mean 'small'?",
        ),
        ([{"tier": "small"}], "auto[0]: the rule has no condition; expected task, images, tools or longer_than"),
        ([{"tier": "small", "task": "hard"}], "auto[0].task: got 'hard'; expected 'simple', 'medium' or 'complex'"),
        ([{"tier": "small", "longer_then": 1}], "auto[0].longer_then: unknown key; did you mean 'longer_than'?"),
        ([{"tier": "small", "longer_than": -1}], "auto[0].longer_than: got -1; expected a whole number of at least 0"),
        ([{"images": True}], "auto[0].tier: missing; expected: Name of the tier that the rule selects."),
    ],
    ids=["unknown tier", "no condition", "unknown task", "unknown key", "negative length", "no tier"],
)
def test_invalid_rule_is_reported(rules: list[dict[str, Any]], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(auto=rules)
    assert caught.value.lines == (line,)


def test_unreachable_rule_causes_a_warning() -> None:
    rules: list[dict[str, Any]] = [
        {"tier": "small", "longer_than": 5},
        {"tier": "middle", "longer_than": 9, "images": True},
        {"tier": "middle", "longer_than": 4},
        {"tier": "middle", "images": True},
        {"tier": "small", "images": True, "tools": True},
    ]
    warned = [line for line in settings(auto=rules).warnings if line.startswith("auto")]
    assert warned == [
        "auto[1]: never reached: auto[0] holds whenever it does",
        "auto[4]: never reached: auto[3] holds whenever it does",
    ]


def test_config_check_explains_the_rules() -> None:
    lines = config.check(settings(auto=RULES, default_tier="middle"))
    start = next(index for index, line in enumerate(lines) if line.startswith("auto"))
    assert [line.split("  ")[0] for line in lines[start + 1 : start + 7]] == [
        "rule 1",
        "rule 2",
        "rule 3",
        "rule 4",
        "rule 5",
        "else",
    ]
    assert [line.split()[-1] for line in lines[start + 1 : start + 7]] == [
        "Complex",
        "Complex",
        "middle",
        "middle",
        "Complex",
        "middle",
    ]
