"""What differs between the settings in force and those that were reread, and which of it counts before a restart. Pure."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import SecretStr

from gateway.config.problems import Path, dotted, shown
from gateway.config.settings import BackendSettings, Settings

AT_START = (
    "host", "port", "metrics_port", "api_keys", "api_keys_file", "admin_key", "metrics_key", "cors_origins", "user_header", "session_header",
    "log_format", "state_file", "ollama_num_parallel", "drain_delay", "drain_timeout", "guard",
)  # fmt: skip
"""Keys that count from the next start on: the door, the keys' guards, the roll-out's and the log are built of them."""

_ABOUT_THE_SOURCES = frozenset({"file", "sources", "warnings"})


@dataclass(frozen=True)
class Differences:
    """`settings`: what is to be in force now, which are the reread ones but for `AT_START`. The others are lines for people."""

    settings: Settings
    changed: tuple[str, ...]
    waiting: tuple[str, ...]
    """What needs a restart."""


def compare(now: Settings, read: Settings) -> Differences:
    """What `read` changes in `now`. Values that are or may hold secrets are not in the lines."""
    settings = read.model_copy(update={key: getattr(now, key) for key in AT_START})
    waiting = tuple(
        f"{key}: {_change((key,), getattr(now, key), getattr(read, key))}"
        for key in AT_START
        if getattr(now, key) != getattr(read, key)
    )
    before, after = (_tree(each) for each in (now, settings))
    return Differences(settings, tuple(_lines((), before, after)), waiting)


def is_same_place(one: BackendSettings, other: BackendSettings) -> bool:
    """The same servers, spoken to in the same way: what else differs can be changed while requests run there."""
    return _place(one) == _place(other)


def _place(backend: BackendSettings) -> tuple[object, ...]:
    return backend.kind, backend.servers, backend.api_key, backend.headers, backend.ca_file


def _tree(settings: Settings) -> dict[str, Any]:
    tree = settings.model_dump(exclude={*_ABOUT_THE_SOURCES, *AT_START})
    for backend in tree["backends"].values():  # as the file has it
        backend |= backend.pop("limits")
    return tree


def _lines(path: Path, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    for key in dict.fromkeys([*before, *after]):
        here = (*path, key)
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _lines(here, old, new)
            if list(old) != list(new) and set(old) == set(new):
                yield f"{dotted(here)}: in another order"
        elif old != new:
            yield f"{dotted(here)}: {_change(here, old, new)}"


def _change(path: Path, old: object, new: object) -> str:
    if _is_plain(old) and _is_plain(new):
        return f"{shown(path, new)}, was {shown(path, old)}"
    return "new" if old is None else "gone" if new is None else "changed"


def _is_plain(value: object) -> bool:
    return value is None or (isinstance(value, str | int | float) and not isinstance(value, SecretStr))
