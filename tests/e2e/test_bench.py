"""`gateway bench` against every engine, directly in its own API and through the gateway."""

from typing import Any

from gateway.bench.measure import measure
from gateway.bench.options import BenchOptions
from gateway.bench.results import ScenarioResult
from gateway.bench.target import Target
from gateway.bench.writers import Style
from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway

SCENARIOS: dict[str, dict[str, Any]] = {
    "concurrency": {"levels": (3,)},
    "text-parallel": {},
    "vision-batch": {"levels": (1, 2), "image_size": 64},
    "load": {"num_prompts": 6, "max_concurrency": 3},
}


async def measured(target: Target, engine: Engine) -> dict[str, ScenarioResult]:
    """Run the scenarios with answers of eight tokens."""
    results = {}
    for name, changes in SCENARIOS.items():
        if name == "vision-batch" and not engine.has_vision:
            continue
        options = BenchOptions(target, output_len=8, parameters=engine.long_sampling, **changes)
        results[name] = await measure(name, options, None, Style())
    return results


def check(results: dict[str, ScenarioResult]) -> None:
    for name, result in results.items():
        for run in result.runs:
            assert run.errors == {}, name
            assert len(run.good) == run.num_prompts
            assert all(record.ttft is not None and record.prompt_tokens for record in run.records), name
            assert all(1 <= (record.completion_tokens or 0) <= 8 for record in run.records), name


async def test_each_engine_is_measured_in_its_own_api(engine: Engine) -> None:
    api = "ollama" if engine.kind == "ollama" else "openai"
    check(await measured(Target(engine.url, engine.model, api), engine))  # type: ignore[arg-type]


async def test_each_engine_is_measured_in_openais_api(engine: Engine) -> None:
    check(await measured(Target(engine.url, engine.model), engine))


async def test_a_gateway_is_measured_with_the_time_in_its_queue(engine: Engine, gateway: Gateway) -> None:
    results = await measured(Target(gateway.url, "standard", api_key=KEY), engine)
    check(results)
    records = [record for result in results.values() for run in result.runs for record in run.records]
    assert all(record.queue_ms is not None and record.backend == engine.kind for record in records)
