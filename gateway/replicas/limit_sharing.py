"""The limits that this replica shares with others through Redis, and the link to it."""

from collections.abc import Callable
from typing import Any

from gateway.admission.shared_limits import SharedLimits
from gateway.replicas.leases import Leases
from gateway.replicas.link import RedisLink
from gateway.replicas.redis_document import RedisDocument
from gateway.state_file import StateFile

SECTION = "replicas"
MOST_REPLICAS = 1000
ROLLOUT = "rollout"


def open_link(url: str) -> tuple[RedisLink, RedisDocument]:
    """Return the link to Redis at `url`, and the document with the roll-out there."""
    link = RedisLink(url)
    return link, RedisDocument(link, ROLLOUT)


class LimitSharing(Leases):
    """Leases of `limits` that remember the number of replicas. Enter it (`async with`) inside the link.

    `state` keeps that number. This replica divides the limits by it if Redis cannot be reached at its next
    start. `on_count` is called with the number of replicas that share the limits when it has changed.
    """

    def __init__(
        self, link: RedisLink, limits: SharedLimits, state: StateFile, on_count: Callable[[int], None]
    ) -> None:
        self._state = state
        self._on_count = on_count
        super().__init__(link, limits, _known_replicas(state.get(SECTION)), self._changed)

    def _changed(self) -> None:
        self._state.put(SECTION, self.replicas)
        self._on_count(self.sharing)


def _known_replicas(kept: Any) -> int:
    return kept if isinstance(kept, int) and 1 <= kept <= MOST_REPLICAS else 1
