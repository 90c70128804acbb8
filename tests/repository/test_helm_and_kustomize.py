"""Covers: deploy/. Helm and kustomize themselves accept the chart and the manifests, and render what the tests read.

The other tests of `deploy/` use the renderers of `manifests.py`, which need no program. These run where
`helm` (3.14 or newer) and `kustomize` (5) are installed, as on GitHub's machines.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.repository.cluster import VARIANTS, built, chart_values
from tests.repository.manifests import CHART, KUSTOMIZE, NAMESPACE, Resource, parse

KUBERNETES = "1.33.0"

each_variant = pytest.mark.parametrize(
    ("overlay", "scaler"), VARIANTS, ids=[f"{overlay}-{scaler}" for overlay, scaler in VARIANTS]
)


def tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def output(*command: str | Path) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def by_name(resources: list[Resource]) -> dict[tuple[str, str], Resource]:
    found = {(resource["kind"], resource["metadata"]["name"]): resource for resource in resources}
    assert len(found) == len(resources)
    return found


@pytest.fixture
def values(tmp_path: Path, overlay: str, scaler: str | None) -> list[str | Path]:
    options: list[str | Path] = []
    for number, given in enumerate(chart_values(overlay, scaler)):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(given))
        options += ["--values", file]
    return options


@each_variant
def test_chart_passes_the_strict_lint_of_helm(values: list[str | Path]) -> None:
    output(tool("helm"), "lint", "--strict", "--kube-version", KUBERNETES, *values, CHART)


@each_variant
def test_helm_renders_what_the_tests_of_the_chart_read(
    values: list[str | Path], overlay: str, scaler: str | None
) -> None:
    options = ["--namespace", NAMESPACE, "--kube-version", KUBERNETES]
    rendered = output(tool("helm"), "template", "gateway", *options, *values, CHART)
    assert by_name(parse(rendered)) == by_name(built("helm", overlay, scaler))


@each_variant
def test_kustomize_renders_what_the_tests_of_the_manifests_read(
    tmp_path: Path, overlay: str, scaler: str | None
) -> None:
    folder = shutil.copytree(KUSTOMIZE, tmp_path / "kubernetes") / "operator"
    folder.mkdir()
    components = [f"../components/{name}" for name in (["monitoring", scaler] if scaler else [])]
    described = {"namespace": NAMESPACE, "resources": [f"../overlays/{overlay}"], "components": components}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(described))
    rendered = output(tool("kustomize"), "build", folder)
    assert by_name(parse(rendered)) == by_name(built("kustomize", overlay, scaler))
