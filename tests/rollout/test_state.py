"""The state of the roll-out: switched in one step, rolled back, undone, restored, reconfigured."""

import json
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway import config
from gateway.errors import Conflict, GatewayError, InvalidRequest
from gateway.rollout.assignment import BUCKETS, Assignment, Canary, Change, Move
from gateway.rollout.state import HISTORY, Rollout

DOCUMENT: dict[str, Any] = {
    "llm_backend": "ollama",
    "backends": {
        "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"},
        "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:2"},
        "cloud": {"kind": "openai", "base_url": "http://127.0.0.1:3"},
    },
    "tiers": {
        "standard": {"models": {"ollama": "small", "vllm": "Small"}},
        "Pro": {"models": {"ollama": "large", "vllm": "Large", "cloud": "huge"}},
        "pinned": {"models": {"ollama": "small", "vllm": "Small"}, "backend": "ollama"},
    },
}
ON_VLLM = Assignment("vllm")
ON_OLLAMA = Assignment("ollama")


def rollout(**changes: Any) -> Rollout:
    return Rollout(config.build(DOCUMENT | changes), clock=lambda: 1_767_225_600.5)


def assignments(of: Rollout) -> dict[str, Assignment]:
    return {name: route.assignment for name, route in of.tiers.items()}


def restarted(of: Rollout, **changes: Any) -> tuple[Rollout, list[str]]:
    """Return another process's roll-out with the state persisted by `of`, and its notes."""
    again = rollout(**changes)
    return again, again.restore(json.loads(json.dumps(of.to_persist()))).notes


# Switches


def test_one_order_moves_every_tier_that_is_not_pinned() -> None:
    state = rollout()
    assert state.set("vllm").change is not None
    assert assignments(state) == {"standard": ON_VLLM, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert (state.tiers["Pro"].route.backend, state.tiers["Pro"].route.model) == ("vllm", "Large")
    assert str(state) == "vllm"


def test_single_tier_moves_whatever_the_case_of_its_name() -> None:
    state = rollout()
    state.set("VLLM", tier="pro")
    assert assignments(state) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert str(state) == "standard on ollama, Pro on vllm, pinned on ollama"


def test_tier_without_a_model_there_is_a_conflict_and_nothing_moves() -> None:
    state = rollout()
    for order in (
        {"backend": "cloud"},
        {"backend": "ollama", "canary": Canary("cloud", 10)},
        {"backend": "vllm", "tier": "pinned"},
    ):
        with pytest.raises(Conflict, match="Nothing was changed"):
            state.set(**order)  # type: ignore[arg-type]
    assert assignments(state) == assignments(rollout())
    assert not state.history
    state.set("cloud", tier="Pro")
    assert state.tiers["Pro"].assignment == Assignment("cloud")


@pytest.mark.parametrize(
    ("order", "param"),
    [
        ({"backend": "nowhere"}, "backend"),
        ({"backend": "vllm", "tier": "nothing"}, "tier"),
        ({}, "backend"),
        ({"backend": "vllm", "canary": Canary("vllm", 10)}, "canary.backend"),
        ({"canary": Canary("nowhere", 10)}, "canary.backend"),
        ({"canary": Canary("vllm", 0.001)}, "canary.percent"),
        ({"canary": Canary("vllm", -1)}, "canary.percent"),
        ({"canary": Canary("vllm", 100.01)}, "canary.percent"),
        ({"canary": Canary("vllm", float("nan"))}, "canary.percent"),
    ],
    ids=[
        "unknown-backend",
        "unknown-tier",
        "empty",
        "canary-on-the-backend",
        "unknown-canary",
        "percent-too-fine",
        "percent-negative",
        "percent-above-100",
        "percent-nan",
    ],
)
def test_invalid_order_changes_nothing(order: dict[str, Any], param: str) -> None:
    state = rollout()
    with pytest.raises(InvalidRequest) as caught:
        state.set(**order)
    assert caught.value.param == param
    assert assignments(state) == assignments(rollout())


def test_canary_without_a_backend_leaves_the_rest_in_place() -> None:
    state = rollout()
    state.set("cloud", tier="Pro")
    state.set(canary=Canary("vllm", 10))
    assert assignments(state)["Pro"] == Assignment("cloud", Canary("vllm", 10))
    assert assignments(state)["standard"] == Assignment("ollama", Canary("vllm", 10))


def test_canary_on_the_current_backend_leaves_the_rest_to_rollback_to() -> None:
    state = rollout()
    state.set("vllm")
    state.set(canary=Canary("vllm", 10))
    assert assignments(state)["standard"] == Assignment("ollama", Canary("vllm", 10))


def test_canary_on_rollback_to_that_serves_everything_is_a_conflict() -> None:
    state = rollout()
    with pytest.raises(Conflict, match="is on ollama already"):
        state.set(canary=Canary("ollama", 10))
    assert not state.history


def test_order_without_effect_leaves_no_trace() -> None:
    state = rollout()
    told: list[Change] = []
    state.listeners.append(told.append)
    assert state.set("ollama").change is None
    assert state.rollback().change is None
    assert state.undo().change is None
    assert (told, list(state.history)) == ([], [])


# Canaries


def sides(of: Rollout, tier: str = "standard") -> set[int]:
    """Return the buckets of the canary."""
    route = of.tiers[tier]
    return {bucket for bucket in range(BUCKETS) if route.choose(bucket).backend == "vllm"}


def test_canary_gets_exactly_its_share_of_the_buckets() -> None:
    state = rollout()
    for percent, count in ((0, 0), (0.01, 1), (10, 1000), (33.33, 3333), (99.99, 9999), (100, BUCKETS)):
        state.set("ollama", Canary("vllm", percent))
        assert len(sides(state)) == count


def test_larger_canary_only_adds_conversations() -> None:
    state = rollout()
    before: set[int] = set()
    for percent in (1, 10, 10.5, 50, 100):
        state.set("ollama", Canary("vllm", percent))
        now = sides(state)
        assert before < now
        before = now


def test_share_is_counted_from_the_last_change_on() -> None:
    state = rollout()
    state.set("ollama", Canary("vllm", 10))
    route = state.tiers["standard"]
    for bucket in (0, 999, 1000, 5000):
        route.choose(bucket)
    assert (route.requests, route.canary_requests) == (4, 2)
    state.set("ollama", Canary("vllm", 20), tier="Pro")
    assert route.requests == 4
    state.set("ollama", Canary("vllm", 30), tier="standard")
    assert (route.requests, route.canary_requests) == (0, 0)


# Rollback and undo


def test_rollback_leads_wholly_to_one_side_and_a_second_one_changes_nothing() -> None:
    state = rollout()
    state.set("vllm")
    state.set("ollama", Canary("vllm", 50), tier="standard")
    assert state.rollback().change is not None
    assert assignments(state) == dict.fromkeys(("standard", "Pro", "pinned"), ON_OLLAMA)
    assert state.rollback().change is None


def test_rollback_can_be_limited_to_a_tier_or_lead_elsewhere() -> None:
    state = rollout()
    state.set("vllm")
    state.rollback(tier="standard")
    assert assignments(state) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    state.rollback(to="vllm")
    assert assignments(state)["standard"] == ON_VLLM


def test_tier_that_cannot_go_back_loses_its_canary_and_is_named() -> None:
    state = rollout()
    state.set("ollama", Canary("vllm", 50))
    outcome = state.rollback(to="cloud")
    assert outcome.unmoved == {"standard": "it has no model on cloud"}
    assert assignments(state) == {"standard": ON_OLLAMA, "Pro": Assignment("cloud"), "pinned": ON_OLLAMA}
    assert state.rollback(tier="pinned", to="vllm") == state.rollback(tier="PINNED", to="vllm")
    assert state.rollback(tier="pinned", to="vllm").unmoved == {"pinned": "it is pinned to ollama"}


def test_undo_reverts_the_last_change_and_a_second_one_reverts_the_undo() -> None:
    state = rollout()
    state.set("ollama", Canary("vllm", 10))
    state.set("vllm", tier="Pro")
    state.rollback()
    state.undo()
    assert assignments(state) == {
        "standard": Assignment("ollama", Canary("vllm", 10)),
        "Pro": ON_VLLM,
        "pinned": ON_OLLAMA,
    }
    state.undo()
    assert assignments(state) == assignments(rollout())


# The history


def test_change_records_time_author_cause_and_moves() -> None:
    state = rollout()
    state.set("vllm", tier="standard", by="0123abcd")
    state.rollback(cause="guard")
    assert list(state.history) == [
        Change("2026-01-01T00:00:00.500Z", "0123abcd", "operator", {"standard": Move(ON_OLLAMA, ON_VLLM)}),
        Change("2026-01-01T00:00:00.500Z", "", "guard", {"standard": Move(ON_VLLM, ON_OLLAMA)}, is_rollback=True),
    ]
    assert str(state.history[0]) == "standard from ollama to vllm"


def test_history_is_bounded() -> None:
    state = rollout()
    for _ in range(HISTORY):
        state.set("vllm")
        state.rollback()
    assert len(state.history) == HISTORY


def test_listeners_see_the_change_in_force() -> None:
    state = rollout()
    seen: list[str] = []
    state.listeners.append(lambda change: seen.append(state.tiers["Pro"].route.backend))
    state.set("vllm")
    assert seen == ["vllm"]


# Restarts


def test_operators_change_takes_precedence_after_a_restart_with_a_note() -> None:
    state = rollout()
    state.set("vllm", by="0123abcd")
    state.set("vllm", Canary("ollama", 12.5), tier="Pro")
    again, notes = restarted(state)
    assert assignments(again) == assignments(state)
    assert list(again.history) == list(state.history)
    (note,) = notes
    for words in ("LLM_BACKEND is ollama", "standard on vllm", "12.5 %", "`gateway rollback`", "GATEWAY_STATE_FILE"):
        assert words in note


def test_state_equal_to_the_settings_is_restored_without_a_note() -> None:
    state = rollout()
    state.set("vllm")
    state.rollback()
    again, notes = restarted(state)
    assert (assignments(again), notes) == (assignments(rollout()), [])
    again.undo()
    assert again.tiers["standard"].assignment == ON_VLLM


def test_changed_llm_backend_takes_precedence() -> None:
    """A rollback by variable and restart must work, whatever an operator did before."""
    state = rollout(llm_backend="vllm")
    state.set("vllm", Canary("ollama", 10))
    again, notes = restarted(state, llm_backend="ollama")
    assert assignments(again) == assignments(rollout())
    assert "LLM_BACKEND is ollama and was vllm" in notes[0]
    assert again.history[-1].cause == "start"


def test_state_overridden_by_the_variable_does_not_come_back() -> None:
    """The variable changes and changes back after an operator's change, which is over by then."""
    state = rollout(llm_backend="vllm")
    state.rollback()
    variable_won, _ = restarted(state, llm_backend="ollama")
    again, notes = restarted(variable_won, llm_backend="vllm")
    assert assignments(again)["standard"] == ON_VLLM
    assert notes


def test_state_that_the_settings_no_longer_allow_is_dropped_with_a_note() -> None:
    state = rollout()
    state.set("vllm")
    tiers = {**DOCUMENT["tiers"], "Pro": {"models": {"ollama": "large"}}}
    del tiers["standard"]
    again, notes = restarted(state, tiers=tiers)
    assert assignments(again) == {"Pro": ON_OLLAMA, "pinned": ON_OLLAMA}
    assert ["no model on vllm" in note or "no longer exists" in note for note in notes] == [True, True]
    outcome = again.undo()
    assert assignments(again) == {"Pro": ON_OLLAMA, "pinned": ON_OLLAMA}
    assert outcome.change is None


@pytest.mark.parametrize(
    "kept",
    [None, [], {"llm_backend": "ollama"}, {"llm_backend": 1, "tiers": {}, "history": []}, "text"],
    ids=["null", "list", "incomplete", "wrong-type", "text"],
)
def test_invalid_section_is_dropped_with_a_note(kept: Any) -> None:
    state = rollout()
    assert "is invalid" in state.restore(kept).notes[0]
    assert assignments(state) == assignments(rollout())


# Any sequence of orders


class Operators(RuleBasedStateMachine):
    """Orders of all kinds, in any sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.rollout = rollout()

    backends = st.sampled_from(["ollama", "vllm", "cloud"])
    tiers = st.sampled_from([None, "standard", "Pro", "pinned"])
    canaries = st.none() | st.builds(Canary, backends, st.sampled_from([0, 0.01, 10, 50, 99.99, 100]))

    @rule(backend=st.none() | backends, canary=canaries, tier=tiers)
    def set(self, backend: str | None, canary: Canary | None, tier: str | None) -> None:
        before = assignments(self.rollout)
        try:
            outcome = self.rollout.set(backend, canary, tier=tier)
        except GatewayError:
            assert assignments(self.rollout) == before
            return
        assert (outcome.change is None) == (assignments(self.rollout) == before)
        for name in ("standard", "Pro") if tier is None else (tier,):
            current = before[name].backend
            rest = "ollama" if canary is not None and canary.backend == current else current
            assert assignments(self.rollout)[name] == Assignment(backend or rest, canary)

    @rule(tier=tiers, to=st.none() | backends)
    def rollback(self, tier: str | None, to: str | None) -> None:
        before = assignments(self.rollout)
        outcome = self.rollout.rollback(tier=tier, to=to)
        for name in ("standard", "Pro") if tier is None else (tier,):
            assignment = assignments(self.rollout)[name]
            assert assignment == (
                Assignment(to or "ollama") if name not in outcome.unmoved else Assignment(before[name].backend)
            )
        assert (to or "ollama") == "cloud" or tier == "pinned" or not outcome.unmoved
        assert self.rollout.rollback(tier=tier, to=to).change is None

    @rule()
    def undo(self) -> None:
        before = assignments(self.rollout)
        outcome = self.rollout.undo()
        assert outcome.change is None or assignments(self.rollout) != before
        self.rollout.undo()
        assert assignments(self.rollout) == before

    @rule(backend=backends)
    def set_and_undo(self, backend: str) -> None:
        before = assignments(self.rollout)
        if self.rollout.rollback(to=backend).change is not None:
            self.rollout.undo()
        assert assignments(self.rollout) == before

    @rule()
    def restart(self) -> None:
        self.rollout, notes = restarted(self.rollout)
        assert bool(notes) == (assignments(self.rollout) != assignments(rollout()))

    @invariant()
    def pinned_tiers_stay(self) -> None:
        assert assignments(self.rollout)["pinned"] == ON_OLLAMA

    @invariant()
    def routes_match_the_assignments(self) -> None:
        for tier in self.rollout.tiers.values():
            assert tier.route.backend == tier.assignment.backend
            assert tier.canary == tier.assignment.canary


TestOperators = Operators.TestCase
TestOperators.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)


# Changed settings


def reloaded(state: Rollout, **changes: Any) -> Change | None:
    return state.reload(config.build(DOCUMENT | changes))


def test_operators_change_survives_changed_settings() -> None:
    state = rollout()
    state.set("vllm", tier="standard")
    state.set(None, Canary("vllm", 10), tier="Pro")
    tiers_before, before = state.tiers, assignments(state)
    state.tiers["Pro"].choose(0), state.tiers["Pro"].choose(9_999)
    tiers = DOCUMENT["tiers"] | {
        "standard": {"models": {"ollama": "smaller", "vllm": "Smaller"}},
        "new": {"models": {"ollama": "n"}},
    }
    assert reloaded(state, tiers=tiers) is None
    assert state.tiers is tiers_before
    assert assignments(state) == before | {"new": ON_OLLAMA}
    assert state.tiers["standard"].route.model == "Smaller"
    assert (state.tiers["Pro"].requests, state.tiers["Pro"].canary_requests) == (2, 1)
    assert len(state.history) == 2


def test_tier_whose_assignment_is_gone_moves_where_the_settings_say() -> None:
    state = rollout()
    state.set("vllm", tier="standard")
    state.set("vllm", Canary("cloud", 10), tier="Pro")
    tiers = DOCUMENT["tiers"] | {
        "standard": {"models": {"ollama": "small"}},
        "Pro": {"models": {"ollama": "large", "vllm": "Large"}},
    }
    change = reloaded(state, tiers=tiers)
    assert change is not None
    assert (change.cause, change.by) == ("reload", "")
    assert change.tiers == {
        "standard": Move(ON_VLLM, ON_OLLAMA),
        "Pro": Move(Assignment("vllm", Canary("cloud", 10)), ON_VLLM),
    }
    assert assignments(state) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert state.undo().unmoved == {"standard": "it has no model on vllm", "Pro": "it has no model on cloud"}


def test_pinning_moves_a_tier_and_unpinning_leaves_it_there() -> None:
    state = rollout()
    pinned = DOCUMENT["tiers"] | {"standard": DOCUMENT["tiers"]["standard"] | {"backend": "vllm"}}
    assert reloaded(state, tiers=pinned) is not None
    assert (assignments(state)["standard"], state.tiers["standard"].is_pinned) == (ON_VLLM, True)
    assert reloaded(state) is None
    assert (assignments(state)["standard"], state.tiers["standard"].is_pinned) == (ON_VLLM, False)


def test_changed_llm_backend_applies_as_at_a_start() -> None:
    state = rollout()
    state.set("vllm", tier="standard")
    change = reloaded(state, llm_backend="vllm")
    assert change is not None
    assert change.tiers == {"Pro": Move(ON_OLLAMA, ON_VLLM)}
    assert assignments(state) == {"standard": ON_VLLM, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert state.undo().change is not None
    assert assignments(state)["Pro"] == ON_OLLAMA


def test_removed_tier_is_unknown() -> None:
    state = rollout()
    state.set("vllm")
    reloaded(
        state,
        tiers={"Pro": DOCUMENT["tiers"]["Pro"]},
        backends=DOCUMENT["backends"] | {"more": {"kind": "openai", "base_url": "http://x:1"}},
    )
    assert list(state.tiers) == ["Pro"]
    with pytest.raises(InvalidRequest):
        state.set("ollama", tier="standard")
    state.undo()
    assert assignments(state) == {"Pro": ON_OLLAMA}
    with pytest.raises(Conflict):
        state.set("more")
