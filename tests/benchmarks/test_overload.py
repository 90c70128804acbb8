"""The overload benchmark, in small runs."""

import pytest

from benchmarks import overload


def test_disconnecting_clients_leave_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert overload.main(["--parts", "disconnects", "--requests", "600"]) == 0
    assert "running 0, waiting 0" in capsys.readouterr().out


async def test_every_request_of_an_overload_gets_a_response() -> None:
    with overload.running(max_queue=4) as (_, gateway):
        seen, _ = await overload.send_at_rate(overload.port_of(gateway), rate=200, seconds=0.5)
    assert seen.count(200) >= overload.SLOTS + 4
    assert seen.count(200) + seen.count(503) == 100
    assert seen.lost == 0
