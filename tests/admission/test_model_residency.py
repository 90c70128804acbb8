"""Decisions about loading models and making room, as steps of a state machine on a manual clock.

Covers: gateway/admission/model_state.py
"""

from collections.abc import Callable

import pytest

from gateway.admission.model_residency import (
    IDLE_AFTER_SECONDS,
    UNLOAD_AFTER_SECONDS,
    UNLOAD_AGAIN_SECONDS,
    LoadedModels,
    ModelResidency,
)
from gateway.admission.model_state import ModelState
from gateway.errors import GatewayError
from tests.fakes.admission import Clock, Server, setup

SWAP = 10.0


class Waiters:
    """Waiting requests whose number the test sets."""

    def __init__(self) -> None:
        self.waiting = 0

    def wants(self, state: ModelState) -> bool:
        return self.waiting > 0

    def may_try_elsewhere(self, state: ModelState) -> bool:
        return False

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        self.waiting = 0


class Setup:
    """Model residency of one server with the models a, b and c."""

    def __init__(self, *report: str) -> None:
        self.clock = Clock()
        self.started: list[str] = []
        self.unloading: list[str] = []
        self.evicted: list[str] = []
        self.can_load = True
        self.residency = ModelResidency(
            self.clock,
            self.clock.alarm,
            lambda: SWAP,
            lambda model: self.can_load,
            self._begin,
            lambda: None,
            lambda state: self.unloading.append(state.name),
            lambda state: self.evicted.append(state.name),
        )
        self.states = {name: self.residency.state(name, name, False) for name in "abc"}
        self.waiters = {name: Waiters() for name in "abc"}
        for name, state in self.states.items():
            state.waiters.append(self.waiters[name])
        self.residency.update(report)

    def _begin(self, state: ModelState) -> None:
        self.started.append(state.name)

    def wait_for(self, name: str) -> None:
        self.waiters[name].waiting += 1
        self.residency.schedule()

    def report(self, *names: str) -> LoadedModels:
        return LoadedModels(dict.fromkeys(names, 1000.0), 500.0)

    def end(self, name: str, before: str, after: str) -> None:
        """End the load of `name` with success; `before` and `after` name the reported models."""
        self.residency.ended(self.states[name], True, self.report(*before), self.report(*after))
        self.residency.schedule()

    def ready(self) -> str:
        return "".join(name for name, state in self.states.items() if state.is_ready)

    def make_rivals(self) -> None:
        """Load a, after loading a and b was seen to evict the other one."""
        self.wait_for("b")
        self.end("b", "a", "b")
        self.waiters["b"].waiting = 0
        self.wait_for("a")
        self.end("a", "b", "a")
        self.waiters["a"].waiting = 0
        self.started.clear()


def test_models_count_as_loaded_until_the_first_report() -> None:
    residency = ModelResidency(
        Clock(),
        lambda *_: None,
        lambda: SWAP,
        lambda model: True,
        lambda *_: None,
        lambda: None,
        lambda *_: None,
        lambda *_: None,
    )
    state = residency.state("a", "a", False)
    assert state.is_ready
    residency.update([])
    assert not state.is_ready
    assert residency.state("b", "b", False).is_ready is False


def test_model_is_loaded_once_for_all_waiting_requests_and_only_if_there_are_any() -> None:
    setup = Setup()
    setup.residency.schedule()
    assert setup.started == []
    for _ in range(3):
        setup.wait_for("a")
    assert setup.started == ["a"]
    setup.end("a", "", "a")
    assert setup.ready() == "a"


def test_models_load_one_at_a_time_and_the_longest_wanted_is_next() -> None:
    setup = Setup()
    for name in "cab":
        setup.wait_for(name)
        setup.clock.pass_time(1)
    assert setup.started == ["c"]
    setup.end("c", "", "c")
    setup.end("a", "c", "ca")
    assert setup.started == ["c", "a", "b"]


def test_running_load_continues_without_waiting_requests_and_a_pending_one_is_dropped() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.wait_for("b")
    setup.waiters["a"].waiting = setup.waiters["b"].waiting = 0
    setup.residency.update([])
    assert setup.states["a"].is_loading
    setup.end("a", "", "a")
    assert setup.started == ["a"]


def test_report_of_a_probe_does_not_end_a_running_load() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.residency.update(["a"])
    assert setup.ready() == ""
    setup.end("a", "", "a")
    assert setup.ready() == "a"


def test_model_that_failed_to_load_is_cold_and_loaded_again_for_the_next_request() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.waiters["a"].waiting = 0
    setup.residency.ended(setup.states["a"], False, None, None)
    setup.residency.schedule()
    assert (setup.started, setup.ready()) == (["a"], "")
    setup.wait_for("a")
    assert setup.started == ["a", "a"]


def test_report_of_the_server_lets_it_try_a_failed_load_again() -> None:
    setup = Setup()
    setup.states["a"].has_failed = True
    setup.residency.update(("b",))
    assert not setup.states["a"].has_failed


def test_nothing_is_loaded_on_a_server_that_is_down() -> None:
    setup = Setup()
    setup.can_load = False
    setup.wait_for("a")
    assert setup.started == []
    setup.can_load = True
    setup.residency.update([])
    assert setup.started == ["a"]


def test_load_seconds_are_counted_during_and_after_the_load() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.clock.pass_time(3)
    assert setup.states["a"].load_seconds(setup.clock.now) == 3
    setup.end("a", "", "a")
    setup.clock.pass_time(3)
    assert setup.states["a"].load_seconds(setup.clock.now) == 3


# Warm models


def test_warm_models_are_loaded_one_by_one_after_the_wanted_models() -> None:
    setup = Setup()
    setup.states["a"].warm = setup.states["b"].warm = True
    setup.wait_for("c")
    assert setup.started == ["c"]
    setup.end("c", "", "c")
    setup.waiters["c"].waiting = 0
    setup.end("a", "c", "ca")
    setup.end("b", "ca", "cab")
    assert setup.started == ["c", "a", "b"]
    setup.residency.update([])
    assert setup.started == ["c", "a", "b"]


def test_warm_model_that_is_loaded_is_not_loaded_again() -> None:
    setup = Setup("a")
    setup.states["a"].warm = True
    setup.residency.update(["a"])
    setup.residency.update([])
    assert setup.started == []


# Rivals


def test_models_that_fit_together_do_not_wait_for_each_other() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    assert (setup.started, setup.ready()) == (["b"], "a")
    setup.end("b", "a", "ab")
    assert setup.ready() == "ab"


def test_loaded_model_runs_requests_for_swap_after_seconds_and_then_makes_room() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.clock.pass_time(SWAP)
    setup.wait_for("b")
    setup.clock.pass_time(SWAP - 0.1)
    assert (setup.started, setup.ready()) == ([], "a")
    setup.clock.pass_time(0.2)
    assert (setup.started, setup.ready()) == ([], "")
    setup.states["a"].running = 0
    setup.residency.schedule()
    assert setup.started == ["b"]


def test_swap_after_counts_from_when_the_loaded_model_was_loaded() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 1)
    setup.states["a"].running = 0
    setup.wait_for("a")
    assert setup.started == ["b"]
    setup.clock.pass_time(50)
    setup.end("b", "a", "b")
    setup.clock.pass_time(SWAP - 0.1)
    assert setup.started == ["b"]
    setup.clock.pass_time(0.2)
    assert setup.started == ["b", "a"]


def test_loaded_model_without_work_makes_room_after_a_moment() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.clock.pass_time(5)
    setup.states["a"].idle_since = setup.clock.now
    setup.wait_for("b")
    setup.clock.pass_time(IDLE_AFTER_SECONDS - 0.1)
    assert setup.started == []
    setup.clock.pass_time(0.2)
    assert setup.started == ["b"]


def test_idle_model_makes_room_at_once() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].idle_since = setup.clock.now
    setup.clock.pass_time(IDLE_AFTER_SECONDS)
    setup.wait_for("b")
    assert setup.started == ["b"]


def test_held_model_is_released_when_the_requests_for_its_rival_have_left() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 1)
    assert setup.ready() == ""
    setup.waiters["b"].waiting = 0
    assert setup.residency.schedule()
    assert setup.ready() == "a"


def test_models_reported_together_are_no_longer_rivals() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.residency.update(["a", "b"])
    setup.residency.update(["a"])
    setup.states["a"].running = 1
    setup.wait_for("b")
    assert (setup.started, setup.ready()) == (["b"], "a")


@pytest.mark.parametrize(
    ("expires", "running", "is_rival"),
    [(1000.0, 0, True), (400.0, 1, True), (400.0, 0, False)],
    ids=["not due to expire", "at work", "idle and due to expire"],
)
def test_model_that_went_was_evicted_unless_it_was_idle_and_due_to_expire(
    expires: float, running: int, is_rival: bool
) -> None:
    setup = Setup("a")
    setup.states["a"].running = running
    setup.wait_for("b")
    setup.residency.ended(setup.states["b"], True, LoadedModels({"a": expires}, 100.0), setup.report("b"))
    setup.states["a"].running, setup.states["b"].running = 0, 1
    setup.wait_for("a")
    assert setup.started == (["b"] if is_rival else ["b", "a"])


def test_slow_load_holds_busy_models_that_are_not_known_to_fit() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP - 0.1)
    assert setup.ready() == "a"
    setup.clock.pass_time(0.2)
    assert setup.ready() == ""
    setup.end("b", "a", "ab")
    assert setup.ready() == "ab"


def test_slow_load_does_not_hold_a_model_that_is_known_to_fit() -> None:
    setup = Setup("a", "b")
    setup.residency.update(["a"])
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(2 * SWAP)
    assert setup.ready() == "a"


def test_three_rivals_take_turns_in_the_order_in_which_they_were_wanted() -> None:
    setup = Setup("a")
    pairs = [("b", "a"), ("c", "b"), ("a", "c"), ("c", "a"), ("b", "c"), ("a", "b")]
    for name, before in pairs:
        setup.wait_for(name)
        setup.end(name, before, name)
        setup.waiters[name].waiting = 0
    setup.started.clear()
    setup.states["a"].running = 1
    for name in "cb":
        setup.wait_for(name)
        setup.clock.pass_time(1)
    setup.clock.pass_time(SWAP)
    setup.states["a"].running = 0
    setup.residency.schedule()
    setup.end("c", "a", "c")
    setup.states["c"].running = 1
    setup.wait_for("a")
    setup.clock.pass_time(SWAP + 1)
    setup.states["c"].running = 0
    setup.residency.schedule()
    assert setup.started == ["c", "b"]


def test_model_that_has_just_served_a_request_counts_as_at_work_for_a_moment() -> None:
    """A program that sends one request after the other leaves gaps."""
    server = Server("a", "b")
    backend = setup(server)
    backend.enable_loading(swap_after=SWAP)
    residency = server.residency
    assert residency is not None
    backend.admission.queue("a", "text"), backend.admission.queue("b", "text")
    residency.update(["a"])
    residency._rivals.add(frozenset("ab"))
    backend.pass_time(100)
    request = backend.arrive("a")
    backend.pass_time(5)
    backend.leave(request)
    assert backend.arrive("b").is_queued
    assert server.loading is None
    backend.pass_time(IDLE_AFTER_SECONDS * 0.9)
    assert server.loading is None
    backend.pass_time(IDLE_AFTER_SECONDS * 0.2)
    assert server.loading is residency.states["b"]


def test_loaded_model_has_its_turn_even_if_the_server_does_not_report_it_after_the_load() -> None:
    """The rival has been wanted for just as long, and the load took longer than a turn."""
    setup = Setup()
    setup.residency._rivals.add(frozenset("ab"))
    setup.waiters["a"].waiting = setup.waiters["b"].waiting = 1
    setup.residency.schedule()
    assert setup.started == ["a"]
    setup.clock.pass_time(3 * SWAP)
    setup.residency.ended(setup.states["a"], True, setup.report(), None)
    setup.states["a"].running = 1
    setup.residency.schedule()
    setup.clock.pass_time(SWAP - 0.1)
    assert (setup.started, setup.ready()) == (["a"], "a")
    setup.clock.pass_time(0.2)
    assert (setup.started, setup.ready()) == (["a"], "")


def test_warm_model_does_not_take_the_place_of_a_loaded_rival() -> None:
    """No request waits for it, and the rival may get one at any time."""
    setup = Setup("a")
    setup.wait_for("b")
    setup.end("b", "a", "b")
    assert setup.started == ["b"]
    setup.waiters["b"].waiting = 0
    setup.states["a"].warm = True
    setup.residency.schedule()
    setup.clock.pass_time(10 * SWAP)
    setup.residency.schedule()
    assert setup.started == ["b"]
    setup.states["c"].warm = True
    setup.residency.schedule()
    assert setup.started == ["b", "c"]


def test_model_that_was_not_loaded_before_the_load_was_not_evicted_by_it() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.end("b", "", "b")
    setup.states["a"].running, setup.states["b"].running = 0, 1
    setup.wait_for("a")
    assert setup.started == ["b", "a"]


def test_load_without_a_report_from_before_it_makes_no_rivals() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.residency.ended(setup.states["b"], True, None, setup.report("b"))
    setup.states["a"].running, setup.states["b"].running = 0, 1
    setup.wait_for("a")
    assert setup.started == ["b", "a"]


def test_every_held_model_is_released_when_the_load_ends_whatever_its_outcome() -> None:
    for is_loaded in (True, False):
        setup = Setup("a", "c")
        setup.states["a"].running = setup.states["c"].running = 1
        setup.wait_for("b")
        setup.clock.pass_time(SWAP + 0.1)
        assert setup.ready() == ""
        setup.residency.ended(setup.states["b"], is_loaded, setup.report("a", "c"), None)
        assert setup.ready() == ("abc" if is_loaded else "ac")
        assert not any(state.is_held for state in setup.states.values())


# Models that a slow load waits for


def slow_load(*busy: str) -> Setup:
    """Return a setup whose load of b has taken longer than `swap_after`, with these models at work."""
    setup = Setup("a", "c")
    for name in busy:
        setup.states[name].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 0.1)
    return setup


def finish(setup: Setup, name: str) -> None:
    setup.states[name].running = 0
    setup.states[name].idle_since = setup.clock.now
    setup.residency.schedule()


def test_model_that_a_slow_load_waits_for_is_unloaded_once_its_requests_have_ended() -> None:
    setup = slow_load("a")
    setup.clock.pass_time(60)
    assert setup.unloading == []
    finish(setup, "a")
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS - 0.1)
    assert setup.unloading == []
    setup.clock.pass_time(0.2)
    assert setup.unloading == ["a"]
    setup.residency.unloaded(setup.states["a"])
    assert setup.states["a"].word == "cold"
    setup.clock.pass_time(2 * UNLOAD_AGAIN_SECONDS)
    assert setup.unloading == ["a"]
    setup.end("b", "ac", "bc")
    setup.clock.pass_time(100)
    assert setup.unloading == ["a"]


def test_unload_that_failed_is_tried_again_while_the_load_lasts() -> None:
    setup = slow_load("a")
    finish(setup, "a")
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS + 2 * UNLOAD_AGAIN_SECONDS + 0.1)
    assert setup.unloading == ["a"] * 3
    setup.end("b", "a", "b")
    setup.clock.pass_time(100)
    assert setup.unloading == ["a"] * 3


def test_drained_model_is_not_unloaded_for_a_load_that_has_ended() -> None:
    setup = slow_load("a")
    finish(setup, "a")
    setup.end("b", "ac", "abc")
    setup.waiters["b"].waiting = 0
    setup.residency.update(["a"])
    setup.wait_for("c")
    setup.states["a"].set(is_held=True)
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS + 0.1)
    assert setup.states["c"].is_loading
    assert setup.unloading == []


def test_model_that_has_worked_since_the_load_began_is_unloaded_though_it_is_idle_now() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(1)
    finish(setup, "a")
    setup.clock.pass_time(SWAP - 1.1)
    assert setup.ready() == "a"
    setup.clock.pass_time(0.2)
    assert setup.ready() == ""
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS)
    assert setup.unloading == ["a"]


def test_model_that_was_idle_all_the_time_is_neither_held_nor_unloaded() -> None:
    """Ollama would have evicted it at once."""
    setup = Setup("a")
    setup.states["a"].idle_since = setup.clock.now
    setup.clock.pass_time(1)
    setup.wait_for("b")
    setup.clock.pass_time(100)
    assert (setup.ready(), setup.unloading) == ("a", [])


def test_rival_that_made_room_before_the_load_is_not_unloaded() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.clock.pass_time(SWAP)
    setup.waiters["a"].waiting = 1  # these wait while it is held
    setup.states["a"].idle_since = -100.0
    setup.residency._next = None
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 0.1)
    assert setup.started == ["b"]
    setup.clock.pass_time(10 * SWAP)
    assert setup.unloading == []


def test_load_that_fails_leaves_an_unloaded_model_cold() -> None:
    setup = slow_load("a")
    finish(setup, "a")
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS)
    setup.residency.unloaded(setup.states["a"])
    setup.residency.ended(setup.states["b"], False, setup.report("a"), None)
    assert setup.ready() == "c"
    assert setup.states["a"].word == "cold"


# What answers and evictions tell


def test_answer_shows_that_its_model_is_loaded_and_its_rival_is_not() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["b"].running = 1
    assert setup.residency.heard(setup.states["b"])
    assert setup.ready() == "b"
    assert setup.evicted[-1] == "a"
    assert not setup.residency.heard(setup.states["b"])


def test_requests_for_an_evicted_model_return_to_the_queue() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.end("b", "a", "b")
    assert setup.evicted == ["a"]


def test_report_returns_the_requests_for_a_model_whose_rival_is_loaded() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.evicted.clear()
    setup.states["b"].running = 1
    setup.residency.update(["a"])
    assert setup.evicted == ["b"]
    setup.residency.update(["b"])
    assert setup.evicted == ["b"]


def test_load_waits_for_the_requests_of_a_rival_that_load_it_themselves() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.residency.update([])
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 0.1)
    assert setup.started == []
    finish(setup, "a")
    assert setup.started == ["b"]


def test_model_that_answers_while_its_rival_is_being_loaded_is_held_and_then_unloaded() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.clock.pass_time(SWAP)
    setup.states["a"].set(is_loaded=False)
    setup.wait_for("b")
    assert setup.started == ["b"]
    setup.states["a"].running = 1
    assert not setup.residency.heard(setup.states["a"])
    assert setup.states["a"].word == "held"
    finish(setup, "a")
    setup.clock.pass_time(UNLOAD_AFTER_SECONDS)
    assert setup.unloading == ["a"]


# Frozen models


def test_model_that_is_unloading_gets_no_requests_and_no_load_until_that_has_ended() -> None:
    setup = Setup("a")
    setup.residency.begin_unload(setup.states["a"])
    assert setup.ready() == ""
    setup.wait_for("a")
    setup.residency.update([])
    assert (setup.ready(), setup.started, setup.states["a"].word) == ("", [], "unloading")
    setup.residency.end_unload(setup.states["a"], is_loaded=False)
    setup.residency.schedule()
    assert setup.started == ["a"]


def test_model_that_could_not_be_unloaded_gets_requests_again() -> None:
    setup = Setup("a")
    setup.residency.begin_unload(setup.states["a"])
    setup.residency.end_unload(setup.states["a"], is_loaded=True)
    assert setup.ready() == "a"


def test_a_forgotten_model_leaves_no_state_and_no_pairs() -> None:
    setup = Setup("a", "b")
    residency = setup.residency
    assert residency.forget("a")
    assert "a" in residency.states, "it has a queue"
    setup.states["a"].waiters.clear()
    assert residency.forget("a")
    assert "a" not in residency.states
    assert residency._compatible == set()
    assert residency.forget("a")


def test_a_model_that_is_being_loaded_is_not_forgotten() -> None:
    setup = Setup()
    setup.waiters["c"].waiting = 1
    setup.residency.schedule()
    assert setup.started == ["c"]
    setup.states["c"].waiters.clear()
    assert not setup.residency.forget("c")
    setup.residency.ended(setup.states["c"], True, None, None)
    assert setup.residency.forget("c")
    assert "c" not in setup.residency.states
