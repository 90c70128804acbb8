"""Several gateway processes on one port: what they share, and how they start, restart and end.

Covers: gateway/cli/serve_replicas.py
Covers: gateway/supervise.py
Covers: gateway/replica_process.py
Covers: gateway/replicas/hub.py
Covers: gateway/replicas/member.py
Covers: gateway/replicas/member_state.py
Covers: gateway/replicas/messages.py
Covers: gateway/replicas/link_down.py
Covers: gateway/api/peers.py
"""

import asyncio
import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.cli.harness import process
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.supervised import Supervised, engines, settings_file, until

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


async def test_replicas_serve_as_one_gateway(tmp_path: Path) -> None:
    """Limits, metrics, status, usage, and a replica that is killed under load."""
    async with engines() as (vllm, ollama):
        settings_file(tmp_path, vllm, ollama, max_concurrency=3)
        usage = {"GATEWAY_USAGE_FILE": str(tmp_path / "usage.db")}
        async with Supervised(tmp_path, 2, **usage) as gateway:
            assert await gateway.chat(40) == [200] * 40
            assert vllm.most_at_once == 3
            sent = 40

            # Each replica has served some, and the sum is what the client has counted.
            counts = await gateway.metrics("gateway_requests_total")
            assert counts.keys() == {"1", "2"}
            assert sum(counts.values()) == sent
            assert sum((await gateway.metrics("gateway_request_duration_seconds_count")).values()) == sent
            assert await gateway.metrics("gateway_replicas") == {"1": 2, "2": 2}
            (row,) = (await gateway.get("/ops/usage"))["rows"]
            assert row["requests"] == sent

            # One of two dies with requests in flight: the other goes on, and it comes back with its slots.
            first, second = (each["pid"] for each in await gateway.until_all_serve())
            vllm.most_at_once = 0
            load = asyncio.ensure_future(gateway.chat(40))
            await until_counted(vllm, sent + 5)
            os.kill(first, signal.SIGKILL)
            statuses = await load
            assert set(statuses) <= {200, 0}
            assert statuses.count(200) >= 10
            replicas = await gateway.until_all_serve()
            assert replicas[0]["pid"] not in (first, second)
            assert replicas[1]["pid"] == second
            assert await gateway.chat(40) == [200] * 40
            assert vllm.most_at_once == 3


async def test_a_change_of_the_roll_out_reaches_all_replicas(tmp_path: Path) -> None:
    async with engines() as (vllm, ollama):
        settings_file(tmp_path, vllm, ollama)
        async with Supervised(tmp_path, 2) as gateway:
            answer = await gateway.post("/ops/rollback", {})
            assert answer.json()["changed"] is True
            assert answer.json()["persisted"] is True
            assert answer.json()["shared"] is True

            async def all_have_it() -> bool:
                active = await gateway.metrics('gateway_active_backend{backend="ollama"')
                return active == {"1": 1, "2": 1}

            await until(all_have_it)
            assert await gateway.chat(10) == [200] * 10
            assert (len(ollama.requests), len(vllm.requests)) == (10, 0)

            # A replica that is started later has it as well.
            pid = (await gateway.until_all_serve())[0]["pid"]
            os.kill(pid, signal.SIGKILL)
            await until_gone([pid])
            await gateway.until_all_serve()
            assert await gateway.metrics('gateway_active_backend{backend="ollama"') == {"1": 1, "2": 1}
        assert json.loads(gateway.state_file.read_text())["rollout"]["tiers"]["standard"]["backend"] == "ollama"


async def test_stop_under_load_loses_no_request_and_leaves_nothing(tmp_path: Path) -> None:
    async with engines() as (vllm, ollama):
        settings_file(tmp_path, vllm, ollama, max_concurrency=2)
        async with Supervised(tmp_path, 2) as gateway:
            pids = [each["pid"] for each in await gateway.until_all_serve()]
            load = asyncio.ensure_future(gateway.chat(60))
            await until_counted(vllm, 10)
            gateway.process.send_signal(signal.SIGTERM)
            assert await load == [200] * 60
            assert await asyncio.to_thread(gateway.process.wait, 60) == 0
            await until_gone(pids)
        assert "error" not in gateway.log.read_text()


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


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"LLM_BACKEND": "olama"}, "LLM_BACKEND: 'olama' is not a backend"),
        ({"GATEWAY_KEYS_FILE": "/nowhere/keys.yaml"}, "GATEWAY_KEYS_FILE: '/nowhere/keys.yaml'"),
    ],
)
def test_a_mistake_in_the_settings_is_one_line_with_exit_status_2(variables: dict[str, str], line: str) -> None:
    with process("serve", "--replicas", "3", GATEWAY_PORT="0", **variables) as started:
        _, errors = started.communicate(timeout=60)
    assert started.returncode == 2
    assert len(errors.splitlines()) == 1
    assert errors.startswith(line)


def test_a_port_in_use_is_one_line_with_exit_status_2() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with process("serve", "--replicas", "3", GATEWAY_PORT=str(port)) as started:
            _, errors = started.communicate(timeout=60)
    assert started.returncode == 2
    assert errors.splitlines() == [f"GATEWAY_PORT: cannot listen on 127.0.0.1:{port}: Address already in use"]
