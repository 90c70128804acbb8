"""All Prometheus metrics, declared once, on a registry that is passed in.

Label values come from closed sets: tiers and backends from the settings, outcomes from the code.
Buckets are vLLM's own (vllm/v1/metrics/buckets.py, 0.33), so that one dashboard can show its
histograms next to the gateway's.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Literal

from msgspec import UNSET
from prometheus_client import CollectorRegistry, Counter, Gauge, Info
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar

from gateway.telemetry.exchange import LANES, NONE, WORKLOADS, Exchange
from gateway.telemetry.key_metrics import KeyMetrics

TIME_TO_FIRST_TOKEN = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80, 160, 640, 2560,
)  # fmt: skip
INTER_TOKEN_LATENCY = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
DURATION = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
QUEUE_WAIT = (0.001, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
LOAD = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
GPU_PHASE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)
OVERHEAD = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1)

Bucket = tuple[str, float] | tuple[str, float, Exemplar]
"""Upper bound, number of observations up to it, and perhaps an exemplar."""

Label = Literal["tier", "backend"]
"""Labels whose values are names from the settings."""


class Histogram:
    """One series of `Histograms`: the observations for one set of label values."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        self.exemplars: dict[int, Exemplar] = {}
        """The last traced observation of each bucket, by its place in `counts`."""

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def keep_exemplar(self, seconds: float, labels: dict[str, str]) -> None:
        """Keep a value that was observed as the exemplar of its bucket. `labels` name its trace."""
        self.exemplars[bisect_left(self.bounds, seconds)] = Exemplar(labels, seconds, time.time())

    def quantile(self, share: float) -> float | None:
        """Return the value that `share` of the observations do not exceed, None if there are none.

        The value is interpolated linearly within its bucket.
        """
        wanted = share * sum(self.counts)
        if not wanted:
            return None
        low = 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if count >= wanted:
                return low + (bound - low) * wanted / count
            wanted -= count
            low = bound
        return low

    def observe_gap(self, seconds: float, tokens: int) -> None:
        """Record `tokens` that arrived together after a gap of `seconds`.

        The gap counts for the first of them; the others count as gaps of 0 seconds.
        """
        counts = self.counts
        counts[bisect_left(self.bounds, seconds)] += 1
        if tokens > 1:
            counts[0] += tokens - 1
        self.total += seconds


class Histograms(Collector):
    """One histogram metric with all its series.

    It does not take locks, because only the event loop writes. An observation costs a fifth of
    prometheus-client's own `observe`, and there is one for every token and four for every request.
    """

    def __init__(
        self, registry: CollectorRegistry, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self._name, self._text, self._labels, self._bounds = name, text, labels, bounds
        self._series: dict[tuple[str, ...], Histogram] = {}
        registry.register(self)

    def labels(self, *values: str) -> Histogram:
        series = self._series.get(values)
        if series is None:
            series = self._series[values] = Histogram(self._bounds)
        return series

    def forget(self, label: str, value: str) -> None:
        """Drop the series whose `label` has this value, if the metric has that label."""
        if label in self._labels:
            place = self._labels.index(label)
            self._series = {labels: series for labels, series in self._series.items() if labels[place] != value}

    def empty(self) -> Histogram:
        """Return a series with the same buckets that is not shown."""
        return Histogram(self._bounds)

    def keys(self) -> Iterable[tuple[str, ...]]:
        """Return the label values of all series."""
        return self._series.keys()

    def find(self, labels: tuple[str, ...]) -> Histogram | None:
        """Return the series with these label values, None if nothing was observed yet."""
        return self._series.get(labels)

    def quantile(self, labels: tuple[str, ...], share: float) -> float | None:
        """Return the quantile of one series, None if the series does not exist or is empty."""
        series = self._series.get(labels)
        return None if series is None else series.quantile(share)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, series in self._series.items():
            running, buckets = 0, list[Bucket]()
            for place, (bound, count) in enumerate(zip((*self._bounds, inf), series.counts, strict=True)):
                running += count
                upper = "+Inf" if bound == inf else repr(float(bound))
                exemplar = series.exemplars.get(place)
                buckets.append((upper, float(running)) if exemplar is None else (upper, float(running), exemplar))
            family.add_metric(labels, buckets, series.total)
        yield family


@dataclass(slots=True)
class RouteMetrics:
    """Series of one tier on one backend at one endpoint, looked up once.

    Counters that change with every successful request are plain numbers until `publish`.
    """

    duration: Histogram
    time_to_first_token: Histogram
    gaps: Histogram
    queue_wait: dict[str, Histogram]
    """Histograms by lane."""
    counters: tuple[Counter, Counter, Counter]
    """Counters of successful requests, prompt tokens and completion tokens."""
    ok: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def publish(self) -> None:
        """Add the numbers to the counters, and reset them."""
        amounts = self.ok, self.prompt_tokens, self.completion_tokens
        self.ok = self.prompt_tokens = self.completion_tokens = 0
        for counter, amount in zip(self.counters, amounts, strict=True):
            with suppress(ValueError, OverflowError):  # whatever was counted, a scrape does not fail
                counter.inc(amount)


class _Preparation(Collector):
    """Collector that runs `prepare` before the others are read; it must be registered first."""

    def __init__(self, registry: CollectorRegistry, prepare: Callable[[], None]) -> None:
        self._prepare = prepare
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        self._prepare()
        return iter(())


class Metrics:
    """All metrics of the gateway.

    `settle` is called before they are read, so that exchanges that were recorded late are counted.
    """

    def __init__(self, registry: CollectorRegistry, version: str, settle: Callable[[], None] = lambda: None) -> None:
        self.registry = registry
        self._settle = settle
        self._routes: dict[tuple[str, str, str], RouteMetrics] = {}
        self._counters: dict[Counter, tuple[str, ...]] = {}
        _Preparation(registry, self._publish)
        route = ("tier", "backend")

        def counter(name: str, text: str, labels: Sequence[str] = ()) -> Counter:
            made = Counter(name, text, labels, registry=registry)
            self._counters[made] = tuple(labels)
            return made

        def histogram(name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> Histograms:
            return Histograms(registry, name, text, labels, bounds)

        self.requests = counter("gateway_requests_total", "Requests by outcome.", ("endpoint", *route, "outcome"))
        self.duration = histogram(
            "gateway_request_duration_seconds",
            "Time from the arrival of a request to the end of its answer.",
            route,
            DURATION,
        )
        self.time_to_first_token = histogram(
            "gateway_time_to_first_token_seconds",
            "Time from the arrival of a request to the first token of its answer.",
            route,
            TIME_TO_FIRST_TOKEN,
        )
        self.gaps = histogram(
            "gateway_inter_token_latency_seconds", "Time between two tokens of an answer.", route, INTER_TOKEN_LATENCY
        )
        self.tokens = counter("gateway_tokens_total", "Tokens as counted by the backends.", (*route, "type"))
        self.queue_wait = histogram(
            "gateway_queue_wait_seconds",
            "Time that requests waited for a slot of a backend.",
            ("backend", "lane"),
            QUEUE_WAIT,
        )
        self.rejected = counter(
            "gateway_rejected_total",
            "Requests refused for lack of capacity or of a healthy backend.",
            ("backend", "reason"),
        )
        self.upstream_errors = counter("gateway_upstream_errors_total", "Failures of a backend.", ("backend", "reason"))
        self.retries = counter("gateway_retries_total", "Retries of a request.", ("backend", "reason"))
        self.fallbacks = counter(
            "gateway_fallbacks_total",
            "Requests sent to another backend by a fallback.",
            ("tier", "from_backend", "to_backend"),
        )
        self.keys = KeyMetrics(registry)
        self.client_disconnects = counter(
            "gateway_client_disconnects_total", "Clients that disconnected before the end of their answer.", ("phase",)
        )
        self.running = Gauge(
            "gateway_requests_running", "Requests in flight at a backend.", ("backend", "lane"), registry=registry
        )
        self.waiting = Gauge(
            "gateway_requests_waiting", "Requests queued for a backend.", ("backend", "lane"), registry=registry
        )
        self.waiting_bytes = Gauge(
            "gateway_waiting_bytes", "Bytes of request bodies that are read, or whose request waits.", registry=registry
        )
        self.replicas = Gauge(
            "gateway_replicas", "Replicas that share the limits, as this one sees them.", registry=registry
        )
        self.replicas.set(1)
        self.redis_up = Gauge(
            "gateway_redis_up",
            "1 while the Redis through which replicas share their limits answers.",
            ("redis",),
            registry=registry,
        )
        self.backend_up = Gauge(
            "gateway_backend_up", "1 while a server of the backend answers its probes.", ("backend",), registry=registry
        )
        self.circuit_state = Gauge(
            "gateway_circuit_state",
            "The backend's best server: 0 closed, 1 suspect or on trial, 2 open or ejected.",
            ("backend",),
            registry=registry,
        )
        self.server_up = Gauge(
            "gateway_server_up",
            "1 if the server is given requests, 0 if it is not: dead, ejected or full.",
            ("backend", "server"),
            registry=registry,
        )
        self.name_resolved = Gauge(
            "gateway_name_resolved",
            "1 if the last lookup of a host name whose addresses are servers found some, 0 if it failed.",
            ("backend", "name"),
            registry=registry,
        )
        self.affinity = counter(
            "gateway_affinity_total",
            "Choices among several servers: kept where most of the prompt is cached, moved elsewhere, or new.",
            ("backend", "outcome"),
        )
        self.server_running = Gauge(
            "gateway_server_requests_running",
            "Requests in flight at a server.",
            ("backend", "server"),
            registry=registry,
        )
        self.load_seconds = histogram(
            "gateway_backend_load_seconds", "Time that a backend took to load a model.", ("backend", "model"), LOAD
        )
        self.model_unloads = counter(
            "gateway_model_unloads_total",
            "Models that the gateway had a backend unload.",
            ("backend", "model", "reason"),
        )
        self.active_backend = Gauge(
            "gateway_active_backend",
            "1 for the active backend of the tier, 0 for its others.",
            route,
            registry=registry,
        )
        self.switches = counter(
            "gateway_switches_total",
            "Moves of a tier, or of a share of it, to another backend.",
            ("tier", "from_backend", "to_backend", "cause"),
        )
        self.backend_asleep = Gauge(
            "gateway_backend_asleep",
            "1 while another engine has the GPU or is about to get it, with exclusive.",
            ("backend",),
            registry=registry,
        )
        self.gpu_switches = counter(
            "gateway_gpu_switches_total",
            "Switches of the engine that has the GPU, by outcome: done, failed or reversed.",
            ("from_backend", "to_backend", "outcome"),
        )
        self.gpu_phase = histogram(
            "gateway_gpu_phase_seconds",
            "Time that an engine spent in a phase of a switch: draining, freeing or waking.",
            ("backend", "phase"),
            GPU_PHASE,
        )
        self.overhead = histogram(
            "gateway_overhead_seconds", "Time in the gateway, without the queue and the upstream.", (), OVERHEAD
        ).labels()
        Info("gateway_build", "The running version.", registry=registry).info({"version": version})

    def route(self, tier: str, backend: str, endpoint: str = "chat") -> RouteMetrics:
        bound = self._routes.get((tier, backend, endpoint))
        if bound is None:
            bound = self._routes[tier, backend, endpoint] = RouteMetrics(
                self.duration.labels(tier, backend),
                self.time_to_first_token.labels(tier, backend),
                self.gaps.labels(tier, backend),
                {lane: self.queue_wait.labels(backend, lane) for lane in LANES[WORKLOADS[endpoint]]},
                (
                    self.requests.labels(endpoint, tier, backend, "ok"),
                    self.tokens.labels(tier, backend, "prompt"),
                    self.tokens.labels(tier, backend, "completion"),
                ),
            )
        return bound

    def forget(self, label: Label, value: str) -> None:
        """Drop the series of a tier or backend that the settings no longer contain.

        The caller must not use a `RouteMetrics` of that tier or backend afterwards.
        """
        place = 0 if label == "tier" else 1
        self._routes = {route: bound for route, bound in self._routes.items() if route[place] != value}
        for histograms in (self.duration, self.time_to_first_token, self.gaps, self.queue_wait, self.load_seconds):
            histograms.forget(label, value)
        self._forget_counters(label, value)

    def _forget_counters(self, label: str, value: str) -> None:
        for counter, labels in self._counters.items():
            if label in labels:
                samples = [sample.labels for family in counter.collect() for sample in family.samples]
                for found in {tuple(sample[name] for name in labels) for sample in samples if sample[label] == value}:
                    counter.remove(*found)

    def record(self, exchange: Exchange) -> None:
        """Count an exchange that has ended."""
        if exchange.outcome != "ok":
            self._record_failure(exchange)
        if exchange.key:
            self.keys.record(exchange)
        if exchange.backend == NONE:
            return
        key = exchange.tier, exchange.backend, exchange.endpoint
        route = self._routes.get(key) or self.route(*key)
        if exchange.outcome == "ok":
            route.ok += 1
        duration, queue_wait = exchange.duration, exchange.queue_wait
        route.duration.observe(duration)
        if queue_wait is not None:
            route.queue_wait[exchange.lane].observe(queue_wait)
            overhead = duration - queue_wait - exchange.upstream
            self.overhead.observe(max(0.0, overhead))
        if exchange.time_to_first_token is not None:
            route.time_to_first_token.observe(exchange.time_to_first_token)
        if exchange.usage is not None:
            route.prompt_tokens += exchange.usage.prompt_tokens
            route.completion_tokens += exchange.usage.completion_tokens

    def keep_exemplars(self, exchanges: Sequence[Exchange]) -> None:
        """Keep traced exchanges, which were or will be recorded, as exemplars of the histograms.

        Exemplars are shown only in OpenMetrics.
        """
        for exchange in exchanges:
            # Each destination has a route with its workload as the endpoint, until its tier is forgotten.
            route = self._routes.get((exchange.tier, exchange.backend, WORKLOADS[exchange.endpoint]))
            if route is None or exchange.trace_id is UNSET or exchange.span_id is UNSET:
                continue
            labels = {"trace_id": exchange.trace_id, "span_id": exchange.span_id}
            route.duration.keep_exemplar(exchange.duration, labels)
            if exchange.queue_wait is not None:
                route.queue_wait[exchange.lane].keep_exemplar(exchange.queue_wait, labels)
            if exchange.time_to_first_token is not None:
                route.time_to_first_token.keep_exemplar(exchange.time_to_first_token, labels)

    def _publish(self) -> None:
        self._settle()
        for route in self._routes.values():
            route.publish()

    def _record_failure(self, exchange: Exchange) -> None:
        self.requests.labels(exchange.endpoint, exchange.tier, exchange.backend, exchange.outcome).inc()
        if exchange.outcome == "cancelled":
            self.client_disconnects.labels(exchange.phase).inc()
        elif exchange.outcome == "rejected":
            self.rejected.labels(exchange.backend, exchange.code or NONE).inc()
        elif exchange.outcome in ("upstream_error", "timeout"):
            self.upstream_errors.labels(exchange.backend, exchange.reason or exchange.code or NONE).inc()
