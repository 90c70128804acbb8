"""Command line of `gateway`: one function for each command.

Exit status: 0 for success, 1 if the command ran and the result is bad, 2 for an invalid command
line or invalid settings. A command imports inside its function what only it needs, so that
a rollback does not wait for a web framework to be imported.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import typer
from rich.console import Console

from gateway import __version__, config
from gateway.cli.advise import advise
from gateway.cli.bench import CONTEXT, bench
from gateway.cli.compare import compare
from gateway.cli.ops_client import PREFLIGHT_SECONDS, OpsClient, OpsError
from gateway.cli.tables import finding_lines, show_preflight, show_result, show_status

Result = TypeVar("Result")

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
keys_app = typer.Typer(no_args_is_help=True, help="Create, list, revoke and rotate client keys in GATEWAY_KEYS_FILE.")
app.add_typer(keys_app, name="keys")
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")]
AtLeastOne = Annotated[int | None, typer.Option(min=1)]


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
    except config.ConfigError as error:
        _stop_with(error.lines)
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


@app.command("usage")
def usage_command(
    by: Annotated[str, typer.Option(help="Fields of the rows: key, person, tier, backend, day.")] = "key",
    since: Annotated[
        str | None, typer.Option(metavar="DATE", help="First day, in UTC. Default: all that is kept.")
    ] = None,
    until: Annotated[str | None, typer.Option(metavar="DATE", help="Last day. Default: today.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Show who used how much: requests, tokens, images and seconds of the backends."""
    from gateway.cli import usage

    answer = _request(_ops_client(config_file), "GET", usage.path_of(by, since, until), field="rows")
    if as_json:
        print(json.dumps(answer))
    elif as_csv:
        usage.write_csv(answer["rows"], sys.stdout)
    else:
        usage.show(answer["rows"], Console(width=None if sys.stdout.isatty() else 200))


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


@keys_app.command("new")
def keys_new(
    name: KeyName,
    tiers: Annotated[str | None, typer.Option(help="Tiers that it may use, separated by commas. Default: all.")] = None,
    requests_per_minute: AtLeastOne = None,
    tokens_per_minute: AtLeastOne = None,
    tokens_per_day: AtLeastOne = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests that run or wait at once.")] = None,
    priority: Annotated[
        Literal["interactive", "batch"] | None, typer.Option(help="The best that it may ask for. Default: interactive.")
    ] = None,
    expires: Annotated[
        str | None, typer.Option(metavar="DATE", help="Date, such as 2027-01-01, from which it is refused.")
    ] = None,
    downgrade: Annotated[
        str | None, typer.Option(metavar="TIER", help="Tier that serves when the tokens of the day are used up.")
    ] = None,
    trusted: Annotated[
        bool, typer.Option("--trusted", help="Believe the header user_header, for the limits of persons.")
    ] = False,
    person_requests_per_minute: AtLeastOne = None,
    person_tokens_per_day: AtLeastOne = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the name and the key as JSON.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Create a key and print it, once: the file has only its SHA-256."""
    from gateway.cli import keys

    fields: dict[str, Any] = {
        "tiers": [tier.strip() for tier in (tiers or "").split(",") if tier.strip()],
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "tokens_per_day": tokens_per_day,
        "concurrency": concurrency,
        "priority": priority,
        "expires": expires,
        "on_limit": None if downgrade is None else {"downgrade": downgrade},
        "trusted": trusted,
        "per_person": {
            limit: value
            for limit, value in (
                ("requests_per_minute", person_requests_per_minute),
                ("tokens_per_day", person_tokens_per_day),
            )
            if value is not None
        },
    }
    _print_key(name, _edit(lambda: keys.add(keys.keys_file(config_file), name, fields)), as_json)


@keys_app.command("list")
def keys_list(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Show names and limits of the keys in the file. `/ops/keys` shows what is used of them."""
    from gateway.cli import keys

    rows = _edit(lambda: keys.listed(keys.keys_file(config_file)))
    print(json.dumps({"keys": rows})) if as_json else keys.show(
        rows, Console(width=None if sys.stdout.isatty() else 160)
    )


@keys_app.command("revoke")
def keys_revoke(name: KeyName, config_file: ConfigFile = None) -> None:
    """Remove a key. A running gateway refuses it within a few seconds."""
    from gateway.cli import keys

    _edit(lambda: keys.keys_file(config_file).remove(name))
    print(f"revoked {name}")


@keys_app.command("rotate")
def keys_rotate(
    name: KeyName,
    as_json: Annotated[bool, typer.Option("--json", help="Print the name and the key as JSON.")] = False,
    config_file: ConfigFile = None,
) -> None:
    """Replace a key by a new one of the same name, and print it. The old one is no longer valid."""
    from gateway.cli import keys

    _print_key(name, _edit(lambda: keys.keys_file(config_file).replace_key(name)), as_json)


def _print_key(name: str, key: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"name": name, "key": key}))
        return
    print(key)
    print(f"This is the key of {name}. It is not stored and cannot be shown again.", file=sys.stderr)


def _edit(action: Callable[[], Result]) -> Result:
    """Carry out an action on the file of keys; a mistake ends the command."""
    from gateway.keys.document import KeysError

    try:
        return action()
    except (config.ConfigError, KeysError) as error:
        _stop_with(error.lines)
    except OSError as error:
        _stop_with([f"the file of keys cannot be written: {error.strerror or error}"], EXIT_BAD)


@config_app.command("check")
def config_check(config_file: ConfigFile = None) -> None:
    """Explain the settings. The exit status is 2 if they, or the file of keys, are invalid."""
    from gateway.api.named_keys import open_accounts

    settings = _load(config_file)
    try:
        accounts = open_accounts(settings)
    except config.ConfigError as error:
        _stop_with(error.lines)
    print("\n".join(config.check(settings)))
    if accounts is not None:
        print(f"keys with names: {len(accounts)}, in {settings.keys_file}")


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


def _request(
    client: OpsClient, method: str, path: str, body: dict[str, Any] | None = None, field: str = "tiers"
) -> dict[str, Any]:
    try:
        return client.request(method, path, body, field=field)
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
