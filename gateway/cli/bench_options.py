"""The options of `gateway bench`, from words of the command line to what scenarios take."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from gateway.bench.arrivals import RAMP_UP_STRATEGIES, RampUp
from gateway.bench.fail_if import Condition
from gateway.bench.formatting import DEFAULT_METRICS
from gateway.bench.http_client import InvalidTarget, base_url
from gateway.bench.metrics import DEFAULT_PERCENTILES, GOODPUT_METRICS, METRICS, run_figures
from gateway.bench.options import BenchOptions
from gateway.bench.prompts import QUESTIONS, InvalidDataset, read_dataset
from gateway.bench.recording import InvalidRecording, Recording, read_recording
from gateway.bench.result_json import to_json
from gateway.bench.results import RunResult, ScenarioResult
from gateway.bench.scenarios import SCENARIOS, Scenario
from gateway.bench.target import BenchRequest, Target
from gateway.bench.writers import Style
from gateway.config import parsers

SHARED = frozenset(
    (
        "url", "model", "api", "api_key", "endpoint", "label", "header", "insecure", "out", "as_json", "lang",
        "fail_if",
        "input_len",
        "output_len", "dataset_path", "languages", "seed", "num_warmups", "no_stream", "extra_body",
        "ignore_eos", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
        "repetition_penalty", "timeout", "goodput", "percentile_metrics", "metric_percentiles", "disable_tqdm",
        "metadata",
    )
)  # fmt: skip
"""Options that every scenario takes."""
NOT_REPLAYED = frozenset(
    ("request_rate", "burstiness", "ramp_up_strategy", "ramp_up_start_rps", "ramp_up_end_rps", "input_len",
     "output_len", "dataset_path", "languages", "no_stream", "ignore_eos")
)  # fmt: skip
"""Options in place of which a replay has recorded values."""
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
NO_CONDITIONS: tuple[Condition, ...] = ()
_FLAGS = {"as_json": "json"}

T = TypeVar("T")


class InvalidOptions(Exception):
    """Options that cannot be used, one line each."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(*lines)
        self.lines = lines


@dataclass(frozen=True, slots=True)
class Checked:
    """Values of a command line."""

    options: BenchOptions
    style: Style
    conditions: tuple[Condition, ...]


@dataclass
class _Check:
    """Parses one option after the other and collects what is wrong with them."""

    given: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def take(self, name: str, parse: Callable[[Any], T], default: T) -> T:
        """Return the parsed option; note a problem and return `default` if it is wrong."""
        try:
            return parse(self.given[name])
        except ValueError as problem:
            self.problems.append(f"{flag(name)}: {problem}")
            return default


def flag(name: str) -> str:
    """Return the option as it is written."""
    return f"--{_FLAGS.get(name, name).replace('_', '-')}"


def check(given: dict[str, Any], chosen: set[str]) -> Checked:
    """Check a command line: `given` has all parameters, `chosen` the names of those that were written.

    Raises:
        InvalidOptions: some cannot be used.
    """
    found = _Check(given)
    scenario = SCENARIOS[given["scenario"]]
    for name in sorted(chosen - SHARED - scenario.options - {"scenario"}):
        found.problems.append(f"{flag(name)} has no meaning for {scenario.name}")
    target = _target(found)
    options = BenchOptions(
        target=target,
        num_prompts=given["num_prompts"],
        levels=found.take("levels", _levels, ()),
        max_concurrency=given["max_concurrency"],
        request_rate=found.take("request_rate", _rate, None),
        burstiness=found.take("burstiness", _positive, 1.0),
        ramp_up=_ramp_up(found),
        probe_rate=found.take("probe_request_rate", _probe_rate, None),
        goodput=found.take("goodput", _goodput, {}),
        input_len=given["input_len"],
        output_len=given["output_len"],
        dataset=found.take("dataset_path", _dataset, ()),
        languages=found.take("languages", _languages, ("ko",)),
        models=tuple(given["model"] or ()) if "models" in scenario.options else (),
        image_folder=given["images"],
        image_size=given["image_size"],
        seed=given["seed"],
        num_warmups=given["num_warmups"],
        stream=not given["no_stream"],
        parameters=_parameters(found),
        timeout=found.take("timeout", lambda text: None if text is None else parsers.positive_duration(text), None),
        duration=found.take("duration", parsers.positive_duration, 0.0),
        window=found.take("window", parsers.positive_duration, 0.0),
        rounds=given["rounds"],
        realtime_ttft=given["realtime_ttft"],
        realtime_speed=given["realtime_speed"],
        wait=found.take("wait", parsers.positive_duration, 0.0),
        max_users=given["max_users"],
        metadata=found.take("metadata", _metadata, {}),
        forecasts=found.take("forecast", _pairs, {}),
        replay=found.take("replay", lambda path: _recording(path, given["num_prompts"]), None),
        speed=found.take("speed", _positive, 1.0),
        names_model=bool(given["model"]),
    )
    if len(given["model"] or ()) > 1 and "models" not in scenario.options:
        found.problems.append(f"--model: {scenario.name} takes one model")
    if given["replay"] is None and "speed" in chosen:
        found.problems.append("--speed has no meaning without --replay")
    for name in sorted(chosen & NOT_REPLAYED if given["replay"] is not None else ()):
        found.problems.append(f"{flag(name)} has no meaning with --replay, which has its own")
    percentiles = found.take("metric_percentiles", _percentiles, DEFAULT_PERCENTILES)
    metrics = found.take("percentile_metrics", _metrics, DEFAULT_METRICS)
    conditions = found.take("fail_if", _conditions, NO_CONDITIONS)
    named = [condition.percentile for condition in conditions]
    percentiles = (*percentiles, *(value for value in named if value is not None and value not in percentiles))
    found.problems += _unknown_figures(conditions, scenario, percentiles, is_probed=options.probe_rate is not None)
    found.problems += _taken_names(options, percentiles)
    if found.problems:
        raise InvalidOptions(found.problems)
    return Checked(options, Style(given["lang"], percentiles, metrics), conditions)


def _target(found: _Check) -> Target:
    given = found.given
    models = given["model"] or [""]
    return Target(
        url=found.take("url", _url, ""),
        model=models[0],
        api=given["api"],
        label=given["label"],
        api_key=found.take("api_key", _printable, ""),
        endpoint=found.take("endpoint", _endpoint, ""),
        headers=found.take("header", _headers, ()),
        tls_verify=not given["insecure"],
    )


def _url(text: str) -> str:
    try:
        return base_url(text)
    except InvalidTarget as problem:
        raise ValueError(str(problem)) from problem


def _printable(text: str) -> str:
    if not text.isascii() or not text.isprintable():
        raise ValueError("only printable ASCII characters are allowed")
    return text


def _endpoint(text: str) -> str:
    if text and (not text.startswith("/") or not text.isascii() or not text.isprintable() or " " in text):
        raise ValueError(f"{text!r} is not a path such as /v1/chat/completions")
    return text


def _headers(texts: list[str] | None) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not parsers.TOKEN.fullmatch(name):
            raise ValueError(f"{text.partition('=')[0]!r}: expected KEY=VALUE")
        pairs.append((name, _printable(value)))
    return tuple(pairs)


def _levels(text: str) -> tuple[int, ...]:
    try:
        levels = tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        levels = (0,)
    if any(level < 1 for level in levels):
        raise ValueError(f"{text!r}: expected positive integers, separated by commas")
    return levels


def _positive(value: float) -> float:
    if not value > 0:
        raise ValueError(f"{value:g}: expected a positive number")
    return value


def _rate(value: float) -> float | None:
    return None if math.isinf(_positive(value)) else value


def _probe_rate(value: float) -> float | None:
    if value < 0 or math.isinf(value) or math.isnan(value):
        raise ValueError(f"{value:g}: expected a positive number, or 0 for no probes")
    return value or None


def _ramp_up(found: _Check) -> RampUp | None:
    """Return the growth of the request rate; vLLM has the same conditions, but lets a rate begin at 0."""
    given = found.given
    strategy, ends = given["ramp_up_strategy"], ("ramp_up_start_rps", "ramp_up_end_rps")
    if strategy is None:
        found.problems += [f"{flag(name)} has no meaning without --ramp-up-strategy" for name in ends if given[name]]
        return None
    if strategy not in RAMP_UP_STRATEGIES:
        found.problems.append(f"--ramp-up-strategy: {strategy!r}: expected {' or '.join(RAMP_UP_STRATEGIES)}")
        return None
    if not math.isinf(given["request_rate"]):
        found.problems.append("--request-rate has no meaning with --ramp-up-strategy, which has its own rates")
    start, end = (found.take(name, _finite_rate, 1.0) for name in ends)
    if start > end:
        found.problems.append(f"--ramp-up-start-rps: {start:g} is more than --ramp-up-end-rps, {end:g}")
    return RampUp(strategy, start, end)


def _finite_rate(value: float | None) -> float:
    if value is None:
        raise ValueError("--ramp-up-strategy needs it")
    if math.isinf(value):
        raise ValueError(f"{value:g}: expected a finite number")
    return _positive(value)


def _metadata(texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"{text!r}: expected KEY=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs


def _taken_names(options: BenchOptions, percentiles: tuple[float, ...]) -> list[str]:
    """Return a problem for each name of `--metadata` that is a key of the result itself."""
    nothing = RunResult(
        "", "", "", (), start=0.0, duration=0.0, num_prompts=0, ramp_up=RampUp("linear", 1, 1), probes=()
    )
    result = ScenarioResult("", "", "", "", "", "", "", {}, (nothing,), "")
    taken = to_json(result, percentiles).keys() & options.metadata.keys()
    return [f"--metadata: {name!r} is a key of the result itself; choose another" for name in sorted(taken)]


def _goodput(texts: list[str] | None) -> dict[str, float]:
    limits = {}
    for text in (part for value in texts or () for part in value.replace(",", " ").split()):
        name, _, value = text.partition(":")
        try:
            limits[name] = _positive(float(value))
        except ValueError:
            name = ""
        if name not in GOODPUT_METRICS:
            raise ValueError(f"{text!r}: expected {', '.join(GOODPUT_METRICS)} with milliseconds, such as ttft:500")
    return limits


def _dataset(path: Path | None) -> tuple[BenchRequest, ...]:
    try:
        return () if path is None else tuple(read_dataset(path))
    except InvalidDataset as problem:
        raise ValueError(str(problem)) from problem


def _recording(path: Path | None, most: int | None) -> Recording | None:
    try:
        return None if path is None else read_recording(path, most)
    except InvalidRecording as problem:
        raise ValueError(str(problem)) from problem


def _languages(text: str) -> tuple[str, ...]:
    languages = tuple(part.strip() for part in text.split(","))
    if not set(languages) <= set(QUESTIONS):
        raise ValueError(f"{text!r}: expected some of {', '.join(QUESTIONS)}")
    return languages


def _pairs(texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        row, equals, value = text.partition("=")
        if not equals or not row or not value:
            raise ValueError(f"{text!r}: expected ROW=TEXT")
        pairs[row] = value
    return pairs


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = (0.0,)
    if not all(0 < value < 100 for value in values):
        raise ValueError(f"{text!r}: expected numbers between 0 and 100, separated by commas")
    return values


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not set(names) <= set(METRICS):
        raise ValueError(f"{text!r}: expected some of {', '.join(METRICS)}")
    return names


def _conditions(texts: list[str] | None) -> tuple[Condition, ...]:
    return tuple(map(Condition.parse, texts or ()))


def _unknown_figures(
    conditions: tuple[Condition, ...], scenario: Scenario, percentiles: tuple[float, ...], *, is_probed: bool
) -> list[str]:
    """Return a problem for each condition on a figure that this scenario will not have."""
    probes = () if is_probed else None
    nothing = RunResult("", "", "", (), start=0.0, duration=0.0, num_prompts=0, probes=probes)
    names = set(run_figures(nothing, percentiles)) - {"too_few"}
    return [
        f"--fail-if: {condition.name!r} is not a figure of {scenario.name}; it has {', '.join(sorted(names))}"
        + (f", and {scenario.figures.replace('|', ', ')}" if scenario.figures else "")
        for condition in conditions
        if condition.name not in names and not re.fullmatch(scenario.figures, condition.name)
    ]


def _parameters(found: _Check) -> dict[str, Any]:
    given = found.given
    parameters: dict[str, Any] = {name: given[name] for name in SAMPLING if given[name] is not None}
    if given["ignore_eos"]:
        parameters["ignore_eos"] = True
    return parameters | found.take("extra_body", _json_object, dict[str, Any]())


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem.msg}") from problem
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value
