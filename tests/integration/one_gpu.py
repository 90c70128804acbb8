"""A gateway, an Ollama and a vLLM that share one simulated GPU, all in one loop of virtual time."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx2

from gateway import config
from gateway.simulate import Model, Options, read_gpu
from gateway.simulate import Running as StandIn
from gateway.simulate import running as stand_in
from tests.fakes.running_gateway import Reply, Running, running
from tests.fakes.virtual_time import virtual_clock

LOAD, SLEEP, WAKE = 4.0, 2.0, 6.0
"""Seconds in which the Ollama loads its model, and the vLLM sleeps and wakes."""
ANSWER_SECONDS, TOKENS = 2.0, 10
MEMORY = 100_000_000
"""Bytes of the GPU. The Ollama's model takes 90 % of them, the vLLM 92 %."""
LONG = 3600.0
"""Virtual seconds after which a condition that has not come true is a failure."""

OLLAMA = Options(
    "ollama",
    (Model("small", size=90_000_000), Model("embed", size=1_000_000, embedding=4)),
    load_seconds=LOAD,
    parallel=4,
    answer_tokens=TOKENS,
    tokens_per_second=TOKENS / ANSWER_SECONDS,
    gpu_memory=MEMORY,
)
VLLM = Options(
    "vllm",
    (Model("Small"),),
    answer_tokens=TOKENS,
    tokens_per_second=TOKENS / ANSWER_SECONDS,
    gpu_memory=MEMORY,
    dev_mode=True,
    sleep_mode=True,
    sleep_seconds=SLEEP,
    wake_seconds=WAKE,
    asleep=True,
)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until `condition` holds, and check it about ten times in a virtual second."""
    async with asyncio.timeout(LONG):
        while not condition():
            await asyncio.sleep(0.1)


class OneGpu:
    """The three, and clients for the gateway."""

    def __init__(self, gateway: Running, ollama: StandIn, vllm: StandIn, gpu_file: Path) -> None:
        self.gateway = gateway
        self.ollama = ollama
        self.vllm = vllm
        self.gpu_file = gpu_file

    async def call(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        async with httpx2.AsyncClient(
            base_url=self.gateway.base_url, trust_env=False, verify=False, timeout=LONG
        ) as client:
            return await client.request(method, path, json=body)

    async def order(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer = await self.call(method, path, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def switch(self, backend: str) -> dict[str, Any]:
        return await self.order("PUT", "/ops/rollout", {"backend": backend})

    async def rollback(self) -> dict[str, Any]:
        return await self.order("POST", "/ops/rollback")

    @property
    def gpu(self) -> dict[str, Any]:
        view = self.gateway.gateway._gpu.state.view()
        assert view is not None
        return view

    @property
    def turns(self) -> dict[str, str]:
        return {name: backend.turn for name, backend in self.gateway.gateway._backends.items()}

    def backend(self, name: str) -> Any:
        return self.gateway.gateway._backends[name]

    async def reached(self, phase: str) -> dict[str, Any]:
        """Wait for a phase, and return the state of the GPU then."""
        await until(lambda: self.gpu["phase"] == phase)
        return self.gpu

    async def ended(self) -> dict[str, Any]:
        """Wait for the end of the switch, whichever way it goes, and return the state of the GPU then."""
        await until(lambda: self.gpu["phase"] == "ready")
        return self.gpu

    async def ask(self, **body: Any) -> Reply:
        async with asyncio.timeout(LONG), self.gateway.sent(body) as raw:
            return await raw.reply()

    def memory(self) -> dict[str, Any]:
        return read_gpu(self.gpu_file)

    def was_never_on_both(self) -> bool:
        """Return whether the engines never held the GPU at once, and none tried to."""
        found = self.memory()
        return found["most_engines"] <= 1 and not found["refused"] and not self.vllm.engine.asked_asleep

    def history(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.gateway.gateway._operations.controller.history()
        return found

    def logs(self) -> Counter[int]:
        return Counter(json.loads(line)["status"] for line in self.gateway.log.getvalue().splitlines())


class Load:
    """Clients that ask one after the other, streams and plain ones in turn, until `stop`."""

    def __init__(self, setup: OneGpu, clients: int = 3) -> None:
        self.setup = setup
        self.replies: list[Reply] = []
        self._is_over = False
        self._tasks = [asyncio.create_task(self._ask(bool(number % 2))) for number in range(clients)]

    async def _ask(self, stream: bool) -> None:
        while not self._is_over:
            self.replies.append(await self.setup.ask(stream=stream))
            await asyncio.sleep(0.3)

    async def stop(self) -> Counter[str]:
        """Wait for the last answers. Return how many there were from each backend, all of them whole."""
        self._is_over = True
        await asyncio.gather(*self._tasks)
        lost = [
            reply.body for reply in self.replies if reply.status != 200 or reply.error is not None or not reply.text
        ]
        assert not lost, lost
        return Counter(reply.headers["x-gateway-backend"] for reply in self.replies)


def document(ollama: StandIn | None, vllm: StandIn | None, **top: Any) -> dict[str, Any]:
    """Return settings with a tier on both, and an embedding model on the Ollama."""
    times = {"queue_timeout": 3, "first_token_timeout": 60, "connect_timeout": 1, "probe_interval": 1}
    backends: dict[str, Any] = {
        "ollama": {"base_url": ollama.base_url if ollama else "http://127.0.0.1:1", **times},
        "vllm": {"base_url": vllm.base_url if vllm else "http://127.0.0.1:1", **times},
    }
    for name, extra in top.pop("of", {}).items():
        backends[name] = backends.get(name, {}) | extra
    found = {
        "llm_backend": "ollama",
        "exclusive": True,
        "wake_timeout": 30,
        "backends": backends,
        "tiers": {"standard": {"models": {"ollama": "small", "vllm": "Small"}}},
        "log_format": "json",
        "state_file": "",
    }
    return found | top


@asynccontextmanager
async def one_gpu(
    folder: Path, *, of_ollama: dict[str, Any] | None = None, of_vllm: dict[str, Any] | None = None, **top: Any
) -> AsyncIterator[OneGpu]:
    """Start both engines and a gateway. `of_ollama` and `of_vllm` are options of the stand-ins."""
    gpu_file = folder / "gpu.json"
    async with AsyncExitStack() as stack:
        stack.enter_context(virtual_clock())
        stack.enter_context(patch("gateway.relay.in_flight.CHECK_SECONDS", 0.25))
        ollama, vllm = [
            await stack.enter_async_context(stand_in(replace(options, gpu_file=str(gpu_file), **(changes or {}))))
            for options, changes in ((OLLAMA, of_ollama), (VLLM, of_vllm))
        ]
        settings = config.build(document(ollama, vllm, **top))
        gateway = await stack.enter_async_context(running(settings, shares_loop=True))
        setup = OneGpu(gateway, ollama, vllm, gpu_file)
        yield setup
