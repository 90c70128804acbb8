"""Files of keys for gateways of tests. The key of an entry is `sk-` and its name."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml


def key_of(name: str) -> str:
    return f"sk-{name}"


def bearer_of(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key_of(name)}"}


def write_keys(path: Path, **entries: dict[str, Any]) -> Path:
    """Write a file of keys with these entries by name, and return its path."""
    document = [
        {"name": name, "sha256": sha256(key_of(name).encode()).hexdigest(), **fields}
        for name, fields in entries.items()
    ]
    path.write_text(yaml.safe_dump({"keys": document}, sort_keys=False))
    return path
