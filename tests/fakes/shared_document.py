"""A document that replicas in one process share, and that can be cut off from each of them."""

import asyncio
from collections.abc import Callable

from gateway.replicas.shared_document import Snapshot, Unreachable


class Store:
    """Store of one document. `now` is the clock of the store, in Unix time."""

    def __init__(self, now: Callable[[], float] = lambda: 1_767_225_600.5) -> None:
        self.version = 0
        self.content = b""
        self.now = now
        self.reads = self.writes = 0
        self.documents: list[MemoryDocument] = []

    def document(self, replica: str) -> "MemoryDocument":
        document = MemoryDocument(self, replica)
        self.documents.append(document)
        return document

    def replace(self, content: bytes) -> None:
        self.version += 1
        self.content = content
        self.writes += 1
        for document in self.documents:
            document.wake_up()

    def lose_data(self) -> None:
        """Forget the document, and begin again at version 0, as Redis after FLUSHALL."""
        self.version, self.content = 0, b""


class MemoryDocument:
    """The document as one replica sees it; implements `SharedDocument`."""

    def __init__(self, store: Store, replica: str) -> None:
        self.replica = replica
        self.is_up = True
        self.is_deaf = False
        """True if wake-ups are lost."""
        self.hangs = False
        self._store = store
        self._wake: Callable[[], None] = lambda: None

    def listen(self, wake: Callable[[], None]) -> None:
        self._wake = wake

    def wake_up(self) -> None:
        if self.is_up and not self.is_deaf:
            self._wake()

    def cut_off(self) -> None:
        self.is_up = False

    def join(self) -> None:
        self.is_up = True
        self.wake_up()

    async def read(self) -> Snapshot:
        await self._check()
        self._store.reads += 1
        return Snapshot(self._store.version, self._store.content)

    async def write(self, content: bytes, version: int) -> bool:
        await self._check()
        if version != self._store.version:
            return False
        self._store.replace(content)
        return True

    def now(self) -> float:
        return self._store.now()

    async def _check(self) -> None:
        while self.hangs:
            await asyncio.sleep(0.01)
        if not self.is_up:
            raise Unreachable
