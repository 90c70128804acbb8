"""Decisions about loading models and making room, as steps of a state machine on a manual clock."""

from collections.abc import Callable

import pytest

from gateway.admission.model_residency import IDLE_AFTER_SECONDS, LoadedModels, ModelResidency, ModelState
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
        self.can_load = True
        self.residency = ModelResidency(
            self.clock, self.clock.alarm, lambda: SWAP, lambda model: self.can_load, self._begin, lambda: None
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
        Clock(), lambda *_: None, lambda: SWAP, lambda model: True, lambda state: None, lambda: None
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
