"""The command `gateway bench`: its options, checked, and what becomes of the result.

`gateway.bench` is imported inside the functions, so that other commands do not wait for it.
"""

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from gateway.cli.exit_status import EXIT_BAD, EXIT_INTERRUPTED, stop_with

if TYPE_CHECKING:
    from gateway.bench.fail_if import Condition
    from gateway.bench.options import BenchOptions
    from gateway.bench.results import ScenarioResult
    from gateway.bench.writers import Style
    from gateway.cli.bench_options import Checked

DEFAULT_URL = "http://127.0.0.1:8080"
ScenarioName = Literal["concurrency", "text-parallel", "vision-batch", "multi-model", "users", "load", "soak"]
CONTEXT = {"allow_extra_args": True}
"""Stray words arrive as arguments of the context, and are refused with the other problems."""
_SEVERAL = {"--goodput": ":", "--header": "=", "--metadata": "="}
"""Options that take several values, as in vLLM, by what every value contains."""

_TARGET, _LOAD, _WORKLOAD, _SCENARIO, _OUTPUT = "Target", "Load", "Requests", "Of one scenario", "Result"


def bench(
    context: typer.Context,
    scenario: Annotated[ScenarioName, typer.Argument(help="What to measure; docs/benchmarks.md describes each.")],
    url: Annotated[
        str, typer.Option("--url", "--base-url", envvar="GATEWAY_URL", help="Address.", rich_help_panel=_TARGET)
    ] = DEFAULT_URL,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model. Default: the first that the server lists. Repeat it for multi-model.", rich_help_panel=_TARGET
        ),
    ] = None,
    api: Annotated[Literal["openai", "ollama"], typer.Option(help="API to speak.", rich_help_panel=_TARGET)] = "openai",
    api_key: Annotated[str, typer.Option(envvar="OPENAI_API_KEY", help="Bearer key.", rich_help_panel=_TARGET)] = "",
    endpoint: Annotated[
        str, typer.Option(help="Path. Default: /v1/chat/completions, or /api/chat.", rich_help_panel=_TARGET)
    ] = "",
    label: Annotated[str, typer.Option(help="Name of the target in results.", rich_help_panel=_TARGET)] = "",
    header: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="Header of every request.", rich_help_panel=_TARGET)
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept any certificate.", rich_help_panel=_TARGET)
    ] = False,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Requests to send.", rich_help_panel=_LOAD)] = None,
    max_concurrency: Annotated[
        int | None, typer.Option(min=1, help="Most requests in flight.", rich_help_panel=_LOAD)
    ] = None,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second; inf: all at once.", rich_help_panel=_LOAD)
    ] = math.inf,
    burstiness: Annotated[
        float, typer.Option(help="1: Poisson arrivals; less: more bursty; inf: even.", rich_help_panel=_LOAD)
    ] = 1.0,
    ramp_up_strategy: Annotated[
        Literal["linear", "exponential"] | None,
        typer.Option(help="The rate grows from request to request (load).", rich_help_panel=_LOAD),
    ] = None,
    ramp_up_start_rps: Annotated[
        float | None, typer.Option(help="Requests per second at the first request (load).", rich_help_panel=_LOAD)
    ] = None,
    ramp_up_end_rps: Annotated[
        float | None, typer.Option(help="Requests per second at the last request (load).", rich_help_panel=_LOAD)
    ] = None,
    probe_request_rate: Annotated[
        float,
        typer.Option(
            help="One-token requests per second beside the load, timed apart (load, soak).", rich_help_panel=_LOAD
        ),
    ] = 0.0,
    num_warmups: Annotated[int, typer.Option(min=0, help="Requests before, unmeasured.", rich_help_panel=_LOAD)] = 1,
    timeout: Annotated[
        str | None,
        typer.Option(help="Longest time of one answer, such as 30s. Default: 10m; users: 2m.", rich_help_panel=_LOAD),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of arrivals, prompts and images.", rich_help_panel=_LOAD)] = 0,
    input_len: Annotated[
        int | None,
        typer.Option(
            "--input-len", "--random-input-len", min=1, help="Tokens of made-up prompts.", rich_help_panel=_WORKLOAD
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(
            "--output-len", "--random-output-len", min=1, help="Most tokens of an answer.", rich_help_panel=_WORKLOAD
        ),
    ] = None,
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="JSONL with prompt or messages, output_tokens, images.", rich_help_panel=_WORKLOAD),
    ] = None,
    languages: Annotated[
        str, typer.Option(help="Languages of the built-in questions: ko, en, ja.", rich_help_panel=_WORKLOAD)
    ] = "ko",
    no_stream: Annotated[bool, typer.Option("--no-stream", help="Plain answers.", rich_help_panel=_WORKLOAD)] = False,
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of the full length (vLLM).", rich_help_panel=_WORKLOAD)
    ] = False,
    extra_body: Annotated[
        str, typer.Option(metavar="JSON", help="Further fields of the body.", rich_help_panel=_WORKLOAD)
    ] = "",
    temperature: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    top_p: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    top_k: Annotated[int | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    min_p: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    frequency_penalty: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    presence_penalty: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(rich_help_panel=_WORKLOAD)] = None,
    replay: Annotated[
        Path | None,
        typer.Option(help="Recording of the setting `record`, to send again (load).", rich_help_panel=_SCENARIO),
    ] = None,
    speed: Annotated[
        float, typer.Option(help="Replay so many times as fast as it came (load).", rich_help_panel=_SCENARIO)
    ] = 1.0,
    levels: Annotated[
        str,
        typer.Option(
            metavar="N,N,…",
            help="At once: 5,16 (concurrency), 1,5,10,20 (vision-batch), searched (users).",
            rich_help_panel=_SCENARIO,
        ),
    ] = "",
    images: Annotated[
        Path | None, typer.Option(help="Folder of images, PSD too (vision-batch).", rich_help_panel=_SCENARIO)
    ] = None,
    image_size: Annotated[
        int, typer.Option(min=8, max=8192, help="Width of made images (vision-batch).", rich_help_panel=_SCENARIO)
    ] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Questions of each user (users).", rich_help_panel=_SCENARIO)] = 2,
    realtime_ttft: Annotated[
        float, typer.Option(min=0, help="Real time: seconds to the first token (users).", rich_help_panel=_SCENARIO)
    ] = 2.0,
    realtime_speed: Annotated[
        float, typer.Option(min=0.001, help="Real time: tokens/s after it (users).", rich_help_panel=_SCENARIO)
    ] = 5.0,
    wait: Annotated[str, typer.Option(help="Acceptable time of an answer (users).", rich_help_panel=_SCENARIO)] = "30s",
    max_users: Annotated[
        int, typer.Option(min=1, help="Where the search ends (users).", rich_help_panel=_SCENARIO)
    ] = 64,
    duration: Annotated[str, typer.Option(help="Such as 90s, 10m, 8h (soak).", rich_help_panel=_SCENARIO)] = "10m",
    window: Annotated[str, typer.Option(help="Length of a window (soak).", rich_help_panel=_SCENARIO)] = "1m",
    forecast: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROW=TEXT",
            help="What a plan expects, beside the measured value: 5=35 s, realtime=5-10.",
            rich_help_panel=_SCENARIO,
        ),
    ] = None,
    goodput: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY:MS", help="Limits for goodput: ttft, tpot, e2el.", rich_help_panel=_OUTPUT),
    ] = None,
    percentile_metrics: Annotated[
        str, typer.Option(help="Metrics to print with percentiles.", rich_help_panel=_OUTPUT)
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[str, typer.Option(help="Percentiles.", rich_help_panel=_OUTPUT)] = "50,90,95,99",
    metadata: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Facts for the result, such as version=0.32.", rich_help_panel=_OUTPUT),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the result's files.", rich_help_panel=_OUTPUT)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.", rich_help_panel=_OUTPUT)] = False,
    lang: Annotated[Literal["en", "ko"], typer.Option(help="Language.", rich_help_panel=_OUTPUT)] = "en",
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help='Exit status 1 if it is true, such as "p99_ttft_ms>500".', rich_help_panel=_OUTPUT
        ),
    ] = None,
    disable_tqdm: Annotated[
        bool, typer.Option("--disable-tqdm", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Measure a gateway, an Ollama or a vLLM, and report tables and files."""
    from rich.console import Console

    checked = _checked(context)
    console = None if disable_tqdm else Console(stderr=True)
    result = _measured(scenario, checked.options, console, checked.style)
    _report(result, checked.style, out, as_json=as_json)
    _judge(result, checked.style, checked.conditions)


def _measured(scenario: str, options: "BenchOptions", console: Any, style: "Style") -> "ScenarioResult":
    import uvloop

    from gateway.bench.images import InvalidImage
    from gateway.bench.measure import NoModel, measure
    from gateway.bench.scenarios import Unanswered

    try:
        return uvloop.run(measure(scenario, options, console, style))
    except InvalidImage as problem:
        stop_with([f"--images: {problem}"])
    except NoModel as problem:
        stop_with([str(problem)], EXIT_BAD)
    except Unanswered as problem:
        target = options.target
        stop_with([f"{target.url}{target.path} does not answer a first request: {problem.error}"], EXIT_BAD)


def _report(result: "ScenarioResult", style: "Style", out: Path | None, *, as_json: bool) -> None:
    from rich.console import Console

    from gateway.bench.terminal import show
    from gateway.bench.writers import json_text, write_all

    paths, failure = [], ""
    if out is not None:  # first: a pipe may close before everything is printed
        try:
            paths = write_all(result, out, style)
        except OSError as problem:
            failure = f"--out: {out}: {problem.strerror or problem}"
    if as_json:
        print(json_text(result, style), end="")
    else:
        show(result, Console(width=None if sys.stdout.isatty() else 160), style)
    if failure:
        stop_with([failure])
    for path in paths:
        print(path, file=sys.stderr)


def _judge(result: "ScenarioResult", style: "Style", conditions: "tuple[Condition, ...]") -> None:
    """Set the exit status: 1 if a condition is true or nothing was answered, 130 after an interruption."""
    from gateway.bench.fail_if import UnknownFigure
    from gateway.bench.result_json import to_json

    figures = to_json(result, style.percentiles) | dict(result.figures)
    try:
        problems = [problem for condition in conditions if (problem := condition.problem(figures))]
    except UnknownFigure as unknown:
        stop_with([f"--fail-if: {unknown}"])
    if problems:
        stop_with([f"failed: {problem}" for problem in problems], EXIT_BAD)
    if result.is_interrupted:
        raise typer.Exit(EXIT_INTERRUPTED)
    if not any(run.good for run in result.runs):
        stop_with(["no request was answered"], EXIT_BAD)


def _checked(context: typer.Context) -> "Checked":
    """Return the options as the scenarios take them; the exit status is 2 if some cannot be used."""
    from gateway.cli.bench_options import InvalidOptions, check

    given = dict(context.params)
    if context.args:
        stop_with([f"unexpected argument {word!r}" for word in context.args])
    sources = {name: context.get_parameter_source(name) for name in given}
    try:
        return check(given, {name for name, source in sources.items() if source and source.name == "COMMANDLINE"})
    except InvalidOptions as problem:
        stop_with(problem.lines)


class BenchCommand(TyperCommand):
    """The command, which takes several values after an option where vLLM's does."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, one_value_each(args))


def one_value_each(words: list[str]) -> list[str]:
    """Repeat an option of `_SEVERAL` before each of its further values: `--header a=1 --header b=2`."""
    repeated: list[str] = []
    option = ""
    for before, word in zip(["", *words], words, strict=False):
        if word.startswith("-"):
            option = word.partition("=")[0]
        elif option in _SEVERAL and before != option:
            if _SEVERAL[option] in word:
                repeated.append(option)
            else:
                option = ""
        repeated.append(word)
    return repeated
