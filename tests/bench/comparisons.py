"""Comparisons for tests."""

import random
from collections.abc import Sequence
from typing import Any

from gateway.bench.compare_result import ColdStart, Comparison, EngineUse, Side
from gateway.bench.quality_checks import Point
from gateway.bench.quality_scores import SideQuality, TaskScore
from tests.bench.records import record, run


def side(name: str, *, gap: float = 0.1, rounds: int = 4, noise: float = 0.02, seed: int = 1, **changes: Any) -> Side:
    """Return a side whose answers take 0.5 s and 10 gaps, which vary a little from round to round."""
    source = random.Random(seed)
    runs = []
    for number in range(rounds):
        factor = 1 + source.uniform(-noise, noise)
        records = [
            record(place, start=100.0 + 50 * number + place, ttft=0.5 * factor, itl=[gap * factor] * 10)
            for place in range(4)
        ]
        runs.append(run(records, label=f"{name} {number + 1}"))
    values: dict[str, Any] = {
        "name": name,
        "url": "http://127.0.0.1:1",
        "model": f"model-{name}",
        "api": "openai",
        "endpoint": "/v1/chat/completions",
        "workload": {"requests": 4, "requests_sha256": "ab" * 32},
        "rounds": tuple(runs),
        "server": {"vllm": "0.33.0"},
        "date": "20261129-050607",
    }
    return Side(**{**values, **changes})


def comparison(*sides: Side, in_turn: bool = True, notes: Sequence[str] = ()) -> Comparison:
    """Return a comparison of these sides, by default of one that is twice as slow with one that is not."""
    return Comparison("20261129-050607", sides or (side("A", gap=0.2), side("B", seed=2)), in_turn, tuple(notes))


SCENARIOS = ("debugging", "korean", "s3", "s4")


def quality(accuracy: float, model: str = "m", scenarios: Sequence[str] = SCENARIOS, **changes: Any) -> SideQuality:
    """Return scores of one task for each scenario; the accuracy varies a little by task and repeat."""
    tasks = tuple(
        TaskScore(
            f"{name}-task",
            name,
            tuple(
                (
                    Point("mentions", "accuracy", 1, min(1.0, accuracy + 0.01 * (place + repeat))),
                    Point("finished", "clarity", 1, 1.0),
                )
                for repeat in range(3)
            ),
        )
        for place, name in enumerate(scenarios)
    )
    return SideQuality(model, tasks, **{"tasks_sha256": "d", "repeats": 3, "temperature": 0.7, **changes})


def cold(seconds: float, **use: float) -> ColdStart:
    """Return a load that took so long."""
    return ColdStart(seconds, 2 * seconds, 20.0, EngineUse(**use))
