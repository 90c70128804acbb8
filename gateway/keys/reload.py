"""Reload of the file of keys while the gateway runs.

A file that is gone, empty, unreadable or wrong changes nothing: the keys before stay in force, and
the log and `/ops/keys` say so.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from gateway.keys.accounts import Accounts, ResolveName
from gateway.keys.document import KeysError
from gateway.keys.policy import KeyPolicy

_log = logging.getLogger(__name__)


class KeysReloader:
    """Reader of changed keys, one reread at a time. `resolve` spells names as the settings do."""

    def __init__(self, accounts: Accounts, resolve: ResolveName) -> None:
        self._accounts = accounts
        self._resolve = resolve
        self._lock = asyncio.Lock()
        self.last: dict[str, Any] | None = None
        """Outcome of the last reread; None: there was none."""

    async def run(self, read: Callable[[], list[KeyPolicy]], cause: str) -> dict[str, Any]:
        """Reread the keys with `read`, put them in force, and return the outcome."""
        async with self._lock:
            try:
                changes = self._accounts.change(await asyncio.to_thread(read), self._resolve)
            except KeysError as error:
                _log.error("keys reread (%s) and refused; the keys before stay in force", cause)
                for reason in error.lines:
                    _log.error("keys: %s", reason)
                self.last = self._outcome(cause, False, error.lines, {})
            else:
                if any(changes.values()) or cause != "start":
                    _log.info("keys reread (%s): %s", cause, _described(changes))
                self.last = self._outcome(cause, True, (), changes)
            return self.last

    def _outcome(self, cause: str, ok: bool, reasons: tuple[str, ...], changes: dict[str, list[str]]) -> dict[str, Any]:
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return {
            "at": at,
            "cause": cause,
            "ok": ok,
            "reasons": list(reasons),
            "keys": len(self._accounts),
            **({"added": [], "removed": [], "changed": []} | changes),
        }


def _described(changes: dict[str, list[str]]) -> str:
    parts = [
        f"{what} {', '.join(names[:20])}{' …' if len(names) > 20 else ''}" for what, names in changes.items() if names
    ]
    return "; ".join(parts) or "nothing changed"
