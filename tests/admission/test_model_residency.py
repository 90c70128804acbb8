"""Which model is loaded when, and who makes room: steps of the state machine, on a clock that the test sets."""

from collections.abc import Callable

import pytest

from gateway.admission.model_residency import REST_SECONDS, LoadedModels, ModelResidency, ModelState
from gateway.errors import GatewayError
from tests.fakes.admission import Clock

SWAP = 10.0


class Waiters:
    """A crowd whose size the test sets."""

    def __init__(self) -> None:
        self.waiting = 0

    def wants(self, state: ModelState) -> bool:
        return self.waiting > 0

    def may_try_elsewhere(self, state: ModelState) -> bool:
        return False

    def refuse(self, error: Callable[[], GatewayError]) -> None:
        self.waiting = 0


class Setup:
    """One server with the models a, b and c."""

    def __init__(self, *shown: str) -> None:
        self.clock = Clock()
        self.begun: list[str] = []
        self.able = True
        self.loads = ModelResidency(
            self.clock, self.clock.alarm, lambda: SWAP, lambda model: self.able, self._begin, lambda: None
        )
        self.states = {name: self.loads.state(name, name, False) for name in "abc"}
        self.crowds = {name: Waiters() for name in "abc"}
        for name, state in self.states.items():
            state.waiters.append(self.crowds[name])
        self.loads.update(shown)

    def _begin(self, state: ModelState) -> None:
        self.begun.append(state.name)

    def wait_for(self, name: str) -> None:
        self.crowds[name].waiting += 1
        self.loads.schedule()

    def shown(self, *names: str) -> LoadedModels:
        return LoadedModels(dict.fromkeys(names, 1000.0), 500.0)

    def end(self, name: str, before: str, after: str) -> None:
        """The load of `name` succeeded; the letters are what was shown."""
        self.loads.ended(self.states[name], True, self.shown(*before), self.shown(*after))
        self.loads.schedule()

    def ready(self) -> str:
        return "".join(name for name, state in self.states.items() if state.is_ready)

    def make_rivals(self) -> None:
        """a is loaded, and known to be evicted by a load of b, and the other way round."""
        self.wait_for("b")
        self.end("b", "a", "b")
        self.crowds["b"].waiting = 0
        self.wait_for("a")
        self.end("a", "b", "a")
        self.crowds["a"].waiting = 0
        self.begun.clear()


def test_all_is_taken_for_loaded_until_the_server_has_told() -> None:
    loads = ModelResidency(Clock(), lambda *_: None, lambda: SWAP, lambda model: True, lambda state: None, lambda: None)
    state = loads.state("a", "a", False)
    assert state.is_ready
    loads.update([])
    assert not state.is_ready
    assert loads.state("b", "b", False).is_ready is False


def test_model_is_loaded_once_for_all_who_wait_and_not_when_nobody_does() -> None:
    setup = Setup()
    setup.loads.schedule()
    assert setup.begun == []
    for _ in range(3):
        setup.wait_for("a")
    assert setup.begun == ["a"]
    setup.end("a", "", "a")
    assert setup.ready() == "a"


def test_loads_are_one_at_a_time_and_who_waits_the_longest_is_next() -> None:
    setup = Setup()
    for name in "cab":
        setup.wait_for(name)
        setup.clock.pass_time(1)
    assert setup.begun == ["c"]
    setup.end("c", "", "c")
    setup.end("a", "c", "ca")
    assert setup.begun == ["c", "a", "b"]


def test_load_whose_waiters_have_left_goes_on_and_one_that_was_not_begun_is_dropped() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.wait_for("b")
    setup.crowds["a"].waiting = setup.crowds["b"].waiting = 0
    setup.loads.update([])
    assert setup.states["a"].is_loading
    setup.end("a", "", "a")
    assert setup.begun == ["a"]


def test_what_a_probe_shows_does_not_end_a_load_under_way() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.loads.update(["a"])
    assert setup.ready() == ""
    setup.end("a", "", "a")
    assert setup.ready() == "a"


def test_model_that_failed_to_load_is_cold_and_tried_again_for_the_next() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.crowds["a"].waiting = 0
    setup.loads.ended(setup.states["a"], False, None, None)
    setup.loads.schedule()
    assert (setup.begun, setup.ready()) == (["a"], "")
    setup.wait_for("a")
    assert setup.begun == ["a", "a"]


def test_nothing_is_loaded_at_a_server_that_is_away() -> None:
    setup = Setup()
    setup.able = False
    setup.wait_for("a")
    assert setup.begun == []
    setup.able = True
    setup.loads.update([])
    assert setup.begun == ["a"]


def test_time_of_loading_is_told_while_it_lasts_and_after() -> None:
    setup = Setup()
    setup.wait_for("a")
    setup.clock.pass_time(3)
    assert setup.states["a"].load_seconds(setup.clock.now) == 3
    setup.end("a", "", "a")
    setup.clock.pass_time(3)
    assert setup.states["a"].load_seconds(setup.clock.now) == 3


# Warm


def test_warm_models_are_loaded_one_after_the_other_behind_those_that_are_waited_for() -> None:
    setup = Setup()
    setup.states["a"].warm = setup.states["b"].warm = True
    setup.wait_for("c")
    assert setup.begun == ["c"]
    setup.end("c", "", "c")
    setup.crowds["c"].waiting = 0
    setup.end("a", "c", "ca")
    setup.end("b", "ca", "cab")
    assert setup.begun == ["c", "a", "b"]
    setup.loads.update([])
    assert setup.begun == ["c", "a", "b"]


def test_warm_model_that_is_loaded_already_is_left_alone() -> None:
    setup = Setup("a")
    setup.states["a"].warm = True
    setup.loads.update(["a"])
    setup.loads.update([])
    assert setup.begun == []


# Swapping


def test_models_that_fit_together_do_not_wait_for_each_other() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    assert (setup.begun, setup.ready()) == (["b"], "a")
    setup.end("b", "a", "ab")
    assert setup.ready() == "ab"


def test_requests_of_the_loaded_one_go_first_for_a_bounded_time_then_the_other() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.clock.pass_time(SWAP)
    setup.wait_for("b")
    setup.clock.pass_time(SWAP - 0.1)
    assert (setup.begun, setup.ready()) == ([], "a")
    setup.clock.pass_time(0.2)
    assert (setup.begun, setup.ready()) == ([], "")
    setup.states["a"].running = 0
    setup.loads.schedule()
    assert setup.begun == ["b"]


def test_loaded_one_has_its_time_from_when_it_was_loaded() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 1)
    setup.states["a"].running = 0
    setup.wait_for("a")
    assert setup.begun == ["b"]
    setup.clock.pass_time(50)
    setup.end("b", "a", "b")
    setup.clock.pass_time(SWAP - 0.1)
    assert setup.begun == ["b"]
    setup.clock.pass_time(0.2)
    assert setup.begun == ["b", "a"]


def test_loaded_one_without_work_makes_room_after_a_moment() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.clock.pass_time(5)
    setup.states["a"].rests_since = setup.clock.now
    setup.wait_for("b")
    setup.clock.pass_time(REST_SECONDS - 0.1)
    assert setup.begun == []
    setup.clock.pass_time(0.2)
    assert setup.begun == ["b"]


def test_loaded_one_that_has_rested_makes_room_at_once() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].rests_since = setup.clock.now
    setup.clock.pass_time(REST_SECONDS)
    setup.wait_for("b")
    assert setup.begun == ["b"]


def test_loaded_one_is_free_again_when_those_who_waited_for_the_other_have_left() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP + 1)
    assert setup.ready() == ""
    setup.crowds["b"].waiting = 0
    assert setup.loads.schedule()
    assert setup.ready() == "a"


def test_pair_that_is_shown_together_does_not_swap_any_more() -> None:
    setup = Setup("a")
    setup.make_rivals()
    setup.loads.update(["a", "b"])
    setup.loads.update(["a"])
    setup.states["a"].running = 1
    setup.wait_for("b")
    assert (setup.begun, setup.ready()) == (["b"], "a")


@pytest.mark.parametrize(("goes", "running", "swaps"), [(1000.0, 0, True), (400.0, 1, True), (400.0, 0, False)])
def test_model_that_went_when_it_was_due_was_not_evicted(goes: float, running: int, swaps: bool) -> None:
    setup = Setup("a")
    setup.states["a"].running = running
    setup.wait_for("b")
    setup.loads.ended(setup.states["b"], True, LoadedModels({"a": goes}, 100.0), setup.shown("b"))
    setup.states["a"].running, setup.states["b"].running = 0, 1
    setup.wait_for("a")
    assert setup.begun == (["b"] if swaps else ["b", "a"])


def test_load_that_lasts_gets_room_from_those_not_known_to_fit() -> None:
    setup = Setup("a")
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(SWAP - 0.1)
    assert setup.ready() == "a"
    setup.clock.pass_time(0.2)
    assert setup.ready() == ""
    setup.end("b", "a", "ab")
    assert setup.ready() == "ab"


def test_load_that_lasts_takes_nothing_from_one_that_is_known_to_fit() -> None:
    setup = Setup("a", "b")
    setup.loads.update(["a"])
    setup.states["a"].running = 1
    setup.wait_for("b")
    setup.clock.pass_time(2 * SWAP)
    assert setup.ready() == "a"


def test_three_rivals_have_their_turns_in_the_order_in_which_they_were_waited_for() -> None:
    setup = Setup("a")
    pairs = [("b", "a"), ("c", "b"), ("a", "c"), ("c", "a"), ("b", "c"), ("a", "b")]
    for name, before in pairs:
        setup.wait_for(name)
        setup.end(name, before, name)
        setup.crowds[name].waiting = 0
    setup.begun.clear()
    setup.states["a"].running = 1
    for name in "cb":
        setup.wait_for(name)
        setup.clock.pass_time(1)
    setup.clock.pass_time(SWAP)
    setup.states["a"].running = 0
    setup.loads.schedule()
    setup.end("c", "a", "c")
    setup.states["c"].running = 1
    setup.wait_for("a")
    setup.clock.pass_time(SWAP + 1)
    setup.states["c"].running = 0
    setup.loads.schedule()
    assert setup.begun == ["c", "b"]
