"""Backends in force: which ones new settings keep, build, change and drop."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.telemetry.metrics import Metrics
from gateway.upstream.backend import Backend
from gateway.upstream.backends import Backends
from tests.fakes.running_gateway import until


def settings(
    ollama: dict[str, Any] | None = None,
    vllm: dict[str, Any] | None = None,
    third: dict[str, Any] | None = None,
    **tier: Any,
) -> config.Settings:
    """Return settings with an Ollama, a vLLM, perhaps a third backend, and one tier on the first two."""
    return config.build(
        {
            "llm_backend": "ollama",
            "backends": {
                "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1", **(ollama or {})},
                "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:2", **(vllm or {})},
                **({"third": third} if third else {}),
            },
            "tiers": {"standard": {"models": {"ollama": "llama", "vllm": "llama"}, **tier}},
        }
    )


class Callbacks:
    """Backends that went down, and the number of learned limits."""

    def __init__(self) -> None:
        self.down: list[Backend] = []
        self.learned = 0

    def on_learned(self) -> None:
        self.learned += 1


def backends_of(settings: config.Settings, callbacks: Callbacks | None = None) -> Backends:
    callbacks = callbacks or Callbacks()
    metrics = Metrics(CollectorRegistry(), "test")
    return Backends(
        {},
        settings,
        metrics,
        b"id",
        on_down=callbacks.down.append,
        on_learned=callbacks.on_learned,
        on_evicted=lambda state: None,
    )


def warm_models(backend: Backend) -> list[str]:
    (server,) = backend.servers
    assert server.residency is not None
    return [name for name, state in server.residency.states.items() if state.warm]


async def test_backends_of_the_first_settings_are_in_force() -> None:
    backends = backends_of(settings())
    assert [(name, backend.kind) for name, backend in backends.current.items()] == [
        ("ollama", "ollama"),
        ("vllm", "vllm"),
    ]
    assert repr(backends).startswith("<Backends [<Backend ollama: ")


async def test_only_servers_that_have_to_load_models_get_a_loader() -> None:
    current = backends_of(settings()).current
    assert current["ollama"].servers[0].residency is not None
    assert current["vllm"].servers[0].residency is None


async def test_backend_with_the_same_servers_is_kept() -> None:
    backends = backends_of(settings())
    built = backends.built_for(settings({"max_concurrency": 9}, {"queue_timeout": 3}, warm=True))
    assert built == backends.current


@pytest.mark.parametrize(
    "change",
    [
        {"base_url": "http://127.0.0.1:3"},
        {"servers": [{"base_url": "http://127.0.0.1:2"}, {"base_url": "http://127.0.0.1:3"}], "base_url": None},
        {"api_key": "other"},
        {"headers": {"x-extra": "1"}},
        {"kind": "openai"},
    ],
    ids=["address", "number of servers", "key", "headers", "kind"],
)
async def test_backend_whose_servers_differ_is_built_anew(change: dict[str, Any]) -> None:
    backends = backends_of(settings())
    before = dict(backends.current)
    built = backends.built_for(settings(vllm=change))
    assert built["ollama"] is before["ollama"]
    assert built["vllm"] is not before["vllm"]
    assert backends.current == before, "the new backend is not in force yet"


async def test_backend_that_cannot_be_built_leaves_none_of_the_new_ones_behind(tmp_path: Path) -> None:
    backends = backends_of(settings())
    (tmp_path / "ca.pem").write_text("not a certificate")
    changed = settings(
        ollama={"base_url": "http://127.0.0.1:9"},
        third={"kind": "openai", "base_url": "https://127.0.0.1:3", "ca_file": str(tmp_path / "ca.pem")},
    )
    with pytest.raises(ssl.SSLError):
        backends.built_for(changed)
    assert set(backends._loaders) == {backends.current["ollama"]}


async def test_backend_that_new_settings_no_longer_have_is_not_among_theirs() -> None:
    backends = backends_of(settings(third={"kind": "openai", "base_url": "http://127.0.0.1:3"}))
    before = dict(backends.current)
    assert set(before) == {"ollama", "vllm", "third"}
    assert set(backends.built_for(settings())) == {"ollama", "vllm"}
    assert backends.current == before


async def test_change_applies_limits_to_backends_in_force() -> None:
    backends = backends_of(settings())
    after = settings({"max_concurrency": 9, "connect_timeout": 7})
    backends.change(after, backends.built_for(after))
    backend = backends.current["ollama"]
    assert backend.settings is after.backends["ollama"]
    assert (backend.servers[0].slots.limit, backend.servers[0].pool.connect_timeout) == (9, 7)


async def test_change_leaves_a_new_backend_as_it_was_built() -> None:
    backends = backends_of(settings())
    after = settings(vllm={"base_url": "http://127.0.0.1:3", "max_concurrency": 9})
    built = backends.built_for(after)
    engine, before = built["vllm"].engine, backends.current["vllm"].settings
    backends.change(after, built)
    assert built["vllm"].engine is engine, "a changed backend gets a new engine"
    assert built["vllm"].servers[0].slots.limit == 9
    assert backends.current["vllm"].settings is before


async def test_change_reaches_the_loaders_of_old_and_new_backends() -> None:
    backends = backends_of(settings())
    assert warm_models(backends.current["ollama"]) == []
    after = settings(warm=True)
    backends.change(after, backends.built_for(after))
    assert warm_models(backends.current["ollama"]) == ["llama"]

    moved = settings({"base_url": "http://127.0.0.1:3"}, warm=True)
    built = backends.built_for(moved)
    assert warm_models(built["ollama"]) == ["llama"]
    cold = settings({"base_url": "http://127.0.0.1:3"})
    backends.change(cold, built)
    assert warm_models(built["ollama"]) == []


async def test_callbacks_reach_every_backend() -> None:
    callbacks = Callbacks()
    backends = backends_of(settings(), callbacks)
    for backend in backends.current.values():
        backend.servers[0].circuit.probe_missed(is_sure=True)
    assert callbacks.down == list(backends.current.values())

    ollama = backends_of(settings(), callbacks).current["ollama"]
    queue = ollama.admission.queue("llama", "text")
    with Ticket(ollama.admission, queue, Claim()) as first, Ticket(ollama.admission, queue, Claim()) as trial:
        first.first_token()
        trial.first_token()
        await until(lambda: callbacks.learned == 1)


@pytest.fixture
async def silent_url() -> AsyncIterator[str]:
    """Address of a server that accepts connections and never answers."""
    writers = []

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        for writer in writers:
            writer.transport.abort()


async def loading(backend: Backend) -> Ticket:
    """Return a queued ticket whose model `backend` is loading, on an open connection."""
    (server,) = backend.servers
    assert server.residency is not None
    ticket = Ticket(backend.admission, backend.admission.queue("llama", "text"), Claim())
    server.residency.update([])
    ticket.__enter__()
    assert server.residency.states["llama"].is_loading
    await until(lambda: server.pool.open_connections == 1)
    return ticket


async def test_dropped_backend_cancels_its_loads_and_closes_its_connections(silent_url: str) -> None:
    tasks = asyncio.all_tasks()
    backends = backends_of(settings({"base_url": silent_url}))
    backend = backends.current["ollama"]
    ticket = await loading(backend)
    await until(lambda: len(asyncio.all_tasks() - tasks) == 1)  # the load; the tasks that opened its connection end
    backends.drop(backend)
    await until(lambda: asyncio.all_tasks() == tasks)
    await until(lambda: backend.servers[0].pool.open_connections == 0)
    ticket.__exit__()


async def test_dropped_backend_begins_no_further_load(silent_url: str) -> None:
    tasks = asyncio.all_tasks()
    backends = backends_of(settings({"base_url": silent_url}))
    backend = backends.current["ollama"]
    backends.drop(backend)
    (server,) = backend.servers
    assert server.residency is not None
    server.residency.update([])
    with Ticket(backend.admission, backend.admission.queue("llama", "text"), Claim()):
        assert asyncio.all_tasks() == tasks


async def test_backend_without_a_loader_can_be_dropped_too(silent_url: str) -> None:
    backends = backends_of(settings(vllm={"base_url": silent_url}))
    backend = backends.current["vllm"]
    pool = backend.servers[0].pool
    await pool.connect()
    assert pool.open_connections == 1
    backends.drop(backend)
    await until(lambda: pool.open_connections == 0)


async def test_close_waits_until_the_loads_are_cancelled(silent_url: str) -> None:
    tasks = asyncio.all_tasks()
    backends = backends_of(settings({"base_url": silent_url}))
    ticket = await loading(backends.current["ollama"])
    await backends.close()
    assert asyncio.all_tasks() == tasks
    for backend in backends.current.values():
        backend.close()
    ticket.__exit__()
