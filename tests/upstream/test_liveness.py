"""Liveness: tells a server that has vanished from one that is busy or restarts."""

import pytest

from gateway.upstream.liveness import FAILED_PROBES, GONE_SECONDS, OUTAGE_SECONDS, RETURN_SECONDS, Liveness


def failed(liveness: Liveness, probes: int = FAILED_PROBES, began: float = 0.0) -> Liveness:
    for _ in range(probes):
        liveness.probe_failed(began)
    return liveness


def test_server_is_gone_after_silence_and_failed_probes_together() -> None:
    liveness = failed(Liveness(0.0))
    assert not liveness.is_gone(GONE_SECONDS - 0.1)
    assert liveness.is_gone(GONE_SECONDS)
    assert not Liveness(0.0).is_gone(1000)  # nobody has asked
    assert not failed(Liveness(0.0), FAILED_PROBES - 1).is_gone(1000)


def test_silence_before_the_first_failed_probe_does_not_count() -> None:
    """A request may be silent for minutes while its server works on it."""
    liveness = failed(Liveness(0.0), began=60.0)
    assert not liveness.is_gone(60.0 + GONE_SECONDS - 0.1)
    assert liveness.is_gone(60.0 + GONE_SECONDS)


def test_sign_of_life_starts_the_silence_anew() -> None:
    liveness = failed(Liveness(0.0))
    liveness.show_life(15.0)
    assert not liveness.is_gone(34.9)
    assert liveness.is_gone(35.0)


def test_answered_probe_needs_as_many_failed_ones_again() -> None:
    liveness = failed(Liveness(0.0))
    liveness.probe_answered(30.0)
    assert not liveness.has_failed
    failed(liveness, FAILED_PROBES - 1, began=40.0)
    assert not liveness.is_gone(100.0)
    failed(liveness, 1, began=45.0)
    assert not liveness.is_gone(40.0 + GONE_SECONDS - 0.1)
    assert liveness.is_gone(40.0 + GONE_SECONDS)


def test_outage_is_reported_once_and_late_enough() -> None:
    liveness = failed(Liveness(0.0))
    liveness.show_life(3.0)
    liveness.probe_answered(15.0)
    assert liveness.take_outage(15.0 + RETURN_SECONDS - 0.1) is None
    assert liveness.take_outage(15.0 + RETURN_SECONDS) == 3.0
    assert liveness.take_outage(15.0 + RETURN_SECONDS) is None


def test_short_outage_is_judged_after_as_much_silence_as_a_vanishing() -> None:
    liveness = failed(Liveness(0.0))
    liveness.probe_answered(OUTAGE_SECONDS)
    assert liveness.take_outage(GONE_SECONDS - 0.1) is None
    assert liveness.take_outage(GONE_SECONDS) == 0.0


@pytest.mark.parametrize(("probes", "silence"), [(FAILED_PROBES - 1, 60.0), (FAILED_PROBES, OUTAGE_SECONDS - 0.1)])
def test_failed_probes_of_a_busy_server_are_not_an_outage(probes: int, silence: float) -> None:
    liveness = failed(Liveness(0.0), probes)
    liveness.show_life(100.0)
    liveness.probe_answered(100.0 + silence)
    assert liveness.take_outage(1000.0) is None
