"""Stalls: how long a wait for first tokens may be, given what is usual at the server."""

from typing import Any

import pytest

from gateway.admission.fair_queue import Claim
from gateway.relay.stalls import FACTOR, LEAST_SECONDS, LEAST_SHARE, WITNESSES, Attempt, eject_stalled
from gateway.upstream.outlier_detection import ENOUGH_SAMPLES, IN_A_ROW, STALL, OutlierDetector

NOW = 10_000.0
TIMEOUT = 120.0
LONG = LEAST_SECONDS + 1


class FakeServer:
    def __init__(self, *detectors: OutlierDetector) -> None:
        self.detectors = dict(enumerate(detectors))


class Place:
    """A server whose last `ENOUGH_SAMPLES` answers, to requests of 100 bytes, took `usual` seconds."""

    def __init__(self, usual: float = 0.1, answers: int = ENOUGH_SAMPLES) -> None:
        self.now = NOW - 1000
        self.detector = OutlierDetector("m", "text", lambda: self.now)
        self.other = OutlierDetector("m", "vision", lambda: self.now)
        self.server: Any = FakeServer(self.detector, self.other)
        for _ in range(answers):
            self.detector.succeed(Claim("before"), 100, usual, False)

    def attempts(self, count: int = WITNESSES, waited: float = LONG, **changes: Any) -> list[Attempt]:
        attempt = Attempt(
            server=self.server,
            detector=self.detector,
            is_streamed=True,
            is_waiting=True,
            is_trial=False,
            since=NOW - waited,
            size=100,
            first_token_timeout=TIMEOUT,
            claim=Claim("a"),
            has_alternative=changes.pop("other", lambda: True),
        )
        return [attempt._replace(**changes)] * count

    def is_ejected_by(self, *attempts: Attempt) -> bool:
        eject_stalled(attempts, NOW)
        return self.detector.restrains


@pytest.fixture
def place() -> Place:
    return Place()


def test_requests_that_wait_far_longer_than_usual_eject_a_server(place: Place) -> None:
    assert place.is_ejected_by(*place.attempts())
    assert place.detector.reason == STALL


def test_too_few_requests_are_no_evidence(place: Place) -> None:
    assert not place.is_ejected_by(*place.attempts(WITNESSES - 1))


@pytest.mark.parametrize(("waited", "is_ejected"), [(LEAST_SECONDS - 0.1, False), (LEAST_SECONDS + 0.1, True)])
def test_wait_has_to_be_long(place: Place, waited: float, is_ejected: bool) -> None:
    assert place.is_ejected_by(*place.attempts(waited=waited)) is is_ejected


@pytest.mark.parametrize(("waited", "is_ejected"), [(4 * FACTOR - 0.1, False), (4 * FACTOR + 0.1, True)])
def test_wait_has_to_be_many_times_as_long_as_usual(waited: float, is_ejected: bool) -> None:
    place = Place(usual=4.0)
    assert place.is_ejected_by(*place.attempts(waited=waited)) is is_ejected


def test_short_first_token_timeout_shortens_the_wait(place: Place) -> None:
    waited = LEAST_SHARE * 8 + 0.1
    assert not place.is_ejected_by(*place.attempts(waited=waited))
    assert place.is_ejected_by(*place.attempts(waited=waited, first_token_timeout=8.0))


def test_server_that_has_answered_too_few_requests_is_not_judged() -> None:
    place = Place(answers=ENOUGH_SAMPLES - 1)
    assert not place.is_ejected_by(*place.attempts())


def test_prompt_that_is_longer_than_those_before_is_no_evidence(place: Place) -> None:
    assert not place.is_ejected_by(*place.attempts(size=101))


def test_piece_of_another_answer_shows_that_the_server_works(place: Place) -> None:
    (streaming,) = place.attempts(1, is_waiting=False, waited=LEAST_SECONDS / 2)
    assert not place.is_ejected_by(*place.attempts(), streaming)
    (silent,) = place.attempts(1, is_waiting=False, waited=LONG)
    assert place.is_ejected_by(*place.attempts(), silent)


def test_success_in_another_lane_shows_that_the_server_works(place: Place) -> None:
    place.now = NOW - LEAST_SECONDS / 2
    place.other.succeed(Claim("b"), 100, 0.1, False)
    assert not place.is_ejected_by(*place.attempts())


def test_answers_that_are_not_streamed_are_no_evidence_and_may_hide_that_the_server_works(place: Place) -> None:
    assert not place.is_ejected_by(*place.attempts(is_streamed=False))
    assert not place.is_ejected_by(*place.attempts(), *place.attempts(WITNESSES + 1, is_streamed=False))
    assert place.is_ejected_by(*place.attempts(), *place.attempts(WITNESSES, is_streamed=False))


def test_server_without_an_alternative_is_left_to_its_timeouts(place: Place) -> None:
    assert not place.is_ejected_by(*place.attempts(other=lambda: False))


@pytest.mark.parametrize("is_trial", [True, False])
def test_request_on_trial_alone_shows_that_a_server_still_hangs(place: Place, is_trial: bool) -> None:
    assert place.is_ejected_by(*place.attempts())
    place.now = NOW
    place.detector.until = NOW
    eject_stalled(place.attempts(1, is_trial=is_trial), NOW)
    assert (place.detector.word, place.detector.until > NOW) == (("ejected", True) if is_trial else ("trial", False))


def test_request_on_trial_of_a_server_that_fails_is_no_witness(place: Place) -> None:
    for _ in range(IN_A_ROW):
        place.detector.fail("status_5xx", place.now, Claim("a"), is_trial=False)
    place.detector.until = NOW
    eject_stalled(place.attempts(1, is_trial=True), NOW)
    assert place.detector.until == NOW


def test_servers_are_judged_one_by_one(place: Place) -> None:
    other = Place()
    eject_stalled([*place.attempts(), *other.attempts(WITNESSES - 1)], NOW)
    assert (place.detector.restrains, other.detector.restrains) == (True, False)
