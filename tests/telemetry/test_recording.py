"""The recording of the traffic: whole lines, a bounded size, and no request that waits for a disk."""

import json
import logging
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry import recording as recording_module
from gateway.telemetry.recording import RequestShape, TrafficRecording
from tests.fakes.exchanges import exchange
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import until

SIZE = 1024 * 1024
SHAPE = RequestShape(messages=2, characters=40, max_tokens=9, conversation="c0", prefix="p0", prefix_characters=8)


@pytest.fixture
async def recording() -> AsyncIterator[TrafficRecording]:
    made = TrafficRecording()
    yield made
    await made.close()


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


async def test_an_exchange_is_a_line_with_its_arrival_and_its_sizes(
    recording: TrafficRecording, tmp_path: Path
) -> None:
    file = tmp_path / "traffic.jsonl"
    assert recording.to(file, SIZE) is recording
    beginning = png_data_url(32).partition(",")[2]
    shape = RequestShape(messages=1, characters=5, images=((beginning, len(beginning)), ("????", 4)))
    recording.add(exchange(), SHAPE)
    recording.add(exchange(stream=False, usage=None, status=503, outcome="rejected"), shape)
    await recording.close()
    head, first, second = lines(file)
    assert (head["format"], head["version"]) == ("llm-gateway-traffic", 1)
    assert first.pop("at") == pytest.approx(head["started"] - 1.25, abs=2)
    assert first == {
        "endpoint": "chat", "tier": "standard", "backend": "vllm", "model": "m", "stream": True, "status": 200,
        "messages": 2, "characters": 40, "duration": 1.25, "prompt_tokens": 10, "completion_tokens": 101,
        "max_tokens": 9, "conversation": "c0", "prefix": "p0", "prefix_characters": 8, "queue_wait": 0.0,
        "time_to_first_token": 0.25,
    }  # fmt: skip
    assert second["images"] == [[32 * 32, len(beginning) * 3 // 4], [None, 3]]
    assert (second["status"], second["outcome"], "prompt_tokens" in second) == (503, "rejected", False)
    assert file.stat().st_mode & 0o777 == 0o600


async def test_a_batch_is_written_without_further_calls(
    recording: TrafficRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "BATCH_SECONDS", 0.01)
    file = tmp_path / "traffic.jsonl"
    recording.to(file, SIZE)
    for _ in range(3):
        recording.add(exchange(), SHAPE)
    assert not file.exists()
    await until(lambda: file.exists() and len(lines(file)) == 4)


async def test_two_files_of_half_the_size_are_kept(recording: TrafficRecording, tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    for _ in range(12):
        recording.to(file, 4000)
        for _ in range(5):
            recording.add(exchange(), SHAPE)
        await recording.close()
    older = tmp_path / "traffic.jsonl.1"
    assert {path.name for path in tmp_path.iterdir()} == {"traffic.jsonl", "traffic.jsonl.1"}
    assert all(path.stat().st_size <= 2500 for path in (file, older))
    assert all("format" in lines(path)[0] and len(lines(path)) > 5 for path in (file, older))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no full device")
async def test_a_full_disk_costs_one_log_line(recording: TrafficRecording, caplog: pytest.LogCaptureFixture) -> None:
    recording.to(Path("/dev/full"), SIZE)
    for _ in range(3):
        recording.add(exchange(), SHAPE)
        recording.flush()
    await recording.close()
    assert [record.getMessage() for record in caplog.records] == [
        "record: cannot write /dev/full (No space left on device); requests are not recorded until it works"
    ]


async def test_recording_goes_on_once_the_folder_is_there(
    recording: TrafficRecording, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "missing" / "traffic.jsonl"
    recording.to(file, SIZE)
    recording.add(exchange(), SHAPE)
    recording.flush()
    await until(lambda: len(caplog.records) == 1)
    file.parent.mkdir()
    recording.add(exchange(), SHAPE)
    await recording.close()
    assert len(lines(file)) == 2


async def test_half_a_line_is_taken_back(
    recording: TrafficRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, write = tmp_path / "traffic.jsonl", os.write
    full = [False]

    def writes_some(descriptor: int, data: memoryview) -> int:
        if not full[0]:
            return write(descriptor, data)
        if len(data) < 200:
            raise OSError(28, "No space left on device")
        return write(descriptor, data[:150])

    monkeypatch.setattr("gateway.telemetry.recording.os.write", writes_some)
    for is_full in (False, True, False):
        full[0] = is_full
        recording.to(file, SIZE)
        recording.add(exchange(), SHAPE)
        await recording.close()
    assert [line.get("endpoint") for line in lines(file)] == [None, "chat", "chat"]


async def test_a_disk_that_hangs_keeps_nobody_waiting_and_the_loss_is_said_once(
    recording: TrafficRecording, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording_module, "CLOSE_SECONDS", 0.01)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it waits for a reader
    recording.to(pipe, SIZE)
    recording.add(exchange(), SHAPE)
    recording.flush()
    writer = recording._writer
    assert writer is not None
    await until(writer._batches.empty)  # the thread waits for the disk with the first batch
    for _ in range(recording_module.MAX_BATCHES + 5):
        recording.add(exchange(), SHAPE)
        recording.flush()
    await recording.close()
    losses = [item.levelno for item in caplog.records if "some are missing in the recording" in item.getMessage()]
    assert losses == [logging.WARNING]
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)  # lets the thread go
    os.close(reader)


async def test_more_exchanges_than_a_batch_holds_are_lost(
    recording: TrafficRecording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(recording_module, "MAX_BATCH", 2)
    file = tmp_path / "traffic.jsonl"
    recording.to(file, SIZE)
    for _ in range(4):
        recording.add(exchange(), SHAPE)
    await recording.close()
    assert len(lines(file)) == 3
    assert "some are missing" in caplog.text


async def test_another_file_takes_over_and_none_ends_it(recording: TrafficRecording, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    recording.to(one, SIZE)
    recording.add(exchange(), SHAPE)
    recording.to(other, SIZE)
    recording.add(exchange(), SHAPE)
    assert recording.to(None, SIZE) is None
    await until(lambda: other.exists() and len(lines(other)) == 2 and len(lines(one)) == 2)


async def test_hashes_differ_between_processes_and_by_their_pieces(recording: TrafficRecording) -> None:
    assert recording.hashed(b"a", b"bc") == recording.hashed(b"a", b"bc")
    assert recording.hashed(b"a", b"bc") != recording.hashed(b"ab", b"c")
    assert TrafficRecording().hashed(b"a", b"bc") != recording.hashed(b"a", b"bc")
