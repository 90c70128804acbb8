"""The bench of overload runs, in small."""

import pytest

from benchmarks import overload


def test_those_who_come_and_go_leave_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert overload.main(["--parts", "leaving", "--requests", "600"]) == 0
    assert "running 0, waiting 0" in capsys.readouterr().out


async def test_flood_is_answered_to_the_last_request() -> None:
    with overload.running(max_queue=4) as (_, gateway):
        seen, _ = await overload.flood(overload.port_of(gateway), rate=200, seconds=0.5)
    assert seen.count(200) >= overload.LANES + 4
    assert seen.count(200) + seen.count(503) == 100
    assert seen.lost == 0
