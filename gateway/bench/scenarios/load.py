"""`load`: requests at a rate (open loop), or a number of them in flight (closed loop)."""

from gateway.bench.options import BenchOptions
from gateway.bench.results import ScenarioResult
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.scenarios import replay
from gateway.bench.scenarios.base import Scenario, assemble, warm_up
from gateway.bench.workload import Prompts, describe

NUM_PROMPTS = 100
OUTPUT_LEN = 128


async def run(options: BenchOptions, runner: Runner) -> ScenarioResult:
    """Send `num_prompts` requests, or those of a recording."""
    if options.replay is not None:
        return await replay.run(options, runner, options.replay)
    prompts = await Prompts.of(options, runner, OUTPUT_LEN)
    count = options.num_prompts or (len(options.dataset) if options.dataset else NUM_PROMPTS)
    requests = prompts.take(count)
    await warm_up(options, runner, requests[:1])
    result = await runner.run(
        RunPlan(
            "load",
            requests,
            max_concurrency=options.max_concurrency,
            request_rate=options.request_rate,
            burstiness=options.burstiness,
            ramp_up=options.ramp_up,
            goodput=options.goodput,
            seed=options.seed,
            probe=prompts.probe(),
            probe_rate=options.probe_rate or 1.0,
        )
    )
    return assemble("load", options, [result], "load", describe(options, requests), notes=prompts.notes)


SCENARIO = Scenario(
    "load",
    run,
    frozenset(
        (
            "num_prompts",
            "max_concurrency",
            "request_rate",
            "burstiness",
            "ramp_up_strategy",
            "ramp_up_start_rps",
            "ramp_up_end_rps",
            "probe_request_rate",
            "replay",
            "speed",
        )
    ),
    replay.FIGURES,
)
