"""A real Prometheus scrapes a gateway under load, and answers with the load generator's own counts."""

import asyncio
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
from openai import APIError, AsyncOpenAI, NotFoundError

from gateway import config, simulate
from gateway.simulate.options import Fault
from gateway.telemetry.metrics import TIME_TO_FIRST_TOKEN
from tests.fakes.dashboard import QUERIES, substituted
from tests.fakes.prometheus import RULES, STARTUP_PATIENCE, Prometheus, Samples, exporter, metrics_of, prometheus
from tests.fakes.running_gateway import PROMPT, Running, running, until
from tests.fakes.stand_ins import stand_in
from tests.programs import program

pytestmark = pytest.mark.uvloop

FIRST_TOKEN = 0.3
"""Seconds to the first token of the vLLM stand-in, between the histogram's bounds 0.25 and 0.5."""
TOKENS_PER_SECOND = 200

MESSAGES: Any = PROMPT

TIERS = {"fast": "vllm", "small": "ollama"}
"""The backend of each tier."""


SOMETIMES = {
    *("ALERTS", "gateway_affinity_total", "gateway_client_disconnects_total", "gateway_fallbacks_total"),
    *("gateway_key_requests_total", "gateway_key_tokens_total", "gateway_model_unloads_total"),
    *("gateway_backend_asleep", "gateway_gpu_switches_total", "gateway_gpu_phase_seconds_sum"),
    *("gateway_gpu_phase_seconds_count", "gateway_name_resolved", "gateway_redis_up"),
    *("gateway_rate_limited_total", "gateway_rejected_total", "gateway_replicas", "gateway_retries_total"),
    *("gateway_switches_total", "gateway_upstream_errors_total", "vllm:e2e_request_latency_seconds_bucket"),
    *("vllm:inter_token_latency_seconds_bucket", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"),
    "vllm:time_to_first_token_seconds_bucket",
}
"""Metrics of events that a healthy gateway has not had, of features that it does not use, and of a
real vLLM."""


class Stack(NamedTuple):
    gateway: Running
    vllm: simulate.Running
    client: AsyncOpenAI


@asynccontextmanager
async def serving() -> AsyncIterator[Stack]:
    """Run both engines, and a gateway with a tier on each and one that may move."""
    vllm = simulate.Options(
        "vllm", (simulate.Model("large"),), time_to_first_token=FIRST_TOKEN, tokens_per_second=TOKENS_PER_SECOND
    )
    ollama = simulate.Options("ollama", (simulate.Model("tiny"),), parallel=4)
    async with AsyncExitStack() as stack:
        one, two = await stack.enter_async_context(stand_in(vllm)), await stack.enter_async_context(stand_in(ollama))
        models = {"vllm": "large", "ollama": "tiny"}
        document = {
            "llm_backend": "vllm",
            "backends": {
                "vllm": {"kind": "vllm", "base_url": one.base_url},
                "ollama": {"kind": "ollama", "base_url": two.base_url},
            },
            "tiers": {
                "free": {"models": models},
                **{tier: {"models": models, "backend": backend} for tier, backend in TIERS.items()},
            },
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document)))
        yield Stack(gateway, one, await stack.enter_async_context(gateway.openai()))


@asynccontextmanager
async def scraping(folder: Path, stack: Stack) -> AsyncIterator[Prometheus]:
    """Run a Prometheus that scrapes the gateway, the vLLM and a GPU exporter."""
    async with exporter() as gpu:
        vllm = stack.vllm.base_url.removeprefix("http://")
        targets = {"gateway": f"127.0.0.1:{stack.gateway.port}", "vllm": vllm, "gpu": gpu}
        async with prometheus(folder, targets) as scraper:
            yield scraper


class Load:
    """Load generator that keeps its own counts."""

    def __init__(self, client: AsyncOpenAI) -> None:
        self._client = client
        self.requests: Counter[tuple[str, ...]] = Counter()
        """Requests by tier, backend and outcome."""
        self.tokens: Counter[tuple[str, ...]] = Counter()
        """Tokens by tier and type."""
        self.first_tokens: dict[str, list[float]] = {tier: [] for tier in TIERS}
        """Seconds to the first token of each stream, by tier."""

    async def run(self, plain: int = 0, streams: int = 0, failing: int = 0, unknown: int = 0) -> None:
        """Send these numbers of requests to each tier, all at once. Those to an unknown model go to none."""
        asked = [self._plain(tier) for tier in TIERS for _ in range(plain)]
        asked += [self._stream(tier) for tier in TIERS for _ in range(streams)]
        asked += [self._failing("fast") for _ in range(failing)]
        await asyncio.gather(*asked, *(self._unknown() for _ in range(unknown)))

    async def _plain(self, tier: str) -> None:
        answer = await self._client.chat.completions.create(model=tier, messages=MESSAGES, max_tokens=16)
        self._count(tier, answer.usage)

    async def _stream(self, tier: str) -> None:
        began = asyncio.get_running_loop().time()
        answer = await self._client.chat.completions.create(
            model=tier,
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        is_first = True
        async for chunk in answer:
            if is_first and chunk.choices and chunk.choices[0].delta.content:
                self.first_tokens[tier].append(asyncio.get_running_loop().time() - began)
                is_first = False
        self._count(tier, chunk.usage)

    def _count(self, tier: str, usage: object) -> None:
        self.requests[tier, TIERS[tier], "ok"] += 1
        for kind in ("prompt", "completion"):
            self.tokens[tier, kind] += getattr(usage, f"{kind}_tokens")

    async def _failing(self, tier: str) -> None:
        with pytest.raises(APIError):
            await self._stream(tier)
        self.requests[tier, TIERS[tier], "upstream_error"] += 1

    async def _unknown(self) -> None:
        with pytest.raises(NotFoundError):
            await self._client.chat.completions.create(model="unknown", messages=MESSAGES)
        self.requests["none", "none", "client_error"] += 1


async def test_prometheus_counts_what_the_load_generator_counts(tmp_path: Path) -> None:
    async with serving() as stack, scraping(tmp_path, stack) as scraper:
        load = Load(stack.client)
        await load.run(plain=20, streams=20, unknown=3)

        await scraper.until("sum by (tier, type) (gateway_tokens_total)", load.tokens, "tier", "type")
        of_vllm: Samples = {(): float(load.tokens["fast", "completion"])}
        await scraper.until("sum(vllm:generation_tokens_total)", of_vllm)
        await scraper.until("sum by (tier) (gateway_tokens_total{type='completion', backend='vllm'})", of_vllm)

        stack.vllm.engine.inject(Fault("error", after=3, times=4))
        await load.run(failing=4)
        await load.run(streams=5)
        labels = ("tier", "backend", "outcome")
        await scraper.until("sum by (tier, backend, outcome) (gateway_requests_total) > 0", load.requests, *labels)
        await scraper.until("gateway_upstream_errors_total", {("vllm",): 4}, "backend")
        of_tiers = {(tier,): sum(count for (of, *_), count in load.requests.items() if of == tier) for tier in TIERS}
        await scraper.until("sum by (tier) (gateway_request_duration_seconds_count > 0)", of_tiers, "tier")
        first_tokens = {("fast",): len(load.first_tokens["fast"])}
        await scraper.until("gateway_time_to_first_token_seconds_count{backend='vllm'} > 0", first_tokens, "tier")
        quantiles = await scraper.until_holds(
            "histogram_quantile(0.5, sum by (tier, le) (gateway_time_to_first_token_seconds_bucket))", bool, "tier"
        )
        assert quantiles["fast",] > 0.25
        for tier, seconds in load.first_tokens.items():  # the client's times include the way to it
            assert quantiles[tier,] <= min(bound for bound in TIME_TO_FIRST_TOKEN if bound >= median(seconds))


async def test_prometheus_sees_the_requests_in_flight_on_each_server(tmp_path: Path) -> None:
    async with serving() as stack, scraping(tmp_path, stack) as scraper, AsyncExitStack() as clients:
        endless = {"model": "fast", "stream": True, "messages": [{"role": "user", "content": "repeat a"}]}
        for _ in range(3):
            await clients.enter_async_context(stack.gateway.sent({**endless, "max_tokens": 30_000}))
        await scraper.until(
            "gateway_server_requests_running", {("vllm", "1"): 3, ("ollama", "1"): 0}, "backend", "server"
        )
        await scraper.until("gateway_requests_running{lane='text'}", {("vllm",): 3, ("ollama",): 0}, "backend")
        await clients.aclose()
        await scraper.until(
            "gateway_server_requests_running", {("vllm", "1"): 0, ("ollama", "1"): 0}, "backend", "server"
        )
        await scraper.until("sum(gateway_client_disconnects_total)", {(): 3})
        await scraper.until("sum by (tier) (gateway_requests_total{outcome='cancelled'})", {("fast",): 3}, "tier")
        await until(stack.gateway.is_idle)


async def test_rules_are_evaluated_without_errors_and_a_switch_is_counted_from_zero(tmp_path: Path) -> None:
    async with serving() as stack, scraping(tmp_path, stack) as scraper:
        await Load(stack.client).run(plain=2, streams=12)
        moved = {"tier": "free", "from_backend": "vllm", "to_backend": "ollama", "cause": "operator"}
        matchers = ", ".join(f'{label}="{value}"' for label, value in moved.items())
        await scraper.until(f"gateway_switches_total{{{matchers}}}", {(): 0})
        stack.gateway.gateway.rollout.set("ollama", tier="free")
        await scraper.until(f"gateway_switches_total{{{matchers}}}", {(): 1})

        await scraper.until("sum by (job) (up)", {("gateway",): 1, ("vllm",): 1, ("gpu",): 1}, "job")
        await scraper.until(
            "tier:gateway_target_concurrent_requests", {("fast",): 10, ("small",): 10, ("free",): 10}, "tier"
        )
        await scraper.until("gpu:memory_used:ratio", {("0",): 0.75}, "gpu")
        await scraper.until('ALERTS{alertname="GatewayTooFewAtOnce"}', {})
        rules = await _evaluated_rules(scraper)
        assert {(rule["name"], rule.get("lastError", "")) for rule in rules if rule["health"] != "ok"} == set()
        critical = [rule["name"] for rule in rules if rule.get("labels", {}).get("severity") == "critical"]
        assert critical
        assert [rule["name"] for rule in rules if rule["name"] in critical and rule["state"] == "firing"] == []


async def test_every_query_of_the_dashboard_is_answered(tmp_path: Path) -> None:
    """Those about what happens rarely, and about metrics that only some gateways have, find nothing."""
    async with serving() as stack, scraping(tmp_path, stack) as scraper:
        for total in (12, 24):  # a rate needs a count to start from
            await Load(stack.client).run(plain=2, streams=4)
            await scraper.until("sum(gateway_requests_total)", {(): total})
        await scraper.until("count(gpu:utilization:ratio) + count(tier:gateway_target_error_ratio)", {(): 4})
        for query in QUERIES:
            if not metrics_of(query) <= SOMETIMES:
                await scraper.until_holds(substituted(query), bool)


async def _evaluated_rules(scraper: Prometheus) -> list[dict[str, Any]]:
    """Return all rules, once each has been evaluated."""
    async with asyncio.timeout(STARTUP_PATIENCE):
        while True:
            groups = (await scraper.get("rules"))["groups"]
            rules = [rule for group in groups for rule in group["rules"]]
            if len({group["file"] for group in groups}) == len(RULES) and "unknown" not in {
                rule["health"] for rule in rules
            }:
                return rules
            await asyncio.sleep(0.05)


async def test_metrics_pass_the_check_of_prometheus() -> None:
    async with serving() as stack:
        stack.vllm.engine.inject(Fault("error", after=3))
        load = Load(stack.client)
        await load.run(failing=1)
        await load.run(plain=1, streams=1, unknown=1)
        text, _ = await stack.gateway.gateway._operations.exposition("text/plain")
    command = [program("promtool"), "check", "metrics"]
    outcome = subprocess.run(command, input=text, capture_output=True, timeout=20)
    assert (outcome.returncode, outcome.stdout + outcome.stderr) == (0, b"")
