"""Switches of the engine on one GPU: nothing is lost, and the engines are never on it at once.

Covers: gateway/rollout/gpu_switch.py
Covers: gateway/rollout/gpu_state.py
Covers: gateway/upstream/gpu_engine.py
"""

import asyncio
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.simulate import Model
from gateway.simulate import running as stand_in
from gateway.simulate.gpu import SharedGpu
from tests.integration.one_gpu import LOAD, MEMORY, SLEEP, VLLM, WAKE, Load, one_gpu, until

pytestmark = pytest.mark.virtual_time

EMBEDDING = {"embed": {"backend": "ollama", "model": "embed"}}


async def test_under_load_nothing_is_lost_and_one_engine_has_the_gpu(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        load = Load(setup)
        await until(lambda: len(load.replies) > 3)
        answer = await setup.switch("vllm")
        assert answer["gpu"]["to"] == "vllm"
        assert answer["gpu"]["phase"] == "draining"
        assert (await setup.ended())["holder"] == "vllm"
        await until(lambda: len(load.replies) > 12)
        assert (await setup.rollback())["gpu"]["to"] == "ollama"
        assert (await setup.ended())["holder"] == "ollama"
        await until(lambda: len(load.replies) > 20)
        served = await load.stop()
        assert min(served["ollama"], served["vllm"]) > 3
        assert setup.was_never_on_both()
        assert setup.gateway.metric("gateway_gpu_switches_total", outcome="done") == 2


async def test_series_of_the_gpu_begin_at_zero_so_that_a_rate_has_the_first_switch(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        text, _ = await setup.gateway.gateway._operations.exposition("text/plain")
        lines = text.decode().splitlines()
        for source, target in (("ollama", "vllm"), ("vllm", "ollama"), ("none", "ollama"), ("none", "vllm")):
            for outcome in ("done", "failed", "reversed"):
                labels = f'from_backend="{source}",outcome="{outcome}",to_backend="{target}"'
                assert any(line.startswith(f"gateway_gpu_switches_total{{{labels}}}") for line in lines), labels
        for engine in ("ollama", "vllm"):
            for phase in ("draining", "freeing", "waking"):
                assert any(
                    line.startswith(f'gateway_gpu_phase_seconds_count{{backend="{engine}",phase="{phase}"}}')
                    for line in lines
                )


async def test_requests_wait_for_the_engine_longer_than_the_queue_timeout(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        await setup.switch("vllm")
        began = asyncio.get_running_loop().time()
        reply = await setup.ask()
        assert reply.status == 200
        assert reply.headers["x-gateway-backend"] == "vllm"
        assert asyncio.get_running_loop().time() - began > WAKE > setup.backend("vllm").settings.limits.queue_timeout


async def test_a_waiting_stream_is_kept_alive_and_told_the_estimate(tmp_path: Path) -> None:
    async with one_gpu(tmp_path, commit_after=1, heartbeat=1, waiting_note=True) as setup:
        await setup.ended()
        for target in ("vllm", "ollama"):  # from now on, the times are known
            await setup.switch(target)
            await setup.ended()
        await setup.switch("vllm")
        reply = await setup.ask(stream=True)
        notes = [event["choices"][0]["delta"].get("reasoning") for event in reply.events[:-1] if event["choices"]]
        told = [note for note in notes if note]
        assert len(told) > 3
        assert all("engine is starting: queued at position 1, about" in note for note in told)
        assert reply.text


async def test_status_tells_the_progress_and_what_a_rollback_would_take(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        assert setup.gpu["rollback"] == {"to": "ollama", "seconds": 0.0, "basis": "none"}
        await setup.switch("vllm")
        waking = await setup.reached("waking")
        assert (waking["from"], waking["to"], waking["holder"]) == ("ollama", "vllm", None)
        assert waking["rollback"]["basis"] == "unknown"
        await setup.ended()
        await setup.rollback()
        assert (await setup.ended())["last"]["outcome"] == "done"
        await setup.switch("vllm")
        await setup.ended()
        rollback = (await setup.order("GET", "/ops/rollout"))["gpu"]["rollback"]
        assert rollback["basis"] == "measured"
        assert rollback["seconds"] == pytest.approx(SLEEP + LOAD, abs=1.0)
        status = await setup.order("GET", "/ops/status")
        assert {name: backend["state"] for name, backend in status["backends"].items()} == {
            "ollama": "sleeping",
            "vllm": "awake",
        }


async def test_an_engine_that_sleeps_is_not_down(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.switch("vllm")
        await setup.ended()
        await setup.ollama.stop()  # as an operator's command would stop it
        await asyncio.sleep(60)
        text = (await setup.call("GET", "/metrics")).text
        assert 'gateway_backend_up{backend="ollama"} 1.0' in text
        assert 'gateway_backend_asleep{backend="ollama"} 1.0' in text
        assert 'gateway_backend_asleep{backend="vllm"} 0.0' in text
        assert 'gateway_circuit_state{backend="ollama"} 0.0' in text
        assert 'gateway_server_up{backend="ollama"' not in text
        assert (await setup.order("GET", "/ops/status"))["ready"]["unserved_tiers"] == []


async def test_what_is_pinned_to_the_sleeping_engine_is_refused_at_once(tmp_path: Path) -> None:
    tiers = {
        "standard": {"models": {"ollama": "small", "vllm": "Small"}},
        "local": {"models": {"ollama": "small"}, "backend": "ollama"},
    }
    async with one_gpu(tmp_path, embeddings=EMBEDDING, tiers=tiers) as setup:
        await setup.switch("vllm")
        await setup.ended()
        answer = await setup.call("POST", "/v1/embeddings", {"model": "embed", "input": "text"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "backend_unavailable"
        assert "does not have the GPU" in answer.json()["error"]["message"]
        assert (await setup.ask(model="local")).status == 503
        assert (await setup.order("GET", "/ops/status"))["ready"]["unserved_tiers"] == ["local"]
        assert setup.was_never_on_both()


async def test_queued_requests_that_cannot_follow_end_before_the_engine_leaves(tmp_path: Path) -> None:
    limits = {"ollama": {"max_concurrency": 1, "model_concurrency": 1}}
    async with one_gpu(tmp_path, embeddings=EMBEDDING, of=limits) as setup:
        await setup.ended()
        body = {"model": "embed", "input": "text"}
        asking = [asyncio.create_task(setup.call("POST", "/v1/embeddings", body)) for _ in range(5)]
        await until(lambda: setup.backend("ollama").admission.waiting("embedding") == 5)
        await setup.switch("vllm")
        assert {answer.status_code for answer in await asyncio.gather(*asking)} == {200}
        assert (await setup.ended())["holder"] == "vllm"
        assert setup.was_never_on_both()


# Orders that are refused


async def test_orders_that_need_two_engines_are_refused(tmp_path: Path) -> None:
    tiers = {name: {"models": {"ollama": "small", "vllm": "Small"}} for name in ("standard", "pro")}
    async with one_gpu(tmp_path, tiers=tiers) as setup:
        await setup.ended()
        for body in (
            {"backend": "ollama", "canary": {"backend": "vllm", "percent": 10}},
            {"canary": {"backend": "vllm", "percent": 100}},
            {"backend": "vllm", "tier": "pro"},
        ):
            answer = await setup.call("PUT", "/ops/rollout", body)
            assert answer.status_code == 409, body
            assert "only one engine fits on the GPU" in answer.json()["error"]["message"]
        assert setup.gpu["phase"] == "ready"
        assert not setup.history()


async def test_a_new_switch_and_undo_are_refused_during_a_switch(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        await setup.switch("vllm")
        assert not (await setup.switch("vllm"))["changed"]
        for method, path, body in (("PUT", "/ops/rollout", {"backend": "ollama"}), ("POST", "/ops/undo", None)):
            answer = await setup.call(method, path, body)
            assert answer.status_code == 409
            assert answer.json()["error"]["code"] == "conflict"
            assert "switch to vllm is in progress" in answer.json()["error"]["message"]
        await setup.ended()
        assert (await setup.order("POST", "/ops/undo"))["gpu"]["to"] == "ollama"
        assert (await setup.ended())["holder"] == "ollama"


async def test_a_rollback_of_one_tier_takes_the_others_along(tmp_path: Path) -> None:
    tiers = {name: {"models": {"ollama": "small", "vllm": "Small"}} for name in ("standard", "pro")}
    async with one_gpu(tmp_path, tiers=tiers, llm_backend="vllm") as setup:
        await setup.ended()
        answer = await setup.order("POST", "/ops/rollback", {"tier": "pro"})
        assert {tier["backend"] for tier in answer["tiers"].values()} == {"ollama"}
        assert (await setup.ended())["holder"] == "ollama"


# Failures


async def test_an_engine_that_cannot_come_up_brings_the_requests_back(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        await setup.vllm.stop()
        load = Load(setup)
        await setup.switch("vllm")
        state = await setup.ended()
        assert state["holder"] == "ollama"
        served = await load.stop()
        assert set(served) == {"ollama"}
        newest = setup.history()[0]
        assert newest["cause"] == "exclusive"
        assert "vllm did not come up: wake_timeout has passed (no connection)" in newest["why"]
        assert setup.gateway.metric("gateway_gpu_switches_total", outcome="failed", to_backend="vllm") == 1
        assert setup.gateway.metric("gateway_switches_total", cause="exclusive", to_backend="ollama") == 1
        status = await setup.order("GET", "/ops/rollout")
        assert status["gpu"]["last"]["outcome"] == "failed"


async def test_an_engine_without_room_on_the_gpu_is_not_waited_for(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        SharedGpu(str(setup.gpu_file), MEMORY).hold(MEMORY // 2)  # a third program
        began = asyncio.get_running_loop().time()
        await setup.switch("vllm")
        assert (await setup.reached("waking"))["to"] == "vllm"
        await until(lambda: setup.gpu["to"] != "vllm")
        assert asyncio.get_running_loop().time() - began < 10 + WAKE
        assert "/wake_up was answered with status 500" in setup.history()[0]["why"]


async def test_an_engine_that_dies_while_it_wakes_brings_the_requests_back(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        asking = asyncio.create_task(setup.ask())
        await setup.switch("vllm")
        await setup.reached("waking")
        late = asyncio.create_task(setup.ask(stream=True))
        await until(lambda: setup.gpu["waiting"] == 1)
        await setup.vllm.stop()
        assert (await setup.ended())["holder"] == "ollama"
        assert (await asking).status == 200
        reply = await late
        assert (reply.status, reply.headers["x-gateway-backend"]) == (200, "ollama")
        assert setup.was_never_on_both()


async def test_an_engine_that_cannot_free_the_gpu_is_not_left(tmp_path: Path) -> None:
    async with one_gpu(tmp_path, llm_backend="vllm", of_vllm={"sleep_mode": False, "asleep": False}) as setup:
        await setup.ended()
        load = Load(setup)
        await until(lambda: len(load.replies) > 2)
        await setup.rollback()
        assert (await setup.ended())["holder"] == "vllm"
        assert "without --enable-sleep-mode" in setup.history()[0]["why"]
        assert set(await load.stop()) == {"vllm"}
        assert setup.was_never_on_both()


async def test_an_engine_that_hangs_counts_as_one_that_has_the_gpu(tmp_path: Path) -> None:
    """It accepts connections and answers nothing, so the other one is not woken beside it."""
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        assert (await setup.ask()).status == 200
        port = setup.ollama.port
        await setup.ollama.stop()
        with socket.create_server(("127.0.0.1", port)):
            await setup.switch("vllm")
            await until(lambda: setup.turns["ollama"] != "leaving" and setup.gpu["phase"] != "freeing")
            assert "did not free the GPU within 120 s" in setup.history()[0]["why"]
            assert (setup.gpu["last"]["outcome"], setup.turns["vllm"]) == ("failed", "asleep")


async def test_with_neither_engine_requests_are_refused_until_one_comes_up(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        port = setup.ollama.port
        await setup.switch("vllm")
        await setup.reached("waking")
        waiting = asyncio.create_task(setup.ask())
        await until(lambda: setup.gpu["waiting"] == 1)
        await setup.vllm.stop()
        await setup.ollama.stop()
        await setup.reached("failed")
        assert (await waiting).status == 503
        assert (await setup.ask()).status == 503
        setup.ollama.port = port
        await setup.ollama.__aenter__()
        assert (await setup.ended())["holder"] == "ollama"
        assert (await setup.ask()).status == 200


# Rollback in the middle


@pytest.mark.parametrize("phase", ["draining", "freeing", "waking"])
async def test_a_rollback_in_each_phase_reverses_the_switch(phase: str, tmp_path: Path) -> None:
    async with one_gpu(tmp_path, llm_backend="vllm", of_vllm={"asleep": False}, rollback_to="vllm") as setup:
        await setup.ended()
        load = Load(setup)
        await until(lambda: len(load.replies) > 2)
        await setup.switch("ollama")
        if phase != "draining":
            await setup.reached(phase)
        answer = await setup.rollback()
        assert answer["changed"]
        assert answer["gpu"]["to"] == "vllm"
        assert (await setup.ended())["holder"] == "vllm"
        count = len(load.replies)
        await until(lambda: len(load.replies) > count + 3)
        served = await load.stop()
        assert set(served) == {"vllm"}
        assert setup.was_never_on_both()
        assert setup.gateway.metric("gateway_gpu_switches_total", outcome="reversed") == 1


@pytest.mark.parametrize("phase", ["draining", "freeing", "waking"])
async def test_a_client_that_leaves_in_each_phase_frees_its_place(phase: str, tmp_path: Path) -> None:
    async with one_gpu(tmp_path, llm_backend="vllm", of_vllm={"asleep": False}) as setup:
        await setup.ended()
        runs = asyncio.create_task(setup.ask(stream=True))
        await until(lambda: setup.vllm.engine.running == 1)
        await setup.switch("ollama")
        if phase != "draining":
            await setup.reached(phase)
        async with setup.gateway.sent({"stream": True}):
            await until(lambda: setup.gpu["waiting"] == 1)
        await until(lambda: setup.gpu["waiting"] == 0)
        stays = await setup.ask()
        assert (stays.status, stays.headers["x-gateway-backend"]) == (200, "ollama")
        assert (await runs).text
        assert setup.was_never_on_both()


async def test_a_running_client_that_leaves_ends_the_draining(tmp_path: Path) -> None:
    async with one_gpu(tmp_path, of_ollama={"tokens_per_second": 0.01}) as setup:
        await setup.ended()
        async with setup.gateway.sent({"stream": True}):
            await until(lambda: setup.ollama.engine.running == 1)
            await setup.switch("vllm")
            await asyncio.sleep(20)
            assert setup.gpu["phase"] == "draining"
        assert (await setup.ended())["holder"] == "vllm"


# Around the switch


async def test_the_guard_watches_from_the_moment_when_the_engine_serves(tmp_path: Path) -> None:
    async with one_gpu(tmp_path, guard={"min_samples": 3}) as setup:
        await setup.ended()
        for _ in range(4):
            await setup.ask(stream=True)
        setup.gateway.gateway.settle()
        await setup.switch("vllm")
        await setup.reached("waking")
        assert (await setup.order("GET", "/ops/status"))["tiers"]["standard"]["guard"] is None
        await setup.ended()
        watched = (await setup.order("GET", "/ops/status"))["tiers"]["standard"]["guard"]
        assert (watched["tested"], watched["seconds"] < 2) == ("vllm", True)


async def test_requests_that_could_run_at_once_wait_beyond_the_length_of_the_queue(tmp_path: Path) -> None:
    async with one_gpu(tmp_path, of={"vllm": {"max_concurrency": 3, "max_queue": 0}}) as setup:
        await setup.ended()
        await setup.switch("vllm")
        waiting = []
        for count in range(1, 4):
            waiting.append(asyncio.create_task(setup.ask()))
            await until(lambda: setup.gpu["waiting"] == count)  # noqa: B023
        refused = await setup.ask()
        assert (refused.status, refused.error and refused.error["code"]) == (503, "queue_full")
        assert int(refused.headers["retry-after"]) <= 60
        assert {reply.status for reply in await asyncio.gather(*waiting)} == {200}


async def test_a_deadline_of_the_client_that_the_engine_cannot_meet_is_refused_at_once(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        for target in ("vllm", "ollama"):  # from now on, the times are known
            await setup.switch(target)
            await setup.ask()
            await setup.ended()
        await setup.switch("vllm")
        async with setup.gateway.sent({}, "x-gateway-timeout: 4") as raw:
            reply = await raw.reply()
        assert (reply.status, reply.error and reply.error["code"]) == (503, "queue_timeout")
        assert setup.gpu["to"] == "vllm"


async def test_a_fallback_elsewhere_serves_what_is_refused_and_not_what_waits(tmp_path: Path) -> None:
    cloud = replace(VLLM, models=(Model("large"),), asleep=False, dev_mode=False)
    async with stand_in(cloud) as server:
        models = {"ollama": "small", "vllm": "Small", "cloud": "large"}
        tiers = {
            "standard": {"models": models, "fallback": "cloud"},
            "local": {"models": models, "backend": "ollama", "fallback": "cloud"},
        }
        of = {"cloud": {"kind": "openai", "base_url": server.base_url}}
        async with one_gpu(tmp_path, tiers=tiers, of=of) as setup:
            await setup.ended()
            await setup.switch("vllm")
            assert (await setup.ask()).headers["x-gateway-backend"] == "vllm"
            assert (await setup.ask(model="local")).headers["x-gateway-backend"] == "cloud"
