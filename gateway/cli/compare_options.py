"""The options of `gateway compare`, from words of the command line to what is measured."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import orjson

from gateway.bench.compare import figure_names
from gateway.bench.compare_measure import ComparePlan
from gateway.bench.fail_if import Condition
from gateway.bench.http_client import InvalidTarget, base_url
from gateway.bench.options import BenchOptions
from gateway.bench.prompts import QUESTIONS, InvalidDataset, read_dataset
from gateway.bench.quality import QualityOptions
from gateway.bench.quality_judge import judge_target
from gateway.bench.quality_sandbox import CAN_RUN
from gateway.bench.quality_tasks import Task, TaskError, built_in, read_tasks
from gateway.bench.report_texts import Lang
from gateway.bench.target import BenchRequest, Target
from gateway.cli.bench_options import InvalidOptions, flag
from gateway.config import parsers

BUILT_IN = "built-in"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CheckedCompare:
    """Values of a command line: either `files` or `targets` are given."""

    plan: ComparePlan
    files: tuple[Path, ...]
    targets: tuple[Target, ...]
    judge: Target | None
    commands: dict[str, str]
    conditions: tuple[Condition, ...]
    lang: Lang
    force: bool


@dataclass
class _Options:
    given: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def take(self, name: str, parse: Callable[[Any], T], default: T) -> T:
        """Return the parsed option; note a problem and return `default` if it is wrong."""
        try:
            return parse(self.given[name])
        except ValueError as problem:
            self.problems.append(f"{name.upper() if name in ('a', 'b') else flag(name)}: {problem}")
            return default


def check(given: dict[str, Any]) -> CheckedCompare:
    """Check the parameters of the command.

    Raises:
        InvalidOptions: some cannot be used; it names all of them.
    """
    found = _Options(given)
    words = [given["a"], *([given["b"]] if given["b"] else [])]
    files = tuple(Path(word) for word in words if _is_file(word))
    targets: tuple[Target, ...] = ()
    if files and len(files) != len(words):
        found.problems.append("A and B have to be two addresses or two result files")
    elif not files:
        targets = tuple(_target(found, side) for side, _ in zip("ab", words, strict=False))
    nothing: tuple[BenchRequest, ...] = ()
    parameters = found.take("extra_body", _json_object, dict[str, Any]())
    load_parameters = {
        **({} if given["temperature"] is None else {"temperature": given["temperature"]}),
        **({"ignore_eos": True} if given["ignore_eos"] else {}),
        **parameters,
    }
    timeout = found.take("timeout", parsers.positive_duration, 600.0)
    load = BenchOptions(
        target=targets[0] if targets else Target("", ""),
        num_prompts=given["num_prompts"],
        max_concurrency=given["max_concurrency"],
        request_rate=found.take("request_rate", _rate, None),
        input_len=given["input_len"],
        output_len=given["output_len"],
        dataset=found.take("dataset_path", _dataset, nothing),
        languages=found.take("languages", _languages, ()),
        seed=given["seed"],
        num_warmups=given["num_warmups"],
        parameters=load_parameters,
        timeout=timeout,
    )
    tasks = found.take("quality", _tasks, None)
    quality = None
    if tasks is not None:
        quality = QualityOptions(
            tasks,
            repeats=given["quality_repeats"],
            temperature=given["quality_temperature"],
            runs_code=CAN_RUN and not given["no_code"],
            parameters=parameters,
            timeout=timeout,
        )
    judge = found.take("judge", lambda text: judge_target(text, given["judge_api_key"]) if text else None, None)
    if judge is not None and tasks is None:
        found.problems.append("--judge: it grades quality tasks; add --quality")
    no_conditions: tuple[Condition, ...] = ()
    conditions = found.take("fail_if", _conditions, no_conditions)
    if targets:
        names = figure_names(len(targets), has_quality=tasks is not None)
        for condition in conditions:
            if condition.name not in names:
                found.problems.append(
                    f"--fail-if: {condition.name!r} is not a figure of this result; it has {', '.join(names)}"
                )
    commands = {side.upper(): given[f"start_{side}"] for side in "ab" if given[f"start_{side}"]}
    if set(commands) - {target.label for target in targets}:
        found.problems.append("--start-a, --start-b: they start the server of a side that is an address")
    if found.problems:
        raise InvalidOptions(found.problems)
    plan = ComparePlan(load, given["rounds"], given["cold"], quality)
    return CheckedCompare(plan, files, targets, judge, commands, conditions, given["lang"], given["force"])


def _is_file(word: str) -> bool:
    return "://" not in word and (Path(word).exists() or word.endswith(".json"))


def _target(found: _Options, side: str) -> Target:
    given = found.given
    return Target(
        url=found.take(side, _url, ""),
        model=given[f"model_{side}"] or given["model"],
        api=given[f"api_{side}"] or given["api"],
        label=side.upper(),
        api_key=found.take(f"api_key_{side}" if given[f"api_key_{side}"] else "api_key", _printable, ""),
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


def _rate(value: float) -> float | None:
    if not value > 0:
        raise ValueError(f"{value:g}: expected a positive number")
    return None if math.isinf(value) else value


def _dataset(path: Path | None) -> tuple[BenchRequest, ...]:
    try:
        return () if path is None else tuple(read_dataset(path))
    except InvalidDataset as problem:
        raise ValueError(str(problem)) from problem


def _languages(text: str) -> tuple[str, ...]:
    languages = tuple(part.strip() for part in text.split(","))
    if not set(languages) <= set(QUESTIONS):
        raise ValueError(f"{text!r}: expected some of {', '.join(QUESTIONS)}")
    return languages


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = orjson.loads(text) if text else {}
    except orjson.JSONDecodeError as problem:
        raise ValueError(f"not JSON: {problem.msg}") from problem
    if not isinstance(value, dict):
        raise ValueError("expected a JSON object")
    return value


def _tasks(words: Sequence[str] | None) -> list[Task] | None:
    if not words:
        return None
    try:
        tasks = [task for word in words for task in (built_in() if word == BUILT_IN else read_tasks(Path(word)))]
    except TaskError as problem:
        raise ValueError(str(problem)) from problem
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"several tasks have the name {repeated[0]!r}")
    return tasks


def _conditions(texts: Sequence[str] | None) -> tuple[Condition, ...]:
    return tuple(map(Condition.parse, texts or ()))
