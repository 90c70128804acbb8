"""Availability of a backend: which requests its servers take, and what the others are told."""

import time

import pytest

from gateway.admission.fair_queue import Claim
from gateway.upstream import outlier_detection
from gateway.upstream.availability import GpuTurn
from gateway.upstream.circuit_breaker import LEVELS
from gateway.upstream.outlier_detection import HANG
from tests.upstream.offline_backend import MODEL, backend, eject, open_circuit, ticket


def test_unavailable_backend_asks_clients_to_wait_for_a_probe() -> None:
    assert backend(probe_interval=2.5).availability.error(MODEL, "text").retry_after == 3


def test_backend_is_down_when_the_circuits_of_all_servers_with_the_model_are_open() -> None:
    here = backend()
    availability = here.availability
    open_circuit(here)
    assert (availability.is_up, availability.is_down(MODEL)) == (True, False)
    here.servers[1].mark_missing(MODEL)
    assert availability.is_down(MODEL)
    here.servers[0].mark_missing(MODEL)
    assert not availability.is_down(MODEL), "no server has the model"
    open_circuit(here, 1)
    assert not availability.is_up


def test_suspect_server_counts_as_accepting_because_a_probe_decides_soon() -> None:
    here = backend(servers=1)
    availability = here.availability
    circuit = here.servers[0].circuit
    assert not here.is_restrained
    circuit.mark_suspect("connect")
    found = here.is_restrained, availability.accepts_none(MODEL, "text"), availability.is_down(MODEL)
    assert found == (True, False, False)
    circuit.probe_missed()
    found = here.is_restrained, availability.accepts_none(MODEL, "text"), availability.is_down(MODEL)
    assert found == (True, True, True)
    circuit.probe_answered()
    circuit.probe_answered()
    assert (here.is_restrained, availability.accepts_none(MODEL, "text")) == (False, False)


def test_level_is_that_of_the_best_circuit() -> None:
    here = backend()
    open_circuit(here)
    assert here.availability.circuit_level == LEVELS["closed"]
    here.servers[1].circuit.mark_suspect("connect")
    assert here.availability.circuit_level == LEVELS["suspect"]


async def test_ejection_holds_for_its_model_and_lane_only() -> None:
    here = backend(servers=1)
    availability = here.availability
    eject(here)
    assert availability.accepts_none(MODEL, "text")
    assert not availability.accepts_none(MODEL, "vision")
    assert not availability.accepts_none("another", "text")
    here.close()


@pytest.mark.parametrize(("reason", "is_allowed"), [("status_5xx", True), (HANG, False)])
async def test_last_server_for_a_model_gets_its_requests_unless_it_hangs(reason: str, is_allowed: bool) -> None:
    here = backend()
    availability = here.availability
    eject(here, 0, reason)
    here.servers[1].mark_missing(MODEL)
    assert availability.accepts_none(MODEL, "text"), "for those who have a fallback"
    assert not availability.refuses_all(MODEL, "text")
    with ticket(here) as first, ticket(here) as second:
        assert (first.is_trial, second.is_queued) == (not is_allowed, not is_allowed)
        assert availability.refuses_all(MODEL, "text") is not is_allowed
        assert availability.gives_requests(here.servers[0])
    here.close()


async def test_backend_refuses_all_if_one_server_is_dead_and_the_other_hangs() -> None:
    here = backend()
    availability = here.availability
    open_circuit(here)
    eject(here, 1, HANG)
    assert not availability.refuses_all(MODEL, "text"), "a request may be on trial"
    with ticket(here):
        assert availability.refuses_all(MODEL, "text")
    open_circuit(here, 1)
    assert availability.refuses_all(MODEL, "text")
    here.close()


async def test_level_and_retry_after_follow_an_ejection() -> None:
    here = backend(servers=1, probe_interval=2.5)
    availability = here.availability
    detector = eject(here)
    assert (availability.circuit_level, availability.gives_requests(here.servers[0])) == (2, False)
    assert availability.error(MODEL, "text").retry_after == outlier_detection.BASE_SECONDS
    assert availability.error(MODEL, "vision").retry_after == 3
    detector.until = time.monotonic() + 1000
    assert availability.error(MODEL, "text").retry_after == 60
    detector.until = time.monotonic()
    assert (availability.circuit_level, availability.error(MODEL, "text").retry_after) == (1, 1)
    detector.succeed(Claim(), 1, 0.1, True)
    found = availability.circuit_level, availability.gives_requests(here.servers[0]), here.is_restrained
    assert found == (0, True, False)
    here.close()


async def test_servers_without_an_ejection_are_judged_without_a_look_at_who_uses_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each scrape and status asked that of each server and model: 20 ms for 128 servers with 50 models."""

    def refuse(_: object) -> bool:
        raise AssertionError

    here = backend()
    for number in range(20):
        here.servers[0].gate(f"model-{number}", "text")
    monkeypatch.setattr(outlier_detection.OutlierDetector, "is_used", property(refuse))
    assert (here.availability.circuit_level, here.availability.gives_requests(here.servers[0])) == (0, True)
    here.close()


@pytest.mark.parametrize(("turn", "refuses"), [("leaving", True), ("asleep", True), ("waking", False)])
async def test_engine_without_the_gpu_refuses_requests_unless_it_wakes(turn: GpuTurn, refuses: bool) -> None:
    here = backend()
    here.take_turn(turn)
    availability = here.availability
    assert availability.refuses_new is refuses
    assert (availability.accepts_none(MODEL, "text"), availability.refuses_all(MODEL, "text")) == (refuses, refuses)
    assert availability.is_down(MODEL) is (turn == "asleep")
    assert ("GPU" in availability.error(MODEL, "text").message) is refuses
    here.close()
