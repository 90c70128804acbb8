"""Metrics: documented names, labels and buckets, and no series that a client could add."""

import gc
from math import inf
from typing import Any

import pytest
from msgspec.structs import replace
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from gateway.chat.answer import Usage
from gateway.telemetry.exchange import NONE, Exchange
from gateway.telemetry.metrics import Metrics

ROUTE = ("tier", "backend")
LANE = ("backend", "lane")
# Names, types and labels as documented, without the label `le` of histograms.
DOCUMENTED: dict[str, tuple[str, tuple[str, ...]]] = {
    "gateway_requests": ("counter", ("endpoint", *ROUTE, "outcome")),
    "gateway_request_duration_seconds": ("histogram", ROUTE),
    "gateway_time_to_first_token_seconds": ("histogram", ROUTE),
    "gateway_inter_token_latency_seconds": ("histogram", ROUTE),
    "gateway_tokens": ("counter", (*ROUTE, "type")),
    "gateway_queue_wait_seconds": ("histogram", LANE),
    "gateway_requests_running": ("gauge", LANE),
    "gateway_requests_waiting": ("gauge", LANE),
    "gateway_waiting_bytes": ("gauge", ()),
    "gateway_replicas": ("gauge", ()),
    "gateway_redis_up": ("gauge", ("redis",)),
    "gateway_rejected": ("counter", ("backend", "reason")),
    "gateway_upstream_errors": ("counter", ("backend", "reason")),
    "gateway_retries": ("counter", ("backend", "reason")),
    "gateway_fallbacks": ("counter", ("tier", "from_backend", "to_backend")),
    "gateway_client_disconnects": ("counter", ("phase",)),
    "gateway_key_requests": ("counter", ("key",)),
    "gateway_key_tokens": ("counter", ("key", "type")),
    "gateway_rate_limited": ("counter", ("key", "limit")),
    "gateway_backend_asleep": ("gauge", ("backend",)),
    "gateway_gpu_switches": ("counter", ("from_backend", "to_backend", "outcome")),
    "gateway_gpu_phase_seconds": ("histogram", ("backend", "phase")),
    "gateway_backend_up": ("gauge", ("backend",)),
    "gateway_circuit_state": ("gauge", ("backend",)),
    "gateway_server_up": ("gauge", ("backend", "server")),
    "gateway_name_resolved": ("gauge", ("backend", "name")),
    "gateway_affinity": ("counter", ("backend", "outcome")),
    "gateway_server_requests_running": ("gauge", ("backend", "server")),
    "gateway_backend_load_seconds": ("histogram", ("backend", "model")),
    "gateway_model_unloads": ("counter", ("backend", "model", "reason")),
    "gateway_active_backend": ("gauge", ROUTE),
    "gateway_switches": ("counter", ("tier", "from_backend", "to_backend", "cause")),
    "gateway_overhead_seconds": ("histogram", ()),
    "gateway_build": ("info", ("version",)),
}
# vLLM's own buckets (vllm/v1/metrics/buckets.py), so that one dashboard can show both.
VLLM_BUCKETS = {
    "gateway_time_to_first_token_seconds": [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560
    ],
    "gateway_inter_token_latency_seconds": [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80
    ],
    "gateway_request_duration_seconds": [
        0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680
    ],
}  # fmt: skip

EXCHANGE = Exchange(
    request_id="r", key_id="", endpoint="chat", tier="standard", backend="vllm", model="m", lane="text",
    stream=True, status=200, code=None, reason=None, outcome="ok", phase="streaming", duration=2.0, queue_wait=0.5,
    upstream=1.2, time_to_first_token=0.7, usage=Usage(10, 4), attempts=1,
)  # fmt: skip


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(CollectorRegistry(), "1.2.3")


def touched(metrics: Metrics) -> Metrics:
    """Metrics in which every series has been created."""
    for outcome in ("ok", "cancelled", "rejected", "upstream_error", "timeout", "client_error"):
        metrics.record(replace(EXCHANGE, outcome=outcome, code="queue_full"))
    metrics.record(replace(EXCHANGE, key="web"))
    metrics.keys.refuse("web", "concurrency")
    metrics.route("standard", "vllm").gaps.observe_gap(0.03, 1)
    metrics.retries.labels("vllm", "connect").inc()
    for gauge in (metrics.running, metrics.waiting):
        gauge.labels("vllm", "text").set(1)
    metrics.backend_up.labels("vllm").set(1)
    metrics.load_seconds.labels("ollama", "qwen3:8b").observe(12.0)
    metrics.model_unloads.labels("ollama", "qwen3:8b", "frozen").inc()
    metrics.circuit_state.labels("vllm").set(0)
    metrics.server_up.labels("vllm", "1").set(1)
    metrics.server_running.labels("vllm", "1").set(1)
    metrics.name_resolved.labels("vllm", "vllm.svc:8000").set(1)
    metrics.fallbacks.labels("standard", "vllm", "ollama").inc()
    metrics.affinity.labels("vllm", "kept").inc()
    metrics.active_backend.labels("standard", "vllm").set(1)
    metrics.backend_asleep.labels("ollama").set(1)
    metrics.gpu_switches.labels("ollama", "vllm", "done").inc()
    metrics.gpu_phase.labels("vllm", "waking").observe(6.0)
    metrics.redis_up.labels("redis:6379/0").set(1)
    metrics.switches.labels("standard", "ollama", "vllm", "operator").inc()
    return metrics


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


# Names, labels, buckets


def test_names_types_and_labels_are_the_documented_ones(metrics: Metrics) -> None:
    found: dict[str, tuple[str, tuple[str, ...]]] = {}
    for family in touched(metrics).registry.collect():
        labels = {tuple(label for label in sample.labels if label != "le") for sample in family.samples}
        assert len(labels) == 1, family.name
        found[family.name] = (family.type, labels.pop())
    assert found == DOCUMENTED


@pytest.mark.parametrize("name", VLLM_BUCKETS)
def test_buckets_equal_those_of_vllm(metrics: Metrics, name: str) -> None:
    (family,) = [family for family in touched(metrics).registry.collect() if family.name == name]
    bounds = [float(sample.labels["le"]) for sample in family.samples if sample.name.endswith("_bucket")]
    assert bounds == [*VLLM_BUCKETS[name], inf]


@pytest.mark.parametrize("parse", ["text", "openmetrics"])
def test_prometheus_own_parser_reads_the_exposition(metrics: Metrics, parse: str) -> None:
    registry = touched(metrics).registry
    if parse == "text":
        families = list(parse_text(generate_latest(registry).decode()))
    else:
        families = list(parse_openmetrics(generate_openmetrics(registry).decode()))
    names = {family.name for family in families}
    assert set(DOCUMENTED) - {"gateway_build"} <= names
    for family in families:
        assert family.documentation


def test_build_info_has_the_version(metrics: Metrics) -> None:
    assert value(metrics, "gateway_build_info", version="1.2.3") == 1


# Recording an exchange


def test_exchange_counts_its_tokens_times_and_outcome(metrics: Metrics) -> None:
    metrics.record(EXCHANGE)
    route = {"tier": "standard", "backend": "vllm"}
    assert value(metrics, "gateway_requests_total", endpoint="chat", outcome="ok", **route) == 1
    assert value(metrics, "gateway_tokens_total", type="prompt", **route) == 10
    assert value(metrics, "gateway_tokens_total", type="completion", **route) == 4
    assert value(metrics, "gateway_request_duration_seconds_sum", **route) == 2.0
    assert value(metrics, "gateway_time_to_first_token_seconds_sum", **route) == 0.7
    assert value(metrics, "gateway_queue_wait_seconds_sum", backend="vllm", lane="text") == 0.5
    assert value(metrics, "gateway_overhead_seconds_sum") == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("changes", "name", "labels"),
    [
        ({"outcome": "cancelled", "phase": "queued"}, "gateway_client_disconnects_total", {"phase": "queued"}),
        (
            {"outcome": "rejected", "code": "queue_full"},
            "gateway_rejected_total",
            {"backend": "vllm", "reason": "queue_full"},
        ),
        (
            {"outcome": "upstream_error", "code": "upstream_error", "reason": "reset"},
            "gateway_upstream_errors_total",
            {"backend": "vllm", "reason": "reset"},
        ),
        (
            {"outcome": "timeout", "code": "upstream_timeout"},
            "gateway_upstream_errors_total",
            {"backend": "vllm", "reason": "upstream_timeout"},
        ),
    ],
)
def test_failure_is_counted_with_its_reason(
    metrics: Metrics, changes: dict[str, Any], name: str, labels: dict[str, str]
) -> None:
    metrics.record(replace(EXCHANGE, **changes))
    assert value(metrics, name, **labels) == 1


@pytest.mark.parametrize("tokens", [-5, 10**400])
def test_scrape_survives_whatever_was_counted(metrics: Metrics, tokens: int) -> None:
    metrics.record(replace(EXCHANGE, usage=Usage(tokens, 4)))
    generate_latest(metrics.registry)
    metrics.record(EXCHANGE)
    assert b"gateway_tokens_total" in generate_latest(metrics.registry)
    assert value(metrics, "gateway_tokens_total", tier="standard", backend="vllm", type="completion") == 8
    assert value(metrics, "gateway_tokens_total", tier="standard", backend="vllm", type="prompt") == 10
    assert value(metrics, "gateway_requests_total", endpoint="chat", tier="standard", backend="vllm", outcome="ok") == 2


def test_answer_that_is_not_streamed_has_no_time_to_first_token(metrics: Metrics) -> None:
    metrics.record(replace(EXCHANGE, time_to_first_token=None))
    assert not value(metrics, "gateway_time_to_first_token_seconds_count", tier="standard", backend="vllm")


def test_request_that_was_never_routed_is_counted_without_times(metrics: Metrics) -> None:
    metrics.record(replace(EXCHANGE, tier=NONE, backend=NONE, outcome="client_error", queue_wait=None, usage=None))
    assert (
        value(metrics, "gateway_requests_total", endpoint="chat", tier=NONE, backend=NONE, outcome="client_error") == 1
    )
    assert value(metrics, "gateway_request_duration_seconds_count", tier=NONE, backend=NONE) is None


def test_tokens_that_arrive_together_count_as_gaps_of_zero(metrics: Metrics) -> None:
    series = metrics.gaps.labels("standard", "vllm")
    series.observe_gap(0.06, 3)
    route = {"tier": "standard", "backend": "vllm"}
    assert value(metrics, "gateway_inter_token_latency_seconds_bucket", le="0.01", **route) == 2
    assert value(metrics, "gateway_inter_token_latency_seconds_bucket", le="0.075", **route) == 3
    assert value(metrics, "gateway_inter_token_latency_seconds_count", **route) == 3
    assert value(metrics, "gateway_inter_token_latency_seconds_sum", **route) == 0.06


def test_gap_that_equals_a_bound_falls_into_its_bucket(metrics: Metrics) -> None:
    metrics.gaps.labels("standard", "vllm").observe_gap(0.025, 1)
    assert (
        value(metrics, "gateway_inter_token_latency_seconds_bucket", le="0.025", tier="standard", backend="vllm") == 1
    )


def test_ten_thousand_unknown_models_add_no_series(metrics: Metrics) -> None:
    refused = replace(
        EXCHANGE,
        tier=NONE,
        backend=NONE,
        outcome="client_error",
        status=404,
        code="model_not_found",
        usage=None,
        queue_wait=None,
    )
    metrics.record(refused)
    before = len(generate_latest(metrics.registry).splitlines())
    for number in range(10_000):
        metrics.record(replace(refused, model=f"bogus-{number}", request_id=f"r{number}", key_id=f"k{number}"))
    gc.collect()
    assert len(generate_latest(metrics.registry).splitlines()) == before


def test_exemplar_is_the_last_traced_observation_of_its_bucket(metrics: Metrics) -> None:
    metrics.route("standard", "vllm")
    traced = replace(EXCHANGE, endpoint="messages", trace_id="a" * 32, span_id="b" * 16)
    metrics.record(traced)
    metrics.keep_exemplars([traced, replace(traced, duration=1.9, trace_id="c" * 32), replace(EXCHANGE, duration=1.8)])
    metrics.keep_exemplars([replace(traced, duration=40.5, trace_id="d" * 32)])
    families = parse_openmetrics(generate_openmetrics(metrics.registry).decode())
    (duration,) = [family for family in families if family.name == "gateway_request_duration_seconds"]
    found = {sample.labels["le"]: sample.exemplar for sample in duration.samples if sample.exemplar is not None}
    assert {bound: (exemplar.labels["trace_id"], exemplar.value) for bound, exemplar in found.items()} == {
        "2.0": ("c" * 32, 1.9),
        "50.0": ("d" * 32, 40.5),
    }


def test_exemplar_adds_no_series(metrics: Metrics) -> None:
    """Its tier may have been forgotten in the meantime."""
    metrics.keep_exemplars([replace(EXCHANGE, trace_id="a" * 32, span_id="b" * 16)])
    metrics.keep_exemplars([replace(EXCHANGE, tier=NONE, backend=NONE, trace_id="a" * 32, span_id="b" * 16)])
    assert value(metrics, "gateway_request_duration_seconds_count", tier="standard", backend="vllm") is None


def test_forget_drops_the_series_of_a_tier_or_backend_and_no_others() -> None:
    metrics = Metrics(CollectorRegistry(), "0")
    for tier, backend in (("one", "ollama"), ("two", "ollama"), ("two", "vllm")):
        metrics.route(tier, backend).ok = 3
        metrics.duration.labels(tier, backend).observe(1)
        metrics.switches.labels(tier, "ollama", "vllm", "reload").inc()
        metrics.rejected.labels(backend, "queue_full").inc()
        metrics.load_seconds.labels(backend, "model").observe(1)
        metrics.model_unloads.labels(backend, "model", "frozen").inc()
    metrics.forget("tier", "one")
    metrics.forget("backend", "vllm")
    metrics.forget("backend", "never-there")
    samples = [sample for family in metrics.registry.collect() for sample in family.samples]
    routes = {
        (sample.labels.get("tier"), sample.labels.get("backend")) for sample in samples if "backend" in sample.labels
    }
    assert routes == {("two", "ollama"), (None, "ollama")}
    assert {sample.labels["tier"] for sample in samples if sample.name == "gateway_switches_total"} == {"two"}
    assert metrics.route("one", "ollama").ok == 0


def test_requests_and_tokens_of_a_key_with_a_name_are_counted_until_it_is_gone(metrics: Metrics) -> None:
    metrics.record(replace(EXCHANGE, key="web"))
    metrics.record(replace(EXCHANGE, key="web", usage=None, sent_tokens=3, outcome="cancelled"))
    metrics.record(replace(EXCHANGE, key_id="12345678"))
    metrics.keys.refuse("web", "concurrency")
    assert value(metrics, "gateway_key_requests_total", key="web") == 2
    assert value(metrics, "gateway_key_tokens_total", key="web", type="prompt") == 10
    assert value(metrics, "gateway_key_tokens_total", key="web", type="completion") == 4 + 3
    assert value(metrics, "gateway_key_requests_total", key="12345678") is None
    metrics.keys.forget("web")
    for name in ("gateway_key_requests_total", "gateway_rate_limited_total"):
        assert not [key for key in series(metrics, name) if key.get("key") == "web"]


def series(metrics: Metrics, name: str) -> list[dict[str, str]]:
    families = metrics.registry.collect()
    return [sample.labels for family in families for sample in family.samples if sample.name == name]
