"""A gateway of several processes, started by its command, and clients that count what they got."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx2

from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.real_engines.process import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
ADMIN = "an-admin-key-0123456789"
CHAT = {"model": "standard", "messages": [{"role": "user", "content": "Hello?"}]}


def settings_file(folder: Path, vllm: FaultBackend, ollama: FaultBackend, **limits: int) -> Path:
    """Write settings with one tier on two backends. The limits are the vLLM's."""
    file = folder / "gateway.yaml"
    backends = {
        "vllm": {"kind": "vllm", "base_url": vllm.base_url, **limits},
        "ollama": {"kind": "ollama", "base_url": ollama.base_url, "model_concurrency": 2},
    }
    tiers = {"standard": {"models": {"vllm": MODEL, "ollama": MODEL}}}
    document = {"llm_backend": "vllm", "rollback_to": "ollama", "backends": backends, "tiers": tiers}
    file.write_text(json.dumps(document | {"log_format": "json", "drain_timeout": 20}))
    return file


class Supervised:
    """`gateway serve --replicas` with the settings in `folder`. Entering it waits until all replicas serve."""

    def __init__(self, folder: Path, replicas: int, **variables: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        self.state_file = folder / "state.json"
        self._replicas = replicas
        self._folder = folder
        self._variables = variables
        self.process: subprocess.Popen[bytes]

    def start(self, *arguments: str) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_CONFIG": str(self._folder / "gateway.yaml"),
            "GATEWAY_STATE_FILE": str(self.state_file),
            "GATEWAY_ADMIN_KEY": ADMIN,
            **self._variables,
        }
        command = [sys.executable, "-m", "gateway", "serve", "--replicas", str(self._replicas), *arguments]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=self._folder, stderr=log)

    async def __aenter__(self) -> Self:
        self.start()
        try:
            await self.until_all_serve()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self.process.wait, PATIENCE)
        self.process.kill()

    async def until_all_serve(self) -> list[dict[str, Any]]:
        """Wait until all replicas serve, and return what the status says of them."""
        found: list[dict[str, Any]] = []

        async def all_serve() -> bool:
            nonlocal found
            assert self.process.poll() is None, self.log.read_text()
            with suppress(httpx2.HTTPError, ValueError):
                status = await self.get("/ops/status")
                found = status["processes"]
                return len(found) == self._replicas and all(each["status"] == "ready" for each in found)
            return False

        await until(all_serve)
        return found

    async def get(self, path: str) -> Any:
        """Return the JSON of a GET over a connection of its own, which any replica may get."""
        async with client() as http:
            return (await http.get(f"{self.url}{path}")).json()

    async def post(self, path: str, body: dict[str, Any]) -> httpx2.Response:
        async with client() as http:
            return await http.post(f"{self.url}{path}", json=body)

    async def metrics(self, name: str) -> dict[str, float]:
        """Return the sums of a metric's series by the value of the label `replica`."""
        async with client() as http:
            text = (await http.get(f"{self.url}/metrics")).text
        found: dict[str, float] = {}
        for line in text.splitlines():
            if line.startswith((f"{name}{{", f"{name},")):
                labels, _, value = line.rpartition(" ")
                replica = labels.partition('replica="')[2].partition('"')[0]
                found[replica] = found.get(replica, 0) + float(value)
        return found

    async def chat(self, count: int, key: str = "any") -> list[int]:
        """Send requests at the same time, each over its own connection; return the statuses, 0 without an answer."""
        return list(await asyncio.gather(*(self._chat(key) for _ in range(count))))

    async def _chat(self, key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        try:
            async with client() as http:
                answer = await http.post(f"{self.url}/v1/chat/completions", json=CHAT, headers=headers)
        except httpx2.HTTPError:
            return 0
        return answer.status_code


def client() -> httpx2.AsyncClient:
    """Return a client with the operator's key."""
    headers = {"authorization": f"Bearer {ADMIN}"}
    return httpx2.AsyncClient(verify=False, trust_env=False, timeout=PATIENCE, headers=headers)


async def until(condition: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Wait until `condition`, a coroutine function, returns True."""
    async with asyncio.timeout(seconds):
        while not await condition():
            await asyncio.sleep(0.02)


@asynccontextmanager
async def engines() -> AsyncIterator[tuple[FaultBackend, FaultBackend]]:
    """Run a vLLM and an Ollama that answer after 10 ms."""
    async with FaultBackend("vllm", mode="brief") as vllm, FaultBackend("ollama", mode="brief") as ollama:
        yield vllm, ollama
