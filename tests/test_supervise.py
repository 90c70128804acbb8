"""Several gateway processes on one port: what they share, and how they start, restart and end.

Covers: gateway/cli/serve_replicas.py
Covers: gateway/supervise.py
Covers: gateway/replica_process.py
Covers: gateway/replicas/hub.py
Covers: gateway/replicas/member.py
Covers: gateway/replicas/member_state.py
Covers: gateway/replicas/messages.py
Covers: gateway/replicas/link_down.py
Covers: gateway/sharing/hub_sharing.py
"""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.replicas.messages import Hello
from gateway.serve import open_listeners
from gateway.supervise import Replica, Supervisor, warnings
from tests.cli.harness import process
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.keys import key_of, write_keys
from tests.fakes.supervised import Supervised, engines, settings_file, until

FREE = key_of("free")

pytestmark = pytest.mark.usefixtures("empty_environment")


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def until_gone(pids: list[int]) -> None:
    async def all_gone() -> bool:
        return not any(is_running(pid) for pid in pids)

    await until(all_gone)


async def until_counted(vllm: FaultBackend, at_least: int) -> None:
    async def has_begun() -> bool:
        return len(vllm.requests) >= at_least

    await until(has_begun)


@pytest.mark.timeout(300)
async def test_replicas_serve_as_one_gateway(tmp_path: Path) -> None:
    """One gateway for all steps: to start its processes takes longer than everything else."""
    keys = write_keys(tmp_path / "keys.yaml", free={}, counted={"requests_per_minute": 15})
    variables = {"GATEWAY_USAGE_FILE": str(tmp_path / "usage.db"), "GATEWAY_KEYS_FILE": str(keys)}
    async with engines() as (vllm, ollama):
        settings_file(tmp_path, vllm, ollama, max_concurrency=3)
        async with Supervised(tmp_path, 2, **variables) as gateway:
            await check_that_limits_and_counts_are_those_of_one_gateway(gateway, vllm)
            await check_that_sighup_reloads_all(gateway)
            await check_that_a_rollback_reaches_all_replicas(gateway, vllm, ollama)
            await check_that_a_killed_replica_comes_back_with_its_slots(gateway, ollama)
            await check_that_a_stop_under_load_loses_no_request(gateway, ollama)
    assert json.loads(gateway.state_file.read_text())["rollout"]["tiers"]["standard"]["backend"] == "ollama"


async def check_that_limits_and_counts_are_those_of_one_gateway(gateway: Supervised, vllm: FaultBackend) -> None:
    assert await gateway.chat(40, FREE) == [200] * 40
    assert vllm.most_at_once == 3

    counts = await gateway.metrics("gateway_requests_total")
    assert counts.keys() == {"1", "2"}
    assert sum(counts.values()) == 40
    assert sum((await gateway.metrics("gateway_request_duration_seconds_count")).values()) == 40
    assert await gateway.metrics("gateway_replicas") == {"1": 2, "2": 2}
    (row,) = (await gateway.get("/ops/usage"))["rows"]
    assert row["requests"] == 40

    # The limit of a key is that of all replicas. What one of them holds and does not use goes to the others later.
    statuses = await gateway.chat(30, key_of("counted"))
    served = statuses.count(200)
    assert served + statuses.count(429) == 30
    async with asyncio.timeout(20):
        while served < 15:
            served += (await gateway.chat(1, key_of("counted"))).count(200)
    assert served == 15
    assert await gateway.chat(4, key_of("counted")) == [429] * 4


async def check_that_sighup_reloads_all(gateway: Supervised) -> None:
    gateway.process.send_signal(signal.SIGHUP)

    async def all_have_reread() -> bool:
        return gateway.log.read_text().count("settings reread (signal)") == 2

    await until(all_have_reread)


async def check_that_a_rollback_reaches_all_replicas(
    gateway: Supervised, vllm: FaultBackend, ollama: FaultBackend
) -> None:
    answer = (await gateway.post("/ops/rollback", {})).json()
    assert (answer["changed"], answer["persisted"], answer["shared"]) == (True, True, True)

    async def all_have_it() -> bool:
        return await gateway.metrics('gateway_active_backend{backend="ollama"') == {"1": 1, "2": 1}

    await until(all_have_it)
    before = len(vllm.requests)
    assert await gateway.chat(10, FREE) == [200] * 10
    assert (len(ollama.requests), len(vllm.requests)) == (10, before)


async def check_that_a_killed_replica_comes_back_with_its_slots(gateway: Supervised, ollama: FaultBackend) -> None:
    first, second = (each["pid"] for each in await gateway.until_all_serve())
    ollama.most_at_once = 0
    load = asyncio.ensure_future(gateway.chat(40, FREE))
    await until_counted(ollama, len(ollama.requests) + 5)
    os.kill(first, signal.SIGKILL)
    statuses = await load
    assert ollama.most_at_once == 2
    assert set(statuses) <= {200, 0}
    assert statuses.count(200) >= 10
    await until_gone([first])
    replicas = await gateway.until_all_serve()
    assert replicas[0]["pid"] not in (first, second)
    assert replicas[1]["pid"] == second
    ollama.most_at_once = 0
    assert await gateway.chat(40, FREE) == [200] * 40
    assert ollama.most_at_once == 2
    # It has the roll-out that was changed before it was started.
    assert await gateway.metrics('gateway_active_backend{backend="ollama"') == {"1": 1, "2": 1}


async def check_that_a_stop_under_load_loses_no_request(gateway: Supervised, ollama: FaultBackend) -> None:
    pids = [each["pid"] for each in await gateway.until_all_serve()]
    load = asyncio.ensure_future(gateway.chat(40, FREE))
    await until_counted(ollama, len(ollama.requests) + 10)
    gateway.process.send_signal(signal.SIGTERM)
    statuses = await load
    # A client that had not connected yet is refused; what was accepted is answered.
    assert set(statuses) <= {200, 0}
    assert statuses.count(200) >= 10
    assert await asyncio.to_thread(gateway.process.wait, 60) == 0
    await until_gone(pids)
    assert sum(1 for line in gateway.log.read_text().splitlines() if '"outcome":"cancelled"' in line) == 0


@pytest.mark.timeout(300)
async def test_replicas_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """Their requests get a last error event, and the port is free."""
    async with engines() as (vllm, ollama):
        vllm.mode = "slow"
        settings_file(tmp_path, vllm, ollama)
        async with Supervised(tmp_path, 2) as gateway:
            pids = [each["pid"] for each in await gateway.until_all_serve()]
            load = asyncio.ensure_future(gateway.chat(4))
            await until_counted(vllm, 4)
            gateway.process.kill()
            await until_gone(pids)
            assert set(await load) <= {0, 503}
            with socket.socket() as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(("127.0.0.1", gateway.port))


@asynccontextmanager
async def supervised(replicas: int) -> AsyncIterator[Supervisor]:
    """A supervisor in this process, whose replicas are real processes."""
    settings = config.build({"port": 0, "state_file": "", "drain_delay": 0, "drain_timeout": 1})
    with closing(open_listeners(settings)) as listeners:
        supervisor = Supervisor(settings, replicas, listeners, None)
        try:
            yield supervisor
        finally:
            await supervisor.close()


async def test_a_stop_while_replicas_are_started_starts_no_further_one(monkeypatch: pytest.MonkeyPatch) -> None:
    async with supervised(3) as supervisor:
        started: list[int] = []
        start = supervisor._start

        async def start_and_stop(number: int) -> Replica:
            replica = await start(number)
            started.append(replica.process.pid)
            supervisor.stop()
            return replica

        monkeypatch.setattr(supervisor, "_start", start_and_stop)
        assert await supervisor.run() == 0
        assert len(started) == 1
        await until_gone(started)


async def test_a_stop_before_the_first_replica_serves_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would miss the order to drain, and serve until they are killed."""
    async with supervised(3) as supervisor:
        greeted: list[int] = []
        pids: list[int] = []

        def greet(replica: Replica) -> None:
            greeted.append(replica.number)
            pids.extend(each.process.pid for each in supervisor._current.values())
            supervisor._hub.join(replica, Hello(replica.number, replica.name, 3, b"", None, {}))
            supervisor.stop()
            replica.channel.close()

        monkeypatch.setattr(supervisor, "_greet", greet)
        await supervisor.run()
        assert greeted == [1]
        assert len(pids) == 3
        await until_gone(pids)


def test_a_mistake_in_the_settings_is_one_line_with_exit_status_2() -> None:
    with process("serve", "--replicas", "3", GATEWAY_PORT="0", LLM_BACKEND="olama") as started:
        _, errors = started.communicate(timeout=60)
    assert started.returncode == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith("LLM_BACKEND: 'olama' is not a backend")


def test_a_port_in_use_is_one_line_with_exit_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process("serve", "--replicas", "3", GATEWAY_PORT=str(port)) as started:
            _, errors = started.communicate(timeout=60)
    assert started.returncode == 2
    assert errors.splitlines() == [f"GATEWAY_PORT: cannot listen on 127.0.0.1:{port}: Address already in use"]


def test_warning_names_the_ollamas_whose_parallelism_is_not_known() -> None:
    def lines(**changes: Any) -> list[str]:
        backends: dict[str, Any] = {
            "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"},
            "held": {"kind": "ollama", "base_url": "http://127.0.0.1:2", "model_concurrency": 2},
            "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:3"},
        }
        tiers = {"standard": {"models": dict.fromkeys(backends, MODEL)}}
        return warnings(config.build({"backends": backends, "tiers": tiers, "state_file": "", **changes}))

    (line,) = lines()
    assert line.startswith("backend ollama: ")
    assert lines(ollama_num_parallel=4) == []
