"""Atomic replacement of files, also in a folder that others may write to."""

import os
import stat
from pathlib import Path

import pytest

from gateway import atomic_file
from gateway.atomic_file import replace_file


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def test_file_is_replaced_whole_with_the_given_mode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old, and longer")
    path.chmod(0o644)
    replace_file(path, b"new", 0o600)
    assert (path.read_bytes(), mode(path)) == (b"new", 0o600)
    assert list(tmp_path.iterdir()) == [path]


def test_symbolic_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    victim, path = tmp_path / "victim", tmp_path / "file"
    victim.write_text("precious")
    path.symlink_to(victim)
    replace_file(path, b"new")
    assert (victim.read_text(), path.is_symlink(), path.read_text()) == ("precious", False, "new")


@pytest.mark.parametrize("kind", ["symbolic link", "dangling symbolic link", "file"])
def test_existing_temporary_name_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(atomic_file.secrets, "randbelow", lambda _: 7)
    victim, path, temporary = tmp_path / "victim", tmp_path / "file", tmp_path / ".file.7"
    if kind != "dangling symbolic link":
        victim.write_text("precious")
    temporary.write_text("of somebody else") if kind == "file" else temporary.symlink_to(victim)
    with pytest.raises(FileExistsError):
        replace_file(path, b"new")
    assert not path.exists()
    assert os.path.lexists(temporary)
    assert victim.read_text() == "precious" if kind != "dangling symbolic link" else not victim.exists()


def test_temporary_name_cannot_be_predicted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        names.add(self.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    for _ in range(3):
        replace_file(tmp_path / "file", b"new")
    assert len(names) == 3


def test_failure_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError, match="directory"):
        replace_file(path, b"new")
    assert list(tmp_path.iterdir()) == [path]
