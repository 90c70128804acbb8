"""State that survives a restart: a small JSON file with named sections.

The file is replaced as a whole (temporary file, fsync, rename) in a thread, so that after a crash
either the old or the new content is there. A file that cannot be read is reported and ignored. A
file that this version of the gateway did not write is never overwritten.
"""

import asyncio
import contextlib
import glob
import logging
import os
import time
from pathlib import Path
from typing import Any

import orjson

from gateway.atomic_file import replace_file

MARK = "llm_gateway_state"
VERSION = 1
MAX_BYTES = 64 * 1024 * 1024
"""Maximum size of a file that is read. The tokens of 100,000 keys and 20,000 persons take 22 MB if their names are as
long as they may be."""
LEFT_SECONDS = 60.0
"""Age from which a temporary file must be a killed process's: no write takes so long."""

_log = logging.getLogger(__name__)


class StateFile:
    """Sections of one file, or of no file if `path` is None; a section is any JSON value."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sections: dict[str, Any] = {}
        self._changes = 0
        self._written = 0
        self._may_write = path is not None
        self._task: asyncio.Task[None] | None = None
        if path is not None:
            self._load(path)
            _remove_leftovers(path)
            if self._may_write and not os.access(path.parent, os.W_OK | os.X_OK):
                _log.warning(
                    "the state file %s cannot be written: its folder is missing or not writable for this user; "
                    "changes are lost at a restart",
                    path,
                )

    def __repr__(self) -> str:
        return f"<StateFile {self._path} {sorted(self._sections)}, {self._changes - self._written} to write>"

    def get(self, section: str) -> Any:
        """Return the value last put into `section`, in this run or an earlier one, else None."""
        return self._sections.get(section)

    def sections(self) -> dict[str, Any]:
        """Return all sections by name."""
        return dict(self._sections)

    def put(self, section: str, value: Any) -> None:
        """Keep `value` in `section`; it is written soon, and before `close` returns."""
        if self._sections.get(section) == value:
            return
        self._sections[section] = value
        self._changes += 1
        if self._path is not None and self._may_write and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._write(self._path))

    async def persisted(self) -> bool:
        """Wait for the pending write, then return whether all values put so far are on disk."""
        if self._task is not None:
            await asyncio.shield(self._task)
        return self._path is not None and self._may_write and self._written == self._changes

    async def close(self) -> None:
        """Wait until pending changes are written. Await this before the event loop ends."""
        await self.persisted()

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            self._may_write = not isinstance(error, IsADirectoryError)
            _log.warning("the state file %s cannot be read (%s); continuing without it", path, error.strerror)
            return
        if not content:
            return
        try:
            document = orjson.loads(content)
        except orjson.JSONDecodeError:
            document = None
        if isinstance(document, dict) and document.get(MARK) == VERSION:
            self._sections = {name: value for name, value in document.items() if name != MARK}
            return
        self._may_write = content.startswith(b'{"%b":%d' % (MARK.encode(), VERSION))
        if self._may_write:
            _log.warning("the state file %s is damaged; continuing without it", path)
        else:
            _log.warning(
                "the state file %s was not written by this version of the gateway; it is left unchanged, "
                "and changes are lost at a restart",
                path,
            )

    async def _write(self, path: Path) -> None:
        while self._written < self._changes:
            changes = self._changes
            content = orjson.dumps({MARK: VERSION, **self._sections})
            try:
                await asyncio.to_thread(replace_file, path, content)
            except OSError as error:
                _log.warning(
                    "the state file %s cannot be written (%s); changes are lost at a restart", path, error.strerror
                )
                return
            self._written = changes


def _remove_leftovers(path: Path) -> None:
    """Remove the old temporary files of killed processes; a young one may be in use."""
    with contextlib.suppress(OSError):
        for temporary in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if temporary.suffix[1:].isdigit() and time.time() - temporary.lstat().st_mtime > LEFT_SECONDS:
                temporary.unlink()
