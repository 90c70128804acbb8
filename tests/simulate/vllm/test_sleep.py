"""Sleep mode of the vLLM stand-in, as vLLM 0.32 has it."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.simulate import Model, Options, OutOfGpuMemory, read_gpu, running
from gateway.simulate.gpu import SharedGpu

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def options(file: Path | None = None, **more: Any) -> Options:
    found: dict[str, Any] = {"dev_mode": True, "sleep_mode": True, "gpu_file": str(file or ""), "gpu_memory": 100}
    return Options("vllm", (Model("m"),), **found | more)


def client(url: str) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(base_url=url, trust_env=False, verify=False, timeout=30)


async def test_an_engine_that_sleeps_frees_the_gpu_and_answers_when_it_wakes(tmp_path: Path) -> None:
    file = tmp_path / "gpu"
    async with running(options(file)) as server, client(server.base_url) as http:
        assert len(read_gpu(file)["held"]) == 1
        assert (await http.post("/sleep?level=1&mode=wait")).json() == {"status": "sleeping", "level": 1}
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert 'sleep_state="awake"} 0.0' in (await http.get("/metrics")).text
        assert (await http.get("/health")).status_code == 200
        assert not read_gpu(file)["held"]
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
        while not server.engine.asked_asleep:
            await asyncio.sleep(0.01)
        assert (await http.post("/wake_up")).json() == {"status": "awake", "tags": None}
        assert (await asking).status_code == 200
        assert len(read_gpu(file)["held"]) == 1


async def test_waking_without_memory_fails_and_the_engine_sleeps_on(tmp_path: Path) -> None:
    file = tmp_path / "gpu"
    async with running(options(file, asleep=True)) as server, client(server.base_url) as http:
        other = SharedGpu(str(file), 100)
        other.hold(50)
        assert (await http.post("/wake_up")).status_code == 500
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        with pytest.raises(OutOfGpuMemory):
            running(options(file))
        other.hold(0)
        assert (await http.post("/wake_up")).status_code == 200


async def test_without_sleep_mode_the_memory_stays(tmp_path: Path) -> None:
    file = tmp_path / "gpu"
    async with running(options(file, sleep_mode=False)) as server, client(server.base_url) as http:
        assert (await http.post("/sleep?level=1")).status_code == 200
        assert (await http.get("/is_sleeping")).json() == {"is_sleeping": True}
        assert len(read_gpu(file)["held"]) == 1
        info = (await http.get("/server_info?config_format=json")).json()
        assert info["vllm_config"]["model_config"]["enable_sleep_mode"] is False


async def test_without_the_dev_mode_there_are_no_endpoints() -> None:
    async with running(options(dev_mode=False)) as server, client(server.base_url) as http:
        assert (await http.post("/sleep")).status_code == 404
        assert (await http.get("/is_sleeping")).status_code == 404


async def test_wait_lets_requests_end_and_abort_does_not() -> None:
    slow = options(tokens_per_second=20, answer_tokens=6)
    async with running(slow) as server, client(server.base_url) as http:
        for mode, status in (("wait", 200), ("abort", 500)):
            asking = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
            while not server.engine.running:
                await asyncio.sleep(0.01)
            assert (await http.post(f"/sleep?mode={mode}")).status_code == 200
            assert (await asking).status_code == status
            await http.post("/wake_up")
        assert (await http.post("/sleep?level=3")).status_code == 400
