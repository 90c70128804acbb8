"""`gateway keys`: create, list, revoke and rotate keys in the file that GATEWAY_KEYS_FILE names.

The commands change the file and need no running gateway; a running one rereads it by itself.
"""

import os
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from dotenv import dotenv_values
from rich.console import Console
from rich.table import Table

from gateway import config
from gateway.keys.document import KeysError, check_name, expires_at
from gateway.keys.file import KeysFile
from gateway.keys.policy import LIMIT_NAMES, KeyPolicy


def keys_file(config_file: Path | None) -> KeysFile:
    """Return the file of keys: the one of GATEWAY_KEYS_FILE, else of the settings.

    The settings are loaded only if they have to tell where it is.

    Raises:
        ConfigError: No file is named, or the settings are invalid.
    """
    variables = {**dotenv_values(".env"), **os.environ}
    name = (variables.get("GATEWAY_KEYS_FILE") or "").strip()
    path = Path(name) if name else config.load(config_file).keys_file
    if path is None:
        raise config.ConfigError(
            ["GATEWAY_KEYS_FILE: not set; expected the file for the keys, such as gateway-keys.yaml"]
        )
    return KeysFile(path)


def add(file: KeysFile, name: str, fields: Mapping[str, Any]) -> str:
    """Add a key with the given fields of an entry; None and empty values count as absent. Return the key.

    Raises:
        KeysError: A field is wrong, the name is taken, or the file is wrong.
        OSError: The file cannot be written.
    """
    try:
        entry = {"name": check_name(name), **fields}
    except ValueError as error:
        raise KeysError([f"NAME: {error}"]) from None
    if entry.get("expires") is not None:
        try:
            entry["expires"] = _expires(str(entry["expires"]))
        except ValueError as error:
            raise KeysError([f"--expires: got {entry['expires']!r}; {error}"]) from None
    return file.add({field: value for field, value in entry.items() if value not in (None, [], {}, False)})


def _expires(text: str) -> date | str:
    if expires_at(text) <= time.time():
        raise ValueError("expected a date that is not over")
    try:
        return date.fromisoformat(text.strip())
    except ValueError:
        return text.strip()


def listed(file: KeysFile) -> list[dict[str, Any]]:
    """Return what the file says of each key, without its digest.

    Raises:
        KeysError: The file is wrong.
    """
    return [_row(policy) for policy in file.policies()]


def _row(policy: KeyPolicy) -> dict[str, Any]:
    expires = policy.expires
    return {
        "name": policy.name,
        "tiers": None if policy.tiers is None else list(policy.tiers),
        "limits": policy.limits.given(),
        "priority": "batch" if policy.is_batch else "interactive",
        "expires": None if expires is None else datetime.fromtimestamp(expires, UTC).isoformat(),
        "expired": expires is not None and expires <= time.time(),
        "on_limit": None if policy.downgrade is None else {"downgrade": policy.downgrade},
        "trusted": policy.is_trusted,
        "per_person": None if policy.per_person is None else policy.per_person.given(),
    }


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print the keys as a table."""
    if not rows:
        console.print("no keys")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "tiers", "requests/min", "tokens/min", "tokens/day", "concurrency", "priority", "expires"):
        table.add_column(heading, justify="right" if "/" in heading or heading == "concurrency" else "left")
    for row in rows:
        limits = [str(row["limits"].get(name, "-")) for name in LIMIT_NAMES]
        expires = "-" if row["expires"] is None else row["expires"].removesuffix("T00:00:00+00:00")
        table.add_row(
            row["name"],
            "all" if row["tiers"] is None else ", ".join(row["tiers"]),
            *limits,
            row["priority"],
            f"{expires} (expired)" if row["expired"] else expires,
        )
    console.print(table)
