"""Differences between the settings in force and reread ones, some of which need a restart. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from gateway.config.problems import Path, dotted, shown
from gateway.config.settings import BackendSettings, Settings

AT_START = (
    "host", "port", "metrics_port", "ollama_port", "ollama_as_key", "keys_file", "admin_key",
    "metrics_key", "cors_origins", "allowed_hosts",
    "user_header", "session_header", "log_format", "state_file", "usage_file", "usage_days", "redis_url",
    "ollama_num_parallel", "drain_delay", "drain_timeout", "keep_alive_timeout", "max_connections_per_address",
    "unlimited_addresses", "guard", "exclusive",
)  # fmt: skip
"""Keys whose changes take effect at the next start.

The HTTP server, the checks of the operator's keys, the guard, the turns of engines on one GPU and the
log are built from them once.
"""

_ABOUT_THE_SOURCES = frozenset({"file", "sources", "warnings"})


@dataclass(frozen=True)
class Differences:
    """Result of a comparison: the settings to put in force, and the changes as lines for people.

    `settings` are the reread ones, with the old values of what needs a restart.
    """

    settings: Settings
    changed: tuple[str, ...]
    waiting: tuple[str, ...]
    """Changes that need a restart."""


def compare(current: Settings, reread: Settings) -> Differences:
    """Return what `reread` changes in `current`; no line contains a value that may be secret.

    Client keys change at run time, but a reread neither opens the gateway nor closes an open one:
    the access to `/ops` depends on that, and a file may be half-edited.
    """
    at_start: tuple[str, ...] = AT_START
    if current.keys_file is None and bool(current.api_keys) != bool(reread.api_keys):
        at_start = (*AT_START, "api_keys", "api_keys_file")
    settings = reread.model_copy(update={key: getattr(current, key) for key in at_start})
    waiting = tuple(
        f"{key}: {_change((key,), getattr(current, key), getattr(reread, key))}"
        for key in at_start
        if getattr(current, key) != getattr(reread, key)
    )
    before, after = (_tree(each) for each in (current, settings))
    return Differences(settings, tuple(_lines((), before, after)), waiting)


def is_same_place(one: BackendSettings, other: BackendSettings) -> bool:
    """Return whether both name the same servers, reached in the same way.

    Anything else can change while requests run there.
    """
    return _place(one) == _place(other)


def _place(backend: BackendSettings) -> tuple[object, ...]:
    return backend.kind, backend.servers, backend.api_key, backend.headers, backend.ca_file


def _tree(settings: Settings) -> dict[str, Any]:
    tree = settings.model_dump(exclude={*_ABOUT_THE_SOURCES, *AT_START})
    for backend in tree["backends"].values():  # the file has limits beside the other keys
        backend |= backend.pop("limits")
    return tree


def _lines(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        here = (*path, key)
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _lines(here, old, new)
            if list(old) != list(new) and set(old) == set(new):
                yield f"{dotted(here)}: the order changed"
        elif old != new:
            yield f"{dotted(here)}: {_change(here, old, new)}"


def _change(path: Path, old: object, new: object) -> str:
    if _is_plain(old) and _is_plain(new):
        return f"{shown(path, new)}, was {shown(path, old)}"
    return "new" if old is None else "removed" if new is None else "changed"


def _is_plain(value: object) -> bool:
    return value is None or (isinstance(value, str | int | float) and not isinstance(value, SecretStr))
