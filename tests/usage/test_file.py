"""The SQLite file: sums, rotation, and readers beside the writer."""

import os
import sqlite3
import stat
from contextlib import closing
from pathlib import Path

import pytest

from gateway.usage.file import add_rows, days_of, first_day_to_keep, identity_of, open_for_writing, read_rows
from gateway.usage.totals import Group


def rows(*groups: tuple[str, str, str, str, str], count: float = 1) -> dict[Group, list[float]]:
    return {Group(*group): [count, 0, 10, 5, 2, 1, 0.5] for group in groups}


A = ("web", "ada", "standard", "vllm", "2026-11-28")
B = ("web", "bob", "ultra", "ollama", "2026-11-29")
C = ("ops", "none", "standard", "vllm", "2026-11-30")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "usage.db"
    connection = open_for_writing(file)
    add_rows(connection, rows(A, B))
    add_rows(connection, rows(B, C))
    connection.close()
    return file


def test_new_file_is_readable_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        connection = open_for_writing(tmp_path / "usage.db")
        add_rows(connection, rows(A))
    finally:
        os.umask(before)
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()}
    connection.close()
    assert modes == dict.fromkeys(("usage.db", "usage.db-wal", "usage.db-shm"), 0o600)


def test_same_group_is_one_row_with_the_sums(path: Path) -> None:
    (row,) = read_rows(path, ["key", "person", "tier", "backend", "day"], "2026-11-29", "2026-11-29")
    assert row == {
        "key": "web", "person": "bob", "tier": "ultra", "backend": "ollama", "day": "2026-11-29", "requests": 2,
        "refused": 0, "prompt_tokens": 20, "completion_tokens": 10, "cached_tokens": 4, "images": 2, "seconds": 1.0,
    }  # fmt: skip


def test_rows_are_by_the_named_fields_and_sums_of_the_others(path: Path) -> None:
    assert [(row["key"], row["requests"]) for row in read_rows(path, ["key"], None, None)] == [("ops", 1), ("web", 3)]
    by_day = read_rows(path, ["key", "day"], "2026-11-29", None)
    assert [(row["key"], row["day"]) for row in by_day] == [("ops", "2026-11-30"), ("web", "2026-11-29")]
    assert "person" not in by_day[0]
    (total,) = read_rows(path, [], None, "2026-11-28")
    assert (total["requests"], next(iter(total))) == (1, "requests")
    assert read_rows(path, [], "2027-01-01", None) == []
    assert read_rows(path.with_name("none.db"), ["key"], None, None) == []


def test_days_that_are_too_old_are_deleted(path: Path) -> None:
    connection = open_for_writing(path)
    add_rows(connection, {}, "2026-11-29")
    connection.close()
    assert [row["day"] for row in read_rows(path, ["day"], None, None)] == ["2026-11-29", "2026-11-30"]


@pytest.mark.parametrize(
    ("days", "first"), [(1, "2026-11-30"), (400, "2025-10-27"), (10**6, "0001-01-01"), (10**15, "0001-01-01")]
)
def test_any_number_of_days_can_be_kept(path: Path, days: int, first: str) -> None:
    connection = open_for_writing(path)
    assert first_day_to_keep(connection, "2026-12-01", days) == first
    connection.close()


def test_reader_does_not_stop_the_writer(path: Path) -> None:
    connection = open_for_writing(path)
    connection.execute("BEGIN IMMEDIATE")
    assert len(read_rows(path, ["day"], None, None)) == 3
    connection.execute("ROLLBACK")
    connection.close()


def test_failed_transaction_writes_nothing(path: Path) -> None:
    connection = open_for_writing(path)
    wrong: dict[Group, list[float]] = {**rows(A), Group("x", "y", "z", "w", None): [1] * 7}  # type: ignore[arg-type]  # NOT NULL fails
    with pytest.raises(sqlite3.Error):
        add_rows(connection, wrong)
    add_rows(connection, rows(A))
    connection.close()
    assert read_rows(path, [], None, "2026-11-28")[0]["requests"] == 2


@pytest.mark.parametrize("content", [b"this is not a database, but text of some length" * 30, None])
def test_file_that_is_no_database_is_an_error_and_stays_as_it_is(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "usage.db"
    file.mkdir() if content is None else file.write_bytes(content)
    with pytest.raises(sqlite3.Error):
        open_for_writing(file)
    assert content is None or file.read_bytes() == content


def test_file_keeps_the_name_that_it_was_given_when_it_was_created(path: Path, tmp_path: Path) -> None:
    name = identity_of(path)
    assert name
    open_for_writing(path).close()
    assert identity_of(path) == name
    open_for_writing(tmp_path / "other.db").close()
    assert identity_of(tmp_path / "other.db") not in (None, name)
    assert identity_of(tmp_path / "missing.db") is None


def test_file_of_an_older_version_gets_a_name(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE identity")
    assert identity_of(path) is None
    open_for_writing(path).close()
    assert identity_of(path)
    assert read_rows(path, [], None, None)


def test_days_with_usage_are_listed(path: Path, tmp_path: Path) -> None:
    assert days_of(path) == ["2026-11-28", "2026-11-29", "2026-11-30"]
    assert days_of(tmp_path / "missing.db") == []
