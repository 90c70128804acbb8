"""The preflight check before a switch, with stand-ins: its findings, its cost, and how it ends."""

import asyncio
from typing import Any

import pytest

from gateway import config, simulate
from gateway.simulate.options import Fault
from tests.fakes.fault_backend import MODEL
from tests.fakes.networks import names
from tests.fakes.running_gateway import until
from tests.fakes.stand_ins import stand_in
from tests.rollout.preflight.checking import NAME, Checked, checked, document, failing, generations, model, serving

pytestmark = pytest.mark.uvloop

ADMIN = "admin-key"


# Findings


async def test_missing_model_breaks_and_existing_models_are_listed() -> None:
    async with checked(model(name="another")) as setup:
        report = await setup.check()
        assert report.breaks == ["serves"]
        assert report.of("serves")["value"] == "does not have the model; it has: another"
        assert generations(setup.vllm) == 0


async def test_tier_without_a_model_on_the_backend_breaks() -> None:
    async with checked(
        tiers={"standard": {"models": {"ollama": NAME, "vllm": NAME}}, "ultra": {"models": {"ollama": NAME}}}
    ) as setup:
        report = await setup.check()
        assert report.of("serves", "ultra")["severity"] == "breaks"
        assert report.of("serves", "standard")["severity"] == "fine"
        assert not (await setup.check(tier="STANDARD")).body["breaks"]


async def test_pinned_tier_is_left_out_and_noted_when_named() -> None:
    tiers = {name: {"models": {"ollama": NAME, "vllm": NAME}} for name in ("standard", "pinned")}
    async with checked(tiers={**tiers, "pinned": {**tiers["pinned"], "backend": "ollama"}}) as setup:
        assert list((await setup.check()).body["tiers"]) == ["standard"]
        assert (await setup.check(tier="pinned")).of("pinned", "pinned")["severity"] == "note"
        assert generations(setup.vllm) == 7


async def test_backend_that_fails_every_request_breaks_and_keeps_its_circuit_closed() -> None:
    async with checked() as setup:
        setup.vllm.engine.inject(Fault("status", times=0, status=500))
        for _ in range(4):
            assert (await setup.check()).breaks == ["serves"]
        status = (await setup.client.get("/ops/status")).json()
        assert status["backends"]["vllm"]["servers"][0]["circuit"] == "closed"


async def test_sleeping_vllm_breaks_and_is_not_probed() -> None:
    async with checked(asleep=True) as setup:
        assert (await setup.check()).of("serves")["value"] == "asleep"
        assert generations(setup.vllm) == 0


async def test_dead_backend_breaks_at_once() -> None:
    async with failing("healthy") as (_, client, vllm):
        vllm.die()
        body = (await client.post("/ops/preflight?backend=vllm")).json()
        assert body["breaks"]
        assert body["seconds"] < 15


# Cost and side effects


async def test_backend_whose_host_name_is_not_resolved_breaks_at_once() -> None:
    settings = document("http://127.0.0.1:1", "http://127.0.0.1:2")
    settings["backends"]["vllm"] = {"kind": "vllm", "servers": "dns://unknown.test:8000"}
    with names():
        async with serving(settings) as (_, client):
            report = (await client.post("/ops/preflight", params={"backend": "vllm"})).json()
    (finding,) = [item for item in report["findings"] if item["what"] == "serves"]
    assert (finding["severity"], finding["value"]) == (
        "breaks",
        "has no servers, because its host name is not resolved",
    )


async def test_ollama_that_is_left_generates_nothing_and_loads_nothing() -> None:
    async with checked() as setup:
        report = await setup.check()
        assert generations(setup.ollama) == 0
        assert report.of("rollback")["value"] == "not loaded"
        assert "waits" in report.of("rollback")["words"]
        assert report.of("gpu", None)["severity"] == "note"
        assert "may share a GPU" in report.of("gpu", None)["words"]


async def test_ollama_that_is_to_serve_loads_the_model_with_a_note() -> None:
    async with checked(llm_backend="vllm") as setup:
        report = await setup.check("ollama")
        assert report.breaks == []
        assert "was not loaded, and this check loaded it" in report.of("servers")["words"]
        assert report.of("context")["value"] == "8192 tokens"
        again = await setup.check("ollama")
        found = [item["what"] for item in again.body["findings"]]
        assert "context" in found
        assert "servers" not in found


async def test_model_unloaded_by_another_one_is_noted() -> None:
    models = [model(name=name) for name in ("one", "two")]
    async with (
        stand_in(simulate.Options("ollama", tuple(models), max_loaded=1)) as ollama,
        stand_in(simulate.Options("vllm", (model(name="any"),))) as vllm,
    ):
        tiers = {name: {"models": {"vllm": "any", "ollama": name}} for name in ("one", "two")}
        async with serving(document(vllm.base_url, ollama.base_url, tiers=tiers, llm_backend="vllm")) as (
            gateway,
            client,
        ):
            report = await Checked(gateway, client, vllm, ollama).check("ollama")
            assert report.breaks == []
            assert "it is unloaded again" in report.of("servers", "one")["words"]
            assert "it is unloaded again" not in report.of("servers", "two")["words"]


async def test_check_changes_no_metrics_no_log_and_no_roll_out() -> None:
    async with checked() as setup:
        await setup.check()
        assert setup.gateway.metric("gateway_requests_total") == 0
        assert [line for line in setup.gateway.exchanges() if line["event"] == "exchange"] == []
        assert str(setup.gateway.gateway.rollout) == "ollama"
        assert setup.gateway.is_idle()


# The end of a check


async def test_caller_that_leaves_ends_the_check() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        check.cancel()
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_shutdown_ends_a_running_check() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        gateway.gateway.begin_drain()
        answer = await check
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    "others",
    [
        {"backends": {"vllm": {"api_key": "other"}}},
        {"llm_backend": "ollama", "tiers": {"else": {"models": {"ollama": MODEL}}}},
    ],
    ids=["backend", "tiers"],
)
async def test_changed_settings_end_running_checks_with_a_conflict(others: dict[str, Any]) -> None:
    """The findings would be about servers or tiers that no longer exist."""
    async with failing("silent") as (gateway, client, vllm):
        checks = [asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60")) for _ in range(2)]
        await until(lambda: len(vllm.open_peers) == 1)
        settings = config.build(document(vllm.base_url, vllm.base_url, **others))
        await gateway.gateway.reload.run(lambda: settings, "file")
        for answer in await asyncio.gather(*checks):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_checks_run_one_at_a_time() -> None:
    async with checked() as setup:
        await asyncio.gather(*(setup.check() for _ in range(3)))
        assert generations(setup.vllm) == 21
    async with failing("silent") as (_, client, vllm):
        await asyncio.gather(*(client.post("/ops/preflight?backend=vllm&seconds=1") for _ in range(2)))
        assert vllm.most_at_once == 1


# The call


async def test_call_requires_the_admin_key_and_valid_parameters() -> None:
    async with checked(admin_key=ADMIN) as setup:
        assert (await setup.client.post("/ops/preflight")).status_code == 401
        setup.client.headers["authorization"] = f"Bearer {ADMIN}"
        for words, param in (
            ("backend=nowhere", "backend"),
            ("tier=none", "tier"),
            ("seconds=0", "seconds"),
            ("seconds=nan", "seconds"),
            ("seconds=x", "seconds"),
        ):
            answer = await setup.client.post(f"/ops/preflight?{words}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        answer = await setup.client.get("/ops/preflight")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_default_backend_is_the_one_that_is_not_rollback_to() -> None:
    async with checked() as setup:
        assert (await setup.client.post("/ops/preflight")).json()["backend"] == "vllm"
    async with checked(llm_backend="vllm", rollback_to="vllm") as setup:
        assert (await setup.client.post("/ops/preflight")).json()["backend"] == "ollama"


async def test_backend_that_already_serves_is_compared_with_rollback_to() -> None:
    async with checked(llm_backend="vllm") as setup:
        report = await setup.check()
        assert report.of("vision")["other"] == "ollama"
