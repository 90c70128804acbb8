"""GPU memory as real engines report it, and answers that report nothing."""

from datetime import UTC, datetime
from math import inf
from typing import Any

import msgspec
import pytest

from gateway import config
from gateway.engines.engine import ModelFacts
from gateway.rollout.preflight import gpu_memory
from gateway.upstream.backend import Backend
from tests.fakes.fault_backend import FaultBackend

# vLLM 0.32 on a CPU, without some labels; there the size of the KV cache is always set.
ON_CPU = (
    b"# TYPE vllm:cache_config_info gauge\n"
    b'vllm:cache_config_info{block_size="128",cache_dtype="auto",engine="0",gpu_memory_utilization="0.92",'
    b'kv_cache_memory_bytes="1073741824",num_gpu_blocks="32768",sliding_window="None"} 1.0\n'
)
ON_GPU = ON_CPU.replace(b'"1073741824"', b'"None"')
# vLLM 0.3.3, vllm-project/vllm#3100.
FIRST = (
    b'vllm:cache_config_info{block_size="16",gpu_memory_utilization="0.9",num_gpu_blocks="24188",'
    b'swap_space_bytes="4294967296"} 1.0\n'
)
# Ollama 0.33.
LOADED = (
    b'{"models":[{"name":"qwen3-vl:latest","model":"qwen3-vl:latest","size":96364133,"digest":"0e61",'
    b'"details":{"family":"qwen3vl"},'
    b'"expires_at":"2026-11-21T17:44:26.525041489Z","size_vram":50000000,"context_length":4096}]}'
)
NOW = datetime(2026, 11, 21, 17, 43, 26, tzinfo=UTC)


def ollama(url: str = "http://127.0.0.1:1") -> Backend:
    settings = config.build(
        {"backends": {"ollama": {"kind": "ollama", "base_url": url}}, "tiers": {"t": {"models": {"ollama": "m"}}}}
    )
    return Backend(settings.backends["ollama"])


@pytest.mark.parametrize(
    ("metrics", "share"),
    [
        (ON_GPU, 0.92),
        (FIRST, 0.9),
        (ON_CPU, None),
        (b"", None),
        (ON_GPU.replace(b"0.92", b"0"), None),
        (ON_GPU.replace(b"0.92", b"1.2.3"), None),
        (ON_GPU.replace(b"0.92", b"7"), None),
    ],
    ids=["gpu", "vllm-0.3.3", "cpu", "none", "zero", "not-a-number", "above-one"],
)
def test_share_of_the_gpu_is_read_if_it_counts(metrics: bytes, share: float | None) -> None:
    assert gpu_memory.share_of(b'vllm:num_requests_running{engine="0"} 0.0\n' + metrics) == share


async def test_loaded_model_is_found_by_each_of_its_names() -> None:
    memory = gpu_memory.GpuMemory(loaded=gpu_memory._loaded([LOADED], NOW))
    for name in ("qwen3-vl", "QWEN3-VL:latest", "library/qwen3-vl"):
        found = memory.of(ollama(), name)
        assert found is not None
        assert (found.size, found.in_gpu, found.context_length, round(found.seconds or 0)) == (
            96364133,
            50000000,
            4096,
            61,
        )
    assert memory.of(ollama(), "qwen3") is None
    assert memory.in_gpu == 50000000


@pytest.mark.parametrize(
    ("expires_at", "seconds"),
    [
        ("2319-03-03T09:29:37.047750274Z", inf),
        ("2026-11-21T19:43:46.5+02:00", 20.5),
        ("0001-01-01T00:00:00Z", None),
        ("2026-11-21T17:44:26", None),
        ("soon", None),
    ],
)
def test_time_until_unloading_is_read_from_the_expiry(expires_at: str, seconds: float | None) -> None:
    body = msgspec.json.encode({"models": [{"name": "m", "expires_at": expires_at}]})
    loaded = gpu_memory._loaded([body], NOW)
    assert loaded is not None
    assert loaded[0].seconds == seconds


@pytest.mark.parametrize(
    ("bodies", "loaded"),
    [([], None), ([b"[]"], None), ([b"<html>"], None), ([b'{"models":null}'], []), ([b"x", b'{"models":[]}'], [])],
    ids=["no-answer", "list", "html", "null", "one-of-two"],
)
def test_malformed_list_reports_nothing(bodies: list[bytes], loaded: Any) -> None:
    assert gpu_memory._loaded(bodies, NOW) == loaded


async def test_server_that_is_down_or_of_another_kind_reports_nothing() -> None:
    down = ollama()
    assert await gpu_memory.query(down, b"id") == gpu_memory.GpuMemory()
    down.close()
    async with FaultBackend("vllm") as other:
        wrong = ollama(other.base_url)
        wrong.servers[0].update_models({"m": ModelFacts()})
        assert await gpu_memory.query(wrong, b"id") == gpu_memory.GpuMemory()
        wrong.close()
