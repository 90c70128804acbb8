"""Live figures: rates and percentiles over a window, series, and the last errors."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry

from gateway.chat.answer import Usage
from gateway.telemetry.live import ALL, KEPT, MAX_CLIENT_ERRORS, MAX_ERRORS, STEP, WINDOW, LiveFigures
from gateway.telemetry.metrics import Metrics
from tests.fakes.exchanges import exchange, failed

BEGAN = 1_800_000_000.0


class Timeline:
    """Live figures whose timer the test moves on."""

    def __init__(self) -> None:
        self.metrics = Metrics(CollectorRegistry(), "0")
        self.loads = {"vllm": (0, 0), "ollama": (0, 0)}
        self.now = BEGAN
        self.due: Callable[[], None] | None = None
        self.live = LiveFigures(self.metrics, lambda: dict(self.loads), self._call_later, lambda: self.now)

    def _call_later(self, seconds: float, step: Callable[[], None]) -> "Timeline":
        assert (seconds, self.due) == (STEP, None)
        self.due = step
        return self

    def cancel(self) -> None:
        self.due = None

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            assert self.due is not None
            self.now += STEP
            due, self.due = self.due, None
            due()

    def stream(self, backend: str = "vllm", tier: str = "standard", tokens: int = 100, gap: float = 0.02) -> None:
        """Record a stream as the relay does: each token as it comes, the exchange at its end."""
        route = self.metrics.route(tier, backend)
        for _ in range(tokens - 1):
            route.gaps.observe_gap(gap, 1)
        self.live.observe([ended := exchange(backend, tier=tier, usage=Usage(10, tokens))])
        self.metrics.record(ended)


def test_nothing_runs_without_traffic_and_without_a_reader() -> None:
    timeline = Timeline()
    assert timeline.due is None
    timeline.stream()
    timeline.step(round(WINDOW / STEP) + 1)
    assert timeline.due is None
    timeline.live.want()
    timeline.step(2)
    assert timeline.due is None


def test_a_running_request_and_a_reader_keep_the_samples_coming() -> None:
    timeline = Timeline()
    timeline.loads["vllm"] = (1, 0)
    timeline.live.want()
    timeline.step(10)
    timeline.loads["vllm"] = (0, 0)
    for _ in range(10):
        timeline.live.want()
        timeline.step()
    assert timeline.due is not None
    timeline.live.close()
    assert timeline.due is None


def test_rates_and_percentiles_are_those_of_the_window() -> None:
    timeline = Timeline()
    timeline.live.want()
    timeline.stream()
    timeline.stream()
    timeline.step()
    figures = timeline.live.figures("standard", "vllm")
    assert (figures["requests"], figures["errors"], figures["tokens"]) == (0.2, 0, 20)
    assert 0.1 < (figures["time_to_first_token_p50"] or 0) <= 0.25  # the bucket of 0.25 s
    assert 0.01 < (figures["inter_token_latency_p95"] or 0) <= 0.025
    assert timeline.live.figures(ALL, "vllm") == figures
    idle = timeline.live.figures("standard", "ollama")
    assert (idle["tokens"], idle["time_to_first_token_p50"]) == (0, None)
    timeline.step(round(WINDOW / STEP))
    assert timeline.live.figures("standard", "vllm") == idle


def test_tokens_are_counted_while_the_stream_runs() -> None:
    timeline = Timeline()
    timeline.live.want()
    timeline.loads["vllm"] = (1, 0)
    route = timeline.metrics.route("standard", "vllm")
    timeline.step()
    for _ in range(50):
        route.gaps.observe_gap(0.02, 1)
    timeline.step()
    assert timeline.live.figures(ALL, "vllm")["tokens"] == 5


def test_plain_answers_count_their_tokens_at_the_end() -> None:
    timeline = Timeline()
    timeline.live.want()
    timeline.live.observe([exchange(stream=False, time_to_first_token=None)])
    timeline.step()
    assert timeline.live.figures("standard", "vllm")["tokens"] == 10.1


def test_what_happened_before_the_first_sample_is_no_burst() -> None:
    """Tokens of a stream that ran for minutes while nobody looked do not count as those of one step."""
    timeline = Timeline()
    route = timeline.metrics.route("standard", "vllm")
    for _ in range(10_000):
        route.gaps.observe_gap(0.02, 1)
    timeline.stream(tokens=1)
    timeline.step()
    assert timeline.live.figures("standard", "vllm")["tokens"] < 1
    assert timeline.live.figures("standard", "vllm")["requests"] == 0.1


def test_all_tiers_are_the_sum_of_the_tiers() -> None:
    timeline = Timeline()
    timeline.live.want()
    timeline.stream(tier="a")
    timeline.stream(tier="b", gap=0.4)
    timeline.stream(tier="b", backend="ollama")
    timeline.step()
    assert timeline.live.figures(ALL, "vllm")["requests"] == 0.2
    assert (timeline.live.figures(ALL, "vllm")["inter_token_latency_p95"] or 0) > 0.3
    assert timeline.live.figures("a", "vllm")["requests"] == 0.1


def test_series_have_a_value_of_each_figure_for_each_sample() -> None:
    timeline = Timeline()
    timeline.loads["vllm"] = (3, 2)
    timeline.live.want()
    timeline.stream()
    timeline.step(3)
    series = timeline.live.series("standard", ["vllm", "ollama"])
    assert series["at"] == [BEGAN + STEP, BEGAN + 2 * STEP, BEGAN + 3 * STEP]
    vllm, ollama = series["backends"]["vllm"], series["backends"]["ollama"]
    assert {len(values) for values in [*vllm.values(), *ollama.values()]} == {3}
    assert (vllm["tokens"], ollama["tokens"]) == ([10, 10, 10], [0, 0, 0])
    assert (vllm["running"][-1], vllm["waiting"][-1]) == (3, 2)
    assert timeline.live.series(ALL, ["vllm"], 1)["at"] == [timeline.now]
    assert timeline.live.series(ALL, ["vllm"], 0)["at"] == []
    timeline.step(KEPT)
    assert len(timeline.live.series(ALL, ["vllm"])["at"]) == KEPT


def test_last_errors_have_their_reasons_the_latest_first() -> None:
    timeline = Timeline()
    timeline.live.observe([failed(request_id="one"), exchange(), exchange(outcome="cancelled")])
    timeline.now += 1
    timeline.live.observe([exchange(request_id="two", outcome="client_error", status=400, code="invalid_value")])
    latest, first = timeline.live.errors()
    assert (latest["request_id"], latest["status"], latest["code"]) == ("two", 400, "invalid_value")
    assert (first["request_id"], first["reason"], first["outcome"]) == ("one", "status_5xx", "upstream_error")
    timeline.step()
    assert timeline.live.figures("standard", "vllm")["errors"] == 0.1  # the client's own is not one


def test_mistakes_of_clients_do_not_displace_failures() -> None:
    timeline = Timeline()
    timeline.live.observe([failed(request_id="failure")])
    timeline.live.observe([exchange(outcome="client_error", status=404)] * 1000)
    assert len(timeline.live.errors()) == MAX_CLIENT_ERRORS + 1
    timeline.live.observe([failed()] * 1000)
    assert len(timeline.live.errors()) == MAX_CLIENT_ERRORS + MAX_ERRORS


def test_a_tier_that_the_settings_drop_and_bring_back_begins_anew() -> None:
    timeline = Timeline()
    timeline.live.want()
    timeline.stream()
    timeline.step()
    timeline.metrics.forget("tier", "standard")
    timeline.live.keep(["other"], ["vllm"])
    timeline.live.want()
    timeline.step()
    timeline.stream()
    timeline.step()
    assert timeline.live.figures("standard", "vllm")["requests"] == 0.1
