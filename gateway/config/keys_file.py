"""File of client keys."""

from pathlib import Path

from gateway.config import parsers
from gateway.config.yaml_file import read_text


def read_keys_file(path: Path) -> tuple[str, ...]:
    """Return the keys in a file, without duplicates: one key per line, `#` begins a comment.

    Raises:
        ValueError: the file cannot be read, has no key, or has an invalid line; the message names
            the line, never the key.
    """
    found: dict[str, None] = {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if text:
            try:
                found[parsers.key(text)] = None
            except ValueError as exc:
                raise ValueError(f"line {number}: {exc}") from None
    if not found:
        raise ValueError("expected at least one key, one per line")
    return tuple(found)
