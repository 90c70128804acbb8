"""The file of keys on disk: edits are locked, whole, and keep comments."""

import os
import stat
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from gateway.keys.document import KeysError
from gateway.keys.file import KeysFile, read_policies


@pytest.fixture
def file(tmp_path: Path) -> KeysFile:
    return KeysFile(tmp_path / "keys.yaml")


def names(file: KeysFile) -> list[str]:
    return [policy.name for policy in read_policies(file.path)]


def test_new_key_is_random_and_only_its_digest_is_stored(file: KeysFile) -> None:
    one, other = file.add({"name": "one"}), file.add({"name": "other", "tokens_per_day": 5})
    assert one.startswith("sk-")
    assert len(one) == len("sk-") + 43  # 32 bytes in base64url
    assert one != other
    text = file.path.read_text()
    assert one not in text
    assert sha256(one.encode()).hexdigest() in text
    assert read_policies(file.path)[1].limits.tokens_per_day == 5


def test_file_is_readable_for_its_owner_alone_whatever_the_umask(file: KeysFile) -> None:
    before = os.umask(0)
    try:
        file.add({"name": "one"})
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    file.path.chmod(0o644)
    file.add({"name": "two"})
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert sorted(path.name for path in file.path.parent.iterdir()) == [".keys.yaml.lock", "keys.yaml"]


def test_revoked_key_is_gone_and_the_last_one_leaves_an_empty_list(file: KeysFile) -> None:
    for name in ("a", "b", "c"):
        file.add({"name": name})
    file.remove("b")
    assert names(file) == ["a", "c"]
    file.remove("c")
    file.remove("a")
    assert names(file) == []
    file.add({"name": "d"})
    assert names(file) == ["d"]


def test_rotated_key_has_the_same_fields_and_another_digest(file: KeysFile) -> None:
    file.add({"name": "a", "concurrency": 3})
    (before,) = read_policies(file.path)
    key = file.replace_key("a")
    (after,) = read_policies(file.path)
    assert after.digest == sha256(key.encode()).digest() != before.digest
    assert (after.name, after.limits) == (before.name, before.limits)


def test_unknown_or_taken_names_change_nothing(file: KeysFile) -> None:
    with pytest.raises(KeysError, match="No such file"):
        file.remove("a")
    file.add({"name": "a"})
    before = file.path.read_text()
    for action in (lambda: file.remove("b"), lambda: file.replace_key("b"), lambda: file.add({"name": "a"})):
        with pytest.raises(KeysError):
            action()
    with pytest.raises(KeysError, match="concurrency"):
        file.add({"name": "b", "concurrency": 0})
    assert file.path.read_text() == before


def test_broken_file_is_never_overwritten(file: KeysFile) -> None:
    file.path.write_text("keys: [{name: a, sha256: short}]\n")
    with pytest.raises(KeysError):
        file.add({"name": "b"})
    assert file.path.read_text() == "keys: [{name: a, sha256: short}]\n"


def test_comments_and_other_entries_stay_as_they_are(file: KeysFile) -> None:
    digest = sha256(b"a").hexdigest()
    text = (
        "# Ask Ada before you change this.\nkeys:\n"
        f"  - name: a   # the web site\n    sha256: '{digest}'\n    requests_per_minute:   10\n"
        "  # for the night\n"
    )
    file.path.write_text(text)
    file.add({"name": "b", "tiers": ["standard"], "per_person": {"tokens_per_day": 5}, "trusted": True})
    assert file.path.read_text().startswith(text)
    file.replace_key("a")
    assert "requests_per_minute:   10" in file.path.read_text()
    file.remove("b")
    kept = file.path.read_text()
    assert kept.startswith("# Ask Ada before you change this.\nkeys:\n  - name: a   # the web site\n")
    assert names(file) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "keys: [{name: a, sha256: '%s'}]\n",
        "keys:\n- {name: a, sha256: '%s'}",
        "---\nkeys:\n    -   name: a\n        sha256: '%s'\n",
        '{"keys": [{"name": "a", "sha256": "%s"}]}',
    ],
    ids=["flow", "no indent", "wide", "JSON"],
)
def test_file_in_any_style_can_be_edited(file: KeysFile, text: str) -> None:
    file.path.write_text(text % sha256(b"a").hexdigest())
    file.add({"name": "b"})
    assert names(file) == ["a", "b"]
    file.remove("a")
    assert names(file) == ["b"]


def test_link_to_a_file_stays_a_link(file: KeysFile, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere" / "keys.yaml"
    real.parent.mkdir()
    real.write_text("keys: []\n")
    file.path.symlink_to(real)
    file.add({"name": "a"})
    assert file.path.is_symlink()
    assert names(KeysFile(real)) == ["a"]


def test_edits_at_the_same_time_lose_nothing(file: KeysFile) -> None:
    """The lock is between processes; threads with descriptors of their own are the same to it."""
    threads = [threading.Thread(target=lambda n=n: file.add({"name": f"k{n}"})) for n in range(12)]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names(file)) == sorted(f"k{n}" for n in range(12))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00", b"keys: " + b"x" * 10], ids=str)
def test_unusable_file_is_an_error_that_says_why(file: KeysFile, content: bytes | None) -> None:
    if content is not None:
        file.path.write_bytes(content)
    with pytest.raises(KeysError) as caught:
        read_policies(file.path)
    assert len(caught.value.lines) == 1


def test_entry_is_written_with_a_line_for_each_field(file: KeysFile) -> None:
    file.add({"name": "a", "tiers": ["x", "y"], "expires": yaml.safe_load("2027-01-01"), "priority": "batch"})
    lines = file.path.read_text().splitlines()
    assert lines[1:3] == ["keys:", "  - name: a"]
    assert lines[4:] == ["    tiers: [x, y]", "    priority: batch", "    expires: 2027-01-01"]
