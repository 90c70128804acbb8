"""What outlives a restart: a small JSON file with a section for each who keeps something there.

The file is replaced as a whole (temporary file, fsync, rename), in a thread: after a crash it is the old one or the new one. One that cannot be
read is reported and ignored; one that is not ours is never written over.
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

MARK = "llm_gateway_state"
VERSION = 1
MAX_BYTES = 4 * 1024 * 1024
LEFT_SECONDS = 60.0
"""A temporary file of this age was left by a process that was killed: no write takes so long."""

_log = logging.getLogger("gateway.state")


class StateFile:
    """The sections of one file; without a `path`, of none. A section is JSON: a dict, list, text or number."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sections: dict[str, Any] = {}
        self._changes = 0
        self._written = 0
        self._is_safe = path is not None
        self._task: asyncio.Task[None] | None = None
        if path is not None:
            self._load(path)
            _tidy(path)
            if self._is_safe and not os.access(path.parent, os.W_OK | os.X_OK):
                _log.warning(
                    "the state file %s cannot be written: its folder is missing, or closed to this user; changes are lost at a restart",
                    path,
                )

    def __repr__(self) -> str:
        return f"<State {self._path} {sorted(self._sections)}, {self._changes - self._written} to write>"

    def get(self, section: str) -> Any:
        """What was put there, in this run or one before; None if nothing was."""
        return self._sections.get(section)

    def put(self, section: str, value: Any) -> None:
        """Keep `value`; it is written soon, and before `close` returns."""
        if self._sections.get(section) == value:
            return
        self._sections[section] = value
        self._changes += 1
        if self._path is not None and self._is_safe and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._write(self._path))

    async def persisted(self) -> bool:
        """Once what was put by now has been written: whether it was."""
        if self._task is not None:
            await asyncio.shield(self._task)
        return self._path is not None and self._is_safe and self._written == self._changes

    async def close(self) -> None:
        """Write what is left. To be awaited before the loop ends."""
        await self.persisted()

    def _load(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return
        except OSError as error:
            self._is_safe = not isinstance(error, IsADirectoryError)
            _log.warning("the state file %s cannot be read (%s); going on without it", path, error.strerror)
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
        self._is_safe = content.startswith(b'{"%b":%d' % (MARK.encode(), VERSION))
        if self._is_safe:
            _log.warning("the state file %s is broken; going on as without it", path)
        else:
            _log.warning(
                "the state file %s is not one of this version of the gateway; it is left alone, and nothing is kept",
                path,
            )

    async def _write(self, path: Path) -> None:
        while self._written < self._changes:
            changes = self._changes
            content = orjson.dumps({MARK: VERSION, **self._sections})
            try:
                await asyncio.to_thread(_replace, path, content)
            except OSError as error:
                _log.warning(
                    "the state file %s cannot be written (%s); what changed is lost at a restart", path, error.strerror
                )
                return
            self._written = changes


def _tidy(path: Path) -> None:
    """Remove what killed processes have left beside the file. One that runs may be writing there now."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if left.suffix[1:].isdigit() and time.time() - left.stat().st_mtime > LEFT_SECONDS:
                left.unlink()


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
