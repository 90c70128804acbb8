"""When a server may be given requests: the states, what leads from one to the next, and that none lasts."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.upstream.circuit_breaker import CALM, HALF, IN_A_ROW, LEVELS, MISSES, WINDOW, CircuitBreaker, CircuitState


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Watched:
    """A circuit, its clock, and all that it told."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.changes: list[tuple[CircuitState, CircuitState, str]] = []
        self.circuit = CircuitBreaker(
            self.clock, lambda was, reason: self.changes.append((was, self.circuit.state, reason))
        )

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.circuit.fail("reset", self.clock.now)

    def suspected(self) -> "Watched":
        self.fail(IN_A_ROW)
        assert self.circuit.state == "suspect"
        return self

    def opened(self) -> "Watched":
        self.suspected().circuit.probe_missed()
        assert self.circuit.state == "open"
        return self

    def half_opened(self) -> "Watched":
        self.opened().circuit.probe_answered()
        assert self.circuit.state == "half_open"
        return self


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_new_circuit_lets_everything_through_without_a_question(watched: Watched) -> None:
    circuit = watched.circuit
    assert (circuit.state, circuit.restrains, circuit.is_troubled, circuit.allows(1000)) == (
        "closed",
        False,
        False,
        True,
    )


def test_three_failures_in_a_row_ask_for_a_probe(watched: Watched) -> None:
    watched.fail(IN_A_ROW - 1)
    assert watched.circuit.state == "closed"
    watched.fail()
    assert watched.changes == [("closed", "suspect", "reset")]
    assert not watched.circuit.allows(0)


def test_success_between_failures_begins_the_row_anew(watched: Watched) -> None:
    for _ in range(4):
        watched.fail(IN_A_ROW - 1)
        watched.circuit.succeed()
        watched.circuit.succeed()
        watched.circuit.succeed()
    assert watched.circuit.state == "closed"


def test_half_of_the_last_twenty_ask_for_a_probe(watched: Watched) -> None:
    for number in range(HALF):
        assert watched.circuit.state == "closed"
        watched.fail()
        if number < HALF - 1:
            watched.circuit.succeed()
    assert watched.circuit.state == "suspect"


def test_failures_are_forgotten_after_twenty_successes(watched: Watched) -> None:
    watched.fail(2)
    assert watched.circuit.is_troubled
    for _ in range(WINDOW):
        watched.circuit.succeed()
    assert not watched.circuit.is_troubled


def test_probe_that_succeeds_clears_the_suspicion(watched: Watched) -> None:
    """One bad instant fails everything in flight, and is no death."""
    watched.suspected().fail(128)
    watched.circuit.probe_answered()
    assert (watched.circuit.state, watched.circuit.is_troubled, watched.circuit.allows(128)) == ("closed", False, True)


def test_probe_that_fails_confirms_the_suspicion(watched: Watched) -> None:
    watched.suspected().circuit.probe_missed()
    assert watched.circuit.is_open
    assert not watched.circuit.allows(0)


def test_stragglers_of_what_was_sent_before_a_change_say_nothing(watched: Watched) -> None:
    sent = watched.clock.now
    watched.clock.now += 1
    watched.half_opened()
    for _ in range(128):
        watched.circuit.fail("reset", sent)
    assert watched.circuit.state == "half_open"
    watched.circuit.probe_answered()
    for _ in range(128):
        watched.circuit.fail("reset", sent)
    assert (watched.circuit.state, watched.circuit.is_troubled) == ("closed", False)


def test_server_that_fails_requests_but_answers_probes_is_asked_once_a_second_at_most(watched: Watched) -> None:
    watched.suspected().circuit.probe_answered()
    watched.fail(10)
    assert watched.circuit.state == "closed"
    watched.clock.now += CALM
    watched.fail()
    assert watched.circuit.state == "suspect"


def test_doubt_asks_for_a_probe_at_once(watched: Watched) -> None:
    watched.circuit.mark_suspect("connect")
    watched.circuit.mark_suspect("connect")
    assert watched.changes == [("closed", "suspect", "connect")]


def test_probes_alone_open_after_two_misses_in_a_row(watched: Watched) -> None:
    watched.circuit.probe_missed()
    watched.circuit.probe_answered()
    for _ in range(MISSES):
        assert watched.circuit.state == "closed"
        watched.circuit.probe_missed()
    assert watched.circuit.is_open


def test_probe_that_is_sure_opens_at_once(watched: Watched) -> None:
    watched.circuit.probe_missed(is_sure=True)
    assert watched.circuit.is_open


def test_half_open_lets_one_request_through_beside_those_left_over(watched: Watched) -> None:
    circuit = watched.half_opened().circuit
    assert circuit.allows(3)  # three hang there from before
    assert not circuit.allows(4)
    assert circuit.allows(2)  # the one that was tried left without a word, and one of the old ended
    assert not circuit.allows(3)


@pytest.mark.parametrize(
    "end",
    [CircuitBreaker.succeed, CircuitBreaker.begin_answer, CircuitBreaker.probe_answered],
    ids=lambda end: end.__name__,
)
def test_half_open_closes_when_the_request_or_the_next_probe_succeeds(
    watched: Watched, end: Callable[[CircuitBreaker], None]
) -> None:
    end(watched.half_opened().circuit)
    assert (watched.circuit.state, watched.circuit.restrains) == ("closed", False)


def test_half_open_opens_when_the_request_fails(watched: Watched) -> None:
    watched.half_opened().fail()
    assert watched.circuit.is_open


def test_half_open_opens_when_the_next_probe_fails(watched: Watched) -> None:
    watched.half_opened().circuit.probe_missed()
    assert watched.circuit.is_open


def test_open_circuit_hears_probes_only(watched: Watched) -> None:
    watched.opened().fail()
    watched.circuit.succeed()
    watched.circuit.begin_answer()
    assert watched.circuit.is_open


def test_pause_holds_back_for_its_time_and_changes_no_state(watched: Watched) -> None:
    circuit = watched.circuit
    circuit.pause(7)
    circuit.pause(1)  # never shorter
    watched.clock.now += 6.9
    assert (circuit.state, circuit.is_paused, circuit.restrains, circuit.allows(0)) == ("closed", True, True, False)
    watched.clock.now += 0.2
    assert circuit.allows(0)
    assert (circuit.is_paused, circuit.restrains) == (False, False)


def test_full_server_that_is_tried_is_alive(watched: Watched) -> None:
    watched.half_opened().circuit.pause(1)
    assert watched.circuit.state == "closed"
    assert not watched.circuit.allows(0)


def test_representation_shows_the_state(watched: Watched) -> None:
    watched.fail(2)
    watched.circuit.pause(1)
    assert repr(watched.circuit) == "<Circuit closed, 2 of 20 failed, 2 in a row, paused>"


EDGES = {
    ("closed", "suspect"), ("closed", "open"), ("suspect", "closed"), ("suspect", "open"), ("open", "half_open"), ("half_open", "closed"),
    ("half_open", "open"),
}  # fmt: skip


class CircuitMachine(RuleBasedStateMachine):
    """Exchanges begin, end and fail, probes come, time passes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = Watched()
        self.flying: list[float] = []
        self.tried = 0
        """Let through since the circuit is half open."""

    @property
    def circuit(self) -> CircuitBreaker:
        return self.watched.circuit

    def noticed(self) -> None:
        """What changed is an edge of the graph, and each one was told."""
        for was, now, _ in self.watched.changes:
            assert (was, now) in EDGES
        self.watched.changes.clear()
        if self.circuit.state != "half_open":
            self.tried = 0

    @rule(count=st.integers(1, 30))
    def arrive(self, count: int) -> None:
        for _ in range(count):
            if not self.circuit.restrains or self.circuit.allows(len(self.flying)):
                assert self.circuit.state in ("closed", "half_open")
                assert not self.circuit.is_paused
                self.flying.append(self.watched.clock.now)
                self.tried += self.circuit.state == "half_open"
        assert self.tried <= 1

    @rule(data=st.data(), how=st.sampled_from(["well", "failed", "left", "full"]))
    def end(self, data: st.DataObject, how: str) -> None:
        if not self.flying:
            return
        sent = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
        if how == "well" and self.circuit.is_troubled:
            self.circuit.succeed()
        elif how == "failed":
            self.circuit.fail("reset", sent)
        elif how == "full":
            self.circuit.pause(2)
        if self.circuit.state == "half_open":
            self.tried = 0
        self.noticed()

    @rule()
    def all_fail_at_once(self) -> None:
        flying, self.flying = self.flying, []
        for sent in flying:
            self.circuit.fail("reset", sent)
        assert self.circuit.state != "open" or not self.watched.changes or self.watched.changes[-1][0] == "half_open"
        self.tried = 0
        self.noticed()

    @rule(well=st.booleans(), is_sure=st.booleans())
    def probe(self, well: bool, is_sure: bool) -> None:
        if well:
            self.circuit.probe_answered()
        else:
            self.circuit.probe_missed(is_sure=is_sure)
        self.noticed()

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.watched.clock.now += seconds

    @invariant()
    def nothing_is_refused_without_a_restraint(self) -> None:
        assert self.circuit.restrains or self.circuit.allows(len(self.flying))
        assert self.circuit.state in LEVELS
        assert self.circuit.is_troubled or self.circuit.state == "closed"

    @invariant()
    def two_good_probes_and_a_pause_bring_everything_back(self) -> None:
        """No state is without a way out."""
        twin, now = Watched(), self.watched.clock.now
        for slot in CircuitBreaker.__slots__:
            if slot not in ("_clock", "_on_change"):
                setattr(twin.circuit, slot, getattr(self.circuit, slot))
        twin.clock.now = now + 3
        twin.circuit.probe_answered()
        twin.circuit.probe_answered()
        assert twin.circuit.state == "closed"
        assert twin.circuit.allows(1000)
        assert not twin.circuit.restrains


TestCircuit = CircuitMachine.TestCase
