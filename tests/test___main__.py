"""Entry point of the command: signals that arrive before the gateway is imported."""

import tomllib
from pathlib import Path

import pytest

from tests.cli.harness import ROOT, process

pytestmark = pytest.mark.usefixtures("empty_environment")

SLOW_IMPORT = """
import os, signal
os.kill(os.getpid(), signal.{name})
os._exit(7)
"""
"""Content of a module that stands in for the first import that takes long."""


@pytest.mark.parametrize(("name", "status"), [("SIGHUP", 7), ("SIGTERM", 0)])
def test_signal_during_the_imports_does_not_kill_the_gateway(tmp_path: Path, name: str, status: int) -> None:
    """A supervisor may reload or stop the gateway right after its start.

    In a container SIGTERM would be lost.
    """
    (tmp_path / "typer.py").write_text(SLOW_IMPORT.format(name=name))
    with process("serve", PYTHONPATH=f"{tmp_path}:{ROOT}") as started:
        assert started.wait(20) == status


def test_an_interruption_during_the_imports_has_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(SLOW_IMPORT.format(name="SIGINT"))
    with process("bench", "load", PYTHONPATH=f"{tmp_path}:{ROOT}") as started:
        _, err = started.communicate(timeout=20)
        assert (started.returncode, err) == (130, "")


def test_installed_command_runs_the_module() -> None:
    """So both ways to start the gateway handle the signals first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"gateway": "gateway.__main__:main"}
