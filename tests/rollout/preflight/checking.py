"""A gateway in front of a vLLM and an Ollama, and what its preflight check reports."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2

from gateway import config, simulate
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import PATIENCE, Running, running
from tests.fakes.stand_ins import stand_in

NAME = "served"
CAPABLE = simulate.Model(NAME, family="qwen3", vision=True, tools=True, context_length=8192)
CHAT_PATHS = ("/v1/chat/completions", "/api/chat")


class Checked:
    """A gateway whose tier `standard` is on Ollama; it checks a switch to vLLM."""

    def __init__(
        self, gateway: Running, client: httpx2.AsyncClient, vllm: simulate.Running, ollama: simulate.Running
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.vllm = vllm
        self.ollama = ollama

    async def check(self, backend: str = "vllm", seconds: float = PATIENCE, **more: str) -> "Report":
        answer = await self.client.post(
            "/ops/preflight", params={"backend": backend, "seconds": f"{seconds:g}", **more}
        )
        assert answer.status_code == 200, answer.text
        return Report(answer.json())


class Report:
    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body

    def __repr__(self) -> str:
        return json.dumps(self.body, indent=1)

    @property
    def breaks(self) -> list[str]:
        return [item["what"] for item in self.body["findings"] if item["severity"] == "breaks"]

    @property
    def notices(self) -> list[str]:
        return [item["what"] for item in self.body["findings"] if item["severity"] == "notices"]

    def of(self, what: str, tier: str | None = "standard") -> dict[str, Any]:
        return next(item for item in self.body["findings"] if (item["what"], item["tier"]) == (what, tier))


def document(vllm: str, ollama: str, **changes: Any) -> dict[str, Any]:
    """Return settings; `backends` among `changes` adds to the two backends."""
    more = changes.pop("backends", {})
    backends = {"ollama": {"kind": "ollama", "base_url": ollama}, "vllm": {"kind": "vllm", "base_url": vllm}}
    return {
        "llm_backend": "ollama",
        "backends": {name: backend | more.get(name, {}) for name, backend in backends.items()},
        "tiers": {"standard": {"models": {"ollama": NAME, "vllm": NAME}}},
        "state_file": "",
        "log_format": "json",
        **changes,
    }


@asynccontextmanager
async def serving(settings: dict[str, Any]) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    async with (
        running(config.build(settings)) as gateway,
        httpx2.AsyncClient(base_url=gateway.base_url, timeout=2 * PATIENCE, trust_env=False, verify=False) as client,
    ):
        yield gateway, client


@asynccontextmanager
async def checked(
    vllm: simulate.Model = CAPABLE, ollama: simulate.Model = CAPABLE, **changes: Any
) -> AsyncIterator[Checked]:
    """Start a gateway; `changes` are options of the vLLM stand-in, or settings."""
    of_vllm = {name: changes.pop(name) for name in list(changes) if name in simulate.Options.__dataclass_fields__}
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(stand_in(simulate.Options("vllm", (vllm,), **of_vllm)))
        two = await stack.enter_async_context(stand_in(simulate.Options("ollama", (ollama,), gpu=True)))
        gateway, client = await stack.enter_async_context(serving(document(one.base_url, two.base_url, **changes)))
        yield Checked(gateway, client, one, two)


@asynccontextmanager
async def failing(mode: str, **changes: Any) -> AsyncIterator[tuple[Running, httpx2.AsyncClient, FaultBackend]]:
    async with FaultBackend("vllm", mode) as vllm, FaultBackend("ollama") as ollama:
        tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}}
        async with serving(document(vllm.base_url, ollama.base_url, tiers=tiers, **changes)) as (gateway, client):
            yield gateway, client, vllm


def generations(server: simulate.Running) -> int:
    return sum(request["path"] in CHAT_PATHS for request in server.engine.requests)


def model(**changes: Any) -> simulate.Model:
    return simulate.Model(
        **{"name": NAME, "family": "qwen3", "vision": True, "tools": True, "context_length": 8192, **changes}
    )
