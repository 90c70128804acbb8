"""Circuit breaker: its states, the transitions between them, and that every state ends."""

from collections.abc import Callable

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.upstream.circuit_breaker import (
    CALM,
    IN_A_ROW,
    LEVELS,
    MISSES,
    WINDOW,
    WINDOW_FAILURES,
    CircuitBreaker,
    CircuitState,
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class ObservedCircuit:
    """A circuit breaker, its clock, and all changes that it reported."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.changes: list[tuple[CircuitState, CircuitState, str]] = []
        self.circuit = CircuitBreaker(
            self.clock, lambda was, reason: self.changes.append((was, self.circuit.state, reason))
        )

    def fail(self, times: int = 1) -> None:
        for _ in range(times):
            self.circuit.fail("reset", self.clock.now)

    def suspected(self) -> "ObservedCircuit":
        self.fail(IN_A_ROW)
        assert self.circuit.state == "suspect"
        return self

    def opened(self) -> "ObservedCircuit":
        self.suspected().circuit.probe_missed()
        assert self.circuit.state == "open"
        return self

    def half_opened(self) -> "ObservedCircuit":
        self.opened().circuit.probe_answered()
        assert self.circuit.state == "half_open"
        return self


@pytest.fixture
def observed() -> ObservedCircuit:
    return ObservedCircuit()


def test_new_circuit_allows_everything(observed: ObservedCircuit) -> None:
    circuit = observed.circuit
    assert (circuit.state, circuit.restrains, circuit.is_troubled, circuit.allows(1000)) == (
        "closed",
        False,
        False,
        True,
    )


def test_three_failures_in_a_row_make_the_circuit_suspect(observed: ObservedCircuit) -> None:
    observed.fail(IN_A_ROW - 1)
    assert observed.circuit.state == "closed"
    observed.fail()
    assert observed.changes == [("closed", "suspect", "reset")]
    assert not observed.circuit.allows(0)


def test_success_resets_the_failures_in_a_row(observed: ObservedCircuit) -> None:
    for _ in range(4):
        observed.fail(IN_A_ROW - 1)
        observed.circuit.succeed()
        observed.circuit.succeed()
        observed.circuit.succeed()
    assert observed.circuit.state == "closed"


def test_ten_failures_in_the_last_twenty_make_the_circuit_suspect(observed: ObservedCircuit) -> None:
    for number in range(WINDOW_FAILURES):
        assert observed.circuit.state == "closed"
        observed.fail()
        if number < WINDOW_FAILURES - 1:
            observed.circuit.succeed()
    assert observed.circuit.state == "suspect"


def test_failures_are_forgotten_after_twenty_successes(observed: ObservedCircuit) -> None:
    observed.fail(2)
    assert observed.circuit.is_troubled
    for _ in range(WINDOW):
        observed.circuit.succeed()
    assert not observed.circuit.is_troubled


def test_successful_probe_closes_a_suspect_circuit(observed: ObservedCircuit) -> None:
    """A bad moment fails everything in flight, but the server is not dead."""
    observed.suspected().fail(128)
    observed.circuit.probe_answered()
    assert (observed.circuit.state, observed.circuit.is_troubled, observed.circuit.allows(128)) == (
        "closed",
        False,
        True,
    )


def test_failed_probe_opens_a_suspect_circuit(observed: ObservedCircuit) -> None:
    observed.suspected().circuit.probe_missed()
    assert observed.circuit.is_open
    assert not observed.circuit.allows(0)


def test_failures_of_requests_sent_before_a_change_of_state_are_not_counted(observed: ObservedCircuit) -> None:
    sent = observed.clock.now
    observed.clock.now += 1
    observed.half_opened()
    for _ in range(128):
        observed.circuit.fail("reset", sent)
    assert observed.circuit.state == "half_open"
    observed.circuit.probe_answered()
    for _ in range(128):
        observed.circuit.fail("reset", sent)
    assert (observed.circuit.state, observed.circuit.is_troubled) == ("closed", False)


def test_server_that_fails_requests_but_answers_probes_is_suspect_once_a_second_at_most(
    observed: ObservedCircuit,
) -> None:
    observed.suspected().circuit.probe_answered()
    observed.fail(10)
    assert observed.circuit.state == "closed"
    observed.clock.now += CALM
    observed.fail()
    assert observed.circuit.state == "suspect"


def test_circuit_can_be_marked_as_suspect_at_once(observed: ObservedCircuit) -> None:
    observed.circuit.mark_suspect("connect")
    observed.circuit.mark_suspect("connect")
    assert observed.changes == [("closed", "suspect", "connect")]


def test_two_failed_probes_in_a_row_open_the_circuit_without_traffic(observed: ObservedCircuit) -> None:
    observed.circuit.probe_missed()
    observed.circuit.probe_answered()
    for _ in range(MISSES):
        assert observed.circuit.state == "closed"
        observed.circuit.probe_missed()
    assert observed.circuit.is_open


def test_sure_probe_that_fails_opens_the_circuit_at_once(observed: ObservedCircuit) -> None:
    observed.circuit.probe_missed(is_sure=True)
    assert observed.circuit.is_open


def test_half_open_circuit_allows_one_request_beside_those_left_over(observed: ObservedCircuit) -> None:
    circuit = observed.half_opened().circuit
    assert circuit.allows(3)  # three requests are left over from before
    assert not circuit.allows(4)
    assert circuit.allows(2)  # the trial request left without a result, and an old one ended
    assert not circuit.allows(3)


@pytest.mark.parametrize(
    "end",
    [CircuitBreaker.succeed, CircuitBreaker.begin_answer, CircuitBreaker.probe_answered],
    ids=lambda end: end.__name__,
)
def test_half_open_circuit_closes_when_the_request_or_the_next_probe_succeeds(
    observed: ObservedCircuit, end: Callable[[CircuitBreaker], None]
) -> None:
    end(observed.half_opened().circuit)
    assert (observed.circuit.state, observed.circuit.restrains) == ("closed", False)


def test_half_open_circuit_opens_when_the_request_fails(observed: ObservedCircuit) -> None:
    observed.half_opened().fail()
    assert observed.circuit.is_open


def test_half_open_circuit_opens_when_the_next_probe_fails(observed: ObservedCircuit) -> None:
    observed.half_opened().circuit.probe_missed()
    assert observed.circuit.is_open


def test_open_circuit_reacts_to_probes_only(observed: ObservedCircuit) -> None:
    observed.opened().fail()
    observed.circuit.succeed()
    observed.circuit.begin_answer()
    assert observed.circuit.is_open


def test_pause_blocks_requests_until_its_time_is_up_without_a_change_of_state(observed: ObservedCircuit) -> None:
    circuit = observed.circuit
    circuit.pause(7)
    circuit.pause(1)  # never shorter
    observed.clock.now += 6.9
    assert (circuit.state, circuit.is_paused, circuit.restrains, circuit.allows(0)) == ("closed", True, True, False)
    observed.clock.now += 0.2
    assert circuit.allows(0)
    assert (circuit.is_paused, circuit.restrains) == (False, False)


def test_full_server_closes_a_half_open_circuit(observed: ObservedCircuit) -> None:
    observed.half_opened().circuit.pause(1)
    assert observed.circuit.state == "closed"
    assert not observed.circuit.allows(0)


def test_representation_shows_the_state(observed: ObservedCircuit) -> None:
    observed.fail(2)
    observed.circuit.pause(1)
    assert repr(observed.circuit) == "<CircuitBreaker closed, 2 of 20 failed, 2 in a row, paused>"


EDGES = {
    ("closed", "suspect"),
    ("closed", "open"),
    ("suspect", "closed"),
    ("suspect", "open"),
    ("open", "half_open"),
    ("half_open", "closed"),
    ("half_open", "open"),
}


class CircuitMachine(RuleBasedStateMachine):
    """Exchanges begin, end and fail, probes end, and time passes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = ObservedCircuit()
        self.in_flight: list[float] = []
        self.trials = 0
        """Number of requests allowed since the circuit became half open."""

    @property
    def circuit(self) -> CircuitBreaker:
        return self.observed.circuit

    def check_changes(self) -> None:
        """Check that every reported change is an edge of the state graph."""
        for was, now, _ in self.observed.changes:
            assert (was, now) in EDGES
        self.observed.changes.clear()
        if self.circuit.state != "half_open":
            self.trials = 0

    @rule(count=st.integers(1, 30))
    def arrive(self, count: int) -> None:
        for _ in range(count):
            if not self.circuit.restrains or self.circuit.allows(len(self.in_flight)):
                assert self.circuit.state in ("closed", "half_open")
                assert not self.circuit.is_paused
                self.in_flight.append(self.observed.clock.now)
                self.trials += self.circuit.state == "half_open"
        assert self.trials <= 1

    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "left", "full"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        if not self.in_flight:
            return
        sent = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        if outcome == "succeeded" and self.circuit.is_troubled:
            self.circuit.succeed()
        elif outcome == "failed":
            self.circuit.fail("reset", sent)
        elif outcome == "full":
            self.circuit.pause(2)
        if self.circuit.state == "half_open":
            self.trials = 0
        self.check_changes()

    @rule()
    def all_fail_at_once(self) -> None:
        in_flight, self.in_flight = self.in_flight, []
        for sent in in_flight:
            self.circuit.fail("reset", sent)
        assert self.circuit.state != "open" or not self.observed.changes or self.observed.changes[-1][0] == "half_open"
        self.trials = 0
        self.check_changes()

    @rule(succeeds=st.booleans(), is_sure=st.booleans())
    def probe(self, succeeds: bool, is_sure: bool) -> None:
        if succeeds:
            self.circuit.probe_answered()
        else:
            self.circuit.probe_missed(is_sure=is_sure)
        self.check_changes()

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        self.observed.clock.now += seconds

    @invariant()
    def requests_are_refused_only_if_the_circuit_restrains(self) -> None:
        assert self.circuit.restrains or self.circuit.allows(len(self.in_flight))
        assert self.circuit.state in LEVELS
        assert self.circuit.is_troubled or self.circuit.state == "closed"

    @invariant()
    def two_good_probes_after_a_pause_close_the_circuit(self) -> None:
        """Every state has a way out."""
        copy, now = ObservedCircuit(), self.observed.clock.now
        for slot in CircuitBreaker.__slots__:
            if slot not in ("_clock", "_on_change"):
                setattr(copy.circuit, slot, getattr(self.circuit, slot))
        copy.clock.now = now + 3
        copy.circuit.probe_answered()
        copy.circuit.probe_answered()
        assert copy.circuit.state == "closed"
        assert copy.circuit.allows(1000)
        assert not copy.circuit.restrains


TestCircuit = CircuitMachine.TestCase


def test_a_reset_closes_the_circuit_whatever_was_before(observed: ObservedCircuit) -> None:
    observed.opened().circuit.pause(60.0)
    observed.circuit.reset()
    assert observed.circuit.allows(0)
    assert observed.changes[-1] == ("open", "closed", "reset")
    observed.fail(IN_A_ROW - 1)
    observed.circuit.reset()
    assert not observed.circuit.is_troubled
    observed.fail(IN_A_ROW - 1)
    assert observed.circuit.state == "closed"
