"""Exit status of the commands, and how a command ends with it."""

import sys
from collections.abc import Iterable
from typing import NoReturn

import typer

EXIT_BAD = 1
"""The command ran, and the result is bad."""
EXIT_USAGE = 2
"""The command line or the settings are invalid."""
EXIT_INTERRUPTED = 130


def stop_with(lines: Iterable[str], status: int = EXIT_USAGE) -> NoReturn:
    """Print `lines` on standard error and end the command."""
    for line in lines:
        print(line, file=sys.stderr)
    raise typer.Exit(status)
