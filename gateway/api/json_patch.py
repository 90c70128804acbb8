"""Differences of two JSON documents as a JSON Patch (RFC 6902). Pure."""

from collections.abc import Iterator
from typing import Any

Operation = dict[str, Any]


def json_patch(before: Any, after: Any) -> list[Operation]:
    """Return the operations `add`, `remove` and `replace` that turn `before` into `after`.

    A list whose length has changed is replaced as a whole.
    """
    return list(_differences(before, after, ""))


def _differences(before: Any, after: Any, path: str) -> Iterator[Operation]:
    if before == after:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for name in before.keys() - after.keys():
            yield {"op": "remove", "path": f"{path}/{_token(name)}"}
        for name, value in after.items():
            if name in before:
                yield from _differences(before[name], value, f"{path}/{_token(name)}")
            else:
                yield {"op": "add", "path": f"{path}/{_token(name)}", "value": value}
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for number, (old, new) in enumerate(zip(before, after, strict=True)):
            yield from _differences(old, new, f"{path}/{number}")
    else:
        yield {"op": "replace", "path": path, "value": after}


def _token(name: str) -> str:
    """Return a member's name as it is written in a JSON Pointer (RFC 6901, section 3)."""
    return name.replace("~", "~0").replace("/", "~1")
