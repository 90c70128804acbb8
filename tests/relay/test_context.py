"""The context of the relays follows the settings, and has one worker thread."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destinations
from gateway.relay.in_flight import InFlight
from gateway.telemetry.metrics import Metrics

DOCUMENT: dict[str, Any] = {
    "backends": {"ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"}},
    "tiers": {"standard": {"models": {"ollama": "small"}}},
}


@pytest.fixture
async def context() -> AsyncIterator[RelayContext]:
    settings, metrics = config.build(DOCUMENT), Metrics(CollectorRegistry(), "0")
    loop = asyncio.get_running_loop()
    context = RelayContext(
        settings,
        destinations=Destinations(settings, {}, metrics),
        in_flight=InFlight(loop, loop.time),
        metrics=metrics,
        requeue_target=lambda relay: None,
        on_exchange=lambda exchange: None,
        gateway_id=b"id",
    )
    yield context
    context.close()


async def test_changed_settings_count_from_the_next_request_on(context: RelayContext) -> None:
    changes = {"commit_after": 3, "heartbeat": 4, "max_text_body": 5000, "waiting_note": True}
    settings = config.build(DOCUMENT | changes)
    assert {name: getattr(context, name) for name in changes}.items().isdisjoint(changes.items())
    context.change(settings)
    assert {name: getattr(context, name) for name in changes} == changes
    assert context.settings is settings


async def test_work_runs_in_one_thread_beside_the_event_loop(context: RelayContext) -> None:
    def work(number: int) -> tuple[int, int]:
        return number, threading.get_ident()

    results = await asyncio.gather(*(context.in_thread(work, number) for number in range(4)))
    assert [number for number, _ in results] == [0, 1, 2, 3]
    assert len({thread for _, thread in results} | {threading.get_ident()}) == 2


async def test_error_of_the_work_is_raised_where_it_is_awaited(context: RelayContext) -> None:
    with pytest.raises(ZeroDivisionError):
        await context.in_thread(lambda: 1 // 0)


async def test_closed_context_takes_no_work(context: RelayContext) -> None:
    context.close()
    with pytest.raises(RuntimeError):
        context.in_thread(int)
