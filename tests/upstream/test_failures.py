"""What a failed attempt means for where a request goes next: decided without a socket."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from gateway.errors import InvalidRequest, SchemaTooComplex, UpstreamError
from gateway.relay.failover import Failover
from gateway.telemetry.exchange import Meter
from gateway.upstream.failures import record_failure
from gateway.upstream.retry_budget import RetryBudget


def after_a_refused_connection(budget: RetryBudget, *, met_stale: bool) -> tuple[Failover, Meter, Any]:
    """A request that had waited in line, whose only server takes no connection any more; and the server's circuit."""
    backend: Any = SimpleNamespace(name="vllm", budget=budget)
    destination: Any = SimpleNamespace(backend=backend, route=SimpleNamespace(model="m"), fallback=None)
    ticket: Any = SimpleNamespace(has_waited=True, reassign=lambda: False)
    server: Any = SimpleNamespace(circuit=MagicMock())
    meter = Meter(lambda: 100.0)
    meter.start_attempt()
    if met_stale:
        meter.attempts, meter.met_stale = 2, True
    detour = Failover(MagicMock(), destination)
    assert not detour.retry_elsewhere(ticket, server, UpstreamError("connect"), meter, sent=100.0, answered=False)
    return detour, meter, server.circuit


def use_up(budget: RetryBudget) -> int:
    """How many more were allowed."""
    left = 0
    while budget.has_room(100.0):
        budget.spend(100.0)
        left += 1
    return left


def spent() -> RetryBudget:
    budget = RetryBudget()
    use_up(budget)
    return budget


@pytest.mark.parametrize("met_stale", [False, True])
def test_kept_connection_that_was_stale_and_the_fresh_one_that_was_refused_are_one_attempt(met_stale: bool) -> None:
    detour, meter, circuit = after_a_refused_connection(RetryBudget(), met_stale=met_stale)
    assert meter.attempts == 1
    assert detour.destination_after(UpstreamError("connect"), meter) is detour.destination, "it waits again"
    circuit.mark_suspect.assert_called_once_with("connect")


def test_request_that_no_server_has_seen_waits_again_without_a_budget() -> None:
    detour, meter, _ = after_a_refused_connection(spent(), met_stale=False)
    assert detour.destination_after(UpstreamError("connect"), meter) is detour.destination


def test_request_that_a_server_may_have_begun_waits_again_only_within_the_budget() -> None:
    detour, meter, circuit = after_a_refused_connection(spent(), met_stale=True)
    with pytest.raises(UpstreamError):
        detour.destination_after(UpstreamError("connect"), meter)
    circuit.mark_suspect.assert_not_called()


def test_second_attempt_of_one_that_a_server_may_have_begun_is_counted_in_the_budget() -> None:
    budget, free = RetryBudget(), RetryBudget()
    after_a_refused_connection(budget, met_stale=True)
    after_a_refused_connection(free, met_stale=False)
    assert use_up(budget) == use_up(free) - 1


@pytest.mark.parametrize(
    ("error", "successes"), [(InvalidRequest("The backend refused it."), 1), (SchemaTooComplex("tools"), 0)]
)
def test_refusal_clears_a_troubled_server_only_if_the_server_has_spoken(error: InvalidRequest, successes: int) -> None:
    server: Any = SimpleNamespace(circuit=MagicMock(is_troubled=True))
    assert record_failure(MagicMock(), "m", server, error, 0.0) is None
    assert server.circuit.succeed.call_count == successes
