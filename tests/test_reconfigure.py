"""New settings come into force in one step, and what only the old ones needed is released."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway import config
from gateway.reconfigure import Reconfiguration
from gateway.relay import destinations
from gateway.relay.destinations import Destinations
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, running, until

pytestmark = pytest.mark.uvloop

PATIENT = {**TIMES, "first_token_timeout": 60, "idle_timeout": 60, "total_timeout": 60}


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations, "CHECK_SECONDS", 0.01)


@pytest.fixture
async def old() -> AsyncIterator[FaultBackend]:
    async with FaultBackend("vllm", "slow") as backend:
        yield backend


@pytest.fixture
async def new() -> AsyncIterator[FaultBackend]:
    async with FaultBackend("vllm") as backend:
        yield backend


def settings(backend: FaultBackend, **changes: Any) -> config.Settings:
    return config.build(
        {
            "llm_backend": "box",
            "backends": {"box": {"kind": "vllm", "base_url": backend.base_url, **PATIENT}},
            "tiers": {"standard": {"models": {"box": MODEL}}},
            "log_format": "json",
            "state_file": "",
            **changes,
        }
    )


class Changing:
    """A gateway, and the parts of it that a change of the settings touches."""

    def __init__(self, gateway: Running) -> None:
        self.gateway = gateway
        self.reconfiguration: Reconfiguration = gateway.gateway._reconfiguration
        self.destinations: Destinations = self.reconfiguration._destinations

    @property
    def box(self) -> Any:
        return self.destinations.backends["box"]


@pytest.fixture
async def changing(old: FaultBackend) -> AsyncIterator[Changing]:
    async with running(settings(old)) as gateway:
        yield Changing(gateway)


async def test_backend_with_the_same_servers_is_kept_and_changed(changing: Changing, old: FaultBackend) -> None:
    box = changing.box
    await changing.reconfiguration.apply(
        settings(old, backends={"box": {"kind": "vllm", "base_url": old.base_url, "max_concurrency": 3}})
    )
    assert changing.box is box
    assert (box.settings.limits.max_concurrency, changing.destinations.generation) == (3, 1)
    await until(lambda: not changing.destinations.past)


async def test_backend_with_other_servers_is_rebuilt_and_probed_before_it_is_used(
    changing: Changing, new: FaultBackend
) -> None:
    box = changing.box
    await changing.reconfiguration.apply(settings(new))
    assert changing.box is not box
    assert changing.box.servers[0].up is True
    assert (await changing.gateway.ask()).status == 200
    assert len(new.requests) == 1


async def test_old_backend_is_closed_once_its_last_request_has_ended(
    changing: Changing, old: FaultBackend, new: FaultBackend
) -> None:
    async with changing.gateway.sent({"stream": True}) as raw:
        await raw.reader.readuntil(b"word")
        await changing.reconfiguration.apply(settings(new))
        assert list(changing.destinations.past) == [0]
        await raw.reader.readuntil(b"word")
        assert old.open_peers
    await until(lambda: not changing.destinations.past)
    await until(lambda: not old.open_peers, patience=PATIENCE)


async def test_settings_whose_backends_cannot_be_probed_change_nothing(
    changing: Changing, new: FaultBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, box, dropped = changing.destinations.settings, changing.box, list[str]()
    drop = changing.reconfiguration._backends.drop

    async def fail(*_: object) -> None:
        raise RuntimeError("it broke")

    def count(backend: Any) -> None:
        dropped.append(backend.servers[0].name)
        drop(backend)

    monkeypatch.setattr(changing.reconfiguration._health, "probe_new", fail)
    monkeypatch.setattr(changing.reconfiguration._backends, "drop", count)
    with pytest.raises(RuntimeError, match="it broke"):
        await changing.reconfiguration.apply(settings(new))
    assert (changing.destinations.settings, changing.box, changing.destinations.generation) == (before, box, 0)
    assert dropped == ["box"]


async def test_metrics_of_a_removed_tier_are_forgotten(changing: Changing, old: FaultBackend) -> None:
    old.mode = "healthy"
    both = {name: {"models": {"box": MODEL}} for name in ("standard", "pro")}
    await changing.reconfiguration.apply(settings(old, tiers=both))
    for tier in both:
        assert (await changing.gateway.ask({"model": tier})).status == 200
    await until(changing.gateway.is_idle)
    assert changing.gateway.metric("gateway_requests_total", tier="pro") == 1
    await changing.reconfiguration.apply(settings(old))
    await until(lambda: not changing.destinations.past)
    assert changing.gateway.metric("gateway_requests_total", tier="pro") == 0
    assert changing.gateway.metric("gateway_requests_total", tier="standard") == 1
