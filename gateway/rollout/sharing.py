"""Exchange of the roll-out with the other replicas, through a shared document.

Every replica has the whole state. An order is in force on its replica before anything is sent. Then
the replica reads the document, merges it with its own state, applies what is new, and writes the
result if it says more than the document did. The write wakes the others, which do the same. A replica
that was cut off, a store that has lost its data, and two orders at once need no other treatment.

A wake-up can be lost, so the document is read every `POLL_SECONDS` as well. One that is no document
is replaced, and one of another version of the gateway is left alone.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from gateway.replicas.shared_document import SharedDocument, Snapshot, Unreachable
from gateway.rollout.shared import SharedRollout
from gateway.rollout.shared_state import OtherFormat, SharedState, decode, encode

POLL_SECONDS = 2.0
SHARE_SECONDS = 0.5
"""Longest time that an answer waits for the store. The order is already in force here."""
START_SECONDS = 1.0
"""Longest time that a start waits for the state of the others."""
ATTEMPTS = 20
"""Attempts to write although others write at the same time, until the next wake-up."""

_log = logging.getLogger(__name__)


class RolloutSharing:
    """Keeps `rollout` and `document` the same, from `start` to `close`."""

    def __init__(self, rollout: SharedRollout, document: SharedDocument) -> None:
        self._rollout = rollout
        self._document = document
        self._wake = asyncio.Event()
        self._synced = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._reported: Snapshot | None = None
        """Document that was last reported as unusable."""
        self._unfollowed: dict[str, str] = {}
        self.on_state: Callable[[], None] = lambda: None
        """Called when the state that replicas share has changed, by an order here or elsewhere."""
        rollout.on_order = self._send
        document.listen(self._wake.set)

    def __repr__(self) -> str:
        return f"<RolloutSharing of {self.replica}, {'in sync' if self.is_in_sync else 'behind'}>"

    @property
    def replica(self) -> str:
        """Name of this replica."""
        return self._document.replica

    @property
    def is_in_sync(self) -> bool:
        """True if the store has all that this replica knows, and answered last."""
        return self._rollout.is_in_sync and self._document.is_up

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Begin the exchange; return when this replica has the state of the others, or could not get it."""
        self._task = asyncio.create_task(self._run())
        with suppress(TimeoutError):
            async with asyncio.timeout(START_SECONDS):
                await self._synced.wait()
        note = self._rollout.note()
        if note is not None:
            _log.warning("%s", note)

    async def close(self) -> None:
        """End the exchange. What the others do not have yet is sent first, if the store answers."""
        if self._task is None:
            return
        await self.shared()
        while not self._task.done():  # a cancellation that meets a timeout within the store's client may be lost
            self._task.cancel()
            await asyncio.wait([self._task], timeout=0.1)

    async def shared(self) -> bool:
        """Wait until the store has all that this replica knows; return False if it does not take it in time."""
        if not self._rollout.is_in_sync and self._document.is_up:
            self._synced.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(SHARE_SECONDS):
                    await self._synced.wait()
        return self.is_in_sync

    def _send(self) -> None:
        self._follow_state()
        self._wake.set()

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._exchange()
            except Unreachable:
                self._rollout.is_in_sync = False  # `listen` wakes when the store is back
            except Exception:
                self._rollout.is_in_sync = False
                _log.exception("the roll-out could not be exchanged with the other replicas")
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _exchange(self) -> None:
        """Make the document and the roll-out the same.

        Raises:
            Unreachable: The store does not answer.
        """
        for _ in range(ATTEMPTS):
            snapshot = await self._document.read()
            try:
                theirs = self._decoded(snapshot)
            except OtherFormat:
                self._rollout.is_in_sync = False
                self._report(snapshot, "another version of the gateway wrote it, so this replica follows its own")
                return
            before = self._rollout.shared_state
            knows_more = self._rollout.merge(theirs)
            state = self._rollout.shared_state
            if state is not before:
                self._follow_state()
            is_stored = not knows_more or await self._document.write(encode(state), snapshot.version)
            if is_stored and state is self._rollout.shared_state:
                self._rollout.is_in_sync = True
                self._synced.set()
                return
        self._wake.set()

    def _decoded(self, snapshot: Snapshot) -> SharedState:
        if not snapshot.content:
            return SharedState()
        found = decode(snapshot.content)
        if found is None:
            self._report(snapshot, "it cannot be read, so it is replaced by the roll-out of this replica")
            return SharedState()
        return found

    def _report(self, snapshot: Snapshot, problem: str) -> None:
        if snapshot != self._reported:
            self._reported = snapshot
            _log.error("the roll-out that the replicas share: %s", problem)

    def _follow_state(self) -> None:
        self.on_state()
        unfollowed = self._rollout.unfollowed()
        for tier, reason in unfollowed.items():
            if self._unfollowed.get(tier) != reason:
                _log.warning("tier %s does not follow the other replicas: %s", tier, reason)
        self._unfollowed = unfollowed
