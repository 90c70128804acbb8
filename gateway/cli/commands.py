"""The command line: `gateway serve`, `demo`, `status`, `switch`, `verify`, `rollback`, `undo`, `config`, `simulate`.

Exit status 0 done, 1 it ran and the answer is bad, 2 wrong words or settings. What only one command needs it imports by itself: who has to roll
back does not wait for a web framework.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from gateway import __version__, config
from gateway.cli.ops_client import PREFLIGHT_SECONDS, OpsClient, OpsError
from gateway.cli.tables import finding_lines, show_preflight, show_result, show_status

EXIT_BAD = 1
EXIT_SETTINGS = 2

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file; without one, the environment is enough.", envvar="GATEWAY_CONFIG"),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print what the gateway answered, for programs.")]
TierName = Annotated[
    str | None, typer.Option("--tier", help="This tier alone; default: every tier that is not pinned.")
]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OpenAI's API in front of Ollama and vLLM.",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at the settings.")
app.add_typer(config_app, name="config")


def main() -> None:
    """Run the command line, and exit."""
    app()


@app.callback(invoke_without_command=True)
def top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """OpenAI's API in front of Ollama and vLLM."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(config_file: ConfigFile = None) -> None:
    """Serve on GATEWAY_HOST:GATEWAY_PORT until SIGTERM or SIGINT."""
    from gateway.serve import CannotListen, run

    settings = _load(config_file)
    try:
        run(settings, reread=lambda: config.load(settings.file))
    except CannotListen as error:
        _stop_with([str(error)])


@app.command("demo")
def demo_command() -> None:
    """Serve in front of an Ollama and a vLLM on this machine, or stand-ins for what is not there."""
    from gateway.cli import demo
    from gateway.serve import CannotListen

    try:
        demo.run()
    except config.ConfigError as error:
        _stop_with(error.lines)
    except CannotListen as error:
        _stop_with([str(error)])


@app.command()
def status(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Show who serves what, how it does, and what was changed last."""
    answer = _ask(_ops_client(config_file), "GET", "/ops/status")
    print(json.dumps(answer)) if as_json else show_status(answer, Console(width=None if sys.stdout.isatty() else 160))


@app.command()
def switch(
    backend: Annotated[str, typer.Argument(metavar="BACKEND", help="Where to go, such as vllm.")],
    tier: TierName = None,
    canary: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="PERCENT",
            help="Only so many conversations; the others stay, or go to rollback_to where BACKEND has all.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Without looking first what would break.")] = False,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Move every tier that is not pinned to BACKEND, or a part of it."""
    remote = _ops_client(config_file)
    if (
        not force and backend.lower() != _ask(remote, "GET", "/ops/rollout")["rollback_to"].lower()
    ):  # the way back is never in doubt
        answer = _preflight(remote, backend, tier, PREFLIGHT_SECONDS)
        lines = finding_lines(answer)
        if answer["breaks"]:
            _stop_with([*lines, "nothing was changed; --force switches all the same"], EXIT_BAD)
        for line in lines:
            print(line, file=sys.stderr)
    order: dict[str, Any] = (
        {"backend": backend} if canary is None else {"canary": {"backend": backend, "percent": canary}}
    )
    _order(remote, "PUT", "/ops/rollout", order | ({} if tier is None else {"tier": tier}), as_json)


@app.command()
def verify(
    backend: Annotated[
        str | None,
        typer.Argument(metavar="[BACKEND]", help="Where to go; default: the first that is not the way back."),
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="What a switch to BACKEND would break, and what clients would notice.")
    ] = False,
    tier: TierName = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=600, help="Longest look; a model that has to be loaded may need more.")
    ] = PREFLIGHT_SECONDS,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Try what is to come before it counts; exit status 1 if it would break."""
    if not preflight:
        _stop_with(["say what to verify: --preflight"])
    answer = _preflight(_ops_client(config_file), backend, tier, seconds)
    print(json.dumps(answer)) if as_json else show_preflight(
        answer, Console(width=None if sys.stdout.isatty() else 160)
    )
    if answer["breaks"]:
        raise typer.Exit(EXIT_BAD)


@app.command()
def rollback(
    tier: TierName = None,
    to: Annotated[str | None, typer.Option("--to", help="Another backend than the settings' rollback_to.")] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Everything back at once, canaries cleared."""
    narrowed = {name: value for name, value in (("tier", tier), ("to", to)) if value is not None}
    _order(_ops_client(config_file), "POST", "/ops/rollback", narrowed, as_json)


@app.command()
def undo(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Back to the state before the last change; once more takes that back."""
    _order(_ops_client(config_file), "POST", "/ops/undo", {}, as_json)


@app.command("simulate")
def simulate_command(
    kind: Annotated[Literal["ollama", "vllm"], typer.Option(help="What to stand in for.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: the system chooses.")] = 0,
    host: str = "127.0.0.1",
    model: Annotated[
        list[str] | None, typer.Option(help="NAME[,vision][,tools][,thinking][,context=TOKENS]; may be given again.")
    ] = None,
    generation: Annotated[Literal["0.33", "0.24"], typer.Option(help="Which Ollama.")] = "0.33",
    tokens_per_second: Annotated[float, typer.Option(min=0, help="Of one request; 0: as fast as it goes.")] = 0,
    time_to_first_token: Annotated[float, typer.Option(min=0, help="Seconds.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests of a text model that the Ollama runs at once.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that the vLLM runs at once.")] = 256,
    load_seconds: Annotated[float, typer.Option(min=0, help="Time in which the Ollama loads a model.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another option: docs/stand-ins.md lists them."),
    ] = None,
) -> None:
    """A stand-in that speaks as Ollama or vLLM does."""
    from gateway import simulate

    try:
        models = tuple(simulate.Model.parse(text) for text in model or ())
    except ValueError as error:
        _stop_with([f"--model: {error}"])
    options = simulate.Options(
        kind,
        models,
        tokens_per_second=tokens_per_second,
        time_to_first_token=time_to_first_token,
        generation=generation,
        parallel=parallel,
        max_num_seqs=max_num_seqs,
        load_seconds=load_seconds,
    )
    try:
        options = options.with_settings(set_ or ())
    except ValueError as error:
        _stop_with([f"--set: {error}"])
    try:
        asyncio.run(simulate.serve(options, host, port, lambda opened: print(f"http://{host}:{opened}", flush=True)))
    except OSError as error:
        _stop_with([f"--port: cannot listen on {host}:{port}: {error.strerror or error}"])


@config_app.command("check")
def config_check(config_file: ConfigFile = None) -> None:
    """Say what the settings mean; exit status 2 if they are wrong."""
    print("\n".join(config.check(_load(config_file))))


@config_app.command("show")
def config_show(config_file: ConfigFile = None) -> None:
    """Print the settings in effect as YAML, secrets hidden."""
    print(config.show(_load(config_file)), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    print(json.dumps(config.schema(), indent=2))


def _load(path: Path | None) -> config.Settings:
    try:
        return config.load(path)
    except config.ConfigError as error:
        _stop_with(error.lines)


def _ops_client(path: Path | None) -> OpsClient:
    try:
        return OpsClient.of_settings(path)
    except config.ConfigError as error:
        _stop_with(
            [*error.lines, "to reach a gateway whatever its settings are, set GATEWAY_URL and GATEWAY_ADMIN_KEY"]
        )
    except OpsError as error:
        _stop_with([str(error)])


def _ask(remote: OpsClient, method: str, path: str, order: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        return remote.request(method, path, order)
    except OpsError as error:
        _stop_with([str(error)], EXIT_BAD)


def _preflight(remote: OpsClient, backend: str | None, tier: str | None, seconds: float) -> dict[str, Any]:
    try:
        return remote.preflight(backend, tier, seconds)
    except OpsError as error:
        _stop_with([str(error)], EXIT_BAD)


def _order(remote: OpsClient, method: str, path: str, order: dict[str, Any], as_json: bool) -> None:
    answer = _ask(remote, method, path, order)
    print(json.dumps(answer)) if as_json else show_result(answer, Console())


def _stop_with(lines: tuple[str, ...] | list[str], status: int = EXIT_SETTINGS) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise typer.Exit(status)
