"""Keys with names in a running gateway: opened at the start, reread, and kept over a restart."""

import asyncio
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from gateway.api.model_names import ModelNames
from gateway.config import ConfigError, Settings
from gateway.dialects.json_body import completed
from gateway.errors import Conflict
from gateway.keys.accounts import Accounts
from gateway.keys.document import KeysError
from gateway.keys.file import read_policies
from gateway.keys.policy import KeyPolicy
from gateway.keys.reload import KeysReloader
from gateway.relay.turns import in_turns
from gateway.state_file import StateFile

SECTION = "keys"
"""Section of the state file with the tokens of the day."""
SAVE_SECONDS = 5.0
"""Time between two looks at the tokens of the day: a gateway that is killed forgets those since the last."""


def open_accounts(settings: Settings, clock: Callable[[], float] = time.monotonic) -> Accounts | None:
    """Return the accounts of the keys in `keys_file`; None if the settings name no such file.

    Raises:
        ConfigError: The file is missing, unreadable, empty or wrong, or has no key for `ollama_as_key`.
    """
    if settings.keys_file is None:
        return None
    place = f"GATEWAY_KEYS_FILE: {str(settings.keys_file)!r}"
    try:
        accounts = Accounts(read_policies(settings.keys_file), ModelNames(settings).resolve, clock, time.time)
    except KeysError as error:
        raise ConfigError(f"{place}: {line}" for line in error.lines) from None
    admin = settings.admin_key
    if admin is not None and sha256(admin.get_secret_value().encode()).digest() in accounts.by_digest:
        raise ConfigError([f"{place}: one of its keys is the admin key; expected a separate key"])
    name = settings.ollama_as_key
    if name is not None and accounts.named(name) is None:
        raise ConfigError([f"GATEWAY_OLLAMA_AS_KEY: got {name!r}; expected the name of a key in keys_file"])
    return accounts


class NamedKeys:
    """The accounts of a gateway, their file and their section of the state file.

    `forget` is called with the name of a key that is gone.
    """

    def __init__(
        self,
        accounts: Accounts,
        file: Path,
        model_names: ModelNames,
        state: StateFile,
        forget: Callable[[str], None],
        count_plain: Callable[[], int],
    ) -> None:
        self.accounts = accounts
        self.file = file
        self._model_names = model_names
        self._state = state
        self._forget = forget
        self._count_plain = count_plain
        self._reloader = KeysReloader(accounts, self._resolve)
        self._task: asyncio.Task[None] | None = None
        self.replica = ""
        """Name of this replica, if it shares the limits with others."""
        kept = state.get(SECTION)
        self.predecessor = str(kept.get("replica", "")) if isinstance(kept, dict) else ""
        """Name of the replica that wrote the state file, if it shared the limits."""
        accounts.restore(kept)

    def _resolve(self, name: str) -> str | None:
        return self._model_names.resolve(name)

    def change(self, model_names: ModelNames) -> None:
        """Apply changed settings."""
        self._model_names = model_names
        self.accounts.use_names(self._resolve)

    # The file

    def read(self) -> list[KeyPolicy]:
        """Read the file.

        Raises:
            KeysError: It is missing, unreadable, empty or wrong.
        """
        return read_policies(self.file)

    async def run(self, read: Callable[[], list[KeyPolicy]], cause: str) -> dict[str, Any]:
        """Reread the keys with `read`; if they are wrong, those before stay in force. Return the outcome."""
        outcome = await self._reloader.run(read, cause)
        for name in outcome["removed"]:
            self._forget(name)
        return outcome

    async def reload(self) -> dict[str, Any]:
        """Reread the file for an operator, and return the outcome.

        Raises:
            Conflict: It is missing, unreadable, empty or wrong. Nothing has changed.
        """
        outcome = await self.run(self.read, "request")
        if not outcome["ok"]:
            reasons = "; ".join(outcome["reasons"][:20])
            raise Conflict(f"The file of keys is refused, and the keys before stay in force: {reasons}.")
        return outcome

    def view(self) -> dict[str, Any]:
        """Return the body of `/ops/keys` without the keys, of which there may be many."""
        return {**self.accounts.view(), "without_limits": self._count_plain(), "reload": self._reloader.last}

    # The state

    def start(self) -> None:
        """Keep the tokens of the day from now on."""
        self._task = asyncio.get_running_loop().create_task(self._save_regularly())

    def stop(self) -> None:
        """Keep the tokens of the day a last time."""
        if self._task is not None:
            self._task.cancel()
        self._keep(completed(self.accounts.saved_steps()))

    async def _save_regularly(self) -> None:
        while True:
            await asyncio.sleep(SAVE_SECONDS)
            self._keep(await in_turns(self.accounts.saved_steps()))

    def _keep(self, saved: dict[str, Any]) -> None:
        """Keep the tokens of the day, if they have changed."""
        self._state.put(SECTION, {**saved, "replica": self.replica} if self.replica else saved)
