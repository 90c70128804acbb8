"""A document that replicas share, in Redis: a hash with its version and content."""

import time
from collections.abc import Callable

from gateway.replicas.link import LinkDown, RedisLink
from gateway.replicas.names import replica_name
from gateway.replicas.shared_document import MAX_BYTES, Snapshot, Unreachable


class RedisDocument:
    """The document `name`; implements `SharedDocument`. Build it before the link is entered."""

    def __init__(self, link: RedisLink, name: str, wall: Callable[[], float] = time.time) -> None:
        self.replica = replica_name(link.replica)
        self._link = link
        self._name = name
        self._wall = wall
        self._ahead = 0.0
        """Seconds by which the clock of Redis is ahead of this machine's."""

    def __repr__(self) -> str:
        return f"<RedisDocument {self._name} at {self._link.address}>"

    @property
    def is_up(self) -> bool:
        return self._link.is_up

    def listen(self, wake: Callable[[], None]) -> None:
        self._link.subscribe(self._name, lambda message: wake())
        self._link.watch(on_up=wake)

    async def read(self) -> Snapshot:
        try:
            version, content, milliseconds = await self._link.call("read_document", [self._name], [MAX_BYTES])
        except LinkDown:
            raise Unreachable from None
        self._ahead = milliseconds / 1000 - self._wall()
        return Snapshot(version, content)

    async def write(self, content: bytes, version: int) -> bool:
        try:
            return bool(await self._link.call("write_document", [self._name], [version, content]))
        except LinkDown:
            raise Unreachable from None

    def now(self) -> float:
        return self._wall() + self._ahead
