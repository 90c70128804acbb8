"""`gateway serve --replicas N`: several processes on one port."""

from typing import NoReturn

import typer

from gateway.cli.exit_status import EXIT_BAD, stop_with
from gateway.config import Settings


def serve_replicas(settings: Settings, replicas: int) -> NoReturn:
    """Serve with several replicas, and exit.

    Raises:
        ConfigError: The file of keys cannot be used.
        CannotListen: An address is in use or invalid.
    """
    from gateway import supervise

    try:
        status = supervise.run(settings, replicas)
    except supervise.CannotStart as error:
        stop_with([str(error)], EXIT_BAD)
    raise typer.Exit(status)
