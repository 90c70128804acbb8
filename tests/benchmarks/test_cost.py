"""Tests of the cost bench: its arithmetic, what it reads of bytes, and one small run of the load against the cheap upstream alone."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import cost, requests
from benchmarks.load import Client, LoadJob, LoadOutcome, Run
from benchmarks.process_stats import cpu_seconds, family, resident_bytes
from benchmarks.report import OURS, THEIRS, Comparison, Target, cost_per, percentile
from benchmarks.subjects import BenchSetup, DidNotRun, gateway_environment, upstream
from benchmarks.subjects import gateway as started_gateway
from benchmarks.upstream import MARK, MODEL, WORDS, Pace, Upstream, UpstreamProtocol, asked


@pytest.mark.parametrize(("share", "expected"), [(0.5, 50), (0.99, 99), (1.0, 100), (0.0, 1), (0.991, 100)])
def test_percentile_is_the_nearest_rank(share: float, expected: int) -> None:
    assert percentile(list(range(100, 0, -1)), share) == expected


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        percentile([], 0.5)


def test_cost_is_microseconds_for_each() -> None:
    assert cost_per(0.5, 10_000) == pytest.approx(50)


def test_a_window_in_which_nothing_was_counted_is_an_error_and_not_free() -> None:
    with pytest.raises(ValueError, match="nothing was counted"):
        cost_per(0.5, 0)


def compared(ours: list[float], theirs: list[float], nominal_rate: float | None = None) -> Comparison:
    table = Comparison("title", "µs", Target(0.8), nominal_rate)
    for name, values in ((OURS, ours), (THEIRS, theirs)):
        for value in values:
            table.add(name, value, 100)
    return table


def test_ratios_are_of_minima_and_of_medians() -> None:
    assert compared([5, 8, 90], [10, 16, 17]).ratios() == (0.5, 0.5)


def test_target_is_judged_by_the_ratio_of_medians() -> None:
    assert compared([1, 8, 9], [10, 10, 10]).passed() is True
    assert compared([1, 8.1, 9], [10, 10, 10]).passed() is False


def test_target_without_the_other_contestant_is_not_measured() -> None:
    table = compared([1], [])
    assert table.passed() is None
    assert "target: ratio of medians <= 0.8: not measured" in "\n".join(table.lines())


def test_figures_under_unequal_load_are_called_not_comparable() -> None:
    even, uneven = compared([1], [10], nominal_rate=102), compared([1], [10], nominal_rate=103)
    assert (even.passed(), uneven.passed()) == (True, None)
    assert "NOT COMPARABLE: the load of gateway, vllm-router was not 103/s" in "\n".join(uneven.lines())


def test_figures_of_one_that_sends_tokens_together_are_called_not_comparable() -> None:
    table = Comparison("title", "µs", Target(1.1), nominal_rate=100)
    table.add(OURS, 1, 100, 1.5)
    table.add(THEIRS, 10, 100, 1.0)
    assert table.passed() is None
    assert "one sent more tokens at a time" in "\n".join(table.lines())


def test_absolute_target_looks_at_our_own_median() -> None:
    table = Comparison("title", "ms", Target(40, ratio=False))
    for value in (10, 39, 90):
        table.add(OURS, value)
    assert table.passed() is True
    assert "gateway's median <= 40: PASS" in "\n".join(table.lines())


def test_exit_status_follows_missed_targets_only_when_strict() -> None:
    missed = [compared([10], [10])]
    assert cost.verdict(missed, strict=False) == 0
    assert cost.verdict(missed, strict=True) == 1
    assert cost.verdict([compared([1], [10])], strict=True) == 0


def test_json_report_has_raw_values_and_verdict() -> None:
    report = json.loads(json.dumps(compared([8], [10]).as_json()))
    assert report["values"] == {OURS: [8], THEIRS: [10]}
    assert report["passed"] is True


def test_wrong_words_end_with_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--only", "request,speed"], ["--rounds", "0"]):
        with pytest.raises(SystemExit) as ended:
            cost.parse(words)
        assert ended.value.code == 2
    assert "unknown speed" in capsys.readouterr().err


def test_router_is_looked_for_in_the_bench_virtualenv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_VENV", ".venv-bench")
    assert cost.parse([]).vllm_router.endswith("/.venv-bench/bin/vllm-router")
    monkeypatch.delenv("BENCH_VENV")
    assert cost.parse([]).vllm_router == ""


def test_settings_of_whoever_runs_the_bench_do_not_reach_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_CONFIG", "mine.yaml")
    monkeypatch.setenv("OLLAMA_MODEL", "mine")
    environment = gateway_environment(1, 2)
    assert "GATEWAY_CONFIG" not in environment
    assert "OLLAMA_MODEL" not in environment
    assert environment["VLLM_BASE_URL"] == "http://127.0.0.1:2/v1"


def test_program_that_does_not_start_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    places = BenchSetup(frozenset(), frozenset(), tmp_path)
    command = [sys.executable, "-c", "raise SystemExit('no such setting')"]
    with pytest.raises(DidNotRun, match="no such setting"), started_gateway(places, 1, command):
        pass
    with pytest.raises(DidNotRun, match="did not start"), started_gateway(places, 1, ["/nowhere/gateway"]):
        pass


def test_request_says_its_own_length_and_asks_for_usage() -> None:
    head, _, body = requests.chat("standard", max_tokens=7, stream=True).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    parsed = json.loads(body)
    assert (parsed["model"], parsed["max_tokens"], parsed["stream_options"]) == ("standard", 7, {"include_usage": True})


def test_image_is_a_valid_png_of_the_size_that_was_asked_for() -> None:
    png = requests.noise_png(200_000)
    Image.open(io.BytesIO(png)).load()
    assert len(base64.b64encode(png)) == pytest.approx(200_000, rel=0.02)


def test_cpu_clock_of_another_process_counts_its_work_and_its_threads() -> None:
    program = (
        "import threading, time\n"
        "def work():\n    while time.thread_time() < 0.1: pass\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print('done', flush=True); input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert 0.2 <= cpu_seconds([process.pid]) < 2
        assert resident_bytes([process.pid]) > 1_000_000
        assert process.pid in family(os.getpid())
        process.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        cpu_seconds([process.pid])


def test_upstream_finds_what_was_asked_on_both_sides_of_a_large_image() -> None:
    image = '"' + "A" * 100_000 + '"'
    found = asked(
        b'{"stream": true, "messages": [%b], "max_completion_tokens":12,"stream_options":{"include_usage":true}}'
        % image.encode()
    )
    assert (found.stream, found.usage, found.tokens) == (True, True, 12)
    assert asked(b'{"messages":[]}').stream is False


def test_pace_takes_its_three_keys_and_no_other() -> None:
    pace = Pace()
    pace.update("interval_ms=2&hold=1&think_ms=30")
    assert (pace.interval, pace.hold, pace.think) == (0.002, 1, 0.03)
    with pytest.raises(ValueError, match="unknown key"):
        pace.update("speed=1")


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter, Upstream]]:
    """The upstream in this process, and a connection to it."""
    shared = Upstream(MODEL)
    server = await asyncio.get_running_loop().create_server(lambda: UpstreamProtocol(shared), "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    try:
        yield reader, writer, shared
    finally:
        writer.close()
        server.close()
        await server.wait_closed()


async def body_of(reader: asyncio.StreamReader) -> bytes:
    """The body of the next answer, its chunks joined."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"content-length: " in head:
        return await reader.readexactly(int(head.split(b"content-length: ")[1].split(b"\r\n")[0]))
    body = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        body += (await reader.readexactly(size + 2))[:-2]
    await reader.readexactly(2)
    return body


async def test_stream_has_the_recorded_engines_shape() -> None:
    async with serving() as (reader, writer, shared):
        shared.pace.interval = 0
        writer.write(requests.chat(MODEL, max_tokens=20, stream=True))
        events = (await body_of(reader)).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    role, *tokens, finish, usage = chunks
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in tokens] == [WORDS[n % 16] + MARK for n in range(20)]
    assert finish["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 20)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_request_cut_at_every_position_is_answered_once() -> None:
    async with serving() as (reader, writer, _):
        request = requests.chat(MODEL, max_tokens=3)
        ids = set()
        for cut in range(1, len(request), 37):
            writer.write(request[:cut])
            await writer.drain()
            await asyncio.sleep(0)
            writer.write(request[cut:])
            answer = json.loads(await body_of(reader))
            assert answer["choices"][0]["message"]["content"] == "".join(word + MARK for word in WORDS[:3])
            ids.add(answer["id"])
        assert len(ids) == len(range(1, len(request), 37))


async def test_tokens_are_counted_however_the_bytes_are_cut() -> None:
    async with serving() as (reader, writer, shared):
        shared.pace.interval = 0
        writer.write(requests.chat(MODEL, max_tokens=9, stream=True))
        raw = await reader.readuntil(b"\r\n0\r\n\r\n")
    for step in (1, 5, 100, len(raw)):
        run = Run(LoadJob("ttft", 0, "", "", 1, 1))
        client = fed_client(run, raw, step)
        assert (run.tokens, run.answers, run.started, run.outcome.failures) == (9, 1, 1, 0), (step, client, run.outcome)
        assert run.reads == (1 if step == len(raw) else 9) or step == 100


def fed_client(run: Run, raw: bytes, step: int) -> object:
    class Transport(asyncio.Transport):
        def write(self, data: object) -> None: ...
        def close(self) -> None: ...
        def abort(self) -> None: ...

    client = Client(run, b"request", repeat=False)
    client.connection_made(Transport())
    for start in range(0, len(raw), step):
        client.data_received(raw[start : start + step])
    return client


@pytest.mark.parametrize(
    "raw",
    [
        b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n~~~\r\n0\r\n\r\n",
    ],
    ids=["error status", "no [DONE]"],
)
async def test_answer_that_is_not_whole_or_not_200_is_a_failure_and_not_a_fast_answer(raw: bytes) -> None:
    run = Run(LoadJob("streams", 0, "", "", 1, 1))
    fed_client(run, raw, len(raw))
    assert run.outcome.failures == 1


@contextmanager
def bench_alone(tmp_path: Path) -> Iterator[cost.CostBench]:
    """A bench whose one contestant is the cheap upstream itself."""
    where = BenchSetup(frozenset(), frozenset(), tmp_path)
    options = cost.parse(["--rounds", "1", "--seconds", "0.3", "--no-pin"])
    with upstream(where) as direct:
        bench = cost.CostBench(options, where, direct)
        bench.contestants = [direct]
        yield bench


def test_small_run_against_the_upstream_itself(tmp_path: Path) -> None:
    """Every kind of load, in processes of their own, with nothing between them and the upstream."""
    with bench_alone(tmp_path) as bench:
        for table in (
            cost.request_cost(bench, 0),
            cost.request_cost(bench, 0, cut=True),
            cost.token_cost(bench, 10),
            cost.first_token_time(bench, 32),
            cost.image_block(bench),
        ):
            assert table.values["direct"][0] > 0, table.title
        bench.pace(hold=1)
        held: LoadOutcome = bench.load(bench.direct, "idle", requests.chat(MODEL, max_tokens=5, stream=True), 20, 0.05)
        assert held.answers == 20


def test_load_on_a_port_that_nobody_serves_did_not_run(tmp_path: Path) -> None:
    with bench_alone(tmp_path) as bench:
        stopped = bench.direct
    started = time.monotonic()
    with pytest.raises(DidNotRun):
        bench.load(stopped, "plain", b"request", 1, 0.1)
    assert time.monotonic() - started < 20
