"""Command line of `gateway`: which commands there are. The body of each is in a module of its own.

Exit status: 0 for success, 1 if the command ran and the result is bad, 2 for an invalid command
line or invalid settings. A command imports inside its function what only it needs, so that
a rollback does not wait for a web framework to be imported.
"""

from typing import Annotated

import typer

from gateway import __version__, config
from gateway.cli import ops_commands
from gateway.cli.advise import advise
from gateway.cli.bench import CONTEXT, BenchCommand, bench
from gateway.cli.common_options import ConfigFile
from gateway.cli.compare import compare
from gateway.cli.config_commands import config_app, load_settings
from gateway.cli.exit_status import stop_with
from gateway.cli.keys_commands import keys_app
from gateway.cli.serve_replicas import serve_replicas
from gateway.cli.simulate_command import simulate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="OpenAI's API in front of Ollama and vLLM.",
)


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
def serve(
    replicas: Annotated[
        int,
        typer.Option(
            min=1,
            max=64,
            help="Processes that serve on the same port and share limits, roll-out and metrics. "
            "One process uses one core.",
        ),
    ] = 1,
    config_file: ConfigFile = None,
) -> None:
    """Run the gateway on GATEWAY_HOST:GATEWAY_PORT until SIGTERM or SIGINT."""
    from gateway.serve import CannotListen, run

    settings = load_settings(config_file)
    try:
        if replicas > 1:
            serve_replicas(settings, replicas)
        run(settings, reread=lambda: config.load(settings.file))
    except config.ConfigError as error:
        stop_with(error.lines)
    except CannotListen as error:
        stop_with([str(error)])


@app.command()
def demo() -> None:
    """Run the gateway in front of Ollama and vLLM on this machine, or stand-ins for them."""
    from gateway.cli import demo as demonstration
    from gateway.serve import CannotListen

    try:
        demonstration.run()
    except config.ConfigError as error:
        stop_with(error.lines)
    except CannotListen as error:
        stop_with([str(error)])


app.command()(ops_commands.status)
app.command()(ops_commands.top)
app.command()(ops_commands.switch)
app.command()(ops_commands.verify)
app.command()(ops_commands.rollback)
app.command()(ops_commands.undo)
app.command()(ops_commands.usage)
app.command(cls=BenchCommand, context_settings=CONTEXT)(bench)
app.command()(advise)
app.command()(compare)
app.command()(simulate)
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
