"""The search for the slowest input: a short run of it, and what it calls slow."""

import random
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks import fuzz


def test_short_run_names_every_target(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "0.1", "--seed", "1"])
    assert fuzz.main() in (0, 1)
    printed = capsys.readouterr().out
    assert all(
        f"\n{name} " in printed for name in ("schema", "tools", "pattern", "chat", "embedding", "http", "events")
    )


def test_slowest_input_is_kept_and_fails_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])

    def run(size: int) -> Iterator[None]:
        for seconds in (size / 1000, 0.01):
            now[0] += seconds
            yield

    def mutated(chance: random.Random, kept: list[int]) -> int:
        return chance.choice(kept) + chance.choice([-1, 1])

    target = fuzz.Target("any", run, lambda: [15], mutated, int, lambda size: b"x" * size)
    worst = fuzz.search(target, 0.2, random.Random(1))
    assert worst.input == worst.size > 20
    assert worst.seconds == pytest.approx(worst.size / 1000)

    monkeypatch.setattr(fuzz, "targets", lambda http: [target])
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "0.2", "--seed", "1"])
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 0.02)
    assert fuzz.main() == 1
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 10**6)
    assert fuzz.main() == 0


def test_mutated_schema_is_small_enough_to_be_looked_at() -> None:
    chance = random.Random(1)
    kept = fuzz._schema_seeds()
    for _ in range(100):
        assert len(fuzz.orjson.dumps(fuzz._mutated_schema(chance, kept))) <= fuzz.json_schema.MAX_SCHEMA
