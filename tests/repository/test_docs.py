"""The documentation lists every variable, metric and error code, and every module has its tests."""

import ast
import re
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from gateway import errors
from gateway.config import VARIABLES
from gateway.telemetry.metrics import Metrics

ROOT = Path(__file__).parents[2]
MODULES = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "gateway").rglob("*.py") if path.name != "__init__.py"
)
_COVERS = re.compile(r"^Covers: (\S+)$", re.MULTILINE)


def documents() -> str:
    """The pages for users: the README and docs/, without the decision records."""
    pages = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "adr"]
    return "\n".join(path.read_text() for path in [ROOT / "README.md", *pages])


def metric_names() -> list[str]:
    registry = CollectorRegistry()
    Metrics(registry, "0")
    ending = {"counter": "_total", "info": "_info"}
    return [family.name + ending.get(family.type, "") for family in registry.collect()]


def error_codes() -> list[str]:
    def below(kind: type[errors.GatewayError]) -> set[type[errors.GatewayError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    return sorted({kind.code for kind in below(errors.GatewayError) if kind.code})


@pytest.mark.parametrize("variable", VARIABLES)
def test_variable_is_in_the_example(variable: str) -> None:
    assert re.search(rf"^# {variable}=", (ROOT / ".env.example").read_text(), re.MULTILINE)


def covered_elsewhere() -> set[str]:
    """The modules, or folders with a slash at the end, that test files name in `Covers:` lines of their docstrings.

    A test file may cover modules of the package that its folder mirrors; one directly below `tests/`, or in a folder
    that mirrors no package, may cover any.
    """
    packages = {path.name for path in (ROOT / "gateway").iterdir() if path.is_dir()}
    found = set()
    for file in (ROOT / "tests").rglob("test_*.py"):
        for name in _COVERS.findall(ast.get_docstring(ast.parse(file.read_text())) or ""):
            folder = file.relative_to(ROOT / "tests").parts[0]
            is_top_level = name.count("/") == 1
            assert is_top_level or folder not in packages or name.startswith(f"gateway/{folder}/"), (file, name)
            assert (ROOT / name).exists(), (file, name)
            found.add(name)
    return found


def test_every_module_has_its_tests() -> None:
    """`gateway/a/b.py` is tested by `tests/a/test_b.py`, or by the file that says so in its docstring."""
    covered = covered_elsewhere()

    def has_tests(module: str) -> bool:
        path = Path(module)
        own = ROOT / "tests" / path.relative_to("gateway").with_name(f"test_{path.name}")
        return own.exists() or module in covered or any(f"{parent}/" in covered for parent in path.parents)

    assert [module for module in MODULES if not has_tests(module)] == []


def test_every_metric_is_documented() -> None:
    written = documents()
    assert [name for name in metric_names() if name not in written] == []


def test_every_error_code_is_documented() -> None:
    written = documents()
    assert [code for code in error_codes() if f"`{code}`" not in written] == []


def test_every_variable_is_documented() -> None:
    written = documents()
    assert [variable for variable in VARIABLES if variable not in written] == []
