"""Restraints of a backend's servers: what open circuits, ejections and pauses lead to, and when they end."""

import logging
import time
from contextlib import ExitStack

import pytest

from gateway.admission.fair_queue import Claim
from gateway.chat.prompt_blocks import PromptBlocks
from gateway.upstream import outlier_detection
from gateway.upstream.backend import Backend
from gateway.upstream.outlier_detection import IN_A_ROW
from tests.upstream.offline_backend import MODEL, backend, eject, open_circuit, ticket


def test_suspicion_requests_a_probe_at_once() -> None:
    here = backend(servers=1)
    here.servers[0].circuit.mark_suspect("reset")
    assert here.servers[0].doubted.is_set()


def test_open_circuit_is_reported_and_the_server_is_no_longer_up() -> None:
    down: list[Backend] = []
    settings = backend(servers=1).settings
    here = Backend(settings, on_down=down.append)
    here.servers[0].circuit.mark_suspect("reset")
    assert down == []
    here.servers[0].circuit.probe_missed()
    assert (down, here.servers[0].up) == ([here], False)


def test_changes_of_a_circuit_are_logged_after_the_first_probe(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.upstream.restraints")
    here = backend()
    server = here.servers[1]
    server.circuit.mark_suspect("reset")
    assert caplog.messages == []
    server.up = True
    server.circuit.probe_missed()
    server.circuit.probe_answered()
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "backend here#2: circuit open, was suspect (probe)"),
        ("INFO", "backend here#2: circuit half_open, was open (probe)"),
    ]


async def test_server_that_fails_fast_is_paused_after_a_probe_cleared_it_if_another_is_up() -> None:
    alone, pair = backend(servers=1), backend()
    for here in (alone, pair):
        circuit = here.servers[0].circuit
        for _ in range(IN_A_ROW):
            circuit.fail("reset", time.monotonic())
        circuit.probe_answered()
        assert circuit.state == "closed"
    assert not alone.servers[0].circuit.is_paused
    assert pair.servers[0].circuit.is_paused
    pair.close()


def test_server_whose_circuit_opens_counts_as_cold() -> None:
    here = backend()
    prompt = PromptBlocks([1], [100], 0, 0, is_continued=False)
    for server in here.servers:
        server.prefixes.add(prompt)
    open_circuit(here)
    assert [server.prefixes.known_blocks(prompt) for server in here.servers] == [0, 1]


async def test_requests_go_to_the_servers_that_are_not_ejected() -> None:
    here = backend()
    detector = eject(here)
    with ExitStack() as stack:
        found = [stack.enter_context(ticket(here)).server for _ in range(3)]
        assert found == [here.servers[1]] * 3
        availability = here.availability
        assert (availability.accepts_none(MODEL, "text"), availability.refuses_all(MODEL, "text")) == (False, False)
        assert (availability.is_down(MODEL), here.is_restrained) == (False, True)
        detector.until = time.monotonic()
        on_trial = stack.enter_context(ticket(here))
        assert (on_trial.server, on_trial.is_trial) == (here.servers[0], True)
        assert stack.enter_context(ticket(here)).server is here.servers[1]
    assert detector.accepts(), "the trial has ended without a result"
    here.close()


async def test_queued_request_gets_the_trial_when_an_ejection_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlier_detection, "BASE_SECONDS", 0.05)
    here = backend(max_concurrency=1)
    eject(here)
    with ticket(here) as running, ticket(here) as waiting:
        assert (running.server, waiting.is_queued) == (here.servers[1], True)
        await waiting.wait()
        assert (waiting.server, waiting.is_trial) == (here.servers[0], True)
    here.close()


async def test_ejections_are_logged_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.upstream.restraints")
    down: list[Backend] = []
    here = Backend(backend().settings, on_down=down.append)
    detector = eject(here)
    detector.until = time.monotonic()
    detector.succeed(Claim(), 1, 0.1, True)
    assert down == [here]
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("WARNING", "backend here#1: ejected for 'llama' (text), 10 s (status_5xx)"),
        ("INFO", "backend here#1: readmitted for 'llama' (text), a request succeeded"),
    ]
    here.close()


async def test_request_waits_for_the_end_of_a_pause() -> None:
    here = backend(servers=1)
    here.restraints.pause(here.servers[0], 0.02)
    assert here.is_restrained
    assert (here.availability.accepts_none(MODEL, "text"), here.availability.is_down(MODEL)) == (True, False)
    with ticket(here) as waiting:
        assert waiting.is_queued
        await waiting.wait()
        assert waiting.server is here.servers[0]
    assert not here.is_restrained


async def test_closed_backend_cancels_the_ends_of_its_pauses() -> None:
    here = backend(servers=1)
    here.restraints.pause(here.servers[0], 60)
    (timer,) = here.restraints._timers
    here.close()
    assert timer.cancelled()
