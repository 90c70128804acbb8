"""Reading of metrics, of the status and of results; targets and costs.

Covers: gateway/bench/advise/exposition.py
Covers: gateway/bench/advise/levels.py
Covers: gateway/bench/advise/loads.py
Covers: gateway/bench/advise/target.py
Covers: gateway/bench/advise/cost.py
"""

import json
from math import inf
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from gateway.bench.advise.cost import HOURS_PER_MONTH, Machine, cost_of
from gateway.bench.advise.exposition import Exposition, Observations
from gateway.bench.advise.levels import is_saturated, knee, levels_of
from gateway.bench.advise.loads import loads
from gateway.bench.advise.sources import InvalidSource, cost_remarks, kind_of, result_of, users_of, users_of_both
from gateway.bench.advise.target import Target
from gateway.bench.result_json import to_json
from gateway.telemetry.metrics import Metrics
from tests.bench.advise.machine import result
from tests.fakes.exchanges import exchange, failed


def scraped(*, requests: int, rejected: int = 0) -> Exposition:
    """Return the metrics after requests of 1.25 s on vLLM, 0.25 s of them in the queue."""
    registry = CollectorRegistry()
    metrics = Metrics(registry, "0")
    for _ in range(requests):
        metrics.record(exchange(queue_wait=0.25))
    for _ in range(rejected):
        metrics.record(failed(outcome="rejected", code="queue_full", queue_wait=None))
    return Exposition(generate_latest(registry).decode())


def status(**server: Any) -> dict[str, Any]:
    slots = {"m": {"running": 0, "limit": 6, "learned": True}} | server
    return {
        "tiers": {"standard": {}},
        "backends": {
            "vllm": {
                "kind": "vllm",
                "limits": {"max_concurrency": 8, "model_concurrency": "auto"},
                "servers": [{"model_slots": slots}, {"model_slots": {}}],
            }
        },
    }


def test_the_load_of_a_backend_is_read_from_metrics_and_status() -> None:
    (load,) = loads(status(), scraped(requests=60, rejected=2), None, 120.0)
    assert (load.name, load.kind, load.requests, load.rate) == ("vllm", "vllm", 60, 0.5)
    assert load.queue_wait.mean == pytest.approx(0.25)
    assert load.time_to_first_token.mean == pytest.approx(0.25)
    assert load.rejected == {"queue_full": 2}
    assert (load.slots, load.learned, load.servers) == (6 + 8, True, 2)
    assert load.service == pytest.approx((60 * 1.25 + 2 * 0.01) / 62 - 0.25)


def test_embeddings_are_no_chats_and_images_are_told_apart() -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry, "0")
    for lane, tier, endpoint in (
        ("embedding", "bge", "embeddings"),
        ("vision", "standard", "chat"),
        ("text", "standard", "chat"),
    ):
        metrics.record(exchange(queue_wait=0.25, lane=lane, tier=tier, endpoint=endpoint))
    (load,) = loads(status(), Exposition(generate_latest(registry).decode()), None, 10.0)
    assert (load.requests, load.duration.count, load.vision_wait.count) == (2, 2, 1)


def test_two_scrapes_give_what_happened_in_between() -> None:
    (load,) = loads(status(), scraped(requests=100, rejected=3), scraped(requests=60, rejected=1), 10.0)
    assert (load.requests, load.rate, load.rejected) == (40, 4.0, {"queue_full": 2})


def test_a_restart_in_between_counts_from_it() -> None:
    (load,) = loads(status(), scraped(requests=5), scraped(requests=60), 10.0)
    assert load.requests == 5


def test_text_without_a_gateways_metrics_is_refused() -> None:
    with pytest.raises(ValueError, match="no metrics of a gateway"):
        Exposition("# TYPE up gauge\nup 1\n")


def test_quantiles_are_linear_within_a_bucket() -> None:
    found = Observations((1.0, 2.0, inf), (50.0, 50.0, 0.0), 100.0)
    assert (found.quantile(0.5), found.quantile(0.75), found.mean) == (1.0, 1.5, 1.0)
    assert Observations((1.0, inf), (0.0, 4.0), 20.0).quantile(0.5) == 1.0
    assert (Observations().quantile(0.5), Observations().mean) == (None, None)


@pytest.mark.parametrize("text", ["p95_ttft_ms < 1000", "mean_e2el_ms<=2.5", "median_tpot_ms<20", "p99.9_itl_ms<80"])
def test_targets_are_latencies_below_a_limit(text: str) -> None:
    target = Target.parse(text)
    assert target.holds(target.limit / 2)
    assert not target.holds(target.limit * 2)
    assert not target.holds(None)
    assert target.holds(target.limit) is ("<=" in text)


@pytest.mark.parametrize("text", ["p95_ttft_ms>1000", "speed<3", "p95_ttft_ms<", "p95_ttft<3", "p95_ttft_ms<-1", ""])
def test_other_targets_are_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="such as p95_ttft_ms<1000"):
        Target.parse(text)


def test_a_result_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    file = tmp_path / "benchmark_results.json"
    file.write_text(json.dumps(to_json(result(users_realtime=0, users_within_wait=8))))
    for path in (file, tmp_path):
        found = result_of(path)
        assert [level.at_once for level in levels_of(found, ())] == [1, 2, 4, 8]
        assert users_of(found) == 8


def test_two_results_are_compared_by_a_criterion_that_both_found() -> None:
    """Ten users in real time and five within the wait are two things."""
    after, before = result(users_realtime=10, users_within_wait=40), result(users_realtime=0, users_within_wait=5)
    assert users_of_both(after, before) == (40, 5)
    assert users_of_both(after, result(users_realtime=2, users_within_wait=4)) == (10, 2)
    assert users_of_both(after, result()) == (10, None)


def test_a_result_before_without_users_is_said() -> None:
    keys = [remark.key for remark in cost_remarks(10, Machine(1, 1, 0, 0), None, is_compared=True)]
    assert keys == ["no_share", "cost_month", "cost_user"]
    assert [remark.key for remark in cost_remarks(10, None, None, is_compared=True)] == ["no_share"]


def test_what_is_not_a_result_is_named(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    file.write_text("[]")
    with pytest.raises(InvalidSource, match=r"other\.json"):
        result_of(file)
    with pytest.raises(InvalidSource, match="No such file"):
        result_of(tmp_path / "missing.json")


def test_the_kind_of_the_server_is_ollama_only_where_that_is_known() -> None:
    assert kind_of(result(api="ollama")) == "ollama"
    assert kind_of(result()) == "openai"


def test_the_knee_is_the_smallest_level_with_the_whole_throughput() -> None:
    levels = levels_of(result((1, 2, 4, 8, 16)), ())
    assert (knee(levels).at_once, is_saturated(levels)) == (4, True)
    assert is_saturated(levels[:3]) is False


def test_the_cost_of_a_user_is_the_machines_over_its_users() -> None:
    machine = Machine(3_600_000, 3, 1000, 100)
    assert machine.monthly == pytest.approx(100_000 + HOURS_PER_MONTH * 100)
    found = cost_of(10, machine, users_before=2)
    assert found is not None
    assert found.per_user == pytest.approx(machine.monthly / 10)
    assert found.share == pytest.approx(20)


def test_the_share_needs_no_price_and_no_users_have_no_cost() -> None:
    assert [remark.key for remark in cost_remarks(10, None, 2)] == ["cost_share"]
    assert [remark.key for remark in cost_remarks(None, Machine(1, 1, 0, 0), None)] == ["no_users"]
    assert cost_remarks(10, None, None) == []
    assert all(remark.origin == "computed" for remark in cost_remarks(4, Machine(1, 1, 0, 0), 2))
