"""Two models of one Ollama that do not fit into its memory together, served for many minutes.

Covers: gateway/upstream/model_loader.py, gateway/admission/model_residency.py,
gateway/simulate/ollama/scheduler.py
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from unittest.mock import patch

import pytest

from gateway import config
from gateway.admission.model_residency import UNLOAD_AFTER_SECONDS
from gateway.simulate import Model, Options
from gateway.simulate import Running as StandIn
from gateway.simulate import running as stand_in
from tests.fakes.running_gateway import Running, running
from tests.fakes.virtual_time import virtual_clock

pytestmark = pytest.mark.virtual_time

SWAP_AFTER, LOAD_SECONDS, ANSWER_SECONDS = 12.0, 1.0, 0.8
ANSWER_TOKENS = 8
STANDSTILL = UNLOAD_AFTER_SECONDS + LOAD_SECONDS + 2 * ANSWER_SECONDS + 1.0
"""Longest time in seconds in which nothing is served: a model finishes, is unloaded, and the other
one is loaded and answers."""
TURN = SWAP_AFTER + STANDSTILL + LOAD_SECONDS + 2 * ANSWER_SECONDS
"""Longest time in seconds in which a model is not served."""
MODELS = (Model("a", size=6000), Model("b", size=6000))


def settings(url: str, parallel: int) -> config.Settings:
    ollama = {
        "kind": "ollama",
        "base_url": url,
        "keep_alive": "10m",
        "swap_after": SWAP_AFTER,
        "model_concurrency": parallel,
    }
    return config.build(
        {
            "backends": {"ollama": ollama},
            "tiers": {name: {"models": {"ollama": name}} for name in "ab"},
            "llm_backend": "ollama",
            "log_format": "json",
            "state_file": "",
        }
    )


@asynccontextmanager
async def gateway_before_small_memory(parallel: int, memory: int = 8000) -> AsyncIterator[tuple[Running, StandIn]]:
    options = Options(
        "ollama",
        MODELS,
        memory=memory,
        parallel=parallel,
        load_seconds=LOAD_SECONDS,
        answer_tokens=ANSWER_TOKENS,
        tokens_per_second=ANSWER_TOKENS / ANSWER_SECONDS,
    )
    with virtual_clock(), patch("gateway.relay.in_flight.CHECK_SECONDS", 1.0):
        async with (
            stand_in(options) as server,
            running(settings(server.base_url, parallel), shares_loop=True) as gateway,
        ):
            yield gateway, server


class Traffic:
    """Clients that ask one after the other, and the times at which their answers came."""

    def __init__(self, gateway: Running) -> None:
        self._gateway = gateway
        self.began = asyncio.get_running_loop().time()
        self.served: dict[str, list[float]] = {"a": [], "b": []}
        self.statuses: set[int] = set()

    async def ask(self, tier: str, until: float, tokens: int = ANSWER_TOKENS) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < self.began + until:
            async with self._gateway.sent({"model": tier, "max_tokens": tokens}) as raw:
                self.statuses.add((await raw.reply()).status)
            self.served[tier].append(loop.time() - self.began)

    def longest_gap(self, *tiers: str) -> float:
        """Return the longest time in seconds in which no request of these tiers was served."""
        times = sorted([0.0, *(time for tier in tiers for time in self.served[tier])])
        return max(later - earlier for earlier, later in pairwise(times))


@pytest.mark.parametrize("parallel", [1, 4])
async def test_models_that_do_not_fit_together_are_both_served_without_a_standstill(parallel: int) -> None:
    """Every request carries a `keep_alive`, which makes Ollama keep a model that it is to evict."""
    seconds = 8 * SWAP_AFTER
    async with gateway_before_small_memory(parallel) as (gateway, server):
        traffic = Traffic(gateway)
        await asyncio.gather(*(traffic.ask(tier, seconds) for tier in "aaab"))
        assert traffic.statuses == {200}
        assert traffic.longest_gap("a", "b") <= STANDSTILL
        assert max(traffic.longest_gap("a"), traffic.longest_gap("b")) <= TURN
        turns = seconds / SWAP_AFTER
        assert turns / 3 <= server.app.scheduler.loads <= turns + 3
        assert min(len(times) for times in traffic.served.values()) > turns


async def test_model_that_is_idle_but_kept_alive_makes_room_after_swap_after() -> None:
    """Requests that overlap have overwritten the order to unload; then no more of them come."""
    async with gateway_before_small_memory(4) as (gateway, _):
        traffic = Traffic(gateway)
        await asyncio.gather(*(traffic.ask("a", 5.0, tokens) for tokens in (8, 7, 5)), traffic.ask("b", 5.0))
        assert traffic.statuses == {200}
        assert traffic.served["b"][0] <= SWAP_AFTER + STANDSTILL + LOAD_SECONDS
        assert gateway.metric("gateway_model_unloads_total", backend="ollama", model="a", reason="make_room") == 1
        assert gateway.metric("gateway_model_unloads_total") == 1


async def test_models_that_fit_together_are_not_unloaded_for_each_other() -> None:
    async with gateway_before_small_memory(4, memory=12000) as (gateway, server):
        traffic = Traffic(gateway)
        await asyncio.gather(*(traffic.ask(tier, 2 * SWAP_AFTER) for tier in "aaab"))
        assert traffic.statuses == {200}
        assert gateway.metric("gateway_model_unloads_total") == 0
        assert server.app.scheduler.loads == 2
