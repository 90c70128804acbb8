"""The command `gateway advise`: reads metrics or a benchmark's result, and says which limits fit.

`gateway.bench` is imported inside the functions, so that other commands do not wait for it.
"""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gateway import config
from gateway.cli.exit_status import EXIT_BAD, stop_with
from gateway.cli.ops_client import OpsClient, OpsError

if TYPE_CHECKING:
    from gateway.bench.advise.advice import Advice, Wishes
    from gateway.bench.results import ScenarioResult


def advise(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[SOURCE]",
            help="A result of `gateway bench` (a file, or the folder of --out), or a gateway's address. "
            "Default: the gateway of GATEWAY_URL or of the settings.",
        ),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help='What has to hold, such as "p95_ttft_ms<1000". Can be repeated.'),
    ] = None,
    users: Annotated[int | None, typer.Option(min=1, help="People that have to be served.")] = None,
    think: Annotated[float, typer.Option(min=0, help="Seconds between an answer and the next question.")] = 30.0,
    wait: Annotated[
        float | None,
        typer.Option(min=0, help="Longest acceptable wait in the queue, in seconds. Default: what the target leaves."),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="Watch a gateway for so long. 0: all since its start.")
    ] = 0.0,
    kind: Annotated[
        Literal["ollama", "vllm"] | None, typer.Option(help="Kind of the measured server, if the result does not tell.")
    ] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Price of the machine, for the cost per user.")] = None,
    years: Annotated[float, typer.Option(min=0.1, help="Years that the machine is used.")] = 3.0,
    watts: Annotated[float, typer.Option(min=0, help="Power of the machine.")] = 0.0,
    kwh_price: Annotated[float, typer.Option(min=0, help="Price of a kWh, in the same currency.")] = 0.0,
    against: Annotated[
        Path | None, typer.Option(help="Result of `gateway bench users` before, on the same machine.")
    ] = None,
    lang: Annotated[Literal["en", "ko"], typer.Option(help="Language.")] = "en",
    as_json: Annotated[bool, typer.Option("--json", help="Print the advice as JSON.")] = False,
    config_file: Annotated[
        Path | None, typer.Option("--config", help="Optional YAML file of settings.", envvar="GATEWAY_CONFIG")
    ] = None,
) -> None:
    """Say which limits fit a target, and why. The exit status is 1 if the data do not show that it is met."""
    from rich.console import Console

    from gateway.bench.advise import report
    from gateway.bench.advise.advice import Wishes
    from gateway.bench.advise.cost import Machine
    from gateway.bench.advise.sources import InvalidSource, cost_remarks, result_of, users_of, users_of_both
    from gateway.bench.advise.target import Target

    try:
        targets = tuple(Target.parse(text) for text in target or ())
    except ValueError as problem:
        stop_with([f"--target: {problem}"])
    wishes = Wishes(targets=targets, users=users, think=think, wait=wait)
    machine = None if price is None else Machine(price, years, watts, kwh_price)
    try:
        if source is not None and Path(source).exists():
            advice, result = _from_result(Path(source), wishes, kind)
        else:
            advice, result = _from_gateway(_client(source, config_file), wishes, seconds), None
        earlier = None if against is None else result_of(against)
    except InvalidSource as problem:
        stop_with([str(problem)])
    found = None if result is None else users_of(result)
    before = None if earlier is None else users_of(earlier)
    if found and result is not None and earlier is not None:
        found, before = users_of_both(result, earlier)
    costs = cost_remarks(found or users, machine, before, is_compared=earlier is not None)
    if as_json:
        print(json.dumps(report.as_json(advice, costs, lang), ensure_ascii=False))
    else:
        report.show(advice, costs, lang, Console(width=None if sys.stdout.isatty() else 160))
    if advice.meets is False or (targets and advice.meets is None):
        raise typer.Exit(EXIT_BAD)


def _from_result(path: Path, wishes: "Wishes", kind: str | None) -> "tuple[Advice, ScenarioResult]":
    """Return the advice and the result."""
    from gateway.bench.advise.advice import from_levels
    from gateway.bench.advise.levels import levels_of
    from gateway.bench.advise.sources import kind_of, result_of

    result = result_of(path)
    return from_levels(levels_of(result, wishes.targets), wishes, kind or kind_of(result)), result


def _from_gateway(client: OpsClient, wishes: "Wishes", seconds: float) -> "Advice":
    """Read the metrics once, or twice with `seconds` in between."""
    from gateway.bench.advise.advice import from_loads
    from gateway.bench.advise.exposition import Exposition
    from gateway.bench.advise.loads import loads

    try:
        earlier = None
        if seconds:
            earlier = Exposition(client.metrics())
            time.sleep(seconds)
        now, status = Exposition(client.metrics()), client.request("GET", "/ops/status")
    except OpsError as error:
        stop_with([str(error)], EXIT_BAD)
    except ValueError as problem:
        stop_with([f"{client.base_url}/metrics: {problem}"], EXIT_BAD)
    period = seconds or time.time() - now.sum("process_start_time_seconds")
    return from_loads(loads(status, now, earlier, period), wishes)


def _client(source: str | None, config_file: Path | None) -> OpsClient:
    if source is not None and source != "localhost" and not {":", "."} & set(source):
        stop_with([f"{source!r} is neither a file nor an address"])
    try:
        if source is not None:
            return OpsClient.of_url(source, config_file, "SOURCE")
        return OpsClient.of_settings(config_file)
    except config.ConfigError as error:
        stop_with([*error.lines])
    except OpsError as error:
        stop_with([str(error)])
