"""Two gateways of two processes each, as on two machines, that share a real Redis: four replicas act as one."""

import asyncio
import os
import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.fakes.fault_backend import FaultBackend
from tests.fakes.redis import redis_server
from tests.fakes.supervised import Supervised, engines, settings_file, until

pytestmark = pytest.mark.usefixtures("empty_environment")

LIMIT = 6
BOTH = {"1", "2"}


@pytest.mark.timeout(300)
async def test_processes_of_several_machines_act_as_one_gateway(tmp_path: Path) -> None:
    """One set of processes for all steps: to start them takes longer than everything else."""
    async with AsyncExitStack() as stack:
        redis = stack.enter_context(redis_server())
        vllm, ollama = await stack.enter_async_context(engines())
        vllm.mode = "leisurely"  # long enough for all slots to be in use at the same time
        machines = []
        for name in ("one", "other"):
            (folder := tmp_path / name).mkdir()
            settings_file(folder, vllm, ollama, max_concurrency=LIMIT)
            machines.append(Supervised(folder, 2, GATEWAY_REDIS_URL=redis.url))
        await asyncio.gather(*(stack.enter_async_context(machine) for machine in machines))
        one, other = machines
        await until_shared_by(4, one, other)
        await check_that_limits_hold_over_all_processes(one, other, vllm)
        await check_that_a_switch_reaches_all_processes(one, other)
        await check_that_a_killed_process_gives_its_slots_back(one, other, vllm)
        await check_that_a_killed_parent_gives_all_slots_back(one, other, vllm)
        await check_that_a_stop_under_load_loses_no_request(other, vllm)


async def until_shared_by(replicas: int, *machines: Supervised) -> None:
    """Wait until each process of these machines shares the limits with so many replicas, itself included."""

    async def all_see_them() -> bool:
        seen = [await machine.metrics("gateway_replicas") for machine in machines]
        return all(counts == dict.fromkeys(BOTH, replicas) for counts in seen)

    await until(all_see_them)


async def until_sent(engine: FaultBackend, more: int) -> None:
    at_least = len(engine.requests) + more

    async def are_sent() -> bool:
        return len(engine.requests) >= at_least

    await until(are_sent)


async def check_that_limits_hold_over_all_processes(one: Supervised, other: Supervised, vllm: FaultBackend) -> None:
    assert await asyncio.gather(one.chat(40), other.chat(40)) == [[200] * 40] * 2
    assert vllm.most_at_once == LIMIT


async def check_that_a_switch_reaches_all_processes(one: Supervised, other: Supervised) -> None:
    async def until_all_have(backend: str) -> None:
        async def all_have_it() -> bool:
            name = f'gateway_active_backend{{backend="{backend}"'
            return [await machine.metrics(name) for machine in (one, other)] == [dict.fromkeys(BOTH, 1.0)] * 2

        await until(all_have_it)

    answer = (await one.post("/ops/rollback", {})).json()
    assert (answer["changed"], answer["persisted"], answer["shared"]) == (True, True, True)
    await until_all_have("ollama")
    assert (await other.post("/ops/undo", {})).json()["changed"]
    await until_all_have("vllm")


async def check_that_a_killed_process_gives_its_slots_back(
    one: Supervised, other: Supervised, vllm: FaultBackend
) -> None:
    first, _ = (each["pid"] for each in await one.until_all_serve())
    load = asyncio.ensure_future(asyncio.gather(one.chat(40), other.chat(40)))
    await until_sent(vllm, 10)
    os.kill(first, signal.SIGKILL)
    of_one, of_other = await load
    assert set(of_one) <= {200, 0}
    assert of_other == [200] * 40

    async def is_replaced() -> bool:
        return first not in [each["pid"] for each in await one.until_all_serve()]

    await until(is_replaced)  # the status may be a second old
    await until_shared_by(4, one, other)
    vllm.most_at_once = 0
    assert await asyncio.gather(one.chat(40), other.chat(40)) == [[200] * 40] * 2
    assert vllm.most_at_once == LIMIT


async def check_that_a_killed_parent_gives_all_slots_back(
    one: Supervised, other: Supervised, vllm: FaultBackend
) -> None:
    load = asyncio.ensure_future(one.chat(40))
    await until_sent(vllm, 10)
    one.process.kill()
    assert set(await load) <= {200, 0, 503}
    await until_shared_by(2, other)
    vllm.most_at_once = 0
    assert await other.chat(40) == [200] * 40
    assert vllm.most_at_once == LIMIT


async def check_that_a_stop_under_load_loses_no_request(machine: Supervised, vllm: FaultBackend) -> None:
    load = asyncio.ensure_future(machine.chat(40))
    await until_sent(vllm, 10)
    machine.process.send_signal(signal.SIGTERM)
    statuses = await load
    assert set(statuses) <= {200, 0}  # a client that had not connected yet is refused
    assert statuses.count(200) >= 10
    assert await asyncio.to_thread(machine.process.wait, 120) == 0
    assert '"outcome":"cancelled"' not in machine.log.read_text()
    assert vllm.most_at_once == LIMIT
