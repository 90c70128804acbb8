"""A document that replicas share, whatever stores it: Redis, or a process on the same machine.

The document is bytes with a version. A replica reads it, merges it with what it has, and writes the
result back if nobody has written since (compare and set, as in HTTP's `If-Match`). So a store needs
no knowledge of the content, and no two writes are lost.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

MAX_BYTES = 1024 * 1024
"""Maximum size of a document."""


class Unreachable(Exception):
    """The store cannot be reached, or did not answer in time. The document may have been written."""


class Snapshot(NamedTuple):
    """A document as it was read. A store that has lost its data begins again at version 0."""

    version: int
    content: bytes
    """Empty if nobody has written yet."""


class SharedDocument(Protocol):
    """One document, as one replica sees it. All methods belong to the event loop.

    `replica` is the name of this replica, different from that of any other, also after a restart.
    """

    replica: str

    @property
    def is_up(self) -> bool:
        """True if the store answered last."""

    def listen(self, wake: Callable[[], None]) -> None:
        """Call `wake` soon after any replica has written, and when the store can be reached again.

        One call may stand for several writes, and calls may be lost: the caller reads from time to
        time anyway.
        """

    async def read(self) -> Snapshot:
        """Return the document.

        Raises:
            Unreachable: The store did not answer within half a second.
        """

    async def write(self, content: bytes, version: int) -> bool:
        """Replace the document if its version is still `version`; return whether it was replaced.

        The next version is a larger number. After a write every replica is woken.

        Raises:
            Unreachable: The store did not answer within half a second.
        """

    def now(self) -> float:
        """Return the Unix time in seconds, by the clock of the store as far as it is known."""
