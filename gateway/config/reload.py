"""Reload of the settings while the gateway runs: applies what differs, and reports the result.

`FileWatcher` notices changes of the settings file and of the files of keys. Editors write in place
(truncate, then write), or write another file and rename it; Kubernetes swaps a symbolic link of a
folder above. So the folders are watched and not the files, only their content counts, and it must
stay the same for `STABLE_SECONDS` before it is read, because until then it may be half written. If
the system does not report changes (a mounted file, a network share), a check every `LOOK_SECONDS`
finds them.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

from watchfiles import awatch

from gateway.config import ConfigError, Differences, Settings, compare

LOOK_SECONDS = 2.0
STABLE_SECONDS = 1.0
STEP_SECONDS = 0.2

ReloadCause = Literal["start", "file", "signal"]
"""Reason for a reread; `start`: the file may have changed since it was first read."""

Contents = dict[Path, bytes | None]
"""Contents of files by path; None if a file does not exist or is empty."""

_log = logging.getLogger(__name__)


class Reloader:
    """Reader of changed settings, one reread at a time.

    `current` returns the settings in force, `apply` puts others in force, and `record` gets the
    result, for `/ops/status`.
    """

    def __init__(
        self,
        current: Callable[[], Settings],
        apply: Callable[[Settings], Awaitable[None]],
        record: Callable[[dict[str, Any]], None],
    ) -> None:
        self._current = current
        self._apply = apply
        self._record = record
        self._lock = asyncio.Lock()

    async def run(self, read: Callable[[], Settings], cause: ReloadCause) -> None:
        """Reread the settings with `read`, and apply them.

        If that fails, the old settings stay in force and the reasons are reported.

        Raises:
            Unsettled: `read` raised it.
        """
        async with self._lock:
            current = self._current()
            try:
                found = compare(current, await asyncio.to_thread(read))
                if found.changed:
                    await self._apply(found.settings)
            except ConfigError as error:
                self._refuse(cause, error.lines)
            except Unsettled:
                raise
            except Exception as error:  # for example, `ca_file` is not a certificate file
                _log.debug("reload failed", exc_info=True)
                self._refuse(cause, (f"the settings cannot be put in force: {type(error).__name__}",))
            else:
                new_warnings = [line for line in found.settings.warnings if line not in current.warnings]
                if cause != "start" or found.changed or found.waiting:
                    self._report(cause, found, new_warnings)

    def _refuse(self, cause: ReloadCause, reasons: tuple[str, ...]) -> None:
        _log.error("settings reread (%s) and refused; the old ones stay in force", cause)
        for reason in reasons:
            _log.error("settings: %s", reason)
        self._record(_result(cause, reasons=reasons))

    def _report(self, cause: ReloadCause, found: Differences, warnings: list[str]) -> None:
        _log.info(
            "settings reread (%s): %s",
            cause,
            f"changes in force: {len(found.changed)}" if found.changed else "nothing changed",
        )
        for line in found.changed:
            _log.info("settings: %s", line)
        for line in found.waiting:
            _log.warning("settings: %s; this change needs a restart", line)
        for line in warnings:
            _log.warning("%s", line)
        self._record(_result(cause, changed=found.changed, waiting=found.waiting))


class Unsettled(Exception):
    """The file changed while it was read."""


def _result(
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


Content = TypeVar("Content")
Content_contra = TypeVar("Content_contra", contravariant=True)


class Rereader(Protocol[Content_contra]):
    """Part of the gateway that puts the content of changed files in force."""

    async def run(self, read: Callable[[], Content_contra], cause: ReloadCause) -> object:
        """Reread the files with `read`.

        Raises:
            Unsettled: `read` raised it.
        """


class FileWatcher(Generic[Content]):
    """Watcher that has the settings, or the keys, reread when the content of a file has changed and settled.

    The files are the settings `file`, if there is one, and those that `others` returns at the time.
    A file that is missing or empty changes nothing.
    """

    def __init__(
        self,
        file: Path | None,
        reloader: Rereader[Content],
        read: Callable[[], Content],
        others: Callable[[], Iterable[Path]] = tuple,
    ) -> None:
        self._file = file
        self._reloader = reloader
        self._read = read
        self._others = others
        self._seen: dict[Path, bytes] = {}
        self._missing: set[Path] = set()

    async def run(self) -> None:
        """Watch the files until cancelled; not if the settings file is a pipe, which can be read once."""
        file = self._file
        if file is not None and await asyncio.to_thread(lambda: file.exists() and not file.is_file()):
            return
        while True:
            folders = await asyncio.to_thread(self._folders)
            try:
                if folders:
                    await self._watch(folders)
                    continue
            except (OSError, RuntimeError):  # a missing folder, or the system's limit of watches
                pass
            await asyncio.sleep(LOOK_SECONDS)
            await self._check()

    async def _watch(self, folders: set[Path]) -> None:
        """Check the files at each change in `folders`, until the files are in other folders."""
        step, timeout = int(STEP_SECONDS * 1000), int(LOOK_SECONDS * 1000)
        watched = awatch(
            *folders, watch_filter=None, recursive=False, step=step, rust_timeout=timeout, yield_on_timeout=True
        )
        async with aclosing(watched):
            await self._check()
            async for _ in watched:
                await self._check()
                if await asyncio.to_thread(self._folders) != folders:
                    return

    def _files(self) -> list[Path]:
        return [*([] if self._file is None else [self._file]), *self._others()]

    def _folders(self) -> set[Path]:
        """Return the folders of the files' names and of the files themselves; links may separate them."""
        files = self._files()
        folders = {folder for file in files for folder in (file.absolute().parent, file.resolve().parent)}
        return {folder for folder in folders if folder.is_dir()}

    async def _check(self) -> None:
        """Reread the settings if a content has changed, once all have settled."""
        found = await self._contents()
        while self._changed(found) or self._newly_missing(found):
            await asyncio.sleep(STABLE_SECONDS)
            before, found = found, await self._contents()
            if found != before:
                continue
            self._report_missing(found)
            if not self._changed(found) or (self._file is not None and found[self._file] is None):
                break  # the other files make no settings without the settings file
            await self._reread(found)
            found = await self._contents()
        self._missing.intersection_update(file for file, content in found.items() if content is None)

    def _changed(self, found: Contents) -> dict[Path, bytes]:
        return {file: new for file, new in found.items() if new is not None and new != self._seen.get(file)}

    def _newly_missing(self, found: Contents) -> list[Path]:
        return [file for file, content in found.items() if content is None and file not in self._missing]

    async def _contents(self) -> Contents:
        """Read the files in a thread, so that a hanging share does not block the event loop."""
        files = self._files()
        return await asyncio.to_thread(lambda: {file: content_of(file) for file in files})

    async def _reread(self, found: Contents) -> None:
        """Reread the settings, unless a file changes meanwhile: then it stays changed."""

        def read_settled() -> Content:
            try:
                return self._read()
            finally:
                if any(content_of(file) != content for file, content in found.items()):
                    raise Unsettled

        changed = self._changed(found)
        cause: ReloadCause = "file" if self._seen.keys() & changed.keys() else "start"
        with suppress(Unsettled):
            await self._reloader.run(read_settled, cause)
            self._seen |= changed

    def _report_missing(self, found: Contents) -> None:
        for file in self._newly_missing(found):
            kind = "settings file" if file == self._file else "file of keys"
            _log.warning("the %s %s is missing, empty or unreadable; nothing changes", kind, file)
            self._missing.add(file)


def files_of_keys(settings: Settings) -> list[Path]:
    """Return the files beside the settings file whose content is a part of the settings."""
    files = [settings.api_keys_file, *(backend.api_key_file for backend in settings.backends.values())]
    return list(dict.fromkeys(file for file in files if file is not None))


def read_whole(file: Path | None, read: Callable[[], Settings]) -> Settings:
    """Return the settings from `read`, unless `file` is empty: that would mean the defaults.

    Raises:
        ConfigError: the file is missing, empty or unreadable, or its settings are invalid.
    """
    if file is not None and content_of(file) is None:
        raise ConfigError([f"{file}: the file is missing, empty or unreadable"])
    return read()


def content_of(file: Path) -> bytes | None:
    """Return the content of a file, None if it has no settings.

    That is a file that is missing or unreadable, a pipe, or a file with nothing but comments, which
    may be about to be written.
    """
    try:
        content = file.read_bytes() if file.is_file() else b""
    except OSError:
        return None
    lines = (line.strip() for line in content.splitlines())
    return content if any(line and not line.startswith(b"#") for line in lines) else None
