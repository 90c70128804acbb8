"""Who serves each tier: moved as a whole, back from any state, and taken up after a restart."""

import json
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway import config
from gateway.errors import Conflict, GatewayError, InvalidRequest
from gateway.rollout.state import BUCKETS, HISTORY, Assignment, Canary, Change, Move, Rollout

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


def positions(of: Rollout) -> dict[str, Assignment]:
    return {name: line.assignment for name, line in of.tiers.items()}


def restarted(of: Rollout, **changes: Any) -> tuple[Rollout, list[str]]:
    """Another process with what this one kept, as a file holds it."""
    again = rollout(**changes)
    return again, again.restore(json.loads(json.dumps(of.to_persist()))).notes


# Set


def test_one_order_moves_every_tier_that_is_not_pinned() -> None:
    here = rollout()
    assert here.set("vllm").change is not None
    assert positions(here) == {"standard": ON_VLLM, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert (here.tiers["Pro"].route.backend, here.tiers["Pro"].route.model) == ("vllm", "Large")
    assert str(here) == "vllm"


def test_one_tier_is_moved_alone_whatever_the_case_of_its_name() -> None:
    here = rollout()
    here.set("VLLM", tier="pro")
    assert positions(here) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert str(here) == "standard on ollama, Pro on vllm, pinned on ollama"


def test_tier_without_a_model_there_lets_nothing_move() -> None:
    here = rollout()
    for order in (
        {"backend": "cloud"},
        {"backend": "ollama", "canary": Canary("cloud", 10)},
        {"backend": "vllm", "tier": "pinned"},
    ):
        with pytest.raises(Conflict, match="Nothing was changed"):
            here.set(**order)  # type: ignore[arg-type]
    assert positions(here) == positions(rollout())
    assert not here.history
    here.set("cloud", tier="Pro")
    assert here.tiers["Pro"].assignment == Assignment("cloud")


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
)
def test_order_that_means_nothing_changes_nothing(order: dict[str, Any], param: str) -> None:
    here = rollout()
    with pytest.raises(InvalidRequest) as caught:
        here.set(**order)
    assert caught.value.param == param
    assert positions(here) == positions(rollout())


def test_canary_without_a_backend_leaves_the_rest_where_it_is() -> None:
    here = rollout()
    here.set("cloud", tier="Pro")
    here.set(canary=Canary("vllm", 10))
    assert positions(here)["Pro"] == Assignment("cloud", Canary("vllm", 10))
    assert positions(here)["standard"] == Assignment("ollama", Canary("vllm", 10))


def test_canary_of_who_has_everything_leaves_the_rest_to_the_way_back() -> None:
    here = rollout()
    here.set("vllm")
    here.set(canary=Canary("vllm", 10))
    assert positions(here)["standard"] == Assignment("ollama", Canary("vllm", 10))


def test_canary_of_the_way_back_where_it_has_everything_is_a_conflict() -> None:
    here = rollout()
    with pytest.raises(Conflict, match="is on ollama already"):
        here.set(canary=Canary("ollama", 10))
    assert not here.history


def test_what_changes_nothing_leaves_no_trace() -> None:
    here = rollout()
    told: list[Change] = []
    here.listeners.append(told.append)
    assert here.set("ollama").change is None
    assert here.rollback().change is None
    assert here.undo().change is None
    assert (told, list(here.history)) == ([], [])


# Canary


def sides(of: Rollout, tier: str = "standard") -> set[int]:
    """The buckets that the canary has."""
    line = of.tiers[tier]
    return {bucket for bucket in range(BUCKETS) if line.choose(bucket).backend == "vllm"}


def test_canary_gets_its_share_of_the_buckets_exactly() -> None:
    here = rollout()
    for percent, count in ((0, 0), (0.01, 1), (10, 1000), (33.33, 3333), (99.99, 9999), (100, BUCKETS)):
        here.set("ollama", Canary("vllm", percent))
        assert len(sides(here)) == count


def test_more_percent_moves_conversations_one_way_only() -> None:
    here = rollout()
    before: set[int] = set()
    for percent in (1, 10, 10.5, 50, 100):
        here.set("ollama", Canary("vllm", percent))
        now = sides(here)
        assert before < now
        before = now


def test_real_share_is_counted_from_the_last_change_on() -> None:
    here = rollout()
    here.set("ollama", Canary("vllm", 10))
    line = here.tiers["standard"]
    for bucket in (0, 999, 1000, 5000):
        line.choose(bucket)
    assert (line.requests, line.canary_requests) == (4, 2)
    here.set("ollama", Canary("vllm", 20), tier="Pro")
    assert line.requests == 4
    here.set("ollama", Canary("vllm", 30), tier="standard")
    assert (line.requests, line.canary_requests) == (0, 0)


# Back


def test_rollback_leads_wholly_to_one_side_and_a_second_one_changes_nothing() -> None:
    here = rollout()
    here.set("vllm")
    here.set("ollama", Canary("vllm", 50), tier="standard")
    assert here.rollback().change is not None
    assert positions(here) == dict.fromkeys(("standard", "Pro", "pinned"), ON_OLLAMA)
    assert here.rollback().change is None


def test_rollback_can_be_narrowed() -> None:
    here = rollout()
    here.set("vllm")
    here.rollback(tier="standard")
    assert positions(here) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    here.rollback(to="vllm")
    assert positions(here)["standard"] == ON_VLLM


def test_tier_that_cannot_go_back_loses_its_canary_and_is_named() -> None:
    here = rollout()
    here.set("ollama", Canary("vllm", 50))
    outcome = here.rollback(to="cloud")
    assert outcome.unmoved == {"standard": "it has no model on cloud"}
    assert positions(here) == {"standard": ON_OLLAMA, "Pro": Assignment("cloud"), "pinned": ON_OLLAMA}
    assert here.rollback(tier="pinned", to="vllm") == here.rollback(tier="PINNED", to="vllm")
    assert here.rollback(tier="pinned", to="vllm").unmoved == {"pinned": "it is pinned to ollama"}


def test_undo_takes_the_last_change_back_and_a_second_one_takes_that_back() -> None:
    here = rollout()
    here.set("ollama", Canary("vllm", 10))
    here.set("vllm", tier="Pro")
    here.rollback()
    here.undo()
    assert positions(here) == {
        "standard": Assignment("ollama", Canary("vllm", 10)),
        "Pro": ON_VLLM,
        "pinned": ON_OLLAMA,
    }
    here.undo()
    assert positions(here) == positions(rollout())


# The history


def test_change_says_when_who_why_and_what() -> None:
    here = rollout()
    here.set("vllm", tier="standard", by="0123abcd")
    here.rollback(cause="guard")
    assert list(here.history) == [
        Change("2026-01-01T00:00:00.500Z", "0123abcd", "operator", {"standard": Move(ON_OLLAMA, ON_VLLM)}),
        Change("2026-01-01T00:00:00.500Z", "", "guard", {"standard": Move(ON_VLLM, ON_OLLAMA)}, is_rollback=True),
    ]
    assert str(here.history[0]) == "standard from ollama to vllm"


def test_history_is_bounded() -> None:
    here = rollout()
    for _ in range(HISTORY):
        here.set("vllm")
        here.rollback()
    assert len(here.history) == HISTORY


def test_listeners_see_the_change_in_force() -> None:
    here = rollout()
    seen: list[str] = []
    here.listeners.append(lambda change: seen.append(here.tiers["Pro"].route.backend))
    here.set("vllm")
    assert seen == ["vllm"]


@pytest.mark.parametrize(
    ("before", "after", "ends"),
    [
        (ON_OLLAMA, ON_VLLM, ("ollama", "vllm")),
        (ON_OLLAMA, Assignment("ollama", Canary("vllm", 10)), ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 10)), Assignment("ollama", Canary("vllm", 50)), ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 50)), Assignment("ollama", Canary("vllm", 10)), ("vllm", "ollama")),
        (Assignment("ollama", Canary("vllm", 50)), ON_OLLAMA, ("vllm", "ollama")),
        (Assignment("ollama", Canary("vllm", 50)), ON_VLLM, ("ollama", "vllm")),
        (Assignment("ollama", Canary("vllm", 50)), Assignment("ollama", Canary("cloud", 5)), ("vllm", "cloud")),
    ],
)
def test_move_is_counted_from_who_has_less_to_who_has_more(
    before: Assignment, after: Assignment, ends: tuple[str, str]
) -> None:
    assert Move(before, after).ends == ends


# Over a restart


def test_what_an_operator_set_counts_after_a_restart_and_is_said() -> None:
    here = rollout()
    here.set("vllm", by="0123abcd")
    here.set("vllm", Canary("ollama", 12.5), tier="Pro")
    again, notes = restarted(here)
    assert positions(again) == positions(here)
    assert list(again.history) == list(here.history)
    (note,) = notes
    for words in ("LLM_BACKEND is ollama", "standard on vllm", "12.5 %", "`gateway rollback`", "GATEWAY_STATE_FILE"):
        assert words in note


def test_what_is_as_the_settings_say_needs_no_words() -> None:
    here = rollout()
    here.set("vllm")
    here.rollback()
    again, notes = restarted(here)
    assert (positions(again), notes) == (positions(rollout()), [])
    again.undo()
    assert again.tiers["standard"].assignment == ON_VLLM


def test_variable_that_has_changed_counts_more() -> None:
    """Who rolls back by variable and restart must succeed, whatever an operator did before."""
    here = rollout(llm_backend="vllm")
    here.set("vllm", Canary("ollama", 10))
    again, notes = restarted(here, llm_backend="ollama")
    assert positions(again) == positions(rollout())
    assert "LLM_BACKEND is ollama and was vllm" in notes[0]
    assert again.history[-1].cause == "start"


def test_variable_that_has_won_once_is_not_forgotten() -> None:
    """Back and forth by variable after an operator's change: what he set then is over."""
    here = rollout(llm_backend="vllm")
    here.rollback()
    variable_won, _ = restarted(here, llm_backend="ollama")
    again, notes = restarted(variable_won, llm_backend="vllm")
    assert positions(again)["standard"] == ON_VLLM
    assert notes


def test_what_the_settings_do_not_allow_any_more_is_left_out_and_said() -> None:
    here = rollout()
    here.set("vllm")
    tiers = {**DOCUMENT["tiers"], "Pro": {"models": {"ollama": "large"}}}
    del tiers["standard"]
    again, notes = restarted(here, tiers=tiers)
    assert positions(again) == {"Pro": ON_OLLAMA, "pinned": ON_OLLAMA}
    assert ["no model on vllm" in note or "no such tier" in note for note in notes] == [True, True]
    outcome = again.undo()
    assert positions(again) == {"Pro": ON_OLLAMA, "pinned": ON_OLLAMA}
    assert outcome.change is None


@pytest.mark.parametrize(
    "kept", [None, [], {"llm_backend": "ollama"}, {"llm_backend": 1, "tiers": {}, "history": []}, "text"]
)
def test_section_that_is_no_roll_out_is_said_and_left_out(kept: Any) -> None:
    here = rollout()
    assert "cannot be read" in here.restore(kept).notes[0]
    assert positions(here) == positions(rollout())


# Whatever the order of things


class Operators(RuleBasedStateMachine):
    """Orders of all kinds in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.rollout = rollout()

    backends = st.sampled_from(["ollama", "vllm", "cloud"])
    tiers = st.sampled_from([None, "standard", "Pro", "pinned"])
    canaries = st.none() | st.builds(Canary, backends, st.sampled_from([0, 0.01, 10, 50, 99.99, 100]))

    @rule(backend=st.none() | backends, canary=canaries, tier=tiers)
    def set(self, backend: str | None, canary: Canary | None, tier: str | None) -> None:
        before = positions(self.rollout)
        try:
            outcome = self.rollout.set(backend, canary, tier=tier)
        except GatewayError:
            assert positions(self.rollout) == before
            return
        assert (outcome.change is None) == (positions(self.rollout) == before)
        for name in ("standard", "Pro") if tier is None else (tier,):
            here = before[name].backend
            rest = "ollama" if canary is not None and canary.backend == here else here
            assert positions(self.rollout)[name] == Assignment(backend or rest, canary)

    @rule(tier=tiers, to=st.none() | backends)
    def rollback(self, tier: str | None, to: str | None) -> None:
        before = positions(self.rollout)
        outcome = self.rollout.rollback(tier=tier, to=to)
        for name in ("standard", "Pro") if tier is None else (tier,):
            position = positions(self.rollout)[name]
            assert position == (
                Assignment(to or "ollama") if name not in outcome.unmoved else Assignment(before[name].backend)
            )
        assert (to or "ollama") == "cloud" or tier == "pinned" or not outcome.unmoved
        assert self.rollout.rollback(tier=tier, to=to).change is None

    @rule()
    def undo(self) -> None:
        before = positions(self.rollout)
        outcome = self.rollout.undo()
        assert outcome.change is None or positions(self.rollout) != before
        self.rollout.undo()
        assert positions(self.rollout) == before

    @rule(backend=backends)
    def set_and_undo(self, backend: str) -> None:
        before = positions(self.rollout)
        if self.rollout.rollback(to=backend).change is not None:
            self.rollout.undo()
        assert positions(self.rollout) == before

    @rule()
    def restart(self) -> None:
        self.rollout, notes = restarted(self.rollout)
        assert bool(notes) == (positions(self.rollout) != positions(rollout()))

    @invariant()
    def pinned_tiers_stay(self) -> None:
        assert positions(self.rollout)["pinned"] == ON_OLLAMA

    @invariant()
    def routes_are_the_positions(self) -> None:
        for line in self.rollout.tiers.values():
            assert line.route.backend == line.assignment.backend
            assert line.canary == line.assignment.canary


TestOperators = Operators.TestCase
TestOperators.settings = hypothesis_settings(max_examples=60, stateful_step_count=25, deadline=None)


# Other settings


def reloaded(here: Rollout, **changes: Any) -> Change | None:
    return here.reload(config.build(DOCUMENT | changes))


def test_what_an_operator_set_survives_other_settings() -> None:
    here = rollout()
    here.set("vllm", tier="standard")
    here.set(None, Canary("vllm", 10), tier="Pro")
    lines, before = here.tiers, positions(here)
    here.tiers["Pro"].choose(0)
    tiers = DOCUMENT["tiers"] | {
        "standard": {"models": {"ollama": "smaller", "vllm": "Smaller"}},
        "new": {"models": {"ollama": "n"}},
    }
    assert reloaded(here, tiers=tiers) is None
    assert here.tiers is lines
    assert positions(here) == before | {"new": ON_OLLAMA}
    assert here.tiers["standard"].route.model == "Smaller"
    assert here.tiers["Pro"].requests == 1
    assert len(here.history) == 2


def test_tier_that_lost_its_place_goes_where_the_settings_say() -> None:
    here = rollout()
    here.set("vllm", tier="standard")
    here.set("vllm", Canary("cloud", 10), tier="Pro")
    tiers = DOCUMENT["tiers"] | {
        "standard": {"models": {"ollama": "small"}},
        "Pro": {"models": {"ollama": "large", "vllm": "Large"}},
    }
    change = reloaded(here, tiers=tiers)
    assert change is not None
    assert (change.cause, change.by) == ("reload", "")
    assert change.tiers == {
        "standard": Move(ON_VLLM, ON_OLLAMA),
        "Pro": Move(Assignment("vllm", Canary("cloud", 10)), ON_VLLM),
    }
    assert positions(here) == {"standard": ON_OLLAMA, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert here.undo().unmoved == {"standard": "it has no model on vllm", "Pro": "it has no model on cloud"}


def test_pin_moves_a_tier_and_its_end_leaves_it_there() -> None:
    here = rollout()
    pinned = DOCUMENT["tiers"] | {"standard": DOCUMENT["tiers"]["standard"] | {"backend": "vllm"}}
    assert reloaded(here, tiers=pinned) is not None
    assert (positions(here)["standard"], here.tiers["standard"].is_pinned) == (ON_VLLM, True)
    assert reloaded(here) is None
    assert (positions(here)["standard"], here.tiers["standard"].is_pinned) == (ON_VLLM, False)


def test_other_llm_backend_counts_as_at_a_start() -> None:
    here = rollout()
    here.set("vllm", tier="standard")
    change = reloaded(here, llm_backend="vllm")
    assert change is not None
    assert change.tiers == {"Pro": Move(ON_OLLAMA, ON_VLLM)}
    assert positions(here) == {"standard": ON_VLLM, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert here.undo().change is not None
    assert positions(here)["Pro"] == ON_OLLAMA


def test_tier_that_is_gone_is_known_no_more() -> None:
    here = rollout()
    here.set("vllm")
    reloaded(
        here,
        tiers={"Pro": DOCUMENT["tiers"]["Pro"]},
        backends=DOCUMENT["backends"] | {"more": {"kind": "openai", "base_url": "http://x:1"}},
    )
    assert list(here.tiers) == ["Pro"]
    with pytest.raises(InvalidRequest):
        here.set("ollama", tier="standard")
    here.undo()
    assert positions(here) == {"Pro": ON_OLLAMA}
    with pytest.raises(Conflict):
        here.set("more")
