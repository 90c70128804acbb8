"""Files of keys: that of the client keys, and that of the key for a backend."""

from pathlib import Path

from gateway.config import parsers
from gateway.config.yaml_file import read_text

MAX_KEY_BYTES = 64 * 1024


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


def read_key_file(path: Path) -> str:
    """Return the one key in a file, such as a mounted secret, without the newlines at its end.

    Raises:
        ValueError: the file cannot be read, is empty, or has anything but one key; the message
            never has the key.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_KEY_BYTES + 1)
    except OSError as exc:
        raise ValueError(f"{exc.strerror or 'it cannot be read'}; expected a file with a key") from exc
    text = content.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode(errors="replace")
    if not text.strip():
        raise ValueError("the file is empty; expected a key")
    if len(content) > MAX_KEY_BYTES:
        raise ValueError("the file is too long; expected one key")
    return parsers.key(text)
