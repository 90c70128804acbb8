"""Loads and evictions of the Ollama stand-in, as observed on a real Ollama."""

import asyncio
from typing import Any

import pytest

from gateway.simulate import Fault, Model, Options, Running, running
from tests.simulate.endpoints import client, sent, until, user

A, B, C = (Model(name, size=size) for name, size in (("a", 4), ("b", 4), ("c", 3)))


def options(**more: Any) -> Options:
    return Options("ollama", models=(A, B, C), **more)


async def chat(server: Running, model: str, **more: Any) -> int:
    async with client(server) as http:
        return (
            await http.post("/api/chat", json={"model": model, "messages": user("Hello"), "stream": False, **more})
        ).status_code


async def loaded(server: Running) -> list[str]:
    async with client(server) as http:
        return [runner["name"].partition(":")[0] for runner in (await http.get("/api/ps")).json()["models"]]


def stalled(server: Running, model: str) -> Any:
    """Send a request that runs until its client leaves."""
    server.engine.inject(Fault("stall"))
    return sent(server, "/api/chat", {"model": model, "messages": user("Hello")})


async def test_load_that_does_not_fit_evicts_the_idle_model_with_the_shortest_keep_alive() -> None:
    async with running(options(max_loaded=2)) as server:
        await chat(server, "a", keep_alive="9m")
        await chat(server, "b", keep_alive="8m")
        await chat(server, "c")
        assert await loaded(server) == ["a", "c"]


async def test_memory_limits_the_bytes_of_loaded_models() -> None:
    async with running(options(memory=8)) as server:
        for model in "abc":
            await chat(server, model)
        assert await loaded(server) == ["b", "c"]


async def test_model_larger_than_the_memory_is_loaded_alone() -> None:
    async with running(options(memory=3)) as server:
        assert [await chat(server, model) for model in "ab"] == [200, 200]
        assert await loaded(server) == ["b"]


async def test_load_waits_for_a_busy_runner_that_still_serves_new_requests() -> None:
    async with running(options(max_loaded=1, parallel=2)) as server:
        async with stalled(server, "a"):
            await until(lambda: server.engine.running == 1)
            waiting = asyncio.create_task(chat(server, "b"))
            await until(lambda: server.engine.waiting == 1)
            assert await chat(server, "a") == 200
            assert not waiting.done()
            assert await loaded(server) == ["a"]
        assert await waiting == 200
        assert await loaded(server) == ["b"]


async def test_request_with_keep_alive_keeps_an_expiring_runner_and_the_load_waits_on() -> None:
    async with running(options(max_loaded=1, parallel=2)) as server:
        async with stalled(server, "a"):
            await until(lambda: server.engine.running == 1)
            waiting = asyncio.create_task(chat(server, "b"))
            await until(lambda: server.engine.waiting == 1)
            await chat(server, "a", keep_alive=0.2)
        await until(lambda: server.engine.running == 0)
        assert (waiting.done(), await loaded(server)) == (False, ["a"])
        assert await waiting == 200
        assert await loaded(server) == ["b"]


async def test_client_that_leaves_while_its_load_waits_has_still_evicted_the_other_model() -> None:
    async with running(options(max_loaded=1)) as server:
        async with stalled(server, "a"):
            await until(lambda: server.engine.running == 1)
            async with sent(server, "/api/chat", {"model": "b", "messages": user("Hello")}):
                await until(lambda: server.engine.waiting == 1)
            await until(lambda: server.engine.cancelled == 1)
        await until(lambda: server.engine.cancelled == 2)
        assert await loaded(server) == []


@pytest.mark.virtual_time(only=True)
async def test_request_that_waits_for_an_aborted_load_starts_a_new_one() -> None:
    async with running(options(load_seconds=0.3)) as server:
        async with sent(server, "/api/chat", {"model": "a", "messages": user("Hello")}):
            await until(lambda: server.engine.waiting == 1)
            waiting = asyncio.create_task(chat(server, "a"))
            await until(lambda: server.engine.waiting == 2)
        assert await waiting == 200
        assert server.engine.state() == {"running": 0, "waiting": 0, "served": 1, "cancelled": 1}


@pytest.mark.virtual_time(only=True)
async def test_load_is_refused_when_too_many_wait_for_another_load() -> None:
    async with running(options(load_seconds=1.0, max_queue=3)) as server:
        async with sent(server, "/api/chat", {"model": "a", "messages": user("Hello")}):
            await until(lambda: server.engine.waiting == 1)
            statuses = await asyncio.gather(*(chat(server, "b") for _ in range(10)))
        assert sorted(statuses) == [200] * 3 + [503] * 7


async def test_idle_runner_expires_after_its_keep_alive_but_one_in_use_does_not() -> None:
    async with running(options(time_scale=0.001)) as server, stalled(server, "a"):
        await until(lambda: server.engine.running == 1)
        await chat(server, "b", keep_alive="100s")
        await asyncio.wait_for(_expired(server, "b"), 5)
        assert await loaded(server) == ["a"]


async def _expired(server: Running, model: str) -> None:
    while model in await loaded(server):
        pass


async def test_unload_of_a_busy_model_waits_for_its_last_request() -> None:
    async with running(options()) as server, client(server) as http:
        async with stalled(server, "a"):
            await until(lambda: server.engine.running == 1)
            answer = (await http.post("/api/generate", json={"model": "a", "keep_alive": 0})).json()
            assert (answer["done_reason"], await loaded(server)) == ("unload", ["a"])
        await until(lambda: server.engine.running == 0)
        assert await loaded(server) == []


async def test_ps_shows_context_size_and_gpu_memory_of_each_runner() -> None:
    models = (Model("v", family="qwen3vl", vision=True, context_length=4096, trained=262144, size=7),)
    async with running(Options("ollama", models=models, gpu=True)) as server, client(server) as http:
        seen = []
        for num_ctx in (None, 100, 8192, 999999):
            await http.post("/api/generate", json={"model": "v", "options": {"num_ctx": num_ctx}})
            seen += (await http.get("/api/ps")).json()["models"]
        shown = (await http.post("/api/show", json={"model": "v"})).json()
    assert [runner["context_length"] for runner in seen] == [4096, 2048, 8192, 262144]
    assert {(runner["size"], runner["size_vram"]) for runner in seen} == {(7, 7)}
    assert shown["model_info"]["qwen3vl.context_length"] == 262144
    assert shown["capabilities"] == ["completion", "vision"]


async def test_load_waits_on_after_its_client_has_left_and_no_other_load_begins() -> None:
    """The wait for the evicted runner belongs to the server, not to the request (processPending)."""
    async with running(options(memory=7, parallel=2)) as server, client(server) as http:
        async with stalled(server, "a"):
            await until(lambda: server.engine.running == 1)
            async with sent(server, "/api/chat", {"model": "b", "messages": user("Hello")}):
                await until(lambda: server.engine.waiting == 1)
                await chat(server, "a", keep_alive=600)
        await until(lambda: server.engine.state()["cancelled"] == 2)
        waiting = asyncio.create_task(chat(server, "c"))
        await until(lambda: server.engine.waiting == 1)
        assert (await loaded(server), waiting.done()) == (["a"], False)
        await http.post("/api/generate", json={"model": "a", "keep_alive": 0})
        assert await waiting == 200
        assert await loaded(server) == ["c"]


async def test_load_that_waits_for_a_busy_runner_goes_on_when_another_one_is_unloaded() -> None:
    """The busy one with the shortest `keep_alive` is chosen, but the wait is for any unload."""
    async with running(options(max_loaded=2)) as server, client(server) as http, stalled(server, "a"):
        await until(lambda: server.engine.running == 1)
        async with stalled(server, "c"):
            await until(lambda: server.engine.running == 2)
            waiting = asyncio.create_task(chat(server, "b"))
            await until(lambda: server.engine.waiting == 1)
            await http.post("/api/generate", json={"model": "c", "keep_alive": 0})
            assert not waiting.done()
        assert await waiting == 200
        assert sorted(await loaded(server)) == ["a", "b"]


async def test_idle_runner_is_evicted_at_once_whatever_its_keep_alive() -> None:
    async with running(options(memory=4)) as server:
        await chat(server, "a", keep_alive=-1)
        assert await chat(server, "b") == 200
        assert await loaded(server) == ["b"]


@pytest.mark.parametrize("by_command", [True, False])
async def test_frozen_model_answers_nothing_until_it_is_unloaded_while_others_work(by_command: bool) -> None:
    async with running(options(freeze_after=3)) as server, client(server) as http:
        if by_command:
            assert (await http.post("/simulate/freeze", json={"model": "a"})).status_code == 400
            await chat(server, "a")
            assert (await http.post("/simulate/freeze", json={"model": "a"})).status_code == 200
        else:
            async with stalled(server, "a"), stalled(server, "a"):
                await until(lambda: server.engine.running + server.engine.waiting == 2)
            await until(lambda: server.engine.cancelled == 2)
            assert await chat(server, "a") == 200
            await asyncio.sleep(1)
            server.engine.faults.clear()
            async with stalled(server, "a"), stalled(server, "a"), stalled(server, "a"):
                await until(lambda: server.engine.running + server.engine.waiting == 3)
            server.engine.faults.clear()
            await until(lambda: server.engine.cancelled == 5)
        hanging = asyncio.create_task(chat(server, "a"))
        await until(lambda: server.engine.waiting == 1)
        assert await chat(server, "b") == 200
        assert (hanging.done(), "a" in await loaded(server)) == (False, True)
        await http.post("/api/generate", json={"model": "a", "keep_alive": 0})
        assert "a" in await loaded(server)
        hanging.cancel()
        await until(lambda: server.engine.waiting == 0)
        assert "a" not in await loaded(server)
        assert await chat(server, "a") == 200


async def test_embedding_model_is_unloaded_like_any_other() -> None:
    models = (Model("e", embedding=8, size=1),)
    async with running(Options("ollama", models=models)) as server, client(server) as http:
        await http.post("/api/embed", json={"model": "e", "input": "a text"})
        assert await loaded(server) == ["e"]
        answer = await http.post("/api/generate", json={"model": "e", "keep_alive": 0})
        assert answer.json()["done_reason"] == "unload"
        assert await loaded(server) == []
