"""Finished exchanges are recorded in batches: counted, logged, and handed to observers."""

import asyncio
import io
import json
from collections.abc import Sequence

import pytest
from prometheus_client import CollectorRegistry

from gateway.telemetry import recorder as recorder_module
from gateway.telemetry.exchange import Exchange
from gateway.telemetry.log import ExchangeLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.recorder import SETTLE_SECONDS, ExchangeRecorder
from tests.fakes.exchanges import exchange, failed
from tests.fakes.running_gateway import until


class Recorded:
    """A recorder, and everything that it writes to."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.lines = io.BytesIO()
        self.batches: list[list[str]] = []
        self.recorder = ExchangeRecorder(
            Metrics(self.registry, "0"), ExchangeLog(True, self.lines), [self._observe, self._observe]
        )

    def _observe(self, exchanges: Sequence[Exchange]) -> None:
        self.batches.append([item.request_id for item in exchanges])

    @property
    def logged(self) -> list[str]:
        return [json.loads(line)["request_id"] for line in self.lines.getvalue().splitlines()]

    def counted(self, outcome: str) -> float:
        labels = {"endpoint": "chat", "tier": "standard", "backend": "vllm", "outcome": outcome}
        return self.registry.get_sample_value("gateway_requests_total", labels) or 0.0


@pytest.fixture
async def recorded() -> Recorded:
    return Recorded()


async def test_batch_is_recorded_once_after_the_settle_time(
    recorded: Recorded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "SETTLE_SECONDS", 0.01)
    for name in "abc":
        recorded.recorder.record(exchange(request_id=name))
    assert (recorded.logged, recorded.batches) == ([], [])
    await until(lambda: bool(recorded.logged))
    assert recorded.logged == ["a", "b", "c"]
    assert recorded.counted("ok") == 3
    assert recorded.batches == [["a", "b", "c"]] * 2
    await asyncio.sleep(0.03)
    assert (len(recorded.logged), len(recorded.batches)) == (3, 2)


async def test_first_exchange_of_a_batch_starts_the_timer(recorded: Recorded) -> None:
    loop = asyncio.get_running_loop()
    before = loop.time()
    recorded.recorder.record(exchange())
    timer = recorded.recorder._timer
    assert timer is not None
    assert before + SETTLE_SECONDS <= timer.when() <= loop.time() + SETTLE_SECONDS
    recorded.recorder.record(exchange())
    assert recorded.recorder._timer is timer
    recorded.recorder.settle()
    assert timer.cancelled()


async def test_settle_records_at_once_and_stops_the_timer(recorded: Recorded) -> None:
    recorded.recorder.record(exchange(request_id="a"))
    recorded.recorder.record(failed(request_id="b"))
    assert repr(recorded.recorder) == "<ExchangeRecorder 2 to record>"
    recorded.recorder.settle()
    assert recorded.logged == ["a", "b"]
    assert (recorded.counted("ok"), recorded.counted("upstream_error")) == (1, 1)
    assert recorded.recorder._timer is None
    recorded.recorder.settle()
    assert recorded.logged == ["a", "b"]


async def test_next_batch_starts_a_new_timer(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "SETTLE_SECONDS", 0.01)
    recorded.recorder.record(exchange(request_id="a"))
    recorded.recorder.settle()
    recorded.recorder.record(exchange(request_id="b"))
    await until(lambda: recorded.logged == ["a", "b"])
    assert recorded.batches == [["a"], ["a"], ["b"], ["b"]]


async def test_exchange_recorded_by_an_observer_belongs_to_the_next_batch() -> None:
    seen: list[list[str]] = []
    out = io.BytesIO()

    def observe(exchanges: Sequence[Exchange]) -> None:
        seen.append([item.request_id for item in exchanges])
        if len(seen) == 1:
            recorder.record(exchange(request_id="late"))

    recorder = ExchangeRecorder(Metrics(CollectorRegistry(), "0"), ExchangeLog(True, out), [observe])
    recorder.record(exchange(request_id="early"))
    recorder.settle()
    assert seen == [["early"]]
    recorder.settle()
    assert seen == [["early"], ["late"]]


async def test_detached_observers_get_no_more_exchanges(recorded: Recorded) -> None:
    recorded.recorder.record(exchange(request_id="a"))
    recorded.recorder.settle()
    recorded.recorder.detach_observers()
    recorded.recorder.record(exchange(request_id="b"))
    recorded.recorder.settle()
    assert recorded.batches == [["a"]] * 2
    assert recorded.logged == ["a", "b"]
    assert recorded.counted("ok") == 2


async def test_scrape_of_the_metrics_records_what_has_finished() -> None:
    """The metrics settle before they are read, as the gateway composes them."""

    def settle() -> None:
        recorder.settle()

    registry = CollectorRegistry()
    recorder = ExchangeRecorder(Metrics(registry, "0", settle), ExchangeLog(True, io.BytesIO()))
    recorder.record(failed())
    labels = {"endpoint": "chat", "tier": "standard", "backend": "vllm", "outcome": "upstream_error"}
    assert registry.get_sample_value("gateway_requests_total", labels) == 1
