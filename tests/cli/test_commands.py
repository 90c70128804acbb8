"""Command line of `gateway`: the commands that there are, and invalid words.

Covers: gateway/cli/exit_status.py
Covers: gateway/cli/common_options.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from gateway import __version__
from gateway.cli.commands import app
from tests.cli.harness import ROOT, invoke

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_version_is_printed() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)


def test_operators_commands_do_not_import_the_server() -> None:
    code = (
        "import sys, gateway.cli.commands; "
        "print(*({'fastapi', 'uvicorn', 'PIL', 'gateway.simulate', 'gateway.app'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("serve", "demo", "status", "switch", "verify", "rollback", "undo", "config", "simulate"):
        assert name in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("serve", "--nonsense"),
        ("serve", "--workers", "2"),
        ("config", "nonsense"),
        ("simulate", "--kind", "gpt"),
        ("simulate",),
    ],
)
def test_invalid_arguments_exit_with_2(words: tuple[str, ...]) -> None:
    assert invoke(*words).exit_code == 2


def options(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Yield each option and argument of each command, with the command's words."""
    for name, inner in group.commands.items():
        if hasattr(inner, "commands"):
            yield from options(inner, *path, name)
        else:
            yield from ((" ".join((*path, name)), option) for option in inner.params)


def test_every_option_that_takes_a_key_can_be_given_by_a_variable() -> None:
    """Other users of the machine see the words of a command line."""
    secrets = [
        (words, option)
        for words, option in options(typer.main.get_command(app))
        if re.search(r"(^|_)(key|(?<!first_)token|secret|password)(_|$)", option.name)
    ]
    assert {words for words, _ in secrets} == {"bench", "compare", "verify"}, "only commands that call other servers"
    assert [(words, option.name) for words, option in secrets if not option.envvar] == []
