"""Rereads the settings while the gateway runs: reads them, has what differs put in force, and tells what came of it.

`Follower` notices that the file has changed. Editors write in place (truncate, then write), or write another file and rename it, and Kubernetes swaps
a symbolic link of a folder above. So the folders are watched and not the file, what counts is its content, and it has to stay the same for
`STABLE_SECONDS` before it is taken: until then it may be half written. Where the system does not tell of changes (a mounted file, a share),
a look each `LOOK_SECONDS` finds them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Literal

from watchfiles import awatch

from gateway.config import ConfigError, Differences, Settings, compare

LOOK_SECONDS = 2.0
STABLE_SECONDS = 1.0
STEP_SECONDS = 0.2

ReloadCause = Literal["start", "file", "signal"]
"""`start`: it may have changed since it was read first."""

_log = logging.getLogger("gateway.reload")


class Reloader:
    """One reread after the other. `now` tells the settings in force, `apply` puts others in force; `tell` gets what came of it, for `/ops/status`."""

    def __init__(
        self,
        now: Callable[[], Settings],
        apply: Callable[[Settings], Awaitable[None]],
        tell: Callable[[dict[str, Any]], None],
    ) -> None:
        self._now = now
        self._apply = apply
        self._tell = tell
        self._lock = asyncio.Lock()

    async def run(self, read: Callable[[], Settings], cause: ReloadCause) -> None:
        """Raises `Unsettled` where `read` does; nothing else: what goes wrong is told, and the old settings stay."""
        async with self._lock:
            now = self._now()
            try:
                found = compare(now, await asyncio.to_thread(read))
                if found.changed:
                    await self._apply(found.settings)
            except ConfigError as error:
                self._refuse(cause, error.lines)
            except Unsettled:
                raise
            except Exception as error:  # a file of authorities that is none, say
                _log.debug("reload failed", exc_info=True)
                self._refuse(cause, (f"they cannot be put in force: {type(error).__name__}",))
            else:
                new = [line for line in found.settings.warnings if line not in now.warnings]
                if cause != "start" or found.changed or found.waiting:
                    self._report(cause, found, new)

    def _refuse(self, cause: ReloadCause, reasons: tuple[str, ...]) -> None:
        _log.error("settings reread (%s) and refused; the old ones stay", cause)
        for reason in reasons:
            _log.error("settings: %s", reason)
        self._tell(_view(cause, reasons=reasons))

    def _report(self, cause: ReloadCause, found: Differences, warnings: list[str]) -> None:
        _log.info(
            "settings reread (%s): %s",
            cause,
            f"{len(found.changed)} changes are in force" if found.changed else "nothing to put in force",
        )
        for line in found.changed:
            _log.info("settings: %s", line)
        for line in found.waiting:
            _log.warning("settings: %s; this needs a restart", line)
        for line in warnings:
            _log.warning("%s", line)
        self._tell(_view(cause, changed=found.changed, waiting=found.waiting))


class Unsettled(Exception):
    """The file has changed while it was read."""


def _view(
    cause: ReloadCause, changed: tuple[str, ...] = (), waiting: tuple[str, ...] = (), reasons: tuple[str, ...] = ()
) -> dict[str, Any]:
    now = time.time()
    at = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{int(now * 1000) % 1000:03d}Z"
    return {
        "at": at,
        "cause": cause,
        "ok": not reasons,
        "changed": list(changed),
        "needs_restart": list(waiting),
        "reasons": list(reasons),
    }


class FileWatcher:
    """Has the settings reread when `file` has another content than before, and that has settled. A file that is gone or empty changes nothing."""

    def __init__(self, file: Path, reload: Reloader, read: Callable[[], Settings]) -> None:
        self._file = file
        self._reload = reload
        self._read = read
        self._seen: bytes | None = None
        self._cause: ReloadCause = "start"
        self._is_gone = False

    async def run(self) -> None:
        """Until it is cancelled; not at all for a pipe, which is read once."""
        if await asyncio.to_thread(lambda: self._file.exists() and not self._file.is_file()):
            return
        while True:
            try:
                await self._watch(await asyncio.to_thread(self._folders))
            except (OSError, RuntimeError):  # a folder is gone, or the system watches too much already
                await asyncio.sleep(LOOK_SECONDS)
                await self._look()

    async def _watch(self, folders: set[Path]) -> None:
        """Look at each sign of a change in `folders`, until the file is in others."""
        step, timeout = int(STEP_SECONDS * 1000), int(LOOK_SECONDS * 1000)
        watched = awatch(
            *folders, watch_filter=None, recursive=False, step=step, rust_timeout=timeout, yield_on_timeout=True
        )
        async with aclosing(watched):
            await self._look()
            async for _ in watched:
                await self._look()
                if await asyncio.to_thread(self._folders) != folders:
                    return

    def _folders(self) -> set[Path]:
        """That of the file's name, and that of the file: links may lead elsewhere."""
        return {folder for folder in (self._file.absolute().parent, self._file.resolve().parent) if folder.is_dir()}

    async def _look(self) -> None:
        content = await self._content()
        while content != self._seen:
            await asyncio.sleep(STABLE_SECONDS)
            before, content = content, await self._content()
            if content != before:
                continue
            if content is None:
                self._tell_gone()
                return
            self._seen = content
            with suppress(Unsettled):
                await self._reload.run(self._read_settled, self._cause)
            self._cause = "file"
            content = await self._content()
        self._is_gone = False

    async def _content(self) -> bytes | None:
        """In a thread: a share that hangs holds up nobody."""
        return await asyncio.to_thread(content_of, self._file)

    def _read_settled(self) -> Settings:
        try:
            return self._read()
        finally:
            if content_of(self._file) != self._seen:
                raise Unsettled

    def _tell_gone(self) -> None:
        if not self._is_gone:
            _log.warning("the settings' file %s is gone, empty or cannot be read; nothing changes", self._file)
        self._is_gone = True


def read_whole(file: Path | None, read: Callable[[], Settings]) -> Settings:
    """What `read` says, where there is something in `file`: an empty one would mean the defaults.

    Raises:
        ConfigError
    """
    if file is not None and content_of(file) is None:
        raise ConfigError([f"{file}: it is gone, empty or cannot be read"])
    return read()


def content_of(file: Path) -> bytes | None:
    """None: it is not there, cannot be read, is a pipe, or has nothing in it but comments, as one that is about to be written."""
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        return None
    lines = (line.strip() for line in content.splitlines())
    return content if any(line and not line.startswith(b"#") for line in lines) else None
