"""File of keys on disk: read by the gateway, edited by `gateway keys`.

An edit holds a lock on a file beside it, checks that the result is what was meant, and replaces the
file as a whole, so a gateway that rereads it never sees half of it. Comments stay where they are,
unless the file is not written in the usual block style.
"""

import fcntl
import os
import secrets
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from gateway.atomic_file import replace_file
from gateway.keys.document import FIELDS, KeysError, parse
from gateway.keys.policy import KeyPolicy

MAX_BYTES = 32 * 1024 * 1024
MODE = 0o600
HEADER = "# Keys of the gateway, written by `gateway keys`. The file has no key, only the SHA-256 of each.\nkeys:"
EMPTY = HEADER + " []\n"
KEY_BYTES = 32
"""Random bytes of a key."""


def read_policies(path: Path) -> list[KeyPolicy]:
    """Return the policies in the file at `path`.

    Raises:
        KeysError: It is missing, unreadable, empty or wrong.
    """
    return parse(_read(path))


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise KeysError([error.strerror or "it cannot be read"]) from None
    if len(content) > MAX_BYTES:
        raise KeysError([f"it has more than {MAX_BYTES} bytes"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise KeysError(["it is not UTF-8 text"]) from None


def new_key() -> tuple[str, str]:
    """Return a new random key, and its SHA-256 in hex."""
    key = "sk-" + secrets.token_urlsafe(KEY_BYTES)
    return key, sha256(key.encode()).hexdigest()


class KeysFile:
    """File of keys, for programs that change it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def policies(self) -> list[KeyPolicy]:
        """Return what the file says; nothing if it does not exist.

        Raises:
            KeysError: It is unreadable, empty or wrong.
        """
        return read_policies(self.path) if self.path.exists() else []

    def add(self, fields: Mapping[str, Any]) -> str:
        """Add an entry with these fields, and return its new key, which is stored nowhere.

        Raises:
            KeysError: The name is taken, a field is wrong, or the file is.
            OSError: The file cannot be written.
        """
        key, digest = new_key()
        entry = {"name": fields["name"], "sha256": digest, **fields}
        entry = {field: entry[field] for field in FIELDS if entry.get(field) is not None}
        with self._locked():
            text = _read(self.path) if self.path.exists() else EMPTY
            entries = _entries(text)
            if any(other.get("name") == entry["name"] for other in entries):
                raise KeysError([f"{entry['name']}: there is a key of this name; rotate or revoke it"])
            self._write(_appended(text, entry), [*entries, entry])
        return key

    def remove(self, name: str) -> None:
        """Remove the entry with this name.

        Raises:
            KeysError: There is none, or the file is wrong.
            OSError: The file cannot be written.
        """
        with self._locked():
            text = _read(self.path)
            entries, index = _find(text, name)
            self._write(_without(text, index), [entry for place, entry in enumerate(entries) if place != index])

    def replace_key(self, name: str) -> str:
        """Give the entry with this name another key, and return it. The old one is no longer valid.

        Raises:
            KeysError: There is no such entry, or the file is wrong.
            OSError: The file cannot be written.
        """
        key, digest = new_key()
        with self._locked():
            text = _read(self.path)
            entries, index = _find(text, name)
            changed = [entry if place != index else {**entry, "sha256": digest} for place, entry in enumerate(entries)]
            self._write(text.replace(entries[index]["sha256"], digest), changed)
        return key

    @contextmanager
    def _locked(self) -> Generator[None, None, None]:
        lock = self.path.with_name(f".{self.path.name}.lock")
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _write(self, edited: str | None, entries: list[dict[str, Any]]) -> None:
        """Write `edited` if it says the same as `entries`, else these in the usual style."""
        if edited is None or not _says(edited, entries):
            edited = HEADER + "\n" + "".join(map(_item, entries)) if entries else EMPTY
        parse(edited)
        target = self.path.resolve() if self.path.is_symlink() else self.path
        before = target.stat() if target.exists() else None
        replace_file(target, edited.encode(), MODE)
        if before is not None and before.st_uid != os.geteuid():
            with suppress(OSError):  # the administrator edits the file of the gateway's user
                os.chown(target, before.st_uid, before.st_gid)


def _entries(text: str) -> list[dict[str, Any]]:
    """Return the entries of a file that is right.

    Raises:
        KeysError: It is wrong.
    """
    parse(text)
    entries: list[dict[str, Any]] = yaml.safe_load(text)["keys"]
    return entries


def _find(text: str, name: str) -> tuple[list[dict[str, Any]], int]:
    entries = _entries(text)
    for index, entry in enumerate(entries):
        if entry["name"] == name:
            return entries, index
    names = ", ".join(entry["name"] for entry in entries) or "none"
    raise KeysError([f"{name}: there is no key of this name; the names are: {names}"])


def _says(text: str, entries: list[dict[str, Any]]) -> bool:
    try:
        return bool(yaml.safe_load(text) == {"keys": entries})
    except (yaml.YAMLError, RecursionError, ValueError):
        return False


def _item(entry: Mapping[str, Any], indent: int = 2) -> str:
    """Return an entry as an item of the list, with a line for each field."""
    lines = [f"{field}: {_scalar(value)}\n" for field, value in entry.items()]
    blanks = " " * indent
    return "".join([f"{blanks}- {lines[0]}", *(f"{blanks}  {line}" for line in lines[1:])])


def _scalar(value: object) -> str:
    return (
        yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10_000).removesuffix("...\n").strip()
    )


def _list_node(text: str) -> yaml.SequenceNode | None:
    """Return the node of the list, if it is written in block style."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    for key, value in root.value:
        if key.value == "keys" and isinstance(value, yaml.SequenceNode) and not value.flow_style:
            return value
    return None


def _appended(text: str, entry: Mapping[str, Any]) -> str | None:
    node = _list_node(text)
    if node is None:
        return None
    return text + ("" if text.endswith("\n") else "\n") + _item(entry, node.start_mark.column)


def _without(text: str, index: int) -> str | None:
    """Return the text without one item of the list: from its dash to the next item's."""
    node = _list_node(text)
    if node is None or len(node.value) == 1:
        return None
    starts = [item.start_mark.line for item in node.value]
    lines = text.splitlines(keepends=True)
    end = starts[index + 1] if index + 1 < len(starts) else node.value[index].end_mark.line
    return "".join(lines[: starts[index]] + lines[end:])
