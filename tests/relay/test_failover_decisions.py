"""Decisions about where a request goes after a failed attempt, tested without sockets.

Covers: gateway/relay/failover.py
"""

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from gateway.errors import UpstreamError
from gateway.relay.failover import Failover
from gateway.telemetry.exchange import Meter
from gateway.upstream.retry_budget import RetryBudget


def after_a_refused_connection(budget: RetryBudget, *, met_stale: bool) -> tuple[Failover, Meter, Any]:
    """Return the failover of a request that was queued and whose only server refuses connections.

    Also return its meter and the circuit breaker of the server.
    """
    backend: Any = SimpleNamespace(name="vllm", budget=budget)
    destination: Any = SimpleNamespace(backend=backend, route=SimpleNamespace(model="m"), fallback=None)
    ticket: Any = SimpleNamespace(has_waited=True, reassign=lambda: False, placement=None)
    server: Any = SimpleNamespace(circuit=MagicMock(is_open=False), is_leaving=False, doubt_name=lambda: None)
    meter = Meter(lambda: 100.0)
    meter.start_attempt()
    if met_stale:
        meter.attempts, meter.met_stale = 2, True
    failover = Failover(MagicMock(), destination, "text")
    assert not failover.retry_elsewhere(ticket, server, UpstreamError("connect"), meter, sent=100.0, answered=False)
    return failover, meter, server.circuit


def use_up(budget: RetryBudget) -> int:
    """Spend the rest of `budget` and return how many retries it allowed."""
    count = 0
    while budget.has_room(100.0):
        budget.spend(100.0)
        count += 1
    return count


def spent_budget() -> RetryBudget:
    budget = RetryBudget()
    use_up(budget)
    return budget


@pytest.mark.parametrize("met_stale", [False, True], ids=["refused", "stale, then refused"])
def test_stale_connection_and_the_refused_fresh_one_count_as_one_attempt(met_stale: bool) -> None:
    failover, meter, circuit = after_a_refused_connection(RetryBudget(), met_stale=met_stale)
    assert meter.attempts == 1
    assert failover.destination_after(UpstreamError("connect"), meter) is failover.destination, "it is queued again"
    circuit.mark_suspect.assert_called_once_with("connect")


def test_request_that_no_server_has_received_is_requeued_without_a_retry_budget() -> None:
    failover, meter, _ = after_a_refused_connection(spent_budget(), met_stale=False)
    assert failover.destination_after(UpstreamError("connect"), meter) is failover.destination


def test_request_that_a_server_may_have_started_is_requeued_only_within_the_retry_budget() -> None:
    failover, meter, circuit = after_a_refused_connection(spent_budget(), met_stale=True)
    with pytest.raises(UpstreamError):
        failover.destination_after(UpstreamError("connect"), meter)
    circuit.mark_suspect.assert_not_called()


def test_second_attempt_at_a_request_that_a_server_may_have_started_spends_retry_budget() -> None:
    budget, free = RetryBudget(), RetryBudget()
    after_a_refused_connection(budget, met_stale=True)
    after_a_refused_connection(free, met_stale=False)
    assert use_up(budget) == use_up(free) - 1
