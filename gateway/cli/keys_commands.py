"""The commands `gateway keys new`, `list`, `revoke` and `rotate`."""

import json
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console

from gateway import config
from gateway.cli.common_options import AsJson, ConfigFile
from gateway.cli.exit_status import EXIT_BAD, stop_with

Result = TypeVar("Result")
KeyName = Annotated[str, typer.Argument(metavar="NAME", help="Name of the key.")]
AtLeastOne = Annotated[int | None, typer.Option(min=1)]

keys_app = typer.Typer(no_args_is_help=True, help="Create, list, revoke and rotate client keys in GATEWAY_KEYS_FILE.")


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
        stop_with(error.lines)
    except OSError as error:
        stop_with([f"the file of keys cannot be written: {error.strerror or error}"], EXIT_BAD)
