"""The guard in a whole gateway in front of stand-ins: automatic rollback, and its reporting."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from gateway.cli.tables import show_status
from gateway.rollout.assignment import Assignment
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

VLLM_MODEL, OLLAMA_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "llama"
MANY = 500
CANARY = {"canary": {"backend": "vllm", "percent": 50}}
FAILS = simulate.Fault("status", times=0)


class Operator:
    def __init__(self, gateway: Running, client: httpx2.AsyncClient) -> None:
        self.gateway = gateway
        self.client = client

    async def put(self, **order: Any) -> None:
        assert (await self.client.put("/ops/rollout", json=order)).json()["changed"]

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self.client.get("/ops/status")).json()
        return found

    async def ask(self, count: int, *, stream: bool = True, **more: Any) -> list[tuple[str, int]]:
        """Send `count` conversations, 20 at a time; return the backend and the status of each."""

        async def one(number: int) -> tuple[str, int]:
            body = {
                "model": "standard",
                "stream": stream,
                "max_tokens": 4,
                "messages": [{"role": "user", "content": f"Hello {number}"}],
                **more,
            }
            answer = await self.client.post("/v1/chat/completions", json=body)
            return answer.headers.get("x-gateway-backend", ""), answer.status_code

        found: list[tuple[str, int]] = []
        for start in range(0, count, 20):
            found += await asyncio.gather(*(one(number) for number in range(start, min(start + 20, count))))
            self.gateway.gateway.settle()
        return found

    @property
    def assignment(self) -> Assignment:
        return self.gateway.gateway.rollout.tiers["standard"].assignment


@asynccontextmanager
async def guarded(*faults: simulate.Fault, **changes: Any) -> AsyncIterator[Operator]:
    """Run a gateway with the guard, in front of an Ollama and a vLLM with `faults`."""
    vllm = simulate.Options("vllm", (simulate.Model(VLLM_MODEL),), max_num_seqs=MANY, faults=faults)
    ollama = simulate.Options("ollama", (simulate.Model(OLLAMA_MODEL),), parallel=MANY)
    async with AsyncExitStack() as stack:
        urls = {side.kind: (await stack.enter_async_context(stand_in(side))).base_url for side in (vllm, ollama)}
        limits = dict.fromkeys(("max_concurrency", "model_concurrency"), MANY)
        document: dict[str, Any] = {
            "llm_backend": "ollama",
            "backends": {name: {"kind": name, "base_url": url, **TIMES, **limits} for name, url in urls.items()},
            "tiers": {"standard": {"models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}}},
            "guard": {},
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document | changes)))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield Operator(gateway, await stack.enter_async_context(client))


async def test_rollback_of_a_failing_canary_is_in_log_metric_history_and_status(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    async with guarded(FAILS) as operator:
        await operator.ask(1)  # Ollama loads its model, so that both sides respond alternately afterwards
        await operator.put(**CANARY)
        for _ in range(2):  # in whatever order the first responses arrive, vLLM's second ones follow both
            await operator.ask(10)
        before = await operator.status()
        watched = before["tiers"]["standard"]["guard"]
        assert (watched["tested"], watched["other"], watched["is_switch"]) == ("vllm", "ollama", False)
        assert watched["rules"]["errors"]["tested"]["share"] == 1.0
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama")
        assert set(await operator.ask(40)) == {("ollama", 200)}
        after = await operator.status()
        assert after["tiers"]["standard"]["guard"] is None
        change, *older = after["rollout"]["history"]
        assert (change["cause"], change["by"], len(older)) == ("guard", "", 1)
        assert "errors: 100.0 % of " in change["why"]
        assert "why" not in older[0]
        moved = {"tier": "standard", "from_backend": "vllm", "to_backend": "ollama", "cause": "guard"}
        assert operator.gateway.metric("gateway_switches_total", **moved) == 1
        warnings = [record for record in caplog.records if "(guard)" in record.getMessage()]
        assert [record.levelname for record in warnings] == ["WARNING"]
        moves = "standard from ollama with 50 % on vllm to ollama"
        assert warnings[0].getMessage() == f"roll-out changed (guard): {moves}; {change['why']}"
        from rich.console import Console

        show_status(before, Console(width=160))
        show_status(after, Console(width=160))
        shown = capsys.readouterr().out
        assert "guard: standard on vllm compared with ollama, " in shown
        assert f"guard: {moves}; errors: 100.0 % of" in shown


async def test_truncated_streams_roll_back_a_canary() -> None:
    async with guarded(simulate.Fault("truncate", after=2, times=0), guard={"rules": ["truncated"]}) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama")
        assert operator.gateway.gateway.rollout.history[-1].why.startswith("truncated streams: 100.0 %")


async def test_failing_canary_is_rolled_back_although_a_fallback_serves_its_requests() -> None:
    tiers = {"standard": {"models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}, "fallback": True}}
    async with guarded(FAILS, tiers=tiers) as operator:
        await operator.put(**CANARY)
        await operator.ask(300)
        assert operator.assignment == Assignment("ollama")
        assert [change.cause for change in operator.gateway.gateway.rollout.history] == ["operator", "guard"]


async def test_failing_switch_is_rolled_back() -> None:
    async with guarded(FAILS) as operator:
        await operator.ask(100)
        await operator.put(backend="vllm")
        await operator.ask(100)
        assert operator.assignment == Assignment("ollama")
        assert operator.gateway.gateway.rollout.history[-1].why.endswith("on ollama before the switch")


async def test_invalid_requests_and_disconnects_do_not_count_as_errors() -> None:
    async with guarded() as operator:
        await operator.put(canary={"backend": "vllm", "percent": 100})
        await operator.put(**CANARY)
        assert {status for _, status in await operator.ask(60, temperature=9)} == {400}
        for number in range(60):
            async with operator.gateway.sent(
                {"stream": True, "messages": [{"role": "user", "content": f"repeat la {number}"}]}
            ):
                pass
        await operator.ask(60)
        status = await operator.status()
        errors = status["tiers"]["standard"]["guard"]["rules"]["errors"]
        assert (errors["tested"]["share"], errors["other"]["share"]) == (0.0, 0.0)
        assert operator.assignment.canary is not None


async def test_rollback_by_the_guard_survives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    async with guarded(FAILS, state_file=str(file)) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama")
        await operator.gateway.gateway._state.persisted()
        kept = json.loads(file.read_text())
    assert "guard" in json.dumps(kept)
    async with guarded(state_file=str(file)) as operator:
        assert operator.assignment == Assignment("ollama")
        history = (await operator.status())["rollout"]["history"]
        assert [change["cause"] for change in history] == ["guard", "operator"]
        assert history[0]["why"].startswith("errors")


async def test_without_the_setting_no_canary_is_rolled_back() -> None:
    async with guarded(FAILS, guard=None) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama", operator.assignment.canary)
        assert operator.assignment.canary is not None
        assert (await operator.status())["tiers"]["standard"]["guard"] is None


async def test_pending_counts_requests_in_flight_since_the_change() -> None:
    async with guarded() as operator:
        gateway = operator.gateway.gateway
        async with operator.gateway.sent({"stream": True, "messages": [{"role": "user", "content": "repeat la"}]}):
            await until(lambda: gateway._in_flight.count_pending("standard", "ollama", 0.0) == 1)
            assert (
                gateway._in_flight.count_pending("standard", "vllm", 0.0)
                == gateway._in_flight.count_pending("other", "ollama", 0.0)
                == 0
            )
            assert gateway._in_flight.count_pending("standard", "ollama", gateway._context.clock()) == 0
        await until(lambda: gateway._in_flight.count_pending("standard", "ollama", 0.0) == 0)
