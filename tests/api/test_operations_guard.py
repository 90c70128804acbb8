"""The guard in a whole gateway, before stand-ins: what goes back by itself, and what says so."""

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
from tests.fakes.running_gateway import PATIENCE, Running, running, until
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
        """So many conversations at once, so many times that all are over; who served each, and the status."""

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
async def house(*faults: simulate.Fault, **changes: Any) -> AsyncIterator[Operator]:
    """`faults` are of the vLLM."""
    vllm = simulate.Options("vllm", (simulate.Model(VLLM_MODEL),), max_num_seqs=MANY, faults=faults)
    ollama = simulate.Options("ollama", (simulate.Model(OLLAMA_MODEL),), parallel=MANY)
    async with AsyncExitStack() as stack:
        urls = {side.kind: (await stack.enter_async_context(stand_in(side))).base_url for side in (vllm, ollama)}
        limits = dict.fromkeys(("max_concurrency", "model_concurrency"), MANY)
        document: dict[str, Any] = {
            "llm_backend": "ollama",
            "backends": {name: {"kind": name, "base_url": url, **limits} for name, url in urls.items()},
            "tiers": {"standard": {"models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}}},
            "guard": {},
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document | changes)))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield Operator(gateway, await stack.enter_async_context(client))


async def test_canary_with_errors_is_taken_back_and_log_metric_history_and_status_say_so(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    async with house(FAILS) as operator:
        await operator.ask(1)  # Ollama has loaded its model, and answers in turns with the other side from now on
        await operator.put(**CANARY)
        for _ in range(2):  # whatever order the first come back in, the second ones of vLLM follow some of both
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
        told = [record for record in caplog.records if "(guard)" in record.getMessage()]
        assert [record.levelname for record in told] == ["WARNING"]
        moves = "standard from ollama with 50 % on vllm to ollama"
        assert told[0].getMessage() == f"roll-out changed (guard): {moves}; {change['why']}"
        from rich.console import Console

        show_status(before, Console(width=160))
        show_status(after, Console(width=160))
        shown = capsys.readouterr().out
        assert "guard: standard on vllm compared with ollama, " in shown
        assert f"guard: {moves}; errors: 100.0 % of" in shown


async def test_streams_that_break_off_take_a_canary_back() -> None:
    async with house(simulate.Fault("truncate", after=2, times=0), guard={"rules": ["truncated"]}) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama")
        assert operator.gateway.gateway.rollout.history[-1].why.startswith("truncated streams: 100.0 %")


async def test_dead_canary_that_a_fallback_covers_is_taken_back() -> None:
    tiers = {"standard": {"models": {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}, "fallback": True}}
    async with house(FAILS, tiers=tiers) as operator:
        await operator.put(**CANARY)
        await operator.ask(300)
        assert operator.assignment == Assignment("ollama")
        assert [change.cause for change in operator.gateway.gateway.rollout.history] == ["operator", "guard"]


async def test_fresh_switch_is_undone() -> None:
    async with house(FAILS) as operator:
        await operator.ask(100)
        await operator.put(backend="vllm")
        await operator.ask(100)
        assert operator.assignment == Assignment("ollama")
        assert operator.gateway.gateway.rollout.history[-1].why.endswith("on ollama before the switch")


async def test_requests_at_fault_themselves_and_clients_that_leave_are_held_against_nobody() -> None:
    async with house() as operator:
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


async def test_what_the_guard_did_outlives_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    async with house(FAILS, state_file=str(file)) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama")
        await operator.gateway.gateway._state.persisted()
        kept = json.loads(file.read_text())
    assert "guard" in json.dumps(kept)
    async with house(state_file=str(file)) as operator:
        assert operator.assignment == Assignment("ollama")
        history = (await operator.status())["rollout"]["history"]
        assert [change["cause"] for change in history] == ["guard", "operator"]
        assert history[0]["why"].startswith("errors")


async def test_without_the_setting_nothing_is_watched() -> None:
    async with house(FAILS, guard=None) as operator:
        await operator.put(**CANARY)
        await operator.ask(200)
        assert operator.assignment == Assignment("ollama", operator.assignment.canary)
        assert operator.assignment.canary is not None
        assert (await operator.status())["tiers"]["standard"]["guard"] is None


async def test_requests_under_way_since_the_change_are_known() -> None:
    async with house() as operator:
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
