"""Capability probes: what a backend can do, what probes cost, and backends that fail or hang."""

import asyncio
from typing import Any

import pytest

from gateway.rollout.preflight.probes import KEY
from gateway.simulate.options import Fault, Template
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import until
from tests.rollout.preflight.checking import NAME, checked, document, failing, generations, model, serving

pytestmark = pytest.mark.uvloop


# Capabilities


async def test_equal_sides_have_no_findings_but_fine_ones() -> None:
    async with checked() as setup:
        await setup.gateway.ask()  # Ollama loads the model
        report = await setup.check()
        assert (report.body["breaks"], report.breaks, report.notices) == (False, [], [])
        asked = (
            "serves",
            "context",
            "streaming",
            "usage",
            "reasoning",
            "tools",
            "forced_tools",
            "structured_output",
            "vision",
            "parameters",
            "conversations",
        )
        assert {what: report.of(what)["severity"] for what in asked} == dict.fromkeys(asked, "fine")
        assert (report.of("context")["value"], report.of("context")["other_value"]) == ("8192 tokens", "8192 tokens")
        assert report.body["tiers"] == {"standard": {"model": NAME, "other": "ollama", "other_model": NAME}}


@pytest.mark.parametrize(
    ("lacking", "breaks", "notices"),
    [
        ({"vision": False}, ["vision"], []),
        ({"tools": False}, [], []),
        ({"context_length": 4096}, [], ["context"]),
        ({"thinking": True}, [], ["reasoning"]),
    ],
    ids=["vision", "tools", "context", "reasoning"],
)
async def test_missing_capability_is_found(lacking: dict[str, Any], breaks: list[str], notices: list[str]) -> None:
    async with checked(model(**lacking)) as setup:
        await setup.gateway.ask()
        report = await setup.check()
        assert (report.breaks, report.notices) == (breaks, notices)


async def test_vllm_without_a_tool_parser_breaks_tools_and_gets_advice() -> None:
    async with checked(tool_parser=False) as setup:
        report = await setup.check()
        assert "tools" in report.breaks
        assert "--enable-auto-tool-choice" in report.of("tools")["words"]


@pytest.mark.parametrize(
    ("template", "value"),
    [("any", "yes"), ("qwen3.5", "yes"), ("mistral", "with joined turns"), ("gemma-2", "with joined turns")],
)
async def test_conversation_that_the_template_refuses_is_tried_as_a_client_would_get_it(
    template: Template, value: str
) -> None:
    async with checked(template=template) as setup:
        report = await setup.check()
        assert (report.of("conversations")["value"], report.breaks) == (value, [])


async def test_reasoning_is_separate_only_with_a_reasoning_parser() -> None:
    for has_parser, value in ((True, "separate"), (False, "in the answer's text")):
        async with checked(model(thinking=True), model(thinking=True), reasoning_parser=has_parser) as setup:
            report = await setup.check()
            assert report.of("reasoning")["value"] == value
            assert ("reasoning" in report.notices) is not has_parser


async def test_capability_that_neither_side_has_breaks_nothing() -> None:
    plain = model(vision=False, tools=False)
    async with checked(plain, plain, tool_parser=False) as setup:
        report = await setup.check()
        assert (report.breaks, report.of("vision")["severity"]) == ([], "fine")


async def test_parameter_that_the_tier_drops_is_not_judged() -> None:
    tiers = {
        "standard": {
            "models": {"ollama": NAME, "vllm": NAME},
            "params": {"drop": ["tools", "tool_choice", "response_format"]},
        }
    }
    async with checked(tool_parser=False, tiers=tiers) as setup:
        report = await setup.check()
        assert report.breaks == []
        assert {report.of(what)["value"] for what in ("tools", "forced_tools", "structured_output")} == {
            "the tier drops it"
        }


# Requests and queueing


async def test_tiers_with_the_same_model_share_seven_small_probes() -> None:
    tiers = {name: {"models": {"ollama": NAME, "vllm": NAME}} for name in ("standard", "pro", "ultra")}
    async with checked(tiers=tiers) as setup:
        report = await setup.check()
        assert {report.of("vision", tier)["value"] for tier in tiers} == {"yes"}
        assert generations(setup.vllm) == 7
        assert setup.vllm.engine.generation_tokens < 150


async def test_busy_backend_does_not_break_and_clients_go_first() -> None:
    backends = {"vllm": {"max_concurrency": 1}}
    async with checked(tokens_per_second=50.0, llm_backend="vllm", backends=backends) as setup:
        long = {"stream": True, "messages": [{"role": "user", "content": "say 5000 words"}], "max_tokens": 5000}
        async with setup.gateway.sent(long) as raw:
            await raw.head()
            report = await setup.check("vllm", seconds=1)
            assert report.breaks == []
            assert report.of("serves")["value"] == "busy: no slot came free in time"
            assert (setup.gateway.waiting, generations(setup.vllm)) == (0, 1)


def test_key_of_the_probes_cannot_be_an_api_keys_id() -> None:
    assert len(KEY) != 8
    assert not set(KEY) <= set("0123456789abcdef")


# Backends that fail or hang


async def test_stream_that_breaks_off_is_found() -> None:
    async with checked() as setup:
        setup.vllm.engine.inject(Fault("truncate", after=3))
        report = await setup.check()
        assert report.breaks == ["streaming"]
        assert report.of("streaming")["value"] == "breaks off (fails (truncated))"


async def test_hanging_backend_breaks_within_the_time_limit_and_is_released() -> None:
    async with failing("silent") as (gateway, client, vllm):
        body = (await client.post("/ops/preflight?backend=vllm&seconds=1")).json()
        assert [item["value"] for item in body["findings"] if item["what"] == "serves"] == ["no first token in time"]
        assert 0.9 < body["seconds"] < 15
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_vllm_that_hangs_in_everything_is_not_taken_for_busy() -> None:
    """It accepts connections and sends nothing, as if stopped by a signal."""

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silence, "127.0.0.1", 0) as hangs, FaultBackend("ollama") as ollama:
        url = f"http://127.0.0.1:{hangs.sockets[0].getsockname()[1]}"
        tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}}
        async with serving(document(url, ollama.base_url, tiers=tiers)) as (gateway, client):
            server = gateway.gateway._backends["vllm"].servers[0]
            await until(lambda: server.circuit.is_open)
            server.circuit.probe_answered()
            server.circuit.probe_answered()
            server.up = True  # as before it stopped
            body = (await client.post("/ops/preflight?backend=vllm&seconds=1")).json()
            assert [item["value"] for item in body["findings"] if item["what"] == "serves"] == [
                "no first token in time"
            ]
            assert body["seconds"] < 15


async def test_check_ends_when_health_checks_find_the_backend_down() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        gateway.gateway._backends["vllm"].servers[0].circuit.probe_missed(is_sure=True)
        assert (await check).json()["breaks"]
        await until(lambda: not vllm.open_peers and gateway.is_idle())


@pytest.mark.parametrize("mode", ["close", "rst", "garbage", "html", "truncated", "redirect", "flood", "big_header"])
async def test_malformed_answer_breaks_and_leaves_nothing_behind(mode: str) -> None:
    async with failing(mode) as (gateway, client, _):
        body = (await client.post("/ops/preflight?backend=vllm&seconds=3")).json()
        assert body["breaks"]
        await until(gateway.is_idle)
