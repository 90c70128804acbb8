"""Destinations follow the settings, and what only earlier settings needed is cleaned up in time."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.relay import destinations as destinations_module
from gateway.relay.destinations import Destinations, GenerationCleanup
from gateway.relay.route import Route
from gateway.telemetry.exchange import CHAT, EMBEDDINGS
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from tests.fakes.running_gateway import until

DOCUMENT: dict[str, Any] = {
    "llm_backend": "ollama",
    "backends": {
        "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"},
        "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:2"},
    },
    "tiers": {
        "standard": {
            "models": {"ollama": "small", "vllm": "Small"},
            "limits": {"vllm": {"idle_timeout": 7}},
            "fallback": True,
        },
        "pro": {"models": {"ollama": "large"}},
    },
    "embeddings": {"vectors": {"backend": "ollama", "model": "bge"}},
}
ON_OLLAMA, ON_VLLM = Route("standard", "ollama", "small"), Route("standard", "vllm", "Small")
PRO = Route("pro", "ollama", "large")
VECTORS = Route("vectors", "ollama", "bge")

Change = Callable[..., dict[str, Backend]]


def settings(**changes: Any) -> config.Settings:
    return config.build(DOCUMENT | changes)


def without(section: str, name: str) -> dict[str, Any]:
    return {section: {key: value for key, value in DOCUMENT[section].items() if key != name}}


@pytest.fixture
async def backends() -> AsyncIterator[list[Backend]]:
    """All backends that a test builds; they are closed at its end."""
    built: list[Backend] = []
    yield built
    for backend in built:
        backend.close()


@pytest.fixture
async def destinations(backends: list[Backend]) -> Destinations:
    found = settings()
    in_force = {name: Backend(item) for name, item in found.backends.items()}
    backends += in_force.values()
    return Destinations(found, in_force, Metrics(CollectorRegistry(), "0"))


@pytest.fixture
def change(destinations: Destinations, backends: list[Backend]) -> Change:
    """Put other settings in force, with new backends in place of those named `rebuilt`."""

    def change(*rebuilt: str, **changes: Any) -> dict[str, Backend]:
        changed = settings(**changes)
        new = {name: Backend(changed.backends[name]) for name in rebuilt}
        backends.extend(new.values())
        kept = {name: backend for name, backend in destinations.backends.items() if name in changed.backends}
        destinations.change(changed, kept | new)
        return new

    return change


# Destinations


async def test_destination_is_built_once_for_each_route(destinations: Destinations) -> None:
    found = destinations.get(ON_OLLAMA, CHAT)
    assert destinations.get(Route("standard", "ollama", "small"), CHAT) is found
    assert destinations.get(ON_VLLM, CHAT) is not found
    assert (found.route, found.backend.name, found.generation) == (ON_OLLAMA, "ollama", 0)
    assert found.fallback == ON_VLLM
    assert set(found.queues) == {"text", "vision"}
    assert found.header_lines == (
        b"x-gateway-tier: standard\r\nx-gateway-backend: ollama\r\nx-gateway-model: small\r\n"
    )


async def test_destination_of_a_tier_has_the_limits_of_the_tier(destinations: Destinations) -> None:
    found = destinations.get(ON_VLLM, CHAT)
    assert found.limits.idle_timeout == 7
    assert found.backend.settings.limits.idle_timeout != 7


async def test_destination_of_embeddings_has_one_lane_and_no_fallback(destinations: Destinations) -> None:
    found = destinations.get(VECTORS, EMBEDDINGS)
    assert (set(found.queues), found.fallback) == ({"embedding"}, None)
    assert found.limits is found.backend.settings.limits


async def test_queues_are_those_of_the_destinations_in_force(destinations: Destinations, change: Change) -> None:
    assert destinations.queues == set()
    standard, pro = destinations.get(ON_OLLAMA, CHAT), destinations.get(PRO, CHAT)
    assert destinations.queues == {*standard.queues.values(), *pro.queues.values()}
    change(**without("tiers", "pro"))
    assert destinations.queues == set()
    destinations.get(PRO, CHAT)  # of the earlier generation
    assert destinations.queues == set()


# Generations


async def test_change_takes_a_snapshot_and_keeps_the_dict_of_backends(
    destinations: Destinations, change: Change
) -> None:
    held, before, ollama = destinations.backends, destinations.settings, destinations.backends["ollama"]
    new = change("ollama")
    assert destinations.generation == 1
    assert destinations.backends is held
    assert held["ollama"] is new["ollama"]
    assert destinations.past[0].settings is before
    assert destinations.past[0].backends["ollama"] is ollama


async def test_route_that_is_still_there_gets_the_new_backend(destinations: Destinations, change: Change) -> None:
    before = destinations.get(ON_OLLAMA, CHAT)
    new = change("ollama")
    after = destinations.get(ON_OLLAMA, CHAT)
    assert (after.generation, after.backend) == (1, new["ollama"])
    assert after is not before


@pytest.mark.parametrize(
    ("changes", "route", "endpoint"),
    [
        (without("tiers", "pro"), PRO, CHAT),
        ({"tiers": DOCUMENT["tiers"] | {"pro": {"models": {"ollama": "larger"}}}}, PRO, CHAT),
        ({"tiers": DOCUMENT["tiers"] | {"standard": {"models": {"ollama": "small"}}}}, ON_VLLM, CHAT),
        (without("embeddings", "vectors"), VECTORS, EMBEDDINGS),
        ({"embeddings": {"vectors": {"backend": "ollama", "model": "bge-2"}}}, VECTORS, EMBEDDINGS),
    ],
    ids=["tier", "model", "backend-of-the-tier", "embedding", "embedding-model"],
)
async def test_removed_route_leads_to_the_last_generation_that_had_it(
    destinations: Destinations, change: Change, changes: dict[str, Any], route: Route, endpoint: str
) -> None:
    new = change("ollama", "vllm")
    change("ollama", "vllm", **changes)
    change(**changes)
    found = destinations.get(route, endpoint)
    assert (found.generation, found.backend) == (1, new[route.backend])
    assert found.generation in destinations.past


async def test_destination_of_an_earlier_generation_is_not_kept(destinations: Destinations, change: Change) -> None:
    """It would outlive its backend, whose connections are closed with the generation."""
    change(**without("tiers", "pro"))
    assert destinations.get(PRO, CHAT) is not destinations.get(PRO, CHAT)


async def test_route_that_comes_back_is_of_the_settings_in_force(destinations: Destinations, change: Change) -> None:
    change(**without("tiers", "pro"))
    assert destinations.get(PRO, CHAT).generation == 0
    new = change("ollama")
    found = destinations.get(PRO, CHAT)
    assert (found.generation, found.backend) == (2, new["ollama"])


async def test_number_of_earlier_generations_is_shown(destinations: Destinations, change: Change) -> None:
    change()
    assert repr(destinations) == "<Destinations of generation 1, 1 earlier ones in use>"
    destinations.past.pop(0)
    assert repr(destinations) == "<Destinations of generation 1, 0 earlier ones in use>"


# Clean-up


@pytest.fixture
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations_module, "CHECK_SECONDS", 0.001)


@pytest.mark.usefixtures("_short_interval")
async def test_clean_up_waits_for_the_last_request_of_its_generation() -> None:
    oldest, done = [0], list[str]()
    cleanup = GenerationCleanup(lambda: oldest[0])
    cleanup.add(0, lambda: done.append("first"))
    cleanup.add(1, lambda: done.append("second"))
    await asyncio.sleep(0.02)
    assert done == []
    oldest[0] = 1
    await until(lambda: done == ["first"])
    cleanup.add(2, lambda: done.append("third"))
    oldest[0] = 3
    await until(lambda: done == ["first", "second", "third"])
    await cleanup.close()


@pytest.mark.usefixtures("_short_interval")
async def test_task_runs_only_while_there_is_something_to_clean_up() -> None:
    before = asyncio.all_tasks()
    cleanup = GenerationCleanup(lambda: 1)
    cleanup.add(0, lambda: None)
    await until(lambda: asyncio.all_tasks() <= before)
    done = list[str]()
    cleanup.add(0, lambda: done.append("again"))
    await until(lambda: bool(done))
    assert done == ["again"]
    await cleanup.close()
    assert asyncio.all_tasks() <= before


@pytest.mark.usefixtures("_short_interval")
async def test_close_cleans_up_every_generation_at_once() -> None:
    done = list[str]()
    cleanup = GenerationCleanup(lambda: 0)
    cleanup.add(0, lambda: done.append("left"))
    await cleanup.close()
    assert done == ["left"]
    await cleanup.close()
    assert done == ["left"]
