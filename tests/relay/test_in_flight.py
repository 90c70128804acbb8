"""The registry of relays in flight, its deadline checks and its counts."""

import asyncio
import logging
import time
from collections.abc import Callable
from math import inf

import pytest

from gateway.errors import GatewayError
from gateway.relay.in_flight import CHECK_SECONDS, InFlight, Requeueable
from gateway.relay.route import Route
from gateway.relay.stalls import Attempt
from gateway.upstream.backend import Backend
from tests.fakes.running_gateway import until

ROUTE = Route("standard", "ollama", "llama")


class FakeRelay:
    """A relay whose check sets `check_at` to `then`, or raises it if it is an exception."""

    generation = 0
    arrived = 0.0
    route = ROUTE
    is_stranded = False

    def __init__(self, check_at: float = 0.0, then: float | Exception = inf, **facts: object) -> None:
        self.check_at = check_at
        self.then = then
        self.checks: list[float] = []
        vars(self).update(facts)

    def check_deadlines(self, now: float) -> None:
        self.checks.append(now)
        if isinstance(self.then, Exception):
            raise self.then
        self.check_at = self.then

    def cut_off(self, error: GatewayError) -> None: ...
    def leave_queue(self, backend: Backend) -> None: ...
    def leave_hung_server(self) -> None: ...
    def attempt(self) -> Attempt | None: ...
    def as_requeueable(self) -> Requeueable | None: ...


Add = Callable[..., FakeRelay]


@pytest.fixture
async def in_flight() -> InFlight:
    return InFlight(asyncio.get_running_loop(), time.monotonic)


@pytest.fixture
def add(in_flight: InFlight) -> Add:
    def add(*arguments: object, **facts: object) -> FakeRelay:
        relay = FakeRelay(*arguments, **facts)  # type: ignore[arg-type]
        in_flight.add(relay)
        return relay

    return add


async def test_relay_is_checked_when_it_asks_for_it(add: Add) -> None:
    now = time.monotonic()
    once, always, later = add(), add(then=0.0), add(check_at=now + 3600)
    await until(lambda: len(always.checks) >= 3)
    assert (len(once.checks), later.checks) == (1, [])
    assert always.checks == sorted(always.checks)


async def test_relay_that_asks_for_an_earlier_check_gets_it_at_the_next_interval(add: Add) -> None:
    """A new phase sets `check_at` back, since its deadline may be nearer."""
    relay = add()
    await until(lambda: len(relay.checks) == 1)
    relay.check_at = 0.0
    await until(lambda: len(relay.checks) >= 2, patience=CHECK_SECONDS * 20)
    assert len(relay.checks) == 2


async def test_timer_runs_only_while_relays_are_in_flight(in_flight: InFlight, add: Add) -> None:
    assert in_flight._timer is None
    relay = add()
    assert in_flight._timer is not None
    in_flight.discard(relay)
    await until(lambda: in_flight._timer is None)
    again = add()
    await until(lambda: len(again.checks) == 1)


async def test_failing_check_of_one_relay_does_not_stop_the_checks_of_others(
    add: Add, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = add(then=ValueError("it broke")), add(then=0.0)
    await until(lambda: len(good.checks) >= 3)
    assert len(bad.checks) == 1
    assert [record.levelno for record in caplog.records] == [logging.ERROR]


async def test_discarding_a_relay_twice_is_harmless(in_flight: InFlight, add: Add) -> None:
    relay = add()
    assert list(in_flight) == [relay]
    in_flight.discard(relay)
    in_flight.discard(relay)
    assert len(in_flight) == 0


async def test_oldest_generation_is_the_default_without_relays(in_flight: InFlight, add: Add) -> None:
    assert in_flight.oldest_generation(7) == 7
    add(generation=5)
    add(generation=3)
    assert in_flight.oldest_generation(7) == 3


async def test_pending_counts_recent_requests_of_a_tier_on_a_backend_unless_stranded(
    in_flight: InFlight, add: Add
) -> None:
    add(arrived=10.0)
    add(arrived=11.0)
    add(arrived=9.0)
    add(arrived=12.0, is_stranded=True)
    add(arrived=12.0, route=Route("pro", "ollama", "llama"))
    add(arrived=12.0, route=Route("standard", "vllm", "llama"))
    assert in_flight.count_pending("standard", "ollama", 10.0) == 2
