"""File of the admin token: who can read it, and how long it stays."""

import os
import stat
from pathlib import Path

import pytest

from gateway.admin_token import new_token, read_token, token_path


def test_file_is_beside_the_state_file_or_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert token_path(Path("/var/lib/gateway/state.json"), 8080) == Path("/var/lib/gateway/gateway-admin-token-8080")
    assert token_path(Path("state.json"), 81) == token_path(None, 81) == tmp_path / "gateway-admin-token-81"


def test_token_is_secret_new_at_each_start_and_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "token"
    values = set()
    for _ in range(2):
        with new_token(path) as token:
            assert token.value is not None
            assert len(token.value) >= 43  # 256 bits
            assert read_token(path) == token.value
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert token.value not in repr(token)
            values.add(token.value)
        assert not path.exists()
    assert len(values) == 2


def test_readable_file_and_link_of_somebody_else_are_replaced(tmp_path: Path) -> None:
    """A file that existed before might be open for reading elsewhere, and a link might lead to a public file."""
    victim, path = tmp_path / "victim", tmp_path / "token"
    victim.write_text("public")
    for prepare in (lambda: path.write_text("guessed"), lambda: path.symlink_to(victim)):
        prepare()
        with new_token(path) as token:
            assert (read_token(path), path.is_symlink()) == (token.value, False)
    assert victim.read_text() == "public"


def test_file_of_a_later_process_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with new_token(path):
        path.write_text("of the next gateway on this port")
    assert path.read_text() == "of the next gateway on this port"


def test_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with new_token(tmp_path / "missing" / "token") as token:
        assert (token.value, token.problem) == (None, "No such file or directory")


def test_link_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("token")
    (tmp_path / "token").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        read_token(tmp_path / "token")


@pytest.mark.parametrize("content", [b"", b"\n", b"a\nb", b"\xff", b"a\x00"])
def test_file_without_a_token_has_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    assert read_token(tmp_path / "token") is None


def test_pipe_in_place_of_the_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "token")
    assert read_token(tmp_path / "token") is None
