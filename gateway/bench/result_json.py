"""Results to JSON and back.

The top level of a scenario's JSON is its headline run as `vllm bench serve` writes one, so that programs
for vLLM's results read it; `runs` has every run in that form, and the other keys are the scenario's. No
list is written twice, since a long run has millions of pieces: the headline run's lists are at the top
level only, and the gaps of a request are in `itls` and not in its record.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from gateway.bench.arrivals import RampUp
from gateway.bench.metrics import DEFAULT_PERCENTILES, run_figures
from gateway.bench.results import (
    CANCELLED,
    Cell,
    ClientLoad,
    Column,
    RateChange,
    RequestRecord,
    RunResult,
    ScenarioResult,
    Table,
    Verdict,
)

FORMAT = 1
"""Version of the keys that are not vLLM's; a larger one means that a key changed its meaning."""


LISTS = (
    "input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "errors", "records",
)  # fmt: skip
"""The keys of a run with an item for each request."""
_TOP_LEVEL_ONLY = (*LISTS, "probes")


def run_to_json(run: RunResult, percentiles: Sequence[float] = DEFAULT_PERCENTILES) -> dict[str, Any]:
    """Return one run under vLLM's names, with lists of all requests and their records."""
    ended = run.ended
    return {
        "label": run.label,
        "model_id": run.model,
        "num_prompts": run.num_prompts,
        "request_rate": "inf" if run.request_rate is None else run.request_rate,
        "burstiness": run.burstiness,
        "max_concurrency": run.max_concurrency,
        **run_figures(run, percentiles),
        "input_lens": [record.prompt_tokens or 0 for record in ended],
        "output_lens": [record.completion_tokens or 0 if record.is_ok else 0 for record in ended],
        "ttfts": [_microseconds(record.ttft or 0.0) for record in ended],
        "itls": [[_microseconds(gap) for gap in record.itl] for record in ended],
        "latencies": [_microseconds(record.latency) for record in ended],
        "start_times": [_microseconds(record.start) for record in ended],
        "queue_times": [_microseconds(record.queue_time) for record in ended],
        "errors": [record.error for record in ended],
        "target": run.target,
        "interrupted": run.interrupted,
        "goodput": dict(run.goodput),
        "errors_by_kind": run.errors,
        "client": asdict(run.client),
        "run_start": run.start,
        "records": [record.to_json(run.start) for record in run.records],
        **_extras_to_json(run),
    }


def run_from_json(value: Mapping[str, Any]) -> RunResult:
    """Read a run of ours, or a result of `vllm bench serve --save-detailed`.

    Raises:
        ValueError: it has no list of requests, as vLLM's without `--save-detailed`, or is not a result.
    """
    try:
        start = float(value.get("run_start", 0.0))
        records = tuple(_own_records(value, start) if "records" in value else _vllm_records(value))
        rate = value.get("request_rate", "inf")
        return RunResult(
            label=str(value.get("label") or ""),
            target=str(value.get("target") or value.get("backend") or ""),
            model=str(value.get("model_id") or ""),
            records=records,
            start=start,
            duration=float(value["duration"]),
            num_prompts=int(value["num_prompts"]),
            request_rate=None if rate == "inf" else float(rate),
            burstiness=float(value.get("burstiness", 1.0)),
            max_concurrency=value.get("max_concurrency"),
            interrupted=bool(value.get("interrupted", False)),
            goodput=value.get("goodput") or {},
            client=_client_load(value.get("client") or {}),
            ramp_up=_ramp_up(value),
            rate_changes=tuple(RateChange(**change) for change in value.get("rps_change_events", ())),
            probes=_probes(value, start),
        )
    except (KeyError, TypeError) as problem:
        raise ValueError(f"not a result with detailed requests: {problem}") from problem


def to_json(result: ScenarioResult, percentiles: Sequence[float] = DEFAULT_PERCENTILES) -> dict[str, Any]:
    """Return the scenario's result for `benchmark_results.json`."""
    kind = {"openai": "openai-chat"}.get(result.api, result.api)
    return {
        **result.metadata,
        "date": result.date,
        "endpoint_type": kind,
        "backend": kind,
        **run_to_json(result.headline_run, percentiles),
        "interrupted": result.is_interrupted,
        "tokenizer_id": None,
        "format": FORMAT,
        "scenario": result.scenario,
        "url": result.url,
        "api": result.api,
        "endpoint": result.endpoint,
        "model": result.model,
        "target": result.target,
        "headline": result.headline,
        "workload": dict(result.workload),
        "figures": dict(result.figures),
        "verdicts": [asdict(verdict) for verdict in result.verdicts],
        "tables": [asdict(table) for table in result.tables],
        "notes": list(result.notes),
        "server": dict(result.server),
        "metadata": dict(result.metadata),
        "runs": [
            _without_lists(run_to_json(run, percentiles))
            if run is result.headline_run
            else run_to_json(run, percentiles)
            for run in result.runs
        ],
    }


def from_json(value: Mapping[str, Any]) -> ScenarioResult:
    """Read what `to_json` wrote, or one result of `vllm bench serve --save-detailed`.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, Mapping):
        raise ValueError("not a result: expected an object")
    try:
        lists = {key: value[key] for key in _TOP_LEVEL_ONLY if key in value}
        runs = tuple(
            run_from_json(run if "records" in run else {**lists, **run}) for run in value.get("runs") or [value]
        )
        return ScenarioResult(
            scenario=str(value.get("scenario", "load")),
            date=str(value.get("date", "")),
            target=str(value.get("target") or value.get("backend") or ""),
            url=str(value.get("url", "")),
            api=str(value.get("api", "openai")),
            endpoint=str(value.get("endpoint", "")),
            model=str(value.get("model") or value.get("model_id") or ""),
            workload=value.get("workload", {}),
            runs=runs,
            headline=str(value.get("headline", runs[0].label)),
            tables=tuple(map(_table, value.get("tables", ()))),
            verdicts=tuple(Verdict(**verdict) for verdict in value.get("verdicts", ())),
            figures=value.get("figures", {}),
            notes=tuple(value.get("notes", ())),
            server=value.get("server", {}),
            metadata=value.get("metadata", {}),
        )
    except (KeyError, TypeError) as problem:
        raise ValueError(f"not a result: {problem}") from problem


def _microseconds(seconds: float) -> float:
    """Return the time without digits that no clock has."""
    return round(seconds, 6)


def _without_lists(run: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key not in _TOP_LEVEL_ONLY}


def _extras_to_json(run: RunResult) -> dict[str, Any]:
    """Return what only a run with a ramp-up or with probes has."""
    extras: dict[str, Any] = {}
    if run.ramp_up is not None:
        extras |= run.ramp_up.to_json()
        extras["rps_change_events"] = [asdict(change) for change in run.rate_changes]
    if run.probes is not None:
        extras["probes"] = [record.to_json(run.start) for record in run.probes]
    return extras


def _own_records(value: Mapping[str, Any], origin: float) -> Iterator[RequestRecord]:
    gaps = iter(value["itls"])
    for item in value["records"]:
        record = RequestRecord.from_json(item)
        yield replace(_moved(record, origin), itl=() if record.error == CANCELLED else tuple(next(gaps)))


def _probes(value: Mapping[str, Any], origin: float) -> tuple[RequestRecord, ...] | None:
    if "probes" not in value:
        return None
    return tuple(_moved(RequestRecord.from_json(item), origin) for item in value["probes"])


def _moved(record: RequestRecord, origin: float) -> RequestRecord:
    """Return the record with its times from `origin` on."""
    return replace(
        record,
        arrival=record.arrival + origin,
        start=record.start + origin,
        last_token=record.last_token + origin,
        end=record.end + origin,
    )


def _ramp_up(value: Mapping[str, Any]) -> RampUp | None:
    strategy = value.get("ramp_up_strategy")
    if strategy is None:
        return None
    return RampUp(strategy, float(value["ramp_up_start_rps"]), float(value["ramp_up_end_rps"]))


def _vllm_records(value: Mapping[str, Any]) -> list[RequestRecord]:
    lists = ("ttfts", "itls", "latencies", "start_times", "input_lens", "output_lens", "errors")
    columns = zip(*(value[name] for name in lists), strict=True)
    return [
        RequestRecord(
            index=index,
            arrival=start - waited,
            start=start,
            last_token=start + latency,
            end=start + latency,
            ttft=None if error else ttft,
            itl=tuple(itl),
            prompt_tokens=prompt,
            completion_tokens=completion,
            status=0 if error else 200,
            error="failed" if error else "",
        )
        for index, ((ttft, itl, latency, start, prompt, completion, error), waited) in enumerate(
            zip(columns, value.get("queue_times") or [0.0] * len(value["ttfts"]), strict=True)
        )
    ]


def _client_load(value: Mapping[str, Any]) -> ClientLoad:
    return ClientLoad(**{**value, "warnings": tuple(value.get("warnings", ()))})


def _table(value: Mapping[str, Any]) -> Table:
    return Table(
        value["key"],
        tuple(Column(**column) for column in value["columns"]),
        tuple(tuple(Cell(**cell) for cell in row) for row in value["rows"]),
    )
