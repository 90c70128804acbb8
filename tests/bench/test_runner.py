import asyncio
import itertools
from dataclasses import replace

import pytest

from gateway.bench.arrivals import RampUp
from gateway.bench.results import CANCELLED, RequestRecord
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.target import BenchRequest
from tests.bench.fake_client import FakeClient, runner
from tests.bench.servers import request

pytestmark = pytest.mark.virtual_time


def requests(count: int) -> list[BenchRequest]:
    return [request(max_tokens=1, name=str(number)) for number in range(count)]


async def test_a_closed_loop_keeps_as_many_in_flight_as_allowed() -> None:
    client = FakeClient(places=100)
    result = await runner(client).run(RunPlan("r", requests(10), max_concurrency=4))
    assert client.most == 4
    assert result.duration == pytest.approx(3.0, abs=0.05)
    assert [record.index for record in result.records] == list(range(10))


async def test_waiting_for_a_place_is_time_in_the_client_and_not_latency() -> None:
    """As in vLLM: without a rate all requests are due at the start."""
    result = await runner(FakeClient(places=100)).run(RunPlan("r", requests(3), max_concurrency=1))
    assert [record.queue_time for record in result.records] == pytest.approx([0, 1, 2], abs=0.05)
    assert [record.latency for record in result.records] == pytest.approx([1, 1, 1], abs=0.05)


async def test_an_open_loop_sends_at_the_due_times_however_slow_the_server_is() -> None:
    client = FakeClient(places=100, prefill=lambda request, running: 50.0)
    result = await runner(client).run(RunPlan("r", requests(5), request_rate=2.0, burstiness=float("inf")))
    starts = [record.start - result.start for record in result.records]
    assert starts == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.5], abs=0.05)
    assert client.most == 5


async def test_a_blocked_open_loop_counts_the_wait_from_the_due_time() -> None:
    plan = RunPlan("r", requests(3), max_concurrency=1, due=[0.0, 0.1, 0.2])
    result = await runner(FakeClient(places=9)).run(plan)
    assert [record.queue_time for record in result.records] == pytest.approx([0, 0.9, 1.8], abs=0.05)
    assert result.client.start_delay_p99_ms == pytest.approx(0, abs=50)


async def test_an_endless_plan_stops_sending_after_its_time_and_waits_for_answers() -> None:
    endless = (request(max_tokens=1) for _ in itertools.count())
    result = await runner(FakeClient(places=9)).run(RunPlan("r", endless, max_concurrency=2, seconds=4.5))
    assert len(result.records) == result.num_prompts == 10
    assert result.duration == pytest.approx(5.0, abs=0.05)
    assert max(record.queue_time for record in result.records) == pytest.approx(0, abs=0.05)


async def test_an_endless_plan_at_a_rate_keeps_the_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.bench.runner.BLOCK", 7)
    endless = (request(max_tokens=1) for _ in itertools.count())
    plan = RunPlan("r", endless, request_rate=4.0, burstiness=float("inf"), seconds=5.1)
    result = await runner(FakeClient(places=99)).run(plan)
    starts = [record.start - result.start for record in result.records]
    assert starts == pytest.approx([0.25 * number for number in range(1, 21)], abs=0.05)


async def test_an_interruption_keeps_what_has_ended() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(2.5, stop.set)
    result = await runner(FakeClient(places=9), stop).run(RunPlan("r", requests(100), max_concurrency=2))
    assert result.interrupted
    assert len(result.good) == 4
    assert [record.error for record in result.records if not record.is_ok] == [CANCELLED] * 2
    assert (len(result.ended), result.num_prompts) == (4, 100)


async def test_a_fault_of_the_client_is_not_swallowed() -> None:
    class Broken(FakeClient):
        async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
            raise RuntimeError("a fault")

    with pytest.raises(RuntimeError, match="a fault"):
        await runner(Broken()).run(RunPlan("r", requests(2)))


async def test_progress_sees_each_request() -> None:
    seen: list[object] = []

    class Progress:
        def begin(self, label: str, total: int | None, seconds: float | None) -> None:
            seen.append((label, total, seconds))

        def advance(self, record: RequestRecord) -> None:
            seen.append(record.index)

        def end(self) -> None:
            seen.append("end")

    progress = Progress()
    await Runner(FakeClient(), progress=progress, clock=asyncio.get_running_loop().time).run(RunPlan("r", requests(2)))
    assert seen == [("r", 2, None), 0, 1, "end"]


async def test_the_lateness_of_the_clients_loop_is_measured() -> None:
    class Slow(FakeClient):
        async def send(self, request: BenchRequest, index: int = 0) -> RequestRecord:
            ahead.append(0.5)  # the clock moves while the loop stands still
            return await super().send(request, index)

    ahead: list[float] = []
    loop = asyncio.get_running_loop()
    slow = Runner(Slow(places=9), clock=lambda: loop.time() + sum(ahead))
    result = await slow.run(RunPlan("r", requests(1)))
    assert result.client.lag_max_ms >= 400
    assert "client_lagging" in result.client.warnings


async def test_a_ramp_up_sends_ever_faster_and_notes_when() -> None:
    plan = RunPlan("r", requests(5), ramp_up=RampUp("linear", 2, 10), burstiness=float("inf"))
    result = await runner(FakeClient(places=99)).run(plan)
    starts = [record.start - result.start for record in result.records]
    assert starts == pytest.approx(list(itertools.accumulate(1 / rate for rate in (2, 4, 6, 8, 10))), abs=0.02)
    assert [change.rps for change in result.rate_changes] == list(range(2, 11))
    assert result.ramp_up == plan.ramp_up


async def test_probes_take_turns_beside_the_load_and_count_nowhere_else() -> None:
    """A probe of 1 s every 2 s after the end of the one before: sent at 0, 3, 6 and 9 s."""
    client = FakeClient(places=99)
    plan = RunPlan("r", requests(10), max_concurrency=1, probe=request(max_tokens=1, name="p"), probe_rate=0.5)
    result = await runner(client).run(plan)
    assert result.probes is not None
    assert [record.start - result.start for record in result.probes] == pytest.approx([0, 3, 6, 9], abs=0.05)
    assert (len(result.records), client.most) == (10, 2)
    assert result.duration == pytest.approx(10, abs=0.1)


async def test_a_probe_that_the_load_holds_up_is_measured_to_its_end() -> None:
    """Leaving out the probe that is in flight at the end would leave out the slowest."""
    probe = request(max_tokens=1, name="p")
    client = FakeClient(places=99, prefill=lambda sent, running: 30.0 if sent is probe else 1.0)
    result = await runner(client).run(RunPlan("r", requests(2), probe=probe, probe_rate=100.0))
    assert result.probes is not None
    assert [record.latency for record in result.probes] == pytest.approx([30], abs=0.1)
    assert result.duration == pytest.approx(1, abs=0.1)


async def test_an_interruption_ends_the_probes() -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(2.5, stop.set)
    plan = RunPlan("r", requests(9), max_concurrency=1, probe=request(max_tokens=1), probe_rate=1000.0)
    result = await runner(FakeClient(places=9), stop).run(plan)
    assert result.interrupted
    assert result.probes is not None
    assert len(result.probes) == 2


async def test_a_fault_of_the_client_in_a_probe_is_not_swallowed() -> None:
    class Broken(FakeClient):
        async def send(self, sent: BenchRequest, index: int = 0) -> RequestRecord:
            if sent.name == "p":
                raise RuntimeError("a fault")
            return await super().send(sent, index)

    with pytest.raises(RuntimeError, match="a fault"):
        await runner(Broken()).run(RunPlan("r", requests(2), probe=request(name="p")))


async def test_the_place_of_a_failed_request_rests_in_a_closed_loop_over_time() -> None:
    """A server that refuses every connection gets a few requests a second, not thousands."""
    client = FakeClient(places=9, fails=lambda request, running: "connect")
    result = await runner(client).run(RunPlan("r", itertools.cycle(requests(1)), max_concurrency=4, seconds=10.0))
    assert len(result.records) == 40
    assert result.duration <= 10.0


async def test_an_answer_that_fails_late_delays_nothing() -> None:
    client = FakeClient()
    slow = [replace(request, timeout=1.5, max_tokens=100) for request in requests(1)]
    result = await runner(client).run(RunPlan("r", itertools.cycle(slow), max_concurrency=1, seconds=5.0))
    assert [record.error for record in result.records] == ["timeout"] * 4


async def test_failed_requests_at_a_rate_delay_nothing() -> None:
    client = FakeClient(places=9, fails=lambda request, running: "connect")
    result = await runner(client).run(RunPlan("r", itertools.cycle(requests(1)), request_rate=50.0, seconds=2.0))
    assert len(result.records) == pytest.approx(100, abs=40)
