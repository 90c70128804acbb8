"""GPU memory as engines report it: Ollama's loaded models (`/api/ps`), vLLM's share (metrics).

Neither reports how much memory the GPU has, or which GPU it is.
"""

import asyncio
import re
from collections.abc import Iterable
from datetime import UTC, datetime
from math import inf

import msgspec
from msgspec import Struct

from gateway.engines.engine import decode
from gateway.upstream.backend import Backend
from gateway.upstream.server import VIA, Server
from gateway.upstream.transport_error import TransportError

SECONDS = 3.0
"""Longest wait for a server's answer."""
MAX_LIST = 4 * 1024 * 1024
"""Bytes of a list or of metrics."""
FOREVER = 10 * 365 * 86400
"""Seconds. Ollama gives a model that stays loaded an expiry in the year 2318 or later."""

_CACHE = re.compile(rb"^vllm:cache_config_info\{([^\n]*)\} ", re.MULTILINE)
_CACHE_BYTES = re.compile(rb'kv_cache_memory_bytes="[0-9]')
_ASLEEP = re.compile(rb'^vllm:engine_sleep_state\{[^\n]*sleep_state="awake"[^\n]*\} 0', re.MULTILINE)
_SHARE = re.compile(rb'gpu_memory_utilization="([0-9.]+)"')


class LoadedModel(Struct, frozen=True):
    """A model that an Ollama has loaded.

    `size` and `in_gpu` are in bytes. `seconds` is the time until it is unloaded if no request
    comes:
    inf for never, None if that is unknown.
    """

    name: str
    size: int
    in_gpu: int
    context_length: int | None
    seconds: float | None


class GpuMemory(Struct, frozen=True):
    """GPU memory of one backend, all servers together. None: the backend does not report it.

    `share` is the part of a GPU's memory that vLLM may fill; of several servers, the largest.
    """

    loaded: list[LoadedModel] | None = None
    share: float | None = None
    is_asleep: bool = False
    """True if every vLLM sleeps: its weights are not in the GPU, and a request would fail."""

    @property
    def in_gpu(self) -> int:
        """Bytes of all loaded models in GPU memory."""
        return sum(item.in_gpu for item in self.loaded or ())

    def of(self, backend: Backend, model: str) -> LoadedModel | None:
        """Return the entry of `model`, by any of its names."""
        wanted = backend.engine.canonical(model)
        return next((item for item in self.loaded or () if backend.engine.canonical(item.name) == wanted), None)


class _Entry(Struct):
    name: str
    size: int = 0
    size_vram: int = 0
    context_length: int | None = None
    expires_at: str = ""


class _Entries(Struct):
    models: list[_Entry] | None


_entries = msgspec.json.Decoder(_Entries)


async def query(backend: Backend, gateway_id: bytes, seconds: float = SECONDS) -> GpuMemory:
    """Ask the servers of `backend`; those that do not answer within `seconds` are left out."""
    if backend.kind == "openai":
        return GpuMemory()
    path = "/api/ps" if backend.kind == "ollama" else "/metrics"
    bodies = await asyncio.gather(*(_get(backend, server, path, gateway_id, seconds) for server in backend.servers))
    answers = [body for body in bodies if body is not None]
    if backend.kind == "ollama":
        return GpuMemory(loaded=_loaded(answers, datetime.now(UTC)))
    return GpuMemory(
        share=max(filter(None, map(share_of, answers)), default=None),
        is_asleep=bool(answers) and all(_ASLEEP.search(body) for body in answers),
    )


def share_of(metrics: bytes) -> float | None:
    """Return vLLM's `--gpu-memory-utilization`, from `vllm:cache_config_info` (0.3.3 to 0.33).

    Return None if the size of the KV cache was set instead, as it always is on a CPU: the share
    then bounds nothing.
    """
    info = _CACHE.search(metrics)
    found = _SHARE.search(info[1]) if info and not _CACHE_BYTES.search(info[1]) else None
    try:
        share = float(found[1]) if found else 0.0
    except ValueError:
        return None
    return share if 0 < share <= 1 else None


def _loaded(bodies: Iterable[bytes], now: datetime) -> list[LoadedModel] | None:
    lists = [found for body in bodies if (found := decode(_entries, body)) is not None]
    if not lists:
        return None
    entries = [entry for found in lists for entry in found.models or ()]
    return [
        LoadedModel(entry.name, entry.size, entry.size_vram, entry.context_length, _seconds(entry.expires_at, now))
        for entry in entries
    ]


def _seconds(expires_at: str, now: datetime) -> float | None:
    """Return the seconds until `expires_at`; inf for never.

    Return None for Go's zero date, which a model in use has: it says nothing.
    """
    try:
        at = datetime.fromisoformat(expires_at)
        seconds = (at - now).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
    return None if seconds < 0 else inf if seconds > FOREVER else seconds


async def _get(backend: Backend, server: Server, path: str, gateway_id: bytes, seconds: float) -> bytes | None:
    """Return the body of an answer with status 200, else None."""
    if not server.is_well:
        return None
    head = server.pool.head("GET", path, [*backend.headers(), (VIA.decode(), gateway_id.decode())])
    try:
        async with asyncio.timeout(seconds):
            with await server.pool.request(head) as response:
                body = await response.read(MAX_LIST)
                return body if response.status == 200 else None
    except (TransportError, TimeoutError):
        return None
