"""Outlier detection: what ejects a server, for how long, and what readmits it."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.admission.fair_queue import Claim
from gateway.upstream.outlier_detection import (
    BASE_SECONDS,
    DECAY_SECONDS,
    ENOUGH_SAMPLES,
    HANG,
    HANGS,
    IN_A_ROW,
    KNOWN_SECONDS,
    MAX_PARTIES,
    MAX_SECONDS,
    QUIET_SECONDS,
    RECENT_SECONDS,
    RELAPSES,
    STALL,
    WINDOW,
    WINDOW_FAILURES,
    OutlierDetector,
    party_of,
)

A, B, C = Claim("a"), Claim("b"), Claim("c")


class Observed:
    """A detector, its clock, and the changes that it reported."""

    def __init__(self, *, is_last_resort: bool = False) -> None:
        self.now = 1000.0
        self.is_last_resort = is_last_resort
        self.changes: list[str] = []
        self.detector = OutlierDetector(
            "m",
            "text",
            lambda: self.now,
            lambda detector: self.is_last_resort,
            lambda detector, change: self.changes.append(change),
        )

    def fail(self, times: int = 1, claim: Claim = A, reason: str = "status_5xx", **more: Any) -> None:
        for _ in range(times):
            self.detector.fail(reason, self.now, claim, more.get("is_trial", False))

    def succeed(self, times: int = 1, claim: Claim = A, *, is_trial: bool = False) -> None:
        for _ in range(times):
            self.detector.succeed(claim, 100, 0.1, is_trial)

    def ejected(self, reason: str = "status_5xx") -> "Observed":
        self.fail(HANGS if reason == HANG else IN_A_ROW, reason=reason)
        assert self.detector.word == "ejected"
        return self

    def on_trial(self, reason: str = "status_5xx") -> "Observed":
        self.ejected(reason)
        self.now = self.detector.until
        assert self.detector.begin_trial()
        return self

    @property
    def seconds(self) -> float:
        """Length of the present ejection."""
        return self.detector.until - self.detector.ejected_at


@pytest.fixture
def observed() -> Observed:
    return Observed()


# What ejects a server


def test_failures_in_a_row_eject_a_server(observed: Observed) -> None:
    observed.fail(IN_A_ROW - 1)
    assert (observed.detector.restrains, observed.detector.accepts(), observed.changes) == (False, True, [])
    observed.fail()
    detector = observed.detector
    assert (detector.restrains, detector.accepts(), detector.allows(), detector.word) == (True, False, False, "ejected")
    assert (detector.reason, observed.seconds, observed.changes) == ("status_5xx", BASE_SECONDS, ["ejected"])


def test_success_of_anybody_interrupts_failures_in_a_row(observed: Observed) -> None:
    observed.fail(IN_A_ROW - 1)
    observed.succeed(claim=B)
    observed.fail(WINDOW_FAILURES - IN_A_ROW)
    assert not observed.detector.restrains


def test_share_of_failures_ejects_a_server(observed: Observed) -> None:
    for number in range(WINDOW_FAILURES):
        assert not observed.detector.restrains
        observed.fail()
        if number < WINDOW_FAILURES - 1:
            observed.succeed()
    assert observed.detector.restrains


def test_failures_that_are_rare_do_not_eject_a_server(observed: Observed) -> None:
    for _ in range(10 * WINDOW):
        observed.fail(2)
        observed.succeed(8)
    assert not observed.detector.restrains


def test_failures_are_forgotten_after_a_window_of_successes(observed: Observed) -> None:
    observed.fail(2)
    observed.succeed(WINDOW)
    assert not observed.detector._outcomes


def test_first_token_timeouts_in_a_row_eject_a_server_as_hung(observed: Observed) -> None:
    observed.fail(HANGS - 1, reason=HANG)
    observed.succeed()
    observed.fail(HANGS - 1, reason=HANG)
    assert not observed.detector.restrains
    observed.fail(reason=HANG)
    assert (observed.detector.restrains, observed.detector.is_hung, observed.detector.reason) == (True, True, HANG)


def test_other_failure_between_two_timeouts_is_not_a_hang(observed: Observed) -> None:
    observed.fail(HANGS - 1, reason=HANG)
    observed.fail()
    observed.fail(HANGS - 1, reason=HANG)
    assert not observed.detector.restrains


def test_stall_ejects_a_server_as_hung_once(observed: Observed) -> None:
    for _ in range(2):
        observed.detector.stall({"a", "b"})
    assert (observed.detector.is_hung, observed.detector.reason, observed.changes) == (True, STALL, ["ejected"])


def test_failures_of_requests_sent_before_the_last_change_do_not_count(observed: Observed) -> None:
    before = observed.now
    observed.on_trial()
    observed.succeed(is_trial=True)
    for _ in range(100):
        observed.detector.fail("reset", before, A, False)
    assert not observed.detector.restrains


# One client


def test_one_party_does_not_eject_a_server_that_serves_another(observed: Observed) -> None:
    observed.succeed(claim=B)
    observed.fail(1000)
    assert not observed.detector.restrains
    observed.now += QUIET_SECONDS + 0.1
    observed.fail()
    assert observed.detector.restrains, "nobody else has had a success for long"


def test_failures_in_a_row_of_two_parties_eject_a_server_whoever_succeeded_before(observed: Observed) -> None:
    observed.succeed(claim=C)
    observed.fail(IN_A_ROW - 1, A)
    observed.fail(1, B)
    assert observed.detector.restrains


def test_share_of_failures_has_to_be_high_for_the_other_parties_too(observed: Observed) -> None:
    for _ in range(WINDOW):
        observed.fail(1, A)
        observed.succeed(1, B)
    assert not observed.detector.restrains
    for _ in range(WINDOW):
        observed.fail(1, A)
        observed.fail(1, B)
        observed.succeed(1, B)
    assert observed.detector.restrains


def test_persons_behind_one_key_are_parties_of_their_own() -> None:
    assert len({party_of(Claim("a")), party_of(Claim("a", "x")), party_of(Claim("a", "y")), party_of(Claim("b"))}) == 4


def test_ejection_that_one_of_several_known_parties_caused_does_not_grow(observed: Observed) -> None:
    observed.succeed(claim=B)
    observed.now += QUIET_SECONDS + 1
    observed.fail(IN_A_ROW)
    for _ in range(3):
        assert observed.seconds == BASE_SECONDS
        observed.now = observed.detector.until
        assert observed.detector.begin_trial()
        observed.fail(is_trial=True)
        observed.detector.end_trial(observed.now)
    observed.now += KNOWN_SECONDS
    assert observed.detector.begin_trial()
    observed.fail(is_trial=True)
    assert observed.seconds == 2 * BASE_SECONDS


def test_number_of_parties_that_are_remembered_is_bounded(observed: Observed) -> None:
    for number in range(10 * MAX_PARTIES):
        observed.succeed(claim=Claim(str(number)))
    assert len(observed.detector._successes) == MAX_PARTIES
    assert str(10 * MAX_PARTIES - 1) in observed.detector._successes


# Trial and readmission


def test_ejected_server_gets_one_request_on_trial_after_its_time(observed: Observed) -> None:
    detector = observed.ejected().detector
    assert not detector.begin_trial()
    observed.now = detector.until - 0.001
    assert not detector.accepts()
    observed.now = detector.until
    assert (detector.word, detector.accepts(), detector.begin_trial()) == ("trial", True, True)
    assert (detector.accepts(), detector.allows(), detector.begin_trial()) == (False, False, False)
    detector.end_trial(observed.now)
    assert detector.accepts(), "the request left without a result"


def test_success_on_trial_readmits_a_server(observed: Observed) -> None:
    observed.on_trial().succeed(is_trial=True)
    assert (observed.detector.restrains, observed.detector.accepts()) == (False, True)
    assert observed.changes == ["ejected", "readmitted"]


def test_only_the_request_on_trial_decides_on_an_ejected_server(observed: Observed) -> None:
    observed.on_trial().succeed()
    observed.detector.begin_answer()
    observed.fail(10)
    assert (observed.detector.word, observed.seconds) == ("trial", BASE_SECONDS)


def test_failure_on_trial_ejects_for_longer_up_to_a_limit(observed: Observed) -> None:
    observed.ejected()
    for number in range(1, 50):
        assert observed.seconds == min(number * BASE_SECONDS, MAX_SECONDS)
        observed.now = observed.detector.until
        assert observed.detector.begin_trial()
        observed.fail(is_trial=True)
        observed.detector.end_trial(observed.now)
        assert observed.detector.word == "ejected"


def test_readmitted_server_is_ejected_again_after_fewer_failures_and_for_longer(observed: Observed) -> None:
    observed.on_trial().succeed(is_trial=True)
    observed.fail(RELAPSES - 1)
    assert not observed.detector.restrains
    observed.fail()
    assert observed.seconds == 2 * BASE_SECONDS


def test_time_without_an_ejection_takes_from_their_number(observed: Observed) -> None:
    for _ in range(3):
        observed.fail(IN_A_ROW)
        observed.now = observed.detector.until
        observed.succeed(is_trial=True)
    observed.now += 2 * DECAY_SECONDS
    observed.fail(IN_A_ROW - 1)
    assert not observed.detector.restrains, "the time of relapses is over"
    observed.fail()
    assert observed.seconds == 2 * BASE_SECONDS
    observed.now = observed.detector.until
    observed.succeed(is_trial=True)
    observed.now += 100 * DECAY_SECONDS
    observed.fail(IN_A_ROW)
    assert observed.seconds == BASE_SECONDS


@pytest.mark.parametrize("reason", [HANG, STALL])
def test_any_sign_of_life_readmits_a_server_that_hung(reason: str) -> None:
    for sign in ("first token", "success"):
        observed = Observed()
        if reason == HANG:
            observed.ejected(HANG)
        else:
            observed.detector.stall({"a"})
        observed.detector.begin_answer() if sign == "first token" else observed.succeed()
        assert not observed.detector.restrains


def test_death_of_the_server_explains_an_ejection_that_began_with_it(observed: Observed) -> None:
    suspected = observed.now
    observed.ejected().detector.explain(suspected)
    assert (observed.detector.restrains, observed.changes) == (False, ["ejected", "explained"])
    assert observed.ejected().seconds == BASE_SECONDS, "it did not count"


def test_death_of_the_server_explains_failures_that_were_too_few_for_an_ejection(observed: Observed) -> None:
    observed.fail(IN_A_ROW - 1)
    observed.detector.explain(observed.now)
    observed.fail(IN_A_ROW - 1)
    assert not observed.detector.restrains


def test_answer_that_began_on_trial_does_not_hold_up_the_next_trial(observed: Observed) -> None:
    """Its first token readmits a server that hung, and its stream may go on for minutes."""
    observed.on_trial(HANG).detector.begin_answer()
    observed.fail(RELAPSES)
    observed.now = observed.detector.until
    assert observed.detector.accepts()


def test_explained_ejection_does_not_lengthen_the_next_one(observed: Observed) -> None:
    observed.on_trial().succeed(is_trial=True)
    observed.fail(RELAPSES)
    assert observed.seconds == 2 * BASE_SECONDS
    observed.detector.explain(observed.now)
    observed.fail(RELAPSES)
    assert observed.seconds == 2 * BASE_SECONDS


def test_death_of_the_server_does_not_explain_an_earlier_ejection(observed: Observed) -> None:
    observed.ejected().detector.explain(observed.now + 0.1)
    assert observed.detector.word == "ejected"


# The last resort


def test_last_resort_that_fails_gets_all_requests(observed: Observed) -> None:
    observed.ejected().is_last_resort = True
    detector = observed.detector
    assert (detector.accepts(), detector.allows(), detector.gets_requests) == (False, True, False)
    assert not detector.begin_trial()
    assert (detector.allows(), detector.gets_requests) == (True, True)
    observed.now += RECENT_SECONDS - 0.1
    assert (detector.word, detector.gets_requests) == ("ejected", True)
    observed.is_last_resort = False
    assert not detector.allows()


def test_last_resort_that_hangs_gets_one_request_at_a_time_from_the_start(observed: Observed) -> None:
    detector = observed.ejected(HANG).detector
    assert not detector.allows()
    observed.is_last_resort = True
    assert (detector.allows(), detector.begin_trial(), detector.allows()) == (True, True, False)
    detector.end_trial(observed.now)
    assert detector.allows()


# The usual time to the first token


def test_usual_time_is_the_longest_of_requests_that_were_at_least_as_large(observed: Observed) -> None:
    detector = observed.detector
    for number in range(ENOUGH_SAMPLES):
        assert detector.usual_seconds(100) is None
        detector.succeed(A, 100 + number, 0.1 * (ENOUGH_SAMPLES - number), False)
    assert detector.usual_seconds(100) == pytest.approx(0.1 * ENOUGH_SAMPLES)
    assert detector.usual_seconds(101) is None, "there are too few"
    detector.succeed(A, 101, None, False)
    assert detector.usual_seconds(101) is None, "it was not streamed"


def test_time_of_the_last_success_is_known(observed: Observed) -> None:
    assert observed.detector.last_success < 0
    assert not observed.detector.is_used
    observed.succeed(claim=A)
    observed.now += 1
    observed.succeed(claim=B)
    observed.now += 1
    observed.succeed(claim=A)
    assert (observed.detector.last_success, observed.detector.is_used) == (observed.now, True)
    observed.now += KNOWN_SECONDS + 1
    assert not observed.detector.is_used


def test_representation_shows_the_state(observed: Observed) -> None:
    observed.fail(2)
    assert repr(observed.detector) == "<OutlierDetector m text in, 2 failed, 0 ejections>"


class DetectorMachine(RuleBasedStateMachine):
    """Requests of three parties begin and end, and time passes, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.observed = Observed()
        self.in_flight: list[tuple[float, Claim, bool]] = []

    @rule(claim=st.sampled_from([A, B, C]), count=st.integers(1, 8), is_last_resort=st.booleans())
    def arrive(self, claim: Claim, count: int, is_last_resort: bool) -> None:
        detector = self.observed.detector
        self.observed.is_last_resort = is_last_resort
        for _ in range(count):
            if not detector.restrains or detector.allows():
                is_trial = detector.restrains and detector.begin_trial()
                assert not detector.restrains or is_trial or (is_last_resort and not detector.is_hung)
                self.in_flight.append((self.observed.now, claim, is_trial))

    @rule(data=st.data(), outcome=st.sampled_from(["succeeded", "failed", "hung", "left", "first token"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        if not self.in_flight:
            return
        sent, claim, is_trial = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
        detector = self.observed.detector
        if outcome == "succeeded":
            detector.succeed(claim, 100, 0.1, is_trial)
        elif outcome == "first token":
            detector.begin_answer()
        elif outcome != "left":
            detector.fail(HANG if outcome == "hung" else "reset", sent, claim, is_trial)
        if is_trial:
            detector.end_trial(sent)

    @rule(since=st.sampled_from([0.0, 5.0, 60.0]))
    def die(self, since: float) -> None:
        self.observed.detector.explain(self.observed.now - since)

    @rule(seconds=st.sampled_from([0.1, 3.0, 11.0, 70.0, 700.0]))
    def wait(self, seconds: float) -> None:
        self.observed.now += seconds

    @invariant()
    def an_ejection_ends_and_is_bounded(self) -> None:
        detector = self.observed.detector
        if detector.restrains:
            assert BASE_SECONDS <= self.observed.seconds <= MAX_SECONDS
            assert detector.until <= self.observed.now + MAX_SECONDS
        assert detector.restrains or detector.accepts()
        assert not detector.accepts() or detector.allows()

    @invariant()
    def a_success_on_trial_readmits(self) -> None:
        """Every state has a way out."""
        copy, detector = Observed(), self.observed.detector
        for slot in OutlierDetector.__slots__:
            if slot not in ("_clock", "_on_change", "_is_last_resort"):
                value = getattr(detector, slot)
                setattr(copy.detector, slot, value.copy() if hasattr(value, "copy") else value)
        copy.detector.restrains = detector.restrains
        copy.now = self.observed.now + MAX_SECONDS
        copy.detector.end_trial(copy.now)
        if copy.detector.restrains:
            assert copy.detector.allows()
            assert copy.detector.begin_trial()
            copy.succeed(is_trial=True)
        assert (copy.detector.restrains, copy.detector.accepts()) == (False, True)


TestDetector = DetectorMachine.TestCase


# At the seams with the circuit breaker


def test_requests_that_fail_late_through_a_death_do_not_eject_the_restarted_server(observed: Observed) -> None:
    """Answers that a vanished host has lost are ended after it has come back."""
    sent = observed.now
    observed.now += 30
    observed.detector.explain(observed.now)
    observed.now += 10
    for _ in range(2 * IN_A_ROW):
        observed.detector.fail("unresponsive", sent, A, is_trial=False)
    assert not observed.changes
    observed.fail(IN_A_ROW)
    assert observed.changes == ["ejected"]


def test_request_on_trial_that_outlives_its_ejection_does_not_speak_for_the_next_one(observed: Observed) -> None:
    """Its first token readmits a server that hung, and the rest of its answer takes long."""
    detector = observed.on_trial(HANG).detector
    first = observed.now
    detector.begin_answer()
    assert detector.word == "in"
    observed.now += 1
    observed.fail(RELAPSES)
    observed.now = detector.until
    assert detector.begin_trial()
    ends = detector.until
    detector.fail("reset", first, A, is_trial=True)
    detector.end_trial(first)
    assert (detector.until, detector.accepts()) == (ends, False)
    detector.end_trial(observed.now)
    assert detector.accepts()


def test_ejection_that_a_death_explains_leaves_no_request_on_trial(observed: Observed) -> None:
    detector = observed.on_trial().detector
    detector.explain(observed.now - 1000)
    assert detector.word == "in"
    observed.fail(IN_A_ROW)
    observed.now = detector.until
    assert detector.accepts()
