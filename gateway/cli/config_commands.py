"""The commands `gateway config check`, `show` and `schema`."""

import json
from pathlib import Path

import typer

from gateway import config
from gateway.cli.common_options import ConfigFile
from gateway.cli.exit_status import stop_with

config_app = typer.Typer(no_args_is_help=True, help="Check and print the settings.")


@config_app.command("check")
def config_check(config_file: ConfigFile = None) -> None:
    """Explain the settings. The exit status is 2 if they, or the file of keys, are invalid."""
    from gateway.api.named_keys import open_accounts

    settings = load_settings(config_file)
    try:
        accounts = open_accounts(settings)
    except config.ConfigError as error:
        stop_with(error.lines)
    print("\n".join(config.check(settings)))
    if accounts is not None:
        print(f"keys with names: {len(accounts)}, in {settings.keys_file}")


@config_app.command("show")
def config_show(config_file: ConfigFile = None) -> None:
    """Print the settings in effect as YAML, with secrets hidden."""
    print(config.show(load_settings(config_file)), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the YAML file, for editors."""
    print(json.dumps(config.schema(), indent=2))


def load_settings(path: Path | None) -> config.Settings:
    """Load the settings. If they are invalid, end the command with a line for each mistake."""
    try:
        return config.load(path)
    except config.ConfigError as error:
        stop_with(error.lines)
