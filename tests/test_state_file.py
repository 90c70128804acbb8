"""State file: sections survive a restart; a damaged or foreign file is handled safely."""

import asyncio
import logging
import os
import time
from pathlib import Path

import pytest

from gateway.keys.accounts import MAX_SAVED_PERSONS
from gateway.keys.document import MAX_KEYS
from gateway.state_file import MARK, StateFile


async def test_sections_survive_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = StateFile(path)
    state.put("one", {"a": 1})
    state.put("two", [1, 2])
    assert await state.persisted()
    state.put("one", {"a": 2})
    await state.close()
    again = StateFile(path)
    assert (again.get("one"), again.get("two"), again.get("three")) == ({"a": 2}, [1, 2], None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]
    assert repr(again) == f"<StateFile {path} ['one', 'two'], 0 to write>"


async def test_tokens_of_as_many_keys_as_a_file_may_have_survive_a_restart(tmp_path: Path) -> None:
    """The file was too large to be read, and the roll-out in it was lost as well."""
    tokens = {f"{number:0>128}": 10**9 + number for number in range(MAX_KEYS)}
    persons = {f"{number:0>128}": {"\xe9" * 122 + f"{number:06}": 10**9} for number in range(MAX_SAVED_PERSONS)}
    state = StateFile(tmp_path / "state.json")
    state.put("keys", {"tokens": tokens, "persons": persons})
    state.put("rollout", {"active": "vllm"})
    await state.close()
    again = StateFile(tmp_path / "state.json")
    assert again.get("rollout") == {"active": "vllm"}
    assert again.get("keys") == {"tokens": tokens, "persons": persons}


async def test_section_that_this_version_does_not_know_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(f'{{"{MARK}":1,"later": {{"x": 1}}}}')
    state = StateFile(path)
    state.put("one", 1)
    await state.close()
    assert StateFile(path).get("later") == {"x": 1}


async def test_unchanged_value_is_not_written_again(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    state = StateFile(path)
    state.put("one", 1)
    await state.close()
    path.unlink()
    state.put("one", 1)
    await state.close()
    assert not path.exists()


@pytest.mark.parametrize("content", [f'{{"{MARK}":1,"one": {{"a"', ""], ids=["torn", "empty"])
async def test_damaged_file_is_ignored_and_replaced(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    state = StateFile(path)
    assert state.get("one") is None
    assert ("is damaged" in caplog.text) == bool(content)
    state.put("one", 1)
    assert await state.persisted()
    assert StateFile(path).get("one") == 1


@pytest.mark.parametrize("content", [b'{"theirs": 1}', b"[]", b"\xff\x00", b'{"%b": 2}' % MARK.encode(), b"not JSON"])
async def test_file_that_the_gateway_did_not_write_is_left_unchanged(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    state = StateFile(path)
    assert "it is left unchanged" in caplog.text
    state.put("one", 1)
    assert not await state.persisted()
    assert path.read_bytes() == content
    assert state.get("one") == 1


async def test_old_temporary_files_of_killed_processes_are_removed_and_young_ones_are_not(tmp_path: Path) -> None:
    for name, age in (
        (".state.json.7", 100),
        (".state.json.8", 1),
        (".state.json.backup", 100),
        (".other.json.7", 100),
    ):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    StateFile(tmp_path / "state.json")
    assert {path.name for path in tmp_path.iterdir()} == {".state.json.8", ".state.json.backup", ".other.json.7"}


async def test_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    """The name once was `.NAME.PID`, which others who may write to the folder can predict."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".state.json.{os.getpid()}").symlink_to(victim)
    state = StateFile(tmp_path / "state.json")
    state.put("one", 1)
    assert await state.persisted()
    assert victim.read_text() == "precious"
    assert not (tmp_path / "state.json").is_symlink()


async def test_dangling_link_does_not_keep_old_temporary_files_from_being_removed(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f".state.json.{number}").symlink_to("nowhere")
    for number in range(5, 10):
        (tmp_path / f".state.json.{number}").touch()
        os.utime(tmp_path / f".state.json.{number}", (time.time() - 100,) * 2)
    StateFile(tmp_path / "state.json")
    assert len(list(tmp_path.iterdir())) == 5


async def test_file_that_cannot_be_written_is_reported_and_written_once_it_can_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateFile(tmp_path / "nowhere" / "state.json")
    state.put("one", 1)
    assert not await state.persisted()
    assert "cannot be written" in caplog.text
    (tmp_path / "nowhere").mkdir()
    state.put("one", 2)
    assert await state.persisted()


async def test_file_that_cannot_be_read_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "state.json").mkdir()
    StateFile(tmp_path / "state.json")
    assert "cannot be read" in caplog.text


@pytest.mark.parametrize("path", [Path("/"), Path()], ids=["root", "here"])
async def test_folder_in_place_of_the_file_is_reported_and_does_no_harm(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = StateFile(path)
    assert "cannot be read (Is a directory)" in caplog.text
    state.put("one", 1)
    assert not await state.persisted()
    await state.close()
    assert state.get("one") == 1


async def test_missing_folder_is_reported_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    StateFile(tmp_path / "state.json")
    assert not caplog.text
    StateFile(tmp_path / "missing" / "state.json")
    assert "its folder is missing or not writable for this user" in caplog.text


async def test_without_a_file_values_are_kept_in_memory_only() -> None:
    state = StateFile(None)
    state.put("one", 1)
    assert state.get("one") == 1
    assert not await state.persisted()


async def test_file_and_folder_reach_the_disk_before_the_change_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is complete on the disk before it takes the name, and the name before the answer."""
    steps: list[tuple[str, str, bytes]] = []
    path, fsync, replace = tmp_path / "state.json", os.fsync, Path.replace

    def recorded_fsync(descriptor: int) -> None:
        target = Path(f"/dev/fd/{descriptor}").resolve()
        steps.append(("fsync", target.name, target.read_bytes() if target.is_file() else b""))
        fsync(descriptor)

    def recorded_replace(source: Path, target: Path) -> Path:
        steps.append(("rename", target.name, source.read_bytes()))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(Path, "replace", recorded_replace)
    state = StateFile(path)
    state.put("one", 1)
    assert await state.persisted()
    content = path.read_bytes()
    assert b'"one":1' in content
    (first, temporary, written), *rest = steps
    assert (first, temporary.startswith(".state.json."), written) == ("fsync", True, content)
    assert rest == [("rename", "state.json", content), ("fsync", tmp_path.name, b"")]


async def test_change_is_not_acknowledged_if_the_disk_reports_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync
    for broken in (1, 2):  # the file, then the folder
        calls = 0

        def failing(descriptor: int) -> None:
            nonlocal calls
            calls += 1
            if calls == broken:  # noqa: B023  # called before it changes
                raise OSError(5, "Input/output error")
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", failing)
        state = StateFile(tmp_path / f"{broken}.json")
        state.put("one", 1)
        assert not await state.persisted()
        assert calls == broken
        assert not list(tmp_path.glob(".*")), "no temporary file is left behind"


async def test_change_made_while_a_write_is_in_progress_is_written_too(tmp_path: Path) -> None:
    state = StateFile(tmp_path / "state.json")
    for number in range(5):
        state.put("number", number)
        await asyncio.sleep(0)
    assert await state.persisted()
    assert StateFile(tmp_path / "state.json").get("number") == 4
