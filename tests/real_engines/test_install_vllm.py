"""Decisions of the vLLM installer; `make test-vllm` runs the whole of it."""

import json
import zipfile
from pathlib import Path

import pytest

from tests.real_engines import install_vllm


def test_finished_install_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / install_vllm.MARKER).write_text(json.dumps(install_vllm.VERSIONS))
    monkeypatch.setattr(install_vllm, "install", lambda folder: pytest.fail("must not install again"))
    assert install_vllm.main([str(tmp_path)]) == 0
    assert "already installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    "marker", [None, "", "[]", '{"torch": "1.0"}'], ids=["missing", "empty", "list", "other version"]
)
def test_unfinished_or_outdated_install_is_repeated(tmp_path: Path, marker: str | None) -> None:
    if marker is not None:
        (tmp_path / install_vllm.MARKER).write_text(marker)
    assert not install_vllm.is_installed(tmp_path)


def test_requirements_exclude_torch_and_extras(tmp_path: Path) -> None:
    wheel = tmp_path / "engine-1.0-py3-none-any.whl"
    listed = [
        "torch==2.0+cpu",
        "torchvision",
        'torchaudio; sys_platform == "linux"',
        "torch-helper",
        "numpy",
        'bench; extra == "bench"',
    ]
    metadata = (
        "Metadata-Version: 2.1\nName: engine\n"
        + "".join(f"Requires-Dist: {line}\n" for line in listed)
        + "\nRequires-Dist: prose\n"
    )
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("engine-1.0.dist-info/METADATA", metadata)
    assert install_vllm.requirements_without_torch(wheel) == ["torch-helper", "numpy"]
