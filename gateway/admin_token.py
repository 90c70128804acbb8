"""Admin token: a secret in a file that only programs of the gateway's own user can read.

It takes the place of GATEWAY_ADMIN_KEY on a gateway that has client keys. There, a connection over
loopback proves nothing: a proxy on the same machine connects over loopback too.
"""

import os
import secrets
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from gateway.atomic_file import replace_file

MAX_BYTES = 256


@dataclass(frozen=True)
class AdminToken:
    """Token of one run of the gateway, and the file that has it."""

    path: Path
    value: str | None = field(repr=False)
    """None if the file could not be written."""
    problem: str = ""
    """Reason why the file could not be written."""


def token_path(state_file: Path | None, port: int) -> Path:
    """Return the file of the gateway on `port`: beside its state file, else in the working directory."""
    return (state_file.parent if state_file else Path()).absolute() / f"gateway-admin-token-{port}"


@contextmanager
def new_token(path: Path) -> Generator[AdminToken, None, None]:
    """Write a new token to `path`, and remove the file at the end of the block.

    The file of a process that was killed stays, and the next start on the same port replaces it. A
    file that another process has replaced meanwhile is not removed.
    """
    value = secrets.token_urlsafe(32)
    try:
        replace_file(path, value.encode(), 0o600)
    except OSError as error:
        yield AdminToken(path, None, error.strerror or str(error))
        return
    try:
        yield AdminToken(path, value)
    finally:
        with suppress(OSError):
            if read_token(path) == value:
                path.unlink()


def read_token(path: Path) -> str | None:
    """Return the token in the file, None if it has none.

    Raises:
        OSError: The file cannot be read, or it is a symbolic link.
    """
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return None
        content = file.read(MAX_BYTES)
    text = content.decode("ascii", "replace").strip()
    return text if text.isprintable() and text.isascii() and text else None
