import asyncio
from dataclasses import replace
from typing import Any

import pytest

from gateway import simulate
from gateway.bench.compare_engine import EngineWatch, cold_start, is_on_this_machine, kv_cache_share, server_facts
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.target import BenchRequest, LoadClient, Target
from tests.bench.answering_client import AnsweringClient, answered
from tests.fakes.stand_ins import stand_in

REQUEST = BenchRequest(({"role": "user", "content": "4 words"},), 4)
OLLAMA = simulate.Options("ollama", (simulate.Model("qwen3:8b", size=2**30),), load_seconds=0.2, gpu=True)


class Gpus:
    """GPUs whose readings the test gives; every reading is used once, the last one from then on."""

    def __init__(self, *memory: float | None) -> None:
        self._memory = list(memory)

    def memory_percent(self) -> float | None:
        return self._memory.pop(0) if len(self._memory) > 1 else self._memory[0]

    def use_percent(self) -> float | None:
        return 80.0

    def names(self) -> list[str]:
        return ["GPU"]


class Pages(AnsweringClient):
    """A client of a server with these pages."""

    def __init__(self, url: str = "http://127.0.0.1:1", **pages: str | Exception) -> None:
        super().__init__(lambda request, number: answered("x"), url=url)
        self.pages = pages
        self.asked: list[str] = []

    async def get(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        page = self.pages.get(path.rpartition("/")[2])
        if isinstance(page, Exception):
            raise page
        return (404, b"") if page is None else (200, page.encode())


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://127.0.0.1:11434", True),
        ("http://localhost:8000", True),
        ("http://[::1]:8000", True),
        ("http://10.0.0.5:8000", False),
        ("http://localhost.example.com", False),
        ("https://gpu.example.com", False),
    ],
)
def test_the_gpus_here_are_those_of_a_server_here(url: str, here: bool) -> None:
    assert is_on_this_machine(url) is here


async def test_gpu_readings_are_averaged_over_the_block() -> None:
    async with EngineWatch(Pages(), Gpus(90.0, 92.0), interval=3600) as watch:
        pass
    assert watch.use().gpu_memory_percent == 91
    assert watch.use().gpu_percent == 80


@pytest.mark.virtual_time
async def test_gpu_is_read_again_and_again() -> None:
    async with EngineWatch(Pages(), Gpus(10.0, 20.0, 30.0), interval=0.5) as watch:
        await asyncio.sleep(1.1)
    assert watch.use().gpu_memory_percent == pytest.approx((10 + 20 + 30 + 30) / 4)


async def test_the_gpu_of_another_machine_is_not_seen() -> None:
    async with EngineWatch(Pages("http://10.0.0.5:8000"), Gpus(90.0)) as watch:
        pass
    assert watch.use().gpu_memory_percent is None


@pytest.mark.parametrize(
    ("page", "share"),
    [
        ('# HELP x\nvllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25\n', 0.25),
        ('vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n', 0.5),
        ("vllm:kv_cache_usage_perc 1e-2\n", 0.01),
        ("gateway_requests_total 3\n", None),
        ("vllm:kv_cache_usage_perc nonsense\n", None),
        (ConnectionRefusedError(), None),
        (EOFError(), None),
    ],
)
async def test_the_fullest_kv_cache_counts(page: str | Exception, share: float | None) -> None:
    assert await kv_cache_share(Pages(metrics=page)) == share


async def test_a_server_without_a_kv_cache_in_its_metrics_is_asked_once() -> None:
    client = Pages(metrics="up 1\n")
    async with EngineWatch(client, None, interval=3600):
        pass
    assert client.asked.count("/metrics") == 1


async def test_the_version_of_a_server_is_seen() -> None:
    async with stand_in(OLLAMA) as server:
        client = HttpLoadClient(Target(server.base_url, "qwen3:8b", "ollama"))
        assert await server_facts(client) == {"ollama": "0.33.0"}
        await client.close()
    assert await server_facts(Pages(version='{"version": "0.33.0"}')) == {"ollama": "0.33.0"}
    assert await server_facts(Pages(version="[]")) == {}
    ready = '{"status": "ready", "unserved_tiers": []}'
    gateway = {"readyz": ready, "version": '{"version": "0.33.0"}', "openapi.json": '{"info": {"version": "0.1.0"}}'}
    assert await server_facts(Pages(**gateway)) == {"gateway": "0.1.0"}
    assert await server_facts(Pages(readyz=ready)) == {"gateway": ""}
    assert await server_facts(Pages(version=OSError())) == {}


async def cold(client: LoadClient, gpus: Any = None) -> Any:
    return await cold_start(client, gpus, REQUEST)


async def test_an_ollama_unloads_loads_and_answers_in_each_cold_start() -> None:
    async with stand_in(replace(OLLAMA, load_seconds=1.5)) as server:
        client = HttpLoadClient(Target(server.base_url, "qwen3:8b", "ollama"))
        await client.send(REQUEST)
        found = await cold(client, Gpus(50.0))
        await client.close()
    assert found.reason == ""
    assert found.load_seconds >= 1.5
    assert 0 < found.response_seconds < found.load_seconds
    assert found.tokens_per_second > 0
    assert found.use.gpu_memory_percent == 50
    assert found.use.model_gib == 1


async def test_a_server_without_the_api_has_no_load_time() -> None:
    async with stand_in(simulate.Options("vllm")) as server:
        client = HttpLoadClient(Target(server.base_url, "Qwen/Qwen3-VL-8B-Instruct"))
        found = await cold(client)
        await client.close()
    assert (found.load_seconds, found.reason) == (None, "cold_no_api")


async def test_a_model_that_stays_loaded_has_no_load_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a gateway: `keep_alive: 0` is accepted and unloads nothing."""
    monkeypatch.setattr("gateway.bench.compare_engine.UNLOAD_SECONDS", 0.05)
    async with stand_in(OLLAMA) as server:
        stays = Pages(server.base_url, ps='{"models": [{"name": "m:latest", "size": 5}]}')
        stays.target = Target(server.base_url, "m")
        found = await cold(stays)
        assert found.reason == "cold_not_unloaded"
        known = Pages(server.base_url, ps='{"models": [{"name": "qwen3:8b", "size": 5}]}')
        known.target = Target(server.base_url, "qwen3:8b")
        assert (await cold(known)).reason == "cold_not_unloaded"
