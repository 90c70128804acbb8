"""The scenarios of `gateway bench`, by name."""

from gateway.bench.scenarios import concurrency, load, multi_model, soak, text_parallel, users, vision_batch
from gateway.bench.scenarios.base import Scenario, Unanswered

SCENARIOS: dict[str, Scenario] = {
    module.SCENARIO.name: module.SCENARIO
    for module in (concurrency, text_parallel, vision_batch, multi_model, users, load, soak)
}

__all__ = ["SCENARIOS", "Scenario", "Unanswered"]
