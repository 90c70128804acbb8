"""Estimates of waits, `Retry-After` and refused deadlines."""

import pytest

from gateway.admission.fair_queue import Claim
from gateway.admission.queues import POSITION_AGE_SECONDS
from gateway.admission.wait_estimates import retry_after, wait_estimate
from gateway.errors import QueueTimeout
from tests.fakes.admission import Server, serve_one, setup


def test_retry_after_is_five_seconds_without_service_times() -> None:
    backend = setup(Server("m"))
    assert retry_after(backend.admission.queue("m", "text"), backend.clock.now) == 5


@pytest.mark.parametrize(
    ("seconds", "slots", "waiting", "least", "most"),
    [(10.0, 2, 0, 4, 6), (10.0, 2, 3, 16, 24), (0.001, 8, 0, 1, 1), (500.0, 1, 5, 60, 60)],
    ids=["empty queue", "three waiting", "at least a second", "at most a minute"],
)
def test_retry_after_follows_the_queue_length_and_the_service_time(
    seconds: float, slots: int, waiting: int, least: int, most: int
) -> None:
    """(waiting + 1) × median service time ÷ slots × 0.8 to 1.2, within 1 to 60."""
    backend = setup(Server("m"), slots=slots)
    for duration in (seconds, seconds, seconds * 50):  # a median, not a mean
        serve_one(backend, duration)
    left = backend.arrive()  # a request that left early does not count as a service time
    backend.clock.now += seconds / 1000
    backend.leave(left)
    for _ in range(slots + waiting):
        backend.arrive()
    assert backend.waiting("text") == waiting
    queue = backend.admission.queue("m", "text")
    assert all(least <= retry_after(queue, backend.clock.now) <= most for _ in range(50))


def test_deadline_that_the_queue_cannot_meet_is_refused_at_once() -> None:
    backend = setup(Server("m"), max_queue=50)
    serve_one(backend, 10.0)
    backend.arrive()
    for _ in range(3):
        backend.arrive()
    with pytest.raises(QueueTimeout, match="within 39 seconds") as caught:
        backend.arrive(claim=Claim(timeout=39))
    assert caught.value.retry_after
    assert backend.arrive(claim=Claim(timeout=41)).is_queued
    with pytest.raises(QueueTimeout):
        backend.arrive(claim=Claim(is_batch=True, timeout=49))
    assert backend.arrive(claim=Claim("another key", timeout=41)).is_queued  # this key's turn comes sooner


def test_request_that_finds_a_slot_is_not_refused_for_its_deadline() -> None:
    """Otherwise an outdated service time would refuse every request for ever."""
    backend = setup(Server("m"))
    serve_one(backend, 100.0)
    assert backend.arrive(claim=Claim(timeout=1)).placement is not None


def test_queued_requests_get_their_position_and_an_estimate() -> None:
    backend = setup(Server("m"), slots=2, max_queue=50)
    running = backend.arrive(), backend.arrive()
    waiting = [backend.arrive(claim=Claim("a")) for _ in range(3)] + [backend.arrive(claim=Claim("b"))]
    assert wait_estimate(waiting[2], backend.clock.now)[:2] == (4, None)
    running[0].is_served = True
    backend.clock.now += 30
    backend.leave(running[0])
    assert [wait_estimate(request, backend.clock.now)[:2] for request in (waiting[3], waiting[1], waiting[2])] == [
        (1, 15.0),
        (2, 30.0),
        (3, 45.0),
    ]


def test_position_of_a_batch_request_counts_the_interactive_requests_that_run_before_it() -> None:
    backend = setup(Server("m"), max_queue=50)
    backend.arrive()
    batch = [backend.arrive(claim=Claim(is_batch=True)) for _ in range(2)]
    for _ in range(12):
        backend.arrive()
    assert [wait_estimate(request, backend.clock.now).position for request in batch] == [10, 14]


def test_positions_are_computed_once_a_second_at_most() -> None:
    backend = setup(Server("m"))
    _, first, second = (backend.arrive() for _ in range(3))
    assert wait_estimate(second, backend.clock.now).position == 2
    backend.leave(first)
    assert wait_estimate(second, backend.clock.now).position == 2
    backend.pass_time(POSITION_AGE_SECONDS + 0.1)
    assert wait_estimate(second, backend.clock.now).position == 1


def test_estimate_counts_the_models_that_share_the_slots() -> None:
    """Two slots for two models: four requests for the other model take turns with this one's two."""
    backend = setup(Server("m", "n"), slots=2, max_queue=50)
    serve_one(backend, 10.0)
    for _ in range(2):
        backend.arrive()
    for _ in range(4):
        backend.arrive("n")
    mine = [backend.arrive() for _ in range(2)]
    assert backend.waiting("text") == 6
    assert wait_estimate(mine[1], backend.clock.now) == (2, 30.0, False)  # 2 of 2 here, 6 of 6 in the lane


def test_estimate_follows_the_model_limit_if_that_is_the_narrower_one() -> None:
    backend = setup(Server("m", "n"), slots=8, model=1, max_queue=50)
    serve_one(backend, 10.0)
    backend.arrive()
    mine = [backend.arrive() for _ in range(3)]
    assert wait_estimate(mine[2], backend.clock.now) == (3, 30.0, False)


def test_estimate_counts_only_the_servers_that_have_the_model() -> None:
    backend = setup(Server("m"), Server("n"), slots=1, max_queue=50)
    serve_one(backend, 10.0)
    backend.arrive()
    mine = [backend.arrive() for _ in range(2)]
    assert wait_estimate(mine[1], backend.clock.now) == (2, 20.0, False)


def test_clients_that_are_refused_at_once_do_not_come_back_at_once() -> None:
    backend = setup(Server("m"))
    serve_one(backend, 30.0)
    queue = backend.admission.queue("m", "text")
    found = {retry_after(queue, backend.clock.now) for _ in range(200)}
    assert 24 <= min(found) < 28
    assert 32 < max(found) <= 36


def test_request_that_joins_a_queue_whose_positions_are_known_gets_its_own() -> None:
    backend = setup(Server("m"))
    _, first = backend.arrive(), backend.arrive()
    assert wait_estimate(first, backend.clock.now).position == 1
    second = backend.arrive()
    assert wait_estimate(second, backend.clock.now).position == 2
