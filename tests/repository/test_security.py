"""The threat model names tests that exist, and the supply chain is pinned as it says."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
ROWS = [line for line in PAGE.splitlines() if re.match(r"\| S\d+ \|", line)]
NAMED_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LOCKED = sorted(path.name for path in (ROOT / "requirements").glob("*.txt"))
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def functions_of(file: Path) -> set[str]:
    """Names of the test functions that pytest collects from this file."""
    body = ast.parse(file.read_text()).body
    return {
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    }


def test_threat_model_has_every_threat_once_with_its_test_or_the_reason_for_none() -> None:
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in ROWS]
    assert [cell[0] for cell in cells] == [f"S{number}" for number in range(1, 25)]
    for cell in cells:
        assert len(cell) == 4, cell
        assert NAMED_TEST.search(cell[3]) or cell[3].startswith("No test: "), cell


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = set(NAMED_TEST.findall(PAGE))
    assert len(named) > 60
    assert PAGE.count("::test_") == len(NAMED_TEST.findall(PAGE)), "each name is of the form `tests/file.py::test_name`"
    missing = [
        f"{file}::{name}"
        for file, name in sorted(named)
        if not (ROOT / file).is_file() or name not in functions_of(ROOT / file)
    ]
    assert missing == []


def test_security_policy_links_to_the_threat_model() -> None:
    assert "](docs/security.md" in (ROOT / "SECURITY.md").read_text()


# Supply chain


def requirements(name: str) -> list[str]:
    """Entries of a locked file: each a package with the options behind it."""
    lines = (ROOT / "requirements" / name).read_text().replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


@pytest.mark.parametrize("name", LOCKED)
def test_every_locked_package_has_one_version_and_its_hashes(name: str) -> None:
    entries = requirements(name)
    assert entries
    for entry in entries:
        text, *hashes = entry.split(" --hash=")
        requirement = Requirement(text.strip())
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], entry
        assert requirement.url is None
        assert hashes, entry
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", each.strip()) for each in hashes), entry


def test_everything_that_is_installed_from_a_locked_file_is_checked_by_hash() -> None:
    installs = 0
    for name in ("Makefile", "deploy/Dockerfile"):
        for line in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
            if re.search(r"(pip install|UV_INSTALL\)).* -r ", line):
                installs += 1
                assert "--require-hashes" in line or "$(UV_INSTALL)" in line, line
    assert installs >= 5
    assert re.search(r"^UV_INSTALL :=.* --require-hashes$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def steps(file: Path) -> list[dict[str, Any]]:
    return [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_workflow_has_read_access_only_and_uses_pinned_actions_of_github(file: Path) -> None:
    assert yaml.safe_load(file.read_text())["permissions"] == {"contents": "read"}
    for step in steps(file):
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@(v\d+|[0-9a-f]{40})", step["uses"])
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False


def test_sbom_and_audit_are_of_what_the_image_installs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (sbom,) = re.findall(r"^\t.*cyclonedx-py .*$", makefile, re.MULTILINE)
    (audit,) = re.findall(r"^\t.*pip-audit .*$", makefile, re.MULTILINE)
    assert sbom.endswith(" -o sbom.json requirements/image.txt")
    assert audit.endswith(" -r requirements/image.txt")
    assert "--strict" in audit, "without it, a package that could not be looked up passes"
    assert "COPY requirements/image.txt" in (ROOT / "deploy" / "Dockerfile").read_text()
    commands = [step["run"] for step in steps(ROOT / ".github/workflows/supply-chain.yml") if "run" in step]
    assert commands == ["make PYTHON=python sbom", "make PYTHON=python audit"]
