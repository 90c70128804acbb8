"""Command line of `gateway`: one function for each command.

Exit status: 0 for success, 1 if the command ran and the result is bad, 2 for an invalid command
line or invalid settings. A command imports inside its function what only it needs, so that
a rollback does not wait for a web framework to be imported.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console

from gateway import __version__, config
from gateway.cli.advise import advise
from gateway.cli.bench import CONTEXT, bench
from gateway.cli.compare import compare
from gateway.cli.ops_client import PREFLIGHT_SECONDS, OpsClient, OpsError
from gateway.cli.tables import finding_lines, show_preflight, show_result, show_status

EXIT_BAD = 1
EXIT_SETTINGS = 2

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="Optional YAML file of settings.", envvar="GATEWAY_CONFIG"),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the gateway's response as JSON.")]
TierName = Annotated[str | None, typer.Option("--tier", help="Only this tier. Default: every tier that is not pinned.")]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OpenAI's API in front of Ollama and vLLM.",
)
config_app = typer.Typer(no_args_is_help=True, help="Check and print the settings.")
app.add_typer(config_app, name="config")


def main() -> None:
    """Run the command line and exit."""
    app()


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """OpenAI's API in front of Ollama and vLLM."""
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def serve(config_file: ConfigFile = None) -> None:
    """Run the gateway on GATEWAY_HOST:GATEWAY_PORT until SIGTERM or SIGINT."""
    from gateway.serve import CannotListen, run

    settings = _load(config_file)
    try:
        run(settings, reread=lambda: config.load(settings.file))
    except CannotListen as error:
        _stop_with([str(error)])


@app.command("demo")
def demo_command() -> None:
    """Run the gateway in front of Ollama and vLLM on this machine, or stand-ins for them."""
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
    """Show which backend serves each tier, its load and latencies, and the last changes."""
    answer = _request(_ops_client(config_file), "GET", "/ops/status")
    print(json.dumps(answer)) if as_json else show_status(answer, Console(width=None if sys.stdout.isatty() else 160))


@app.command()
def top(
    interval: Annotated[float, typer.Option(min=0.2, max=60, help="Seconds between two refreshes.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print the status once, as where there is no terminal.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Watch load, latencies, roll-out and errors in the terminal. Press q to leave."""
    from gateway.cli.top import run

    try:
        run(_ops_client(config_file), Console(width=None if sys.stdout.isatty() else 100), interval, is_once=once)
    except OpsError as error:
        _stop_with([str(error)], EXIT_BAD)


@app.command()
def switch(
    backend: Annotated[str, typer.Argument(metavar="BACKEND", help="Backend to move to, such as vllm.")],
    tier: TierName = None,
    canary: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=100,
            metavar="PERCENT",
            help="Move only this share of the conversations. "
            "The others stay, or go to rollback_to if BACKEND serves all of them.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Skip the preflight check.")] = False,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Move every tier that is not pinned, or a share of its conversations, to BACKEND."""
    client = _ops_client(config_file)
    # A switch to `rollback_to` is never checked: the way back must stay open.
    if not force and backend.lower() != _request(client, "GET", "/ops/rollout")["rollback_to"].lower():
        answer = _preflight(client, backend, tier, PREFLIGHT_SECONDS)
        lines = finding_lines(answer)
        if answer["breaks"]:
            _stop_with([*lines, "nothing was changed; use --force to switch anyway"], EXIT_BAD)
        for line in lines:
            print(line, file=sys.stderr)
    body: dict[str, Any] = (
        {"backend": backend} if canary is None else {"canary": {"backend": backend, "percent": canary}}
    )
    _change(client, "PUT", "/ops/rollout", body | ({} if tier is None else {"tier": tier}), as_json)


@app.command()
def verify(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="[URL]",
            help="Address of a gateway, an Ollama, a vLLM or another server with OpenAI's API. "
            "Default: the gateway of GATEWAY_URL or of the settings. With --preflight: a backend's name. "
            "Default: the first one that is not rollback_to.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model to ask. Default: the first listed one that chats.")
    ] = None,
    api_key: Annotated[
        str | None, typer.Option("--api-key", help="Key of the server.", envvar="OPENAI_API_KEY", show_envvar=True)
    ] = None,
    users: Annotated[int, typer.Option(min=2, max=512, help="Requests at once that have to be answered.")] = 10,
    only: Annotated[
        str | None, typer.Option("--only", metavar="GROUPS", help="Only these groups of checks, comma-separated.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, max=3600, help="Longest wait for the next byte of an answer, in seconds.")
    ] = 120,
    language: Annotated[Literal["en", "ko"], typer.Option("--lang", help="Language of the report.")] = "en",
    preflight: Annotated[
        bool,
        typer.Option("--preflight", help="Report what a switch to a backend would break, and nothing else."),
    ] = False,
    tier: TierName = None,
    seconds: Annotated[
        float, typer.Option(min=1, max=600, help="Longest duration of the preflight. Loading a model may need more.")
    ] = PREFLIGHT_SECONDS,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Check that a server does what programs expect. The exit status is 1 if a check fails."""
    if preflight:
        _check_switch(_ops_client(config_file), target, tier, seconds, as_json)
        return
    from gateway.cli import verify as verification

    if target is not None and target != "localhost" and not {":", ".", "/"} & set(target):
        _stop_with([f"{target!r} is not an address; to check a switch to a backend of this name, add --preflight"])
    try:
        ops = OpsClient.of_url(target, config_file, "URL") if target is not None else _ops_client(config_file)
        passed = verification.run(
            ops,
            tier,
            seconds,
            model,
            api_key,
            users=users,
            only=only,
            timeout=timeout,
            language=language,
            as_json=as_json,
        )
    except (OpsError, ValueError) as error:
        _stop_with([str(error)])
    if not passed:
        raise typer.Exit(EXIT_BAD)


def _check_switch(client: OpsClient, backend: str | None, tier: str | None, seconds: float, as_json: bool) -> None:
    answer = _preflight(client, backend, tier, seconds)
    print(json.dumps(answer)) if as_json else show_preflight(
        answer, Console(width=None if sys.stdout.isatty() else 160)
    )
    if answer["breaks"]:
        raise typer.Exit(EXIT_BAD)


@app.command()
def rollback(
    tier: TierName = None,
    to: Annotated[str | None, typer.Option("--to", help="Backend to roll back to. Default: rollback_to.")] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Move every tier that is not pinned back to rollback_to at once, and clear canaries."""
    body = {name: value for name, value in (("tier", tier), ("to", to)) if value is not None}
    _change(_ops_client(config_file), "POST", "/ops/rollback", body, as_json)


@app.command()
def undo(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Restore the state before the last change. A second undo reverts the first."""
    _change(_ops_client(config_file), "POST", "/ops/undo", {}, as_json)


app.command("bench", context_settings=CONTEXT)(bench)
app.command("advise")(advise)
app.command("compare")(compare)


@app.command("simulate")
def simulate_command(
    kind: Annotated[Literal["ollama", "vllm"], typer.Option(help="Engine to imitate.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: the system chooses.")] = 0,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[
        list[str] | None, typer.Option(help="NAME[,vision][,tools][,thinking][,context=TOKENS]. Can be repeated.")
    ] = None,
    generation: Annotated[Literal["0.33", "0.24"], typer.Option(help="Version of Ollama.")] = "0.33",
    tokens_per_second: Annotated[float, typer.Option(min=0, help="Speed of one request. 0: no limit.")] = 0,
    time_to_first_token: Annotated[float, typer.Option(min=0, help="Seconds before the first token.")] = 0,
    parallel: Annotated[int, typer.Option(min=1, help="Requests of a text model that Ollama runs at once.")] = 1,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that vLLM runs at once.")] = 256,
    load_seconds: Annotated[float, typer.Option(min=0, help="Seconds that Ollama takes to load a model.")] = 0,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Further option; docs/stand-ins.md lists them."),
    ] = None,
) -> None:
    """Run a stand-in that answers like Ollama or vLLM."""
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
    """Explain the settings. The exit status is 2 if they are invalid."""
    print("\n".join(config.check(_load(config_file))))


@config_app.command("show")
def config_show(config_file: ConfigFile = None) -> None:
    """Print the settings in effect as YAML, with secrets hidden."""
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
            [*error.lines, "to call a gateway without reading its settings, set GATEWAY_URL and GATEWAY_ADMIN_KEY"]
        )
    except OpsError as error:
        _stop_with([str(error)])


def _request(client: OpsClient, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    try:
        return client.request(method, path, body)
    except OpsError as error:
        _stop_with([str(error)], EXIT_BAD)


def _preflight(client: OpsClient, backend: str | None, tier: str | None, seconds: float) -> dict[str, Any]:
    try:
        return client.preflight(backend, tier, seconds)
    except OpsError as error:
        _stop_with([str(error)], EXIT_BAD)


def _change(client: OpsClient, method: str, path: str, body: dict[str, Any], as_json: bool) -> None:
    answer = _request(client, method, path, body)
    print(json.dumps(answer)) if as_json else show_result(answer, Console())


def _stop_with(lines: tuple[str, ...] | list[str], status: int = EXIT_SETTINGS) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise typer.Exit(status)
