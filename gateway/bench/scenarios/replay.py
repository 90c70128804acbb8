"""`load --replay`: recorded traffic again, with made-up texts of the same sizes at the recorded times."""

import json
from contextlib import suppress

from gateway.bench.metrics import METRICS, run_figures
from gateway.bench.options import BenchOptions
from gateway.bench.quantiles import needed, quantile
from gateway.bench.recording import Recording
from gateway.bench.replayed_requests import ReplayedRequests
from gateway.bench.results import Cell, CellValue, Column, RunResult, ScenarioResult, Table, Verdict
from gateway.bench.runner import Runner, RunPlan
from gateway.bench.scenarios.base import assemble, failures_cell, ratio, table, verdict_of, warm_up
from gateway.bench.workload import DEFAULT_TIMEOUT, Prompts, describe, token_ratio

ALLOWANCE = 0.001
"""Share of the requests that may fail beyond those that failed in the recording."""
FIGURES = (
    "speed|recorded_requests|recorded_failed|failed_share|recorded_p50_ttft_ms|recorded_p95_ttft_ms|"
    "recorded_p99_ttft_ms|recorded_p50_e2el_ms|recorded_p95_e2el_ms|recorded_p99_e2el_ms"
)
"""Names of the figures of a replay."""
SLOWER = 1.1
"""Ratio of the whole answer's p95 to the recorded one from which the replay counts as slower."""


async def run(options: BenchOptions, runner: Runner, recording: Recording) -> ScenarioResult:
    """Send the requests of a recording, `options.speed` times as fast as they came."""
    ratio_of_words = await token_ratio(options, runner)
    requests = ReplayedRequests(
        recording,
        ratio_of_words,
        seed=options.seed,
        sends_tiers=await _knows_tiers(options, runner, recording),
        timeout=DEFAULT_TIMEOUT if options.timeout is None else options.timeout,
        parameters=dict(options.parameters),
    )
    first = recording.exchanges[0].at
    due = [(item.at - first) / options.speed for item in recording.exchanges]
    await warm_up(options, runner, requests[:1])
    result = await runner.run(
        RunPlan(
            "replay",
            requests,
            due=due,
            max_concurrency=options.max_concurrency,
            goodput=options.goodput,
            probe=Prompts(options, 1).probe(),
            probe_rate=options.probe_rate or 1.0,
        )
    )
    notes = (
        *(("length_estimated",) if ratio_of_words is None else ()),
        *(("images_made",) if any(item.images for item in recording.exchanges) else ()),
        *(("ollama_ignores_eos",) if options.target.api == "ollama" else ()),
        *(("replay_skipped",) if recording.skipped else ()),
        *(("replay_unreadable",) if recording.unreadable else ()),
    )
    return assemble(
        "load",
        options,
        [result],
        "replay",
        describe(options, requests, speed=options.speed, recorded_seconds=recording.seconds),
        tables=(_comparison(recording, result),),
        verdicts=() if result.interrupted else (_verdict(recording, result, options.speed),),
        figures=_figures(recording, result, options.speed),
        notes=notes,
    )


async def _knows_tiers(options: BenchOptions, runner: Runner, recording: Recording) -> bool:
    """Return whether each request may name its recorded tier: no model was named, and the server lists all."""
    if options.names_model:
        return False
    listed: set[str] = set()
    with suppress(OSError, EOFError, ValueError, KeyError, TypeError):
        status, body = await runner.client.get("/v1/models")
        listed = {entry["id"] for entry in json.loads(body)["data"]} if status == 200 else set()
    return {item.tier for item in recording.exchanges} <= listed


def _comparison(recording: Recording, run: RunResult) -> Table:
    columns = (
        Column("metric", "key"),
        Column("recorded", "s", lower_is_better=True),
        Column("replayed", "s", lower_is_better=True),
        Column("replay_ratio", "x", lower_is_better=True),
    )
    rows = []
    for metric in ("ttft", "e2el"):
        values = METRICS[metric](run)
        for percentile in (50, 95, 99):
            then = recording.milliseconds(metric, percentile) if recording.count(metric) >= needed(percentile) else None
            now = quantile(values, percentile) if len(values) >= needed(percentile) else None
            seconds = None if then is None else then / 1000
            rows.append(
                (
                    Cell(f"replay_{metric}_p{percentile}"),
                    Cell(seconds, note="" if seconds is not None else "n_too_small"),
                    Cell(now, note="" if now is not None else "n_too_small"),
                    Cell(ratio(now, seconds), "computed"),
                )
            )
    counts = (
        ("replay_requests", Cell(str(len(recording.exchanges))), Cell(str(len(run.ended)))),
        ("failures", Cell(str(recording.failed)), failures_cell(run)),
        ("replay_prompt_tokens", Cell(str(_recorded_tokens(recording, "prompt"))), Cell(_tokens(run, "input"))),
        ("replay_output_tokens", Cell(str(_recorded_tokens(recording, "output"))), Cell(_tokens(run, "output"))),
    )
    rows += [(Cell(name), then, now, Cell(None)) for name, then, now in counts]
    return table("replay", columns, rows)


def _recorded_tokens(recording: Recording, kind: str) -> int:
    return sum((item.prompt_tokens if kind == "prompt" else item.completion_tokens) or 0 for item in recording.good)


def _tokens(run: RunResult, kind: str) -> str | None:
    count = run_figures(run)[f"total_{kind}_tokens"]
    return None if count is None else str(count)


def _figures(recording: Recording, run: RunResult, speed: float) -> dict[str, CellValue]:
    figures: dict[str, CellValue] = {
        "speed": speed,
        "recorded_requests": len(recording.exchanges),
        "recorded_failed": recording.failed,
        "failed_share": ratio(len(run.ended) - len(run.good), len(run.ended)),
    }
    for metric in ("ttft", "e2el"):
        for percentile in (50, 95, 99):
            has_enough = recording.count(metric) >= needed(percentile)
            value = recording.milliseconds(metric, percentile) if has_enough else None
            figures[f"recorded_p{percentile}_{metric}_ms"] = value
    return figures


def _verdict(recording: Recording, run: RunResult, speed: float) -> Verdict:
    """Say whether the target carried the recorded traffic: it failed no more, and was not slower."""
    total = len(run.ended)
    failed, allowed = total - len(run.good), recording.failed + ALLOWANCE * total
    then, now = recording.milliseconds("e2el", 95), quantile(METRICS["e2el"](run), 95)
    before = None if then is None else then / 1000
    quotient = ratio(now, before)
    key = "replay_carried"
    if failed > allowed:
        key = "replay_failed"
    elif quotient is None or min(len(run.good), len(recording.good)) < needed(95):
        key = "unclear"
    elif quotient > SLOWER:
        key = "replay_slower"
    return verdict_of(
        key,
        "rule_replay",
        total=total,
        failed=failed,
        recorded_failed=recording.failed,
        speed=speed,
        now=now or 0.0,
        then=before or 0.0,
        slower=(SLOWER - 1) * 100,
        allowance=ALLOWANCE * 100,
    )
