"""Queues: their service times, and where their requests could run."""

import pytest

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import SERVICE_SAMPLES
from gateway.errors import GatewayError, QueueTimeout
from tests.fakes.admission import Request, Server, serve_one, setup


def test_only_a_whole_answer_counts_as_a_service_time() -> None:
    backend = setup(Server("m"))
    queue = backend.admission.queue("m", "text")
    for seconds, is_served in ((1.0, False), (2.0, True), (4.0, False)):
        request = backend.arrive()
        backend.clock.now += seconds
        request.is_served = is_served
        backend.leave(request)
    left = backend.arrive(), backend.arrive()
    backend.leave(left[1])  # it was queued
    assert list(queue.service_times) == [2.0]


def test_service_time_of_another_model_in_the_lane_counts_until_there_is_an_own_one() -> None:
    backend = setup(Server("m", "n"), slots=1)
    queue = backend.admission.queue("m", "text")
    serve_one(backend, 10.0, "n")
    assert queue.service_seconds() == 10.0
    serve_one(backend, 2.0)
    assert queue.service_seconds() == 2.0


def test_service_time_is_that_of_the_latest_requests() -> None:
    backend = setup(Server("m"))
    queue = backend.admission.queue("m", "text")
    for _ in range(SERVICE_SAMPLES):
        serve_one(backend, 100.0)
    for _ in range(SERVICE_SAMPLES // 2 + 1):
        serve_one(backend, 1.0)
    assert queue.service_seconds() == 1.0
    assert len(queue.service_times) == SERVICE_SAMPLES


def test_error_for_a_queue_reaches_its_batch_requests_too(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[tuple[Request, GatewayError]] = []
    monkeypatch.setattr(Request, "refuse", lambda request, error: refused.append((request, error)))
    backend = setup(Server("m"))
    backend.arrive()
    waiting = [backend.arrive(claim=Claim(is_batch=is_batch)) for is_batch in (True, False, True)]
    backend.admission.queue("m", "text").refuse(lambda: QueueTimeout("over"))
    assert {id(request) for request, _ in refused} == {id(request) for request in waiting}
    assert len({id(error) for _, error in refused}) == 3, "each gets an error of its own"


@pytest.mark.parametrize(
    ("reason", "has_slot"),
    [("", True), ("down", False), ("without the model", False), ("loaded", False), ("busy", False)],
)
def test_request_may_wait_for_a_model_only_where_a_server_could_load_it(reason: str, has_slot: bool) -> None:
    """Such requests do not count against `max_queue`."""
    server = Server("m", "n")
    backend = setup(server, Server("o"), slots=2)
    backend.enable_loading()
    queue = backend.admission.queue("m", "text")
    assert server.residency is not None
    server.residency.update(["m", "n"] if reason == "loaded" else ["n"])
    if reason == "down":
        server.up = False
    elif reason == "without the model":
        server.available_models.clear()
    elif reason == "busy":
        backend.arrive("n"), backend.arrive("n")
    assert queue.has_slot_but_no_model() is has_slot


@pytest.mark.parametrize(
    ("reason", "may_try"), [("", True), ("down", False), ("without the model", False), ("failed too", False)]
)
def test_load_may_be_tried_elsewhere_only_where_it_could_succeed(reason: str, may_try: bool) -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, two)
    backend.enable_loading()
    queue = backend.admission.queue("m", "text")
    assert one.residency is not None
    assert two.residency is not None
    if reason == "down":
        two.up = False
    elif reason == "without the model":
        two.available_models.clear()
    two.residency.states["m"].has_failed = reason == "failed too"
    assert queue.may_try_elsewhere(one.residency.states["m"]) is may_try
