"""Facts about an engine beside its answers: versions, memory, GPU, KV cache, and the load of its model."""

import asyncio
import ipaddress
import json
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx2

from gateway.bench.compare_result import ColdStart, EngineUse
from gateway.bench.gpu import Gpus
from gateway.bench.results import CellValue, RequestRecord
from gateway.bench.target import BenchRequest, LoadClient, Target

INTERVAL = 0.5
"""Seconds between two readings of the GPU."""
UNLOAD_SECONDS = 30.0
LOAD_SECONDS = 900.0
_KV_CACHE = re.compile(r"^vllm:kv_cache_usage_perc(?:\{[^}]*\})? (\S+)", re.MULTILINE)


async def server_facts(client: LoadClient) -> dict[str, CellValue]:
    """Return the server and its version, as far as it tells them.

    A gateway of this project answers `/api/version` as an Ollama does, and is known by its `/readyz`.
    """
    ready = await _json(client, "/readyz")
    if isinstance(ready, Mapping) and "unserved_tiers" in ready:
        info = await _json(client, "/openapi.json")
        version = info.get("info", {}).get("version") if isinstance(info, Mapping) else None
        return {"gateway": version if isinstance(version, str) else ""}
    for path, name in (("/api/version", "ollama"), ("/version", "vllm")):
        value = await _json(client, path)
        if isinstance(value, Mapping) and isinstance(value.get("version"), str):
            return {name: value["version"]}
    return {}


def is_on_this_machine(url: str) -> bool:
    """Return whether the address is a loopback one: only then are this machine's GPUs the engine's."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class EngineWatch:
    """Reads the GPU and the engine during an `async with` block."""

    def __init__(self, client: LoadClient, gpus: Gpus | None, interval: float = INTERVAL) -> None:
        self._client = client
        self._gpus = gpus if is_on_this_machine(client.target.url) else None
        self._interval = interval
        self._memory: list[float] = []
        self._use: list[float] = []
        self._kv_cache: list[float] = []
        self._has_kv_cache = True
        self._model_gib: float | None = None

    async def __aenter__(self) -> Self:
        await self._read()
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        await self._read()
        self._model_gib = await loaded_gib(self._client)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._interval)
            await self._read()

    async def _read(self) -> None:
        if self._gpus is not None:
            for values, value in ((self._memory, self._gpus.memory_percent()), (self._use, self._gpus.use_percent())):
                if value is not None:
                    values.append(value)
        if self._has_kv_cache:
            share = await kv_cache_share(self._client)
            self._has_kv_cache = share is not None
            if share is not None:
                self._kv_cache.append(100 * share)

    def look_again(self) -> None:
        """Look for the KV cache again, which a server that did not run yet could not show."""
        self._has_kv_cache = True

    def use(self) -> EngineUse:
        """Return what was seen."""
        return EngineUse(_mean(self._memory), _mean(self._use), max(self._kv_cache, default=None), self._model_gib)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


async def kv_cache_share(client: LoadClient) -> float | None:
    """Return the share of vLLM's KV cache in use, the fullest of its engines; None if the server does not tell."""
    try:
        status, body = await client.get("/metrics")
    except (OSError, EOFError):
        return None
    found = _KV_CACHE.findall(body.decode(errors="replace")) if status == 200 else []
    try:
        return max(map(float, found), default=None)
    except ValueError:
        return None


async def loaded_gib(client: LoadClient) -> float | None:
    """Return the memory of the loaded model by Ollama's `/api/ps`: in the GPU, else in all; None: not loaded."""
    model = await _loaded(client)
    if model is None:
        return None
    size = model.get("size_vram") or model.get("size")
    return size / 2**30 if isinstance(size, int) and size else None


async def _loaded(client: LoadClient) -> Mapping[str, Any] | None:
    value = await _json(client, "/api/ps")
    models = value.get("models") if isinstance(value, Mapping) else None
    wanted = client.target.model.lower()
    for model in models if isinstance(models, list) else ():
        name = str(model.get("name", "")).lower() if isinstance(model, Mapping) else ""
        if name in (wanted, f"{wanted}:latest"):
            return dict(model)
    return None


async def _json(client: LoadClient, path: str) -> Any:
    try:
        status, body = await client.get(path)
        return json.loads(body) if status == 200 else None
    except (OSError, EOFError, ValueError):
        return None


async def cold_start(
    client: LoadClient,
    gpus: Gpus | None,
    request: BenchRequest,
    clock: Callable[[], float] = time.perf_counter,
) -> ColdStart:
    """Unload the model of an Ollama, load it by an empty prompt, and send `request` to it.

    The unload is asked for by `keep_alive: 0`. Where the server has no such API, or the model stays
    loaded (as behind a gateway, which unloads nothing), nothing is measured and `reason` says why.
    """
    if await _json(client, "/api/ps") is None:
        return ColdStart(reason="cold_no_api")
    async with _Ollama(client.target) as ollama:
        if await ollama.generate(keep_alive=0) is None or not await _is_unloaded(client):
            return ColdStart(reason="cold_not_unloaded")
        async with EngineWatch(client, gpus) as watch:
            start = clock()
            answer = await ollama.generate()
            seconds = clock() - start
            if answer is None:
                return ColdStart(reason="cold_not_loaded")
            record = await client.send(request)
    return after_load(seconds, record, watch.use())


def after_load(seconds: float, record: RequestRecord, use: EngineUse) -> ColdStart:
    """Return a load of so many seconds with the first answer after it."""
    return ColdStart(
        load_seconds=seconds,
        response_seconds=record.latency if record.is_ok else None,
        tokens_per_second=record.tokens_per_second if record.is_ok else None,
        use=use,
    )


async def load_model(target: Target) -> None:
    """Load the model of an Ollama by an empty prompt; without success the first request loads it."""
    async with _Ollama(target) as ollama:
        await ollama.generate()


async def _is_unloaded(client: LoadClient) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(UNLOAD_SECONDS):
            while await _loaded(client) is not None:  # noqa: ASYNC110  # another process changes it
                await asyncio.sleep(0.05)
            return True
    return False


class _Ollama:
    """The load and unload calls of one Ollama."""

    def __init__(self, target: Target) -> None:
        headers = dict(target.headers)
        if target.api_key:
            headers["authorization"] = f"Bearer {target.api_key}"
        self._target = target
        self._http = httpx2.AsyncClient(
            base_url=target.url, headers=headers, verify=target.tls_verify, timeout=LOAD_SECONDS, trust_env=False
        )

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def generate(self, keep_alive: int | None = None) -> Mapping[str, Any] | None:
        """Load the model by an empty prompt, or with `keep_alive` 0 unload it; None: it failed."""
        body: dict[str, Any] = {"model": self._target.model, "prompt": "", "stream": False}
        if keep_alive is not None:
            body["keep_alive"] = keep_alive
        try:
            response = await self._http.post("/api/generate", json=body)
            value = response.json() if response.status_code == 200 else None
        except (httpx2.HTTPError, ValueError):
            return None
        return value if isinstance(value, Mapping) else None
