"""The context of the relays follows the settings."""

import asyncio
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.body_memory import BodyMemory
from gateway.relay.context import RelayContext
from gateway.relay.destinations import Destinations
from gateway.relay.in_flight import InFlight
from gateway.telemetry.metrics import Metrics

DOCUMENT: dict[str, Any] = {
    "backends": {"ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"}},
    "tiers": {"standard": {"models": {"ollama": "small"}}},
}


@pytest.fixture
async def context() -> RelayContext:
    settings, metrics = config.build(DOCUMENT), Metrics(CollectorRegistry(), "0")
    loop = asyncio.get_running_loop()
    return RelayContext(
        settings,
        destinations=Destinations(settings, {}, metrics),
        in_flight=InFlight(loop, loop.time),
        metrics=metrics,
        requeue_target=lambda relay: None,
        on_exchange=lambda exchange: None,
        body_memory=BodyMemory(0),
        gateway_id=b"id",
    )


async def test_changed_settings_count_from_the_next_request_on(context: RelayContext) -> None:
    changes = {"commit_after": 3, "heartbeat": 4, "max_text_body": 5000, "waiting_note": True}
    settings = config.build(DOCUMENT | changes)
    assert {name: getattr(context, name) for name in changes}.items().isdisjoint(changes.items())
    context.change(settings)
    assert {name: getattr(context, name) for name in changes} == changes
    assert context.settings is settings
