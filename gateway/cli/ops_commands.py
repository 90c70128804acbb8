"""Commands that call `/ops` of a running gateway: its status, the roll-out, the usage and the checks."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

from gateway import config
from gateway.cli.common_options import AsJson, ConfigFile, TierName
from gateway.cli.exit_status import EXIT_BAD, stop_with
from gateway.cli.ops_client import PREFLIGHT_SECONDS, OpsClient, OpsError
from gateway.cli.tables import finding_lines, show_preflight, show_result, show_status


def status(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Show which backend serves each tier, its load and latencies, and the last changes."""
    answer = _request(_ops_client(config_file), "GET", "/ops/status")
    print(json.dumps(answer)) if as_json else show_status(answer, Console(width=None if sys.stdout.isatty() else 160))


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
        stop_with([str(error)], EXIT_BAD)


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
            stop_with([*lines, "nothing was changed; use --force to switch anyway"], EXIT_BAD)
        for line in lines:
            print(line, file=sys.stderr)
    body: dict[str, Any] = (
        {"backend": backend} if canary is None else {"canary": {"backend": backend, "percent": canary}}
    )
    _change(client, "PUT", "/ops/rollout", body | ({} if tier is None else {"tier": tier}), as_json)


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
        stop_with([f"{target!r} is not an address; to check a switch to a backend of this name, add --preflight"])
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
        stop_with([str(error)])
    if not passed:
        raise typer.Exit(EXIT_BAD)


def _check_switch(client: OpsClient, backend: str | None, tier: str | None, seconds: float, as_json: bool) -> None:
    answer = _preflight(client, backend, tier, seconds)
    print(json.dumps(answer)) if as_json else show_preflight(
        answer, Console(width=None if sys.stdout.isatty() else 160)
    )
    if answer["breaks"]:
        raise typer.Exit(EXIT_BAD)


def rollback(
    tier: TierName = None,
    to: Annotated[str | None, typer.Option("--to", help="Backend to roll back to. Default: rollback_to.")] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Move every tier that is not pinned back to rollback_to at once, and clear canaries."""
    body = {name: value for name, value in (("tier", tier), ("to", to)) if value is not None}
    _change(_ops_client(config_file), "POST", "/ops/rollback", body, as_json)


def undo(as_json: AsJson = False, config_file: ConfigFile = None) -> None:
    """Restore the state before the last change. A second undo reverts the first."""
    _change(_ops_client(config_file), "POST", "/ops/undo", {}, as_json)


def usage(
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
    from gateway.cli import usage as table

    if lines := table.wrong_words(by, since, until):
        stop_with(lines)
    answer = _request(_ops_client(config_file), "GET", table.path_of(by, since, until), field="rows")
    if not answer.get("complete", True):
        print("without the usage of the other replicas, since Redis does not answer", file=sys.stderr)
    if as_json:
        print(json.dumps(answer))
    elif as_csv:
        table.write_csv(answer["rows"], sys.stdout)
    else:
        table.show(answer["rows"], Console(width=None if sys.stdout.isatty() else 200))


def _ops_client(path: Path | None) -> OpsClient:
    try:
        return OpsClient.of_settings(path)
    except config.ConfigError as error:
        stop_with(
            [*error.lines, "to call a gateway without reading its settings, set GATEWAY_URL and GATEWAY_ADMIN_KEY"]
        )
    except OpsError as error:
        stop_with([str(error)])


def _request(
    client: OpsClient, method: str, path: str, body: dict[str, Any] | None = None, field: str = "tiers"
) -> dict[str, Any]:
    try:
        return client.request(method, path, body, field=field)
    except OpsError as error:
        stop_with([str(error)], EXIT_BAD)


def _preflight(client: OpsClient, backend: str | None, tier: str | None, seconds: float) -> dict[str, Any]:
    try:
        return client.preflight(backend, tier, seconds)
    except OpsError as error:
        stop_with([str(error)], EXIT_BAD)


def _change(client: OpsClient, method: str, path: str, body: dict[str, Any], as_json: bool) -> None:
    answer = _request(client, method, path, body)
    print(json.dumps(answer)) if as_json else show_result(answer, Console())
    if answer.get("gpu") is not None and not as_json:
        from gateway.cli.gpu_progress import follow_switch

        try:
            is_done = follow_switch(client, answer["gpu"])
        except OpsError as error:
            stop_with([str(error)], EXIT_BAD)
        if not is_done:
            raise typer.Exit(EXIT_BAD)
