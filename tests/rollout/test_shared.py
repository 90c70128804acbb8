"""The roll-out of one of several replicas: orders from any of them apply to all, the newest last."""

import json
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway import config
from gateway.errors import Conflict
from gateway.rollout.assignment import Assignment, Canary, Change
from gateway.rollout.shared import SharedRollout
from gateway.rollout.shared_state import SharedState, merge
from gateway.rollout.state import Rollout
from tests.rollout.test_state import DOCUMENT, ON_OLLAMA, ON_VLLM, assignments

TIERS = DOCUMENT["tiers"]
EXTRA = {"extra": {"models": {"ollama": "e", "vllm": "E"}}}


class Time:
    """A clock in Unix time that tests set."""

    def __init__(self) -> None:
        self.now = 1_767_225_600.0

    def __call__(self) -> float:
        return self.now


def replica(name: str, time: Time | None = None, **changes: Any) -> SharedRollout:
    made = SharedRollout(config.build(DOCUMENT | changes), name, clock=time or Time(), common_clock=time or Time())
    made.is_in_sync = True
    return made


def exchange(*replicas: SharedRollout) -> None:
    """Merge all states until nobody knows more than the others."""
    document = SharedState()
    for _ in range(3):
        for each in replicas:
            each.merge(document)
            document = each.shared_state
    for each in replicas:
        assert not each.merge(document)
        each.is_in_sync = True


def shown(of: Rollout) -> list[tuple[str, str]]:
    return [(change.replica, str(change)) for change in of.history]


# Orders


def test_order_on_one_replica_moves_the_others_and_names_where_it_was_taken() -> None:
    a, b = replica("a"), replica("b")
    told: list[Change] = []
    b.listeners.append(told.append)
    a.set("vllm", by="0123abcd")
    exchange(a, b)
    assert assignments(b) == assignments(a) == {"standard": ON_VLLM, "Pro": ON_VLLM, "pinned": ON_OLLAMA}
    assert list(a.history) == list(b.history)
    (change,) = told
    assert (change.by, change.replica, change.cause) == ("0123abcd", "a", "operator")
    assert set(change.tiers) == {"standard", "Pro"}


def test_rollback_undo_and_canaries_reach_the_others() -> None:
    a, b = replica("a"), replica("b")
    a.set("vllm")
    exchange(a, b)
    b.set(canary=Canary("ollama", 10), tier="standard")
    exchange(a, b)
    assert a.tiers["standard"].canary == Canary("ollama", 10)
    told: list[Change] = []
    b.listeners.append(told.append)
    a.rollback()
    exchange(a, b)
    assert [change.is_rollback for change in told] == [True]
    assert assignments(b)["standard"] == ON_OLLAMA
    b.undo()
    exchange(a, b)
    assert assignments(a)["standard"] == Assignment("vllm", Canary("ollama", 10))
    assert [name for name, _ in shown(a)] == ["a", "b", "a", "b"]


def test_undo_on_another_replica_reverts_the_last_order_of_all() -> None:
    a, b = replica("a"), replica("b")
    a.set("vllm")
    exchange(a, b)
    b.undo()
    exchange(a, b)
    assert assignments(a) == assignments(b) == assignments(replica("c"))


def test_of_two_operators_at_once_the_later_one_counts_everywhere() -> None:
    time = Time()
    a, b, c = (replica(name, time) for name in "abc")
    a.set("vllm")
    time.now += 0.001
    b.set("cloud", tier="Pro")
    exchange(a, b, c)
    for each in (a, b, c):
        assert assignments(each) == {"standard": ON_VLLM, "Pro": Assignment("cloud"), "pinned": ON_OLLAMA}
        assert shown(each) == [
            ("a", "standard from ollama to vllm, Pro from ollama to vllm"),
            ("b", "Pro from vllm to cloud"),
        ]
    c.undo()
    exchange(a, b, c)
    assert assignments(a)["Pro"] == ON_VLLM


def test_orders_at_the_same_millisecond_have_one_winner() -> None:
    time = Time()
    a, b = replica("a", time), replica("b", time)
    a.set("vllm")
    b.set("vllm")
    b.set(canary=Canary("ollama", 20))
    exchange(b, a)
    assert assignments(a) == assignments(b)


def test_order_in_knowledge_of_another_is_newer_whatever_the_clocks_say() -> None:
    fast, slow = Time(), Time()
    fast.now += 3600
    a, b = replica("a", fast), replica("b", slow)
    a.set("vllm")
    exchange(a, b)
    b.rollback()
    exchange(a, b)
    assert assignments(a)["standard"] == ON_OLLAMA


def test_rollback_without_an_effect_here_counts_against_an_older_switch_elsewhere() -> None:
    time = Time()
    a, b = replica("a", time), replica("b", time)
    a.is_in_sync = b.is_in_sync = False  # cut off from each other
    b.set("vllm")
    time.now += 1
    assert a.rollback().change is None
    exchange(a, b)
    assert assignments(b)["standard"] == assignments(a)["standard"] == ON_OLLAMA
    assert (
        shown(a)
        == shown(b)
        == [
            ("b", "standard from ollama to vllm, Pro from ollama to vllm"),
            ("a", "standard from vllm to ollama, Pro from vllm to ollama"),
        ]
    )


def test_order_without_an_effect_anywhere_leaves_no_trace() -> None:
    a, b = replica("a"), replica("b")
    assert a.set("ollama").change is None
    exchange(a, b)
    assert not a.history
    assert not b.history


def test_replica_that_was_away_for_a_day_follows_the_newest_orders() -> None:
    time = Time()
    a, b = replica("a", time), replica("b", time)
    a.is_in_sync = False
    a.set("cloud", tier="Pro")
    for backend in ("vllm", "ollama") * 40:
        time.now += 1000
        b.set(backend, tier="standard")
    time.now += 1000
    b.set("vllm", tier="Pro")
    exchange(a, b)
    assert assignments(a) == assignments(b)
    assert assignments(a)["Pro"] == ON_VLLM
    assert list(a.history) == list(b.history)
    assert len(a.history) == 50


def test_second_guards_rollback_of_the_same_canary_leaves_no_trace() -> None:
    time = Time()
    a, b = replica("a", time), replica("b", time)
    a.set(canary=Canary("vllm", 10))
    exchange(a, b)
    for each in (a, b):
        time.now += 0.001
        each.rollback(tier="standard", to="ollama", cause="guard", why="errors")
    told: list[Change] = []
    a.listeners.append(told.append)
    exchange(a, b)
    assert [(change.cause, change.replica) for change in a.history] == [("operator", "a"), ("guard", "a")]
    assert told == []


def test_listeners_see_every_tier_moved_already() -> None:
    a, b = replica("a"), replica("b")
    a.set("vllm", tier="standard")
    a.set("vllm", tier="Pro")
    seen: list[dict[str, Assignment]] = []
    b.listeners.append(lambda change: seen.append(assignments(b)))
    exchange(a, b)
    assert len(seen) == 2
    assert seen[0] == seen[1] == assignments(a)


# Different settings


def test_tier_that_cannot_follow_stays_and_is_named() -> None:
    only_ollama = TIERS | {"standard": {"models": {"ollama": "small"}}}
    a, b = replica("a"), replica("b", tiers=only_ollama)
    a.set("vllm")
    exchange(a, b)
    assert assignments(b)["standard"] == ON_OLLAMA
    assert b.unfollowed() == {"standard": "it was ordered to vllm, but here it has no model on vllm; it is on ollama"}
    assert assignments(a)["standard"] == ON_VLLM  # and the others are not held back


def test_canary_that_a_replica_cannot_have_leaves_its_tier_whole() -> None:
    without_cloud = TIERS | {"Pro": {"models": {"ollama": "large", "vllm": "Large"}}}
    a, b = replica("a"), replica("b", tiers=without_cloud)
    a.set("vllm", Canary("cloud", 10), tier="Pro")
    exchange(a, b)
    assert assignments(b)["Pro"] == ON_VLLM


def test_rollback_ends_the_canary_of_a_tier_that_cannot_go_back() -> None:
    no_ollama = TIERS | {"Pro": {"models": {"vllm": "Large", "cloud": "huge"}, "backend": None}}
    a = replica("a")
    b = replica("b", tiers=no_ollama, llm_backend="vllm", rollback_to="ollama")
    a.set("vllm", Canary("cloud", 10), tier="Pro")
    exchange(a, b)
    assert b.tiers["Pro"].canary is not None
    a.rollback()
    exchange(a, b)
    assert assignments(b)["Pro"] == ON_VLLM


def test_order_for_all_tiers_applies_to_those_that_its_replica_does_not_have() -> None:
    a, b = replica("a"), replica("b", tiers=TIERS | EXTRA)
    a.set("vllm")
    exchange(a, b)
    assert assignments(b)["extra"] == ON_VLLM
    a.rollback()
    exchange(a, b)
    assert assignments(b)["extra"] == ON_OLLAMA
    a.undo()
    exchange(a, b)
    assert assignments(b)["extra"] == ON_VLLM
    assert all("extra" in change.tiers for change in b.history)


def test_undone_order_for_all_tiers_does_not_come_back_with_a_new_tier() -> None:
    a = replica("a")
    a.set("vllm")
    a.undo()
    b = replica("b", tiers=TIERS | EXTRA)
    exchange(a, b)
    assert assignments(b)["extra"] == ON_OLLAMA


def test_order_for_one_tier_does_not_concern_unknown_ones() -> None:
    a, b = replica("a"), replica("b", tiers=TIERS | EXTRA)
    a.set("vllm", tier="standard")
    exchange(a, b)
    assert assignments(b)["extra"] == ON_OLLAMA


def test_pinned_tier_never_follows() -> None:
    pinned = TIERS | {"standard": TIERS["standard"] | {"backend": "ollama"}}
    a, b = replica("a"), replica("b", tiers=pinned)
    a.set("vllm")
    exchange(a, b)
    assert assignments(b)["standard"] == ON_OLLAMA
    with pytest.raises(Conflict):
        b.set("vllm", tier="standard")


def test_tier_follows_as_soon_as_new_settings_allow_it() -> None:
    only_ollama = TIERS | {"standard": {"models": {"ollama": "small"}}}
    a, b = replica("a"), replica("b", tiers=only_ollama)
    a.set("vllm")
    exchange(a, b)
    told: list[Change] = []
    b.listeners.append(told.append)
    b.reload(config.build(DOCUMENT))
    assert assignments(b)["standard"] == ON_VLLM
    assert [change.cause for change in told] == ["reload"]
    assert b.unfollowed() == {}


def test_settings_of_one_replica_that_lose_a_backend_move_only_that_one() -> None:
    a, b = replica("a"), replica("b")
    a.set("vllm")
    exchange(a, b)
    b.reload(config.build(DOCUMENT | {"tiers": TIERS | {"standard": {"models": {"ollama": "small"}}}}))
    exchange(a, b)
    assert assignments(b)["standard"] == ON_OLLAMA
    assert assignments(a)["standard"] == ON_VLLM


# LLM_BACKEND and restarts


def restarted(of: SharedRollout, name: str, **changes: Any) -> tuple[SharedRollout, list[str]]:
    again = replica(name, **changes)
    return again, again.restore(json.loads(json.dumps(of.to_persist()))).notes


def test_variable_applies_to_tiers_that_no_order_has_moved() -> None:
    a, b = replica("a"), replica("b", llm_backend="vllm")
    a.set("cloud", tier="Pro")
    exchange(a, b)
    assert assignments(b) == {"standard": ON_VLLM, "Pro": Assignment("cloud"), "pinned": ON_OLLAMA}
    assert assignments(a)["standard"] == ON_OLLAMA


def test_changed_variable_yields_to_the_shared_roll_out_with_a_note() -> None:
    a = replica("a")
    a.set("vllm")
    for changes in ({}, {"llm_backend": "vllm"}):
        again, notes = restarted(a, "a2", **changes)
        assert assignments(again)["standard"] == ON_VLLM
        assert notes == []
    again, _ = restarted(a, "a3")
    assert again.note() == (
        "LLM_BACKEND is ollama, but the roll-out that the replicas share takes precedence: vllm. "
        "To leave it, run `gateway rollback` (moves to ollama) or `gateway switch`"
    )
    assert replica("b").note() is None


def test_reload_with_another_variable_does_not_move_what_was_ordered() -> None:
    a = replica("a")
    a.set("vllm", tier="standard")
    a.rollback(tier="standard")
    a.reload(config.build(DOCUMENT | {"llm_backend": "vllm"}))
    assert assignments(a)["standard"] == ON_OLLAMA
    assert assignments(a)["Pro"] == ON_VLLM  # which nobody has moved


def test_replica_that_comes_back_with_its_state_file_yields_to_newer_orders() -> None:
    time = Time()
    a, b = replica("a", time), replica("b", time)
    a.set("vllm")
    exchange(a, b)
    kept = a.to_persist()
    time.now += 86_400
    b.rollback()
    again = replica("a2", time)
    again.restore(kept)
    assert assignments(again)["standard"] == ON_VLLM
    exchange(again, b)
    assert assignments(again)["standard"] == assignments(b)["standard"] == ON_OLLAMA


def test_store_that_lost_its_data_gets_the_state_of_the_replicas() -> None:
    a = replica("a")
    a.set("vllm")
    assert a.merge(SharedState())  # it knows more than the empty store
    c = replica("c")
    c.merge(a.shared_state)
    assert assignments(c) == assignments(a)


def test_what_was_set_before_replicas_shared_it_is_the_oldest_order() -> None:
    alone = Rollout(config.build(DOCUMENT))
    alone.set("vllm")
    a = replica("a")
    a.restore(json.loads(json.dumps(alone.to_persist())))
    assert assignments(a)["standard"] == ON_VLLM
    assert [change.replica for change in a.history] == [""]
    b = replica("b")
    exchange(a, b)
    assert assignments(b)["standard"] == ON_VLLM
    b.rollback(tier="standard")
    exchange(a, b)
    assert assignments(a)["standard"] == ON_OLLAMA


@pytest.mark.parametrize(
    "kept", [None, 3, {"llm_backend": "ollama", "tiers": {}, "history": [], "shared": {"tiers": 3}}]
)
def test_invalid_section_is_dropped_with_a_note(kept: Any) -> None:
    a = replica("a")
    assert a.restore(kept).notes == ["the roll-out in the state file is invalid; the settings apply"]
    assert assignments(a) == assignments(replica("b"))


# All together


class Cluster(RuleBasedStateMachine):
    """Three replicas, of which one has another tier, that exchange their states now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Time()
        self.replicas = [replica(name, self.time) for name in "ab"] + [replica("c", self.time, tiers=TIERS | EXTRA)]
        self.document = SharedState()
        for each in self.replicas:
            each.is_in_sync = False

    @rule(at=st.integers(0, 2), backend=st.sampled_from(["ollama", "vllm"]), tier=st.sampled_from([None, "standard"]))
    def switch(self, at: int, backend: str, tier: str | None) -> None:
        self.replicas[at].set(backend, tier=tier)

    @rule(at=st.integers(0, 2), percent=st.sampled_from([0, 10, 100]))
    def canary(self, at: int, percent: int) -> None:
        self.replicas[at].set("ollama", Canary("vllm", percent))

    @rule(at=st.integers(0, 2), tier=st.sampled_from([None, "Pro"]))
    def roll_back(self, at: int, tier: str | None) -> None:
        self.replicas[at].rollback(tier=tier)
        assert assignments(self.replicas[at])["Pro"] == ON_OLLAMA

    @rule(at=st.integers(0, 2))
    def undo(self, at: int) -> None:
        self.replicas[at].undo()

    @rule(at=st.integers(0, 2))
    def exchange(self, at: int) -> None:
        self.replicas[at].merge(self.document)
        self.document = self.replicas[at].shared_state
        self.replicas[at].is_in_sync = True

    @rule()
    def lose(self) -> None:
        self.document = SharedState()

    @rule(milliseconds=st.integers(-5, 5))
    def tick(self, milliseconds: int) -> None:
        self.time.now += milliseconds / 1000

    @invariant()
    def follows_its_registers(self) -> None:
        for each in self.replicas:
            for name, register in each.shared_state.tiers.items():
                assert name not in each.tiers or each.tiers[name].assignment == register.assignment

    def teardown(self) -> None:
        exchange(*self.replicas)
        a, b, c = self.replicas
        assert assignments(a) == assignments(b)
        assert assignments(c).items() >= assignments(a).items()
        assert list(a.history) == list(b.history) == list(c.history)
        assert merge(a.shared_state, c.shared_state) == b.shared_state


Cluster.TestCase.settings = hypothesis_settings(max_examples=30, stateful_step_count=20, deadline=None)
TestCluster = Cluster.TestCase
