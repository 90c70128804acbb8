"""Assignments of tiers when one GPU has room for one engine."""

from typing import Any

import pytest

from gateway import config
from gateway.errors import Conflict
from gateway.rollout.assignment import Assignment, Canary
from gateway.rollout.one_gpu import gathered, reason_against
from gateway.rollout.state import Rollout

MODELS = {"ollama": "small", "vllm": "Small", "cloud": "large"}
DOCUMENT: dict[str, Any] = {
    "llm_backend": "ollama",
    "exclusive": True,
    "backends": {
        "ollama": {"base_url": "http://127.0.0.1:1"},
        "vllm": {"base_url": "http://127.0.0.1:2"},
        "cloud": {"kind": "openai", "base_url": "http://127.0.0.1:3"},
    },
    "tiers": {"standard": {"models": MODELS}, "pro": {"models": MODELS}},
}


def settings(**changes: Any) -> config.Settings:
    return config.build(DOCUMENT | changes)


@pytest.mark.parametrize(
    ("standard", "pro", "is_possible"),
    [
        (Assignment("ollama"), Assignment("ollama"), True),
        (Assignment("ollama"), Assignment("vllm"), False),
        (Assignment("ollama"), Assignment("cloud"), True),
        (Assignment("ollama", Canary("vllm", 10)), Assignment("ollama"), False),
        (Assignment("ollama", Canary("cloud", 10)), Assignment("ollama"), True),
        (Assignment("cloud", Canary("vllm", 10)), Assignment("ollama"), False),
    ],
)
def test_tiers_may_be_on_one_engine_of_the_gpu(standard: Assignment, pro: Assignment, is_possible: bool) -> None:
    reason = reason_against(settings(), {"standard": standard, "pro": pro})
    assert (reason is None) == is_possible
    assert reason_against(settings(exclusive=False), {"standard": standard, "pro": pro}) is None


def test_tiers_on_several_engines_are_gathered_on_the_one_of_the_settings() -> None:
    split = {"standard": Assignment("vllm"), "pro": Assignment("ollama", Canary("vllm", 10))}
    assert gathered(settings(), split) == {"standard": Assignment("ollama"), "pro": Assignment("ollama")}
    assert gathered(settings(llm_backend="cloud"), split | {"standard": Assignment("cloud")}) == {
        "pro": Assignment("ollama")
    }
    assert gathered(settings(), dict.fromkeys(split, Assignment("vllm"))) == {}


def test_a_tier_may_go_to_a_backend_elsewhere() -> None:
    rollout = Rollout(settings())
    rollout.set("cloud", tier="pro")
    rollout.set(canary=Canary("cloud", 10), tier="standard")
    with pytest.raises(Conflict, match="only one engine fits"):
        rollout.set("vllm", tier="pro")


def test_a_persisted_split_is_gathered_at_the_start() -> None:
    before = Rollout(settings(exclusive=False))
    before.set("vllm", tier="pro")
    after = Rollout(settings())
    notes = after.restore(before.to_persist()).notes
    assert {route.assignment for route in after.tiers.values()} == {Assignment("ollama")}
    assert any("only one engine fits" in note for note in notes)


def test_a_canary_of_before_is_not_restored() -> None:
    before = Rollout(settings(exclusive=False))
    before.set(canary=Canary("vllm", 10))
    after = Rollout(settings())
    assert any("a canary needs two engines at once" in note for note in after.restore(before.to_persist()).notes)
    assert {route.assignment for route in after.tiers.values()} == {Assignment("ollama")}


def test_a_change_is_taken_back_as_it_was() -> None:
    rollout = Rollout(settings())
    rollout.set("cloud", tier="pro")
    change = rollout.set("vllm").change
    assert change is not None
    back = rollout.take_back(change, "vllm did not come up").change
    assert back is not None
    assert (back.cause, back.why, back.is_rollback) == ("exclusive", "vllm did not come up", False)
    assert {name: route.assignment.backend for name, route in rollout.tiers.items()} == {
        "standard": "ollama",
        "pro": "cloud",
    }


def test_only_a_rollback_is_accepted_during_a_switch() -> None:
    rollout = Rollout(settings())
    rollout.set("vllm")
    rollout.reason_to_refuse = lambda: "A switch is in progress."
    with pytest.raises(Conflict, match="in progress"):
        rollout.set("ollama")
    with pytest.raises(Conflict, match="in progress"):
        rollout.undo()
    assert rollout.set("vllm").change is None
    assert rollout.rollback().change is not None
