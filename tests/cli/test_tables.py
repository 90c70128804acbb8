"""Output of the commands for the status, a change, and a preflight check."""

import io
import json
import time
from typing import Any

import pytest
from rich.console import Console

from gateway import config
from gateway.admission.fair_queue import Claim
from gateway.cli.tables import change_line, replicas_line, server_lines, show_result
from gateway.upstream.outlier_detection import IN_A_ROW
from tests.cli.harness import assignments, command, gateway

pytestmark = pytest.mark.usefixtures("empty_environment")


async def test_number_of_migrated_requests_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        monkeypatch.setattr(here.gateway._operations.controller, "_migrate", lambda change: 3)
        assert "queued requests that migrated: 3" in (await command("switch", "vllm", "--tier", "standard")).stdout
        monkeypatch.setattr(here.gateway._operations.controller, "_migrate", lambda change: 0)
        assert "migrated" not in (await command("rollback")).stdout


async def test_status_shows_both_sides_of_each_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        assert (await here.ask({"stream": True})).status == 200
        here.gateway.settle()
        await command("switch", "vllm", "--tier", "standard", "--canary", "10")
        status = await command("status")
        assert status.exit_code == 0
        lines = status.stdout.splitlines()
        rows = {tuple(line.split()[:2]): line for line in lines}
        assert "active" in rows["standard", "ollama"]
        assert "ms" in rows["standard", "ollama"]
        assert any("vllm" in line and "canary 10 %" in line and "no request yet" in line for line in lines)
        assert "pinned" in rows["pinned", "ollama"]
        assert rows["away", "openai"].split() == ["away", "openai", "no", "0", "0"]
        assert "operator local: standard from ollama to ollama with 10 % on vllm" in status.stdout
        assert "leads to ollama" in status.stdout


def test_status_says_which_servers_leave_and_which_names_are_not_resolved() -> None:
    names = [
        {"name": "a:1", "resolved": True, "failure": None, "servers": 2, "ignored": 0},
        {"name": "b:1", "resolved": False, "failure": "no answer in time", "servers": 3, "ignored": 0},
        {"name": "c:1", "resolved": False, "failure": "unknown", "servers": 0, "ignored": 0},
    ]
    leaving = [{"name": "pods#10.0.0.5:1", "running": 4}]
    assert list(server_lines({"backends": {"pods": {"names": names, "leaving": leaving, "servers": []}}})) == [
        "host name b:1: not resolved (no answer in time); its last 3 servers are used",
        "host name c:1: not resolved (unknown); it has no servers",
        "server pods#10.0.0.5:1: leaving, 4 requests run there",
    ]


def test_status_says_who_shares_the_limits_or_since_when_this_replica_is_alone() -> None:
    shared = {"redis": "redis:6379/0", "up": True, "since": 0.0, "reason": None, "sharing": 3, "replicas": 3}
    assert replicas_line(shared) == "replicas that share the limits: 3, through Redis at redis:6379/0"
    assert replicas_line(shared | {"sharing": 1}) == (
        "Redis at redis:6379/0 answers again; the limits are shared within seconds"
    )
    assert replicas_line(shared | {"up": False, "reason": "ConnectionError", "sharing": 1}) == (
        "the limits are not shared: Redis at redis:6379/0 is not reachable since 1970-01-01 00:00:00 UTC "
        "(ConnectionError); this replica goes on with 1/3 of each"
    )


async def test_status_says_which_server_is_out_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        (server,) = here.gateway._backends["ollama"].servers
        assert "server ollama" not in (await command("status")).stdout
        detector = server.gate("llama", "text")
        for _ in range(IN_A_ROW):
            detector.fail("status_5xx", time.monotonic(), Claim(), False)
        assert "server ollama: ejected for llama (text), status_5xx; until 20" in (await command("status")).stdout
        detector.begin_trial()  # a request that nothing else can serve
        assert "; it gets requests that no other server can serve" in (await command("status")).stdout
        detector.until = 0.0
        told = (await command("status")).stdout
        assert "server ollama: ejected for llama (text), status_5xx; on trial, with one request at a time" in told
        server.circuit.probe_missed(is_sure=True)
        assert "server ollama: circuit open" in (await command("status")).stdout


async def test_status_shows_settings_that_were_refused_or_need_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        document = {"port": 1, "backends": {"vllm": {}}, "tiers": {"standard": {"models": {"vllm": "m"}}}}

        def read() -> config.Settings:
            return config.build(document)

        await here.gateway.reload.run(read, "file")
        assert "need a restart:\n  port: 1, was" in (await command("status")).stdout
        document["tirs"] = {}
        await here.gateway.reload.run(read, "file")
        assert "refused; the old ones stay in force:\n  tirs: unknown key" in (await command("status")).stdout


async def test_preflight_check_is_a_table_and_exits_with_1_if_a_tier_would_break(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch) as here:
        result = await command("verify", "--preflight", "vllm", "--seconds", "5")
        assert result.exit_code == 1
        rows = [line.split() for line in result.stdout.splitlines()]
        assert ["ultra", "serves", "breaks"] in [row[:3] for row in rows]
        assert ["standard", "serves", "ok"] in [row[:3] for row in rows]
        assert "a switch to vllm would break" in result.stdout
        one = await command("verify", "--preflight", "vllm", "--tier", "standard")
        assert (one.exit_code, "breaks nothing" in one.stdout) == (0, True)
        body = json.loads((await command("verify", "--preflight", "away", "--json")).stdout)
        assert body["breaks"]
        assert {"backend", "findings", "seconds", "tiers"} <= set(body)
        assert assignments(here) == {"standard": "ollama", "ultra": "ollama", "pinned": "ollama"}
        assert (await command("verify", "vllm")).exit_code == 2


def test_change_that_the_other_replicas_do_not_know_says_so() -> None:
    answer: dict[str, Any] = {
        "changed": False,
        "persisted": True,
        "moved": 0,
        "unmoved": {},
        "tiers": {"standard": {"backend": "ollama", "canary": None, "pinned": False}},
        "history": [],
    }
    for shared, is_said in ((False, True), (True, False), (None, False)):
        console = Console(file=(out := io.StringIO()), width=200)
        show_result({**answer, "shared": shared}, console)
        assert ("the other replicas have not been told" in out.getvalue()) is is_said


def test_change_names_the_replica_that_took_it() -> None:
    move = {"from": {"backend": "ollama", "canary": None}, "to": {"backend": "vllm", "canary": None}}
    change = {"at": "2026-11-29T08:00:00.000Z", "by": "0123abcd", "cause": "operator", "tiers": {"standard": move}}
    assert change_line({**change, "replica": "web-1-3f9c21ab"}).startswith(
        "2026-11-29 08:00:00 operator 0123abcd on web-1-3f9c21ab: "
    )
