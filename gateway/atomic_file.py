"""Replacement of a small file as a whole: temporary file, fsync, rename."""

import contextlib
import os
import secrets
from pathlib import Path

_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def replace_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace the file at `path`; after a crash, either the old or the new content is there.

    `mode` applies to the new file, less the umask. The temporary file has an unpredictable name and
    is never opened if something has that name already, and the rename replaces a symbolic link
    instead of its target, so nobody who may write to the folder can redirect the content.

    Raises:
        OSError: The file could not be written; nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{secrets.randbelow(10**18)}")
    try:
        with os.fdopen(os.open(temporary, _FLAGS, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except FileExistsError:  # not ours
        raise
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
