"""Requests of Ollama's API without content: they load the model, or change nothing."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import PATIENCE, Raw, Reply, Running, until
from tests.fakes.running_gateway import running as running_gateway
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

LOADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/api/generate", {}),
    ("/api/generate", {"prompt": "", "keep_alive": -1}),
    ("/api/chat", {"messages": []}),
    ("/api/chat", {"stream": True}),
)
UNLOADS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/api/generate", {"keep_alive": 0}),
    ("/api/chat", {"messages": [], "keep_alive": "0s"}),
)
LONG = {"messages": [{"role": "user", "content": "Write 300 words."}], "options": {"num_predict": 300}}


@asynccontextmanager
async def sent(gateway: Running, path: str, fields: Mapping[str, Any]) -> AsyncIterator[Raw]:
    """Send a request and leave at the end of the block."""
    data = json.dumps({"model": "standard", **fields}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**20)
    writer.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    raw = Raw(reader, writer)
    try:
        yield raw
    finally:
        raw.leave()


async def ask(gateway: Running, path: str, fields: Mapping[str, Any]) -> Reply:
    async with asyncio.timeout(PATIENCE), sent(gateway, path, fields) as raw:
        return await raw.reply()


def document(backends: dict[str, Any], **more: Any) -> config.Settings:
    tiers = {"standard": {"models": dict.fromkeys(backends, MODEL)}}
    return config.build(
        {"llm_backend": next(iter(backends)), "backends": backends, "tiers": tiers, "state_file": ""} | more
    )


@asynccontextmanager
async def ollama(**options: Any) -> AsyncIterator[tuple[Running, simulate.Running]]:
    """A gateway in front of an Ollama that has loaded nothing yet."""
    async with stand_in(simulate.Options("ollama", (simulate.Model(MODEL),), **options)) as server:
        backends = {"ollama": {"kind": "ollama", "base_url": server.base_url, "probe_interval": 0.05}}
        async with running_gateway(document(backends)) as gateway:
            yield gateway, server


async def loaded(server: simulate.Running) -> list[str]:
    async with httpx2.AsyncClient(base_url=server.base_url, trust_env=False, verify=False) as client:
        return [model["name"] for model in (await client.get("/api/ps")).json()["models"]]


@pytest.mark.parametrize(("path", "fields"), LOADS)
async def test_a_request_without_content_is_answered_when_the_model_is_loaded(
    path: str, fields: dict[str, Any]
) -> None:
    async with ollama(load_seconds=0.3) as (gateway, server):
        assert await loaded(server) == []
        begun = asyncio.get_running_loop().time()
        reply = await ask(gateway, path, fields)
        assert asyncio.get_running_loop().time() - begun >= 0.3
        assert await loaded(server) == [f"{MODEL}:latest"]
        body = json.loads(reply.body)
        assert (reply.status, body["done"], body["done_reason"]) == (200, True, "load")
        assert reply.headers["content-type"] == "application/json; charset=utf-8"
        await until(gateway.is_idle)
        assert gateway.exchanges()[-1]["outcome"] == "ok"


async def test_the_first_chat_after_a_load_does_not_load_again() -> None:
    async with ollama(load_seconds=0.3) as (gateway, server):
        await ask(gateway, "/api/generate", {})
        reply = await ask(gateway, "/api/chat", {**LONG, "options": {"num_predict": 2}, "stream": False})
        assert reply.status == 200
        assert server.app.scheduler.loads == 1


@pytest.mark.parametrize(("path", "fields"), UNLOADS)
async def test_a_request_to_unload_is_answered_at_once_and_unloads_nothing(path: str, fields: dict[str, Any]) -> None:
    async with ollama(load_seconds=0.3) as (gateway, server):
        await ask(gateway, "/api/generate", {})
        body = json.loads((await ask(gateway, path, fields)).body)
        assert (body["done"], body["done_reason"]) == (True, "unload")
        assert await loaded(server) == [f"{MODEL}:latest"]


async def test_a_request_to_unload_loads_nothing() -> None:
    async with ollama(load_seconds=60) as (gateway, server):
        await ask(gateway, *UNLOADS[0])
        assert await loaded(server) == []


async def test_a_load_on_a_vllm_sends_no_chat() -> None:
    async with (
        FaultBackend("vllm") as backend,
        running_gateway(document({"vllm": {"kind": "vllm", "base_url": backend.base_url}})) as gateway,
    ):
        assert json.loads((await ask(gateway, *LOADS[0])).body)["done_reason"] == "load"
        assert backend.requests == []


async def test_a_client_that_leaves_its_load_frees_its_place() -> None:
    async with ollama(load_seconds=60) as (gateway, _):
        async with sent(gateway, *LOADS[0]):
            await until(lambda: len(gateway.live) == 1)
        await until(lambda: not gateway.live and not gateway.waiting and not gateway.running)
        assert gateway.exchanges()[-1]["outcome"] == "cancelled"


async def test_a_load_that_finds_the_queue_full_is_refused() -> None:
    async with FaultBackend("vllm", "silent") as backend:
        patient = dict.fromkeys(("first_token_timeout", "idle_timeout", "total_timeout", "queue_timeout"), 60)
        limits = {"max_concurrency": 1, "max_queue": 1, **patient}
        backends = {"vllm": {"kind": "vllm", "base_url": backend.base_url, **limits}}
        async with running_gateway(document(backends)) as gateway, AsyncExitStack() as stack:
            await stack.enter_async_context(sent(gateway, "/api/chat", LONG))
            await until(lambda: gateway.running == 1)
            await stack.enter_async_context(sent(gateway, "/api/chat", LONG))
            await until(lambda: gateway.waiting == 1)
            reply = await ask(gateway, *LOADS[0])
            assert (reply.status, list(json.loads(reply.body))) == (503, ["error"])
            assert int(reply.headers["retry-after"]) >= 1


async def test_a_load_of_a_model_that_is_not_there_is_refused() -> None:
    async with ollama() as (gateway, _):
        reply = await ask(gateway, "/api/generate", {"model": "nothing"})
        assert reply.status == 404
        assert "not found" in json.loads(reply.body)["error"]


async def test_a_queued_load_follows_a_switch() -> None:
    options = simulate.Options("ollama", (simulate.Model(MODEL),), load_seconds=60)
    async with stand_in(options) as old, FaultBackend("vllm") as new:
        backends = {
            "ollama": {"kind": "ollama", "base_url": old.base_url},
            "vllm": {"kind": "vllm", "base_url": new.base_url},
        }
        async with running_gateway(document(backends)) as gateway, sent(gateway, *LOADS[0]) as raw:
            await until(lambda: gateway.waiting == 1)
            async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client:
                await client.put("/ops/rollout", json={"backend": "vllm"})
            reply = await asyncio.wait_for(raw.reply(), PATIENCE)
            assert json.loads(reply.body)["done_reason"] == "load"
            assert reply.headers["x-gateway-backend"] == "vllm"
