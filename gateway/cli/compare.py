"""The command `gateway compare`.

`gateway.bench` is imported inside the functions, so that other commands do not wait for it.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli.exit_status import EXIT_BAD, stop_with

if TYPE_CHECKING:
    from gateway.bench.compare import Written
    from gateway.cli.compare_options import CheckedCompare


_SIDES, _LOAD, _QUALITY, _OUTPUT = "Sides", "Load", "Quality", "Result"
_Api = Literal["openai", "ollama"]


def compare(
    context: typer.Context,
    a: Annotated[str, typer.Argument(metavar="A", help="An address, or a result file.")],
    b: Annotated[str, typer.Argument(metavar="[B]", help="The other side. Without one, A alone is measured.")] = "",
    model: Annotated[str, typer.Option(help="Model of both sides.", rich_help_panel=_SIDES)] = "",
    model_a: Annotated[
        str, typer.Option(help="Model of A. Default: the first that it lists.", rich_help_panel=_SIDES)
    ] = "",
    model_b: Annotated[str, typer.Option(help="Model of B.", rich_help_panel=_SIDES)] = "",
    api: Annotated[_Api, typer.Option(help="API of both sides.", rich_help_panel=_SIDES)] = "openai",
    api_a: Annotated[_Api | None, typer.Option(help="API of A.", rich_help_panel=_SIDES)] = None,
    api_b: Annotated[_Api | None, typer.Option(help="API of B.", rich_help_panel=_SIDES)] = None,
    api_key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="Bearer key of both sides.", rich_help_panel=_SIDES)
    ] = "",
    api_key_a: Annotated[
        str, typer.Option(envvar="GATEWAY_COMPARE_API_KEY_A", help="Key of A.", rich_help_panel=_SIDES)
    ] = "",
    api_key_b: Annotated[
        str, typer.Option(envvar="GATEWAY_COMPARE_API_KEY_B", help="Key of B.", rich_help_panel=_SIDES)
    ] = "",
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Accept any certificate.", rich_help_panel=_SIDES)
    ] = False,
    rounds: Annotated[
        int, typer.Option(min=1, help="Times that each side is measured, in turn.", rich_help_panel=_LOAD)
    ] = 5,
    num_prompts: Annotated[int, typer.Option(min=1, help="Requests of each round.", rich_help_panel=_LOAD)] = 16,
    max_concurrency: Annotated[int, typer.Option(min=1, help="Most requests in flight.", rich_help_panel=_LOAD)] = 4,
    request_rate: Annotated[
        float, typer.Option(help="Requests per second; inf: as fast as there are places.", rich_help_panel=_LOAD)
    ] = float("inf"),
    num_warmups: Annotated[int, typer.Option(min=1, help="Requests before, unmeasured.", rich_help_panel=_LOAD)] = 1,
    input_len: Annotated[
        int | None, typer.Option(min=1, help="Tokens of made-up prompts.", rich_help_panel=_LOAD)
    ] = None,
    output_len: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.", rich_help_panel=_LOAD)] = 128,
    dataset_path: Annotated[
        Path | None,
        typer.Option(help="JSONL with prompt or messages, output_tokens, images.", rich_help_panel=_LOAD),
    ] = None,
    languages: Annotated[
        str, typer.Option(help="Languages of the built-in questions: ko, en, ja.", rich_help_panel=_LOAD)
    ] = "ko",
    ignore_eos: Annotated[
        bool, typer.Option("--ignore-eos", help="Answers of the full length (vLLM).", rich_help_panel=_LOAD)
    ] = False,
    temperature: Annotated[
        float | None, typer.Option(help="Of the load; see also --quality-temperature.", rich_help_panel=_LOAD)
    ] = None,
    extra_body: Annotated[
        str, typer.Option(metavar="JSON", help="Further fields of every body.", rich_help_panel=_LOAD)
    ] = "",
    timeout: Annotated[str, typer.Option(help="Longest time of one answer.", rich_help_panel=_LOAD)] = "10m",
    seed: Annotated[int, typer.Option(help="Of arrivals and prompts.", rich_help_panel=_LOAD)] = 0,
    cold: Annotated[
        bool,
        typer.Option(
            "--cold", help="Load the model in each round: an Ollama's, or by --start-a.", rich_help_panel=_LOAD
        ),
    ] = False,
    start_a: Annotated[
        str, typer.Option(metavar="COMMAND", help="Start the server of A, and stop it.", rich_help_panel=_SIDES)
    ] = "",
    start_b: Annotated[
        str, typer.Option(metavar="COMMAND", help="Start the server of B, and stop it.", rich_help_panel=_SIDES)
    ] = "",
    quality: Annotated[
        list[str] | None,
        typer.Option(metavar="built-in|FILE", help="Score answers to these tasks.", rich_help_panel=_QUALITY),
    ] = None,
    quality_repeats: Annotated[
        int, typer.Option(min=1, help="Times that each task is asked.", rich_help_panel=_QUALITY)
    ] = 3,
    quality_temperature: Annotated[float, typer.Option(min=0, max=2, rich_help_panel=_QUALITY)] = 0.7,
    no_code: Annotated[
        bool, typer.Option("--no-code", help="Run no code of the models.", rich_help_panel=_QUALITY)
    ] = False,
    judge: Annotated[
        str, typer.Option(metavar="URL/MODEL", help="A model that grades the answers.", rich_help_panel=_QUALITY)
    ] = "",
    judge_api_key: Annotated[
        str, typer.Option(envvar="GATEWAY_JUDGE_API_KEY", help="Its key.", rich_help_panel=_QUALITY)
    ] = "",
    force: Annotated[
        bool, typer.Option("--force", help="Compare files whose workloads differ.", rich_help_panel=_OUTPUT)
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the reports.", rich_help_panel=_OUTPUT)] = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=_OUTPUT)] = False,
    lang: Annotated[Literal["en", "ko"], typer.Option(help="Language.", rich_help_panel=_OUTPUT)] = "en",
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION", help='Exit status 1 if it is true, such as "b_worse>0".', rich_help_panel=_OUTPUT
        ),
    ] = None,
    disable_tqdm: Annotated[
        bool, typer.Option("--disable-tqdm", help="No progress bar.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Compare two servers, or two results, on the same work: A B A B."""
    from rich.console import Console

    from gateway.bench.compare_terminal import show

    checked = _checked(dict(context.params))
    written = _compared(checked, None if disable_tqdm else Console(stderr=True))
    paths, failure = [], ""
    try:  # first: a pipe may close before everything is printed
        paths = written.write(out, lang)
    except OSError as problem:
        failure = f"--out: {out}: {problem.strerror or problem}"
    if as_json:
        print(written.json_text(), end="")
    else:
        show(written.comparison, Console(width=None if sys.stdout.isatty() else 160), lang)
    if failure:
        stop_with([failure])
    for path in paths:
        print(path, file=sys.stderr)
    _judge(written, checked)


def _checked(given: dict[str, Any]) -> "CheckedCompare":
    from gateway.cli.bench_options import InvalidOptions
    from gateway.cli.compare_options import check

    try:
        return check(given)
    except InvalidOptions as problem:
        stop_with(problem.lines)


def _compared(checked: "CheckedCompare", console: Any) -> "Written":
    import uvloop

    from gateway.bench import compare as bench
    from gateway.bench.compare_measure import NotMeasured
    from gateway.bench.compare_start import NotStarted
    from gateway.bench.measure import NoModel

    try:
        if checked.files:
            return bench.of_files(checked.files, force=checked.force)
        return uvloop.run(
            bench.of_targets(checked.plan, checked.targets, checked.judge, console, checked.lang, checked.commands)
        )
    except bench.UnreadableResult as problem:
        stop_with([str(problem)])
    except bench.UnlikeWorkloads as unlike:
        stop_with(
            ["the workloads differ, so a difference would say nothing; use --force to compare anyway:"]
            + [f"  {one}" for one in unlike.fields],
        )
    except (NoModel, NotMeasured, NotStarted) as problem:
        stop_with([str(problem)], EXIT_BAD)


def _judge(written: "Written", checked: "CheckedCompare") -> None:
    """Set the exit status: 1 if a condition is true."""
    from gateway.bench.compare import all_figures
    from gateway.bench.fail_if import UnknownFigure

    figures = all_figures(written.comparison)
    try:
        problems = [problem for condition in checked.conditions if (problem := condition.problem(figures))]
    except UnknownFigure as unknown:
        stop_with([f"--fail-if: {unknown}"])
    if problems:
        stop_with([f"failed: {problem}" for problem in problems], EXIT_BAD)
