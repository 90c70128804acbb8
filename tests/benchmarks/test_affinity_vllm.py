"""Covers: benchmarks/affinity_traffic.py"""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.affinity_traffic import WORKLOADS, growing_conversations, shared_prompts
from benchmarks.affinity_vllm import COUNTERS, MODEL, Tally, counters_of, gateway, play, table
from gateway import simulate
from tests.bench.records import record
from tests.fakes.stand_ins import stand_in

METRICS = """\
# HELP vllm:prefix_cache_queries_total Prefix cache queries
vllm:prefix_cache_queries_total{engine="0",model_name="m"} 1000.0
vllm:prefix_cache_queries_created{engine="0",model_name="m"} 1.7e9
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 640.0
vllm:request_success_total{finished_reason="stop",model_name="m"} 3.0
vllm:request_success_total{finished_reason="length",model_name="m"} 4.0
"""


def test_the_counters_are_sums_over_their_series() -> None:
    assert counters_of(METRICS) == {"queries": 1000.0, "hits": 640.0, "requests": 7.0}
    assert counters_of("") == dict.fromkeys(COUNTERS, 0.0)


def test_a_tally_adds_differences_of_all_servers_and_rounds() -> None:
    tally = Tally()
    before = [{"queries": 100.0, "hits": 100.0, "requests": 5.0}, {"queries": 0.0, "hits": 0.0, "requests": 0.0}]
    after = [{"queries": 300.0, "hits": 150.0, "requests": 9.0}, {"queries": 200.0, "hits": 150.0, "requests": 2.0}]
    tally.add(before, after)
    tally.add(before, after)
    tally.records = [record(number) for number in range(20)]
    assert tally.row() == ("0.500", "400", "500", "500", "8 : 4", "0")


def test_a_percentile_without_enough_answers_and_failures_are_shown() -> None:
    tally = Tally(hits=1, queries=2, requests=[1], records=[record(0), record(1, ttft=None, itl=(), error="timeout")])
    assert tally.row()[3:] == ("n too small", "1", "1")
    assert "| policy | 0.500 |" in table("growing conversations", [("policy", *tally.row())])


@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_same_seed_gives_the_same_requests(workload: str) -> None:
    assert WORKLOADS[workload](3, 0.5) == WORKLOADS[workload](3, 0.5) != WORKLOADS[workload](4, 0.5)


def test_a_conversation_grows_by_an_answer_and_a_question() -> None:
    for chain in growing_conversations(1):
        for before, step in pairwise(chain):
            assert step.messages[:-2] == before.messages or len(step.messages) == 2
            assert step.messages[0] == chain[0].messages[0]


def test_system_prompts_are_shared_by_single_requests_in_order() -> None:
    chains = shared_prompts(1)
    assert {len(chain) for chain in chains} == {1}
    assert len({chain[0].messages[0]["content"] for chain in chains}) <= 20
    assert [chain[0].pause for chain in chains] == sorted(chain[0].pause for chain in chains)


async def test_all_requests_are_played_through_the_gateway_on_both_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.Random.uniform", lambda *_: 0.0)
    chains = growing_conversations(1, 0.25)
    options = simulate.Options("vllm", (simulate.Model(MODEL),))
    async with stand_in(options) as one, stand_in(options) as two:
        with gateway("least_busy", [one.base_url, two.base_url], tmp_path) as url:
            records = await play(url, chains)
        counts = [len([seen for seen in server.engine.requests if "chat" in str(seen)]) for server in (one, two)]
    assert [item.error for item in records] == [""] * sum(map(len, chains))
    assert min(counts) > 0
