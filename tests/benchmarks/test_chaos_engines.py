"""The engine of the chaos run: it ends by any signal, and starts again at the same address."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.chaos_engines import ChaosEngine, StandIn, send_signal


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ChaosEngine]:
    engine = StandIn(tmp_path / "log", [])
    try:
        yield engine
    finally:
        engine.close()


def test_engine_starts_again_after_each_kind_of_end(engine: ChaosEngine) -> None:
    assert engine.has_ended()
    for number in (signal.SIGKILL, signal.SIGTERM):
        engine.start()
        engine.wait_until_ready()
        assert engine.load() == 0
        send_signal(engine.processes(), number)
        assert engine.wait_until_ended(10.0)
        assert not engine.is_ready()


def test_stopped_engine_does_not_end_by_itself(engine: ChaosEngine) -> None:
    engine.start()
    engine.wait_until_ready()
    send_signal(engine.processes(), signal.SIGSTOP)
    assert not engine.wait_until_ended(0.1)
    assert engine.has_ended()


def test_engine_that_ends_while_it_starts_is_reported(tmp_path: Path) -> None:
    engine = StandIn(tmp_path / "log", ["--no-such-option"])
    engine.start()
    with pytest.raises(RuntimeError, match="not ready"):
        engine.wait_until_ready()
