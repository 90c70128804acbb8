"""What users have reported of their systems, measured by the scenarios: directly, and through a gateway.

Everything runs in virtual time, 20 times as fast as reported: the stand-ins' servers wake up ten times a second.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest

from gateway import config
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.options import BenchOptions
from gateway.bench.results import ScenarioResult
from gateway.bench.runner import Runner
from gateway.bench.scenarios import SCENARIOS
from gateway.bench.target import Api, Target
from gateway.chat.images import ImageNormalizer
from gateway.chat.request import Chat
from gateway.simulate import SEED_SLOWDOWN, Model, Options
from gateway.simulate import running as stand_in
from tests.fakes.running_gateway import running
from tests.fakes.virtual_time import virtual_clock

pytestmark = pytest.mark.virtual_time

SCALE = 0.05
TOKENS = 10
VISION = Options(
    "ollama",
    (Model("qwen3-vl:8b", family="qwen3vl", vision=True),),
    time_scale=SCALE,
    image_seconds=50.0,
    tokens_per_second=TOKENS,
    answer_tokens=TOKENS,
    image_slowdown=SEED_SLOWDOWN,
)
"""An Ollama that takes 51 s for one image and 397 s for five at once."""
TEXT = Options(
    "ollama",
    (Model("gemma2:2b"), Model("llama3.1:8b")),
    time_scale=SCALE,
    parallel=3,
    tokens_per_second=0.1,
    time_to_first_token=82.0,
)
"""An Ollama that takes 182 s for a text of ten tokens, and three at once."""


def reported(seconds: Any) -> float:
    """Return measured seconds at the time scale of the reports."""
    return float(seconds) / SCALE


async def measured(scenario: str, url: str, model: str, api: Api = "openai", **changes: Any) -> ScenarioResult:
    """Run a scenario on the clock of the running loop."""
    loop = asyncio.get_running_loop()
    defaults = {"target": Target(url, model, api), "output_len": TOKENS, "timeout": 600.0 * SCALE}
    options = BenchOptions(**(defaults | changes))  # type: ignore[arg-type]
    client = HttpLoadClient(options.target, loop.time)
    try:
        return await SCENARIOS[scenario].run(options, Runner(client, clock=loop.time, watch_interval=1000.0))
    finally:
        await client.close()


async def _as_it_is(self: ImageNormalizer, chat: Chat, *_: Any, **__: Any) -> Chat:
    return chat


@asynccontextmanager
async def behind_gateway(options: Options, limits: dict[str, Any] | None = None, **backend: Any) -> AsyncIterator[str]:
    """Yield the address of a gateway with a tier for each model of the stand-in.

    It does not check images: its threads would not be in this loop, whose clock runs ahead of them.
    """
    kind = options.kind
    with (
        virtual_clock(),
        patch("gateway.relay.in_flight.CHECK_SECONDS", 1000.0),
        patch("gateway.chat.images.ImageNormalizer.checked", _as_it_is),
    ):
        async with stand_in(options) as server:
            tiers = {
                model.name: {"models": {kind: model.name}, "limits": {kind: limits or {}}} for model in options.served
            }
            document: dict[str, Any] = {
                "backends": {kind: {"kind": kind, "base_url": server.base_url, "probe_interval": 5000, **backend}},
                "tiers": tiers,
                "llm_backend": kind,
                "state_file": "",
                "commit_after": 45 * SCALE,
                "heartbeat": 15 * SCALE,
            }
            async with running(config.build(document), shares_loop=True) as gateway:
                yield gateway.base_url


async def test_images_at_once_get_slower_directly_and_ten_are_not_done_in_ten_minutes() -> None:
    """Reported: 1 file 51.0 s, 5 files 397.2 s (0.64 times), 10 and 20 files longer than 600 s."""
    async with stand_in(VISION) as server:
        result = await measured("vision-batch", server.base_url, "qwen3-vl:8b", "ollama", image_size=8)
    figures = result.figures
    assert reported(figures["total_s_1"]) == pytest.approx(51.0, rel=0.02)
    assert reported(figures["total_s_5"]) == pytest.approx(397.2, rel=0.02)
    assert figures["speedup_5"] == pytest.approx(0.64, abs=0.015)
    assert (figures["failed_10"], figures["failed_20"]) == (10, 20)


async def test_images_at_once_lose_nothing_through_the_gateway() -> None:
    """Its lane serves images one after the other, so each takes as long as alone, and none fails."""
    async with behind_gateway(VISION) as url:
        result = await measured(
            "vision-batch", url, "qwen3-vl:8b", image_size=8, levels=(1, 5, 10), timeout=900.0 * SCALE
        )
    assert reported(result.figures["total_s_5"]) == pytest.approx(255.0, rel=0.03)
    assert result.figures["speedup_5"] >= 0.98  # type: ignore[operator]
    assert result.figures["speedup_10"] >= 0.98  # type: ignore[operator]
    assert result.figures["failed_10"] == 0
    assert [verdict.key for verdict in result.verdicts] == ["no_gain", "no_gain"]


async def test_the_keep_alive_of_a_waiting_stream_is_no_token() -> None:
    """The gateway commits a stream after 45 s and keeps it alive; the first token comes when the lane is free."""
    async with behind_gateway(VISION) as url:
        result = await measured("vision-batch", url, "qwen3-vl:8b", image_size=8, levels=(2,), timeout=900.0 * SCALE)
    firsts = sorted(reported(record.ttft) for record in result.runs[-1].records)
    assert firsts == pytest.approx([50.0, 101.0], rel=0.05)


@pytest.mark.parametrize("through", ["directly", "through the gateway"])
async def test_three_texts_at_once_are_three_times_as_fast(through: str) -> None:
    """Reported: 546 s one after the other, 182 s at once, 3.0 times."""
    if through == "directly":
        async with stand_in(TEXT) as server:
            result = await measured("text-parallel", server.base_url, "gemma2:2b", "ollama", output_len=TOKENS + 1)
    else:
        async with behind_gateway(TEXT, model_concurrency=3) as url:
            result = await measured("text-parallel", url, "gemma2:2b", output_len=TOKENS + 1)
    assert reported(result.figures["in_turn_s"]) == pytest.approx(546.0, rel=0.02)
    assert reported(result.figures["together_s"]) == pytest.approx(182.0, rel=0.02)
    assert result.figures["speedup"] == pytest.approx(3.0, abs=0.05)


async def test_two_models_and_three_languages_at_once() -> None:
    """Reported: an Ollama serves several models at once, each in a runner of its own."""
    async with stand_in(TEXT) as server:
        models = ("gemma2:2b", "llama3.1:8b")
        result = await measured("multi-model", server.base_url, models[0], "ollama", models=models)
    assert result.figures["speedup"] == pytest.approx(3.0, abs=0.05)


async def test_requests_at_once_on_an_ollama_are_served_one_after_the_other() -> None:
    """Reported: 16 requests took 0.69 s to 3.49 s on an Ollama, and all 4.1 s on a vLLM."""
    serial = Options("ollama", (Model("qwen3:0.6b"),), tokens_per_second=160.0)
    async with stand_in(serial) as server:
        result = await measured("concurrency", server.base_url, "qwen3:0.6b", "ollama", levels=(16,), output_len=32)
    times = sorted(record.end - record.start for record in result.runs[-1].records)
    assert result.verdicts[0].key == "serial"
    assert times[0] == pytest.approx(0.2, abs=0.1)
    assert times[-1] == pytest.approx(3.2, abs=0.3)
    batching = Options("vllm", (Model("Qwen/Qwen3-0.6B"),), tokens_per_second=8.0)
    async with stand_in(batching) as server:
        result = await measured("concurrency", server.base_url, "Qwen/Qwen3-0.6B", levels=(16,), output_len=32)
    times = sorted(record.end - record.start for record in result.runs[-1].records)
    assert result.verdicts[0].key == "batched"
    assert times[-1] - times[0] < 0.3


TRANSFORMERS = Options(
    "vllm",
    (Model("moondream2", vision=True),),
    image_seconds=11.0,
    tokens_per_second=TOKENS,
    answer_tokens=TOKENS,
)
"""A server that batches, as Transformers behind an OpenAI API; 12 s for one image."""


async def test_twenty_images_fit_on_one_tier_and_not_on_the_next() -> None:
    """Reported: 20 files at once are 13.6 times as fast on the small model; on the next the memory does not suffice."""
    for fits, failed in ((20, 0), (10, 20)):
        async with stand_in(replace(TRANSFORMERS, out_of_memory_above=fits)) as server:
            result = await measured("vision-batch", server.base_url, "moondream2", levels=(1, 10, 20), image_size=8)
        assert result.figures["failed_10"] == 0
        assert result.figures["failed_20"] == failed


async def test_a_tiers_concurrency_keeps_the_memory() -> None:
    """The same server behind a tier with `limits: {vllm: {concurrency: 10}}` serves 20, in two turns."""
    fits_ten = replace(TRANSFORMERS, out_of_memory_above=10)
    async with behind_gateway(fits_ten, {"concurrency": 10}) as url:
        result = await measured("vision-batch", url, "moondream2", levels=(1, 10, 20), image_size=8)
    assert result.figures["failed_20"] == 0
    assert result.figures["total_s_20"] == pytest.approx(24.0, rel=0.2)
