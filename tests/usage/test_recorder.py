"""Recorder: writes once a second in a thread, and outlives a disk that fails."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway.telemetry.exchange import Attribution
from gateway.usage import recorder as module
from gateway.usage.file import read_rows
from gateway.usage.recorder import UsageRecorder, day_of
from tests.fakes.exchanges import exchange
from tests.fakes.running_gateway import until

NOW = 1_796_040_000.0
TODAY = day_of(NOW)


@asynccontextmanager
async def recording(path: Path, days: int = 400, now: float = NOW) -> AsyncIterator[UsageRecorder]:
    usage = UsageRecorder(path, days, lambda: now)
    try:
        yield usage
    finally:
        await usage.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "usage.db"


def requests(path: Path) -> int:
    found = read_rows(path, [], None, None)
    return int(found[0]["requests"]) if found else 0


async def test_exchanges_are_in_the_file_within_a_second(path: Path) -> None:
    async with recording(path) as usage:
        usage.observe([(exchange(), None)] * 3)
        usage.observe([(exchange(), Attribution("ada"))])
        assert usage._timer is not None
        assert usage._timer.when() <= asyncio.get_running_loop().time() + 1
        await until(lambda: requests(path) == 4)
    (row,) = read_rows(path, ["person", "day"], "", None)[:1]
    assert row["day"] == TODAY


async def test_reader_sees_everything_that_has_ended(path: Path) -> None:
    async with recording(path) as usage:
        pending: list[Any] = [(exchange(key="web"), None)]

        def settle() -> None:
            usage.observe(pending)
            pending.clear()

        usage.settle = settle
        (row,) = await usage.rows(["key"], None, None)
        assert (row["key"], row["requests"]) == ("web", 1)
        assert await usage.rows(["key"], "2999-01-01", None) == []


async def test_what_is_left_is_written_at_the_end(path: Path) -> None:
    async with recording(path) as usage:
        usage.observe([(exchange(), None)])
    assert requests(path) == 1


async def test_days_beyond_those_to_keep_are_deleted(path: Path) -> None:
    for days_ago in (40, 29, 0):
        async with recording(path, 30, NOW - days_ago * 86_400) as usage:
            usage.observe([(exchange(), None)])
    assert [row["day"] for row in read_rows(path, ["day"], None, None)] == [day_of(NOW - 29 * 86_400), TODAY]


async def test_clock_that_runs_years_ahead_for_a_day_deletes_next_to_nothing(path: Path) -> None:
    for days in (-400, -200, -1, 4000, 0, 1):
        async with recording(path, 400, NOW + days * 86_400) as usage:
            usage.observe([(exchange(), None)])
    kept = [day_of(NOW + days * 86_400) for days in (-200, -1, 0, 1, 4000)]
    assert [row["day"] for row in read_rows(path, ["day"], None, None)] == kept


async def test_gateway_that_was_off_for_months_deletes_old_days_as_it_goes_on(path: Path) -> None:
    for days in (-100, -29, 100, 101):
        async with recording(path, 30, NOW + days * 86_400) as usage:
            usage.observe([(exchange(), None)])
    kept = [day_of(NOW + days * 86_400) for days in (100, 101)]
    assert [row["day"] for row in read_rows(path, ["day"], None, None)] == kept


async def test_disk_that_fails_costs_one_line_and_nothing_is_missing_later(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.mkdir()
    async with recording(path) as usage:
        for _ in range(3):
            usage.observe([(exchange(), None)])
            await asyncio.wrap_future(usage._write())
        assert caplog.text.count("cannot be written") == 1
        path.rmdir()
        with caplog.at_level(logging.INFO):
            usage.observe([(exchange(), None)])
            await asyncio.wrap_future(usage._write())
        assert "is written again; nothing is missing in it" in caplog.text
        assert requests(path) == 4


async def test_rows_that_cannot_be_written_are_bounded(
    path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    path.mkdir()
    async with recording(path) as usage:
        usage.observe([(exchange(tier=tier), None) for tier in ("a", "b", "c", "d")])
        await asyncio.wrap_future(usage._write())
        assert "2 rows are lost" in caplog.text


async def test_file_that_is_removed_while_the_gateway_runs_is_made_again(path: Path) -> None:
    async with recording(path) as usage:
        usage.observe([(exchange(), None)])
        await asyncio.wrap_future(usage._write())
        for file in path.parent.iterdir():
            file.unlink()
        usage.observe([(exchange(), None)])
        await asyncio.wrap_future(usage._write())
        assert requests(path) == 1


_KILLED = """
import asyncio, sys
from pathlib import Path
from gateway.usage.recorder import UsageRecorder
from tests.fakes.exchanges import exchange

async def main():
    usage = UsageRecorder(Path(sys.argv[1]), 400)
    while True:
        usage.observe([(exchange(), None)])
        print("x", flush=True)
        await asyncio.sleep(0.01)

asyncio.run(main())
"""


def test_process_that_is_killed_loses_at_most_the_last_second(path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", _KILLED, str(path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        told = 0
        while not path.exists() or requests(path) < 150:
            child.stdout.readline()
            told += 1
        child.send_signal(signal.SIGKILL)
        told += len(child.stdout.read().splitlines())
    written = requests(path)
    assert 150 <= written <= told
    assert told - written <= 100  # one every 10 ms
