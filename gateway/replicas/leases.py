"""Leases of slots: this replica's part of each shared limit, kept up to date with Redis.

`gateway/admission/shared_limits.py` says what a replica tells and may use, `operations.lua` how slots are divided.

A task reports to Redis, one report at a time:

- all limits every `BEAT_SECONDS`, which also keeps the leases alive;
- those limits at once whose report could move a slot, when a request is queued or ends, and when Redis wakes this
  replica because another one waits or slots are free.

No request waits for an answer: it runs with the slots at hand, or it is queued, as always. The answer to a report
lets queued requests run.

A lease is valid for `LEASE_SECONDS` from the time at which its report was sent, which is less than Redis counts. If
Redis cannot be reached, the replica is alone: it goes on with an equal share (`SharedLimits.go_alone`), and reports
what it then holds when the link is up again.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Self

from gateway.admission.shared_limits import SLICE_SECONDS, Grant, SharedAdaptiveLimit, SharedLimit, SharedLimits
from gateway.replicas.link import Argument, LinkDown, RedisLink, key
from gateway.replicas.tasks import end

BEAT_SECONDS = 1.0
LEASE_SECONDS = 4.5
"""Less than TTL in `operations.lua`, by what the clocks of two machines may differ in that time."""
GUARD_SECONDS = 0.25
"""Time at the beginning of a turn in which no replica begins a request, because clocks and timers differ."""
PAUSE_SECONDS = 0.001
"""Shortest time between two reports."""
REPORT_LENGTH = 10
GRANT_LENGTH = 7
LIMITS_PER_CALL = 256
"""Limits in one call, so that no call keeps Redis busy for long."""
MEMBERS = "replicas"
LIMIT_PREFIX = "limit "
WAKE_PREFIX = "wake "

_log = logging.getLogger(__name__)


class Leases:
    """Keeps the leases of `limits`. Enter it (`async with`) inside the link.

    `known_replicas` is the number of replicas before the last stop of this one, which counts if Redis cannot be
    reached at the start. `on_change` is called when `replicas` or `is_alone` has changed.
    """

    def __init__(
        self,
        link: RedisLink,
        limits: SharedLimits,
        known_replicas: int = 1,
        on_change: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._link = link
        self._limits = limits
        self._clock = clock
        self._on_change = on_change
        limits.on_change = self._examine_soon
        self.replicas = known_replicas
        """Replicas that share the limits, as last seen, this one included."""
        self.place = 0
        self.is_alone = False
        """Whether this replica goes on with its share, because Redis cannot be reached."""
        self._has_counted = False
        self._is_leaving = False
        self._sequence = 0
        self._lease_end = -math.inf
        self._next_beat = -math.inf
        self._recovery_end = -math.inf
        self._next_turn = -math.inf
        self._server_offset = 0.0
        self._due: set[str] = set()
        self._event = asyncio.Event()
        self._is_scheduled = False
        self._task: asyncio.Task[None] | None = None
        self._warned: set[str] = set()
        link.watch(self._on_up, self._on_down)
        link.subscribe(WAKE_PREFIX + link.replica, self._on_wake)

    def __repr__(self) -> str:
        return f"<Leases {'alone' if self.is_alone else 'shared'}, {self.replicas} replicas, {self._limits!r}>"

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="leases")
        return self

    async def __aexit__(self, *_: object) -> None:
        """Give back all slots at once, if Redis can be reached."""
        if self._task is not None:
            await end(self._task)
        self._limits.on_change = lambda: None
        with suppress(LinkDown):
            await self._release([*self._limits.by_name], is_leaving=True)

    def begin_leaving(self) -> None:
        """Hold no more slots than needed from now on, because the gateway stops."""
        self._is_leaving = True
        self._next_beat = -math.inf
        self._event.set()

    @property
    def sharing(self) -> int:
        """Number of replicas that share the limits now: 1 while this one is alone."""
        return 1 if self.is_alone else self.replicas

    def view(self) -> dict[str, Any]:
        """Return the state for `/ops/status`."""
        return {
            "replica": self._link.replica,
            "redis": self._link.address,
            "up": self._link.is_up,
            "since": self._link.changed,
            "reason": self._link.failure or None,
            "sharing": self.sharing,
            "replicas": self.replicas,
            "limits": [
                {"name": limit.name, "limit": limit.total, "share": limit.limit, "running": limit.count}
                for limit in self._limits.by_name.values()
            ],
        }

    # Reasons to report

    def _on_up(self) -> None:
        self._next_beat = -math.inf
        self._event.set()

    def _on_down(self) -> None:
        self._event.set()

    def _on_wake(self, message: bytes) -> None:
        prefix = key(LIMIT_PREFIX)
        self._due.update(name.removeprefix(prefix) for name in message.decode().split("\n"))
        self._event.set()

    def _examine_soon(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._examine)

    def _examine(self) -> None:
        self._is_scheduled = False
        if not self.is_alone:
            self._event.set()

    def _take_due(self) -> tuple[list[SharedLimit], bool]:
        """Return the limits to report on now, and whether these are all."""
        limits = self._limits.by_name
        self._limits.measure()
        now = self._clock()
        if now >= self._next_beat or (self._recovery_end <= now and self._recovery_end > -math.inf):
            self._next_beat = now + BEAT_SECONDS
            self._recovery_end = -math.inf
            self._due.clear()
            return list(limits.values()), True
        due = [limit for name, limit in limits.items() if name in self._due or limit.is_due]
        self._due.clear()
        return due, False

    # Reports

    async def _run(self) -> None:
        started = self._clock()
        while True:
            if self._link.is_up:
                due, is_beat = self._take_due()
                if due or is_beat:
                    try:
                        await self._report(due, is_beat)
                    except LinkDown:
                        self._next_beat = self._clock() + BEAT_SECONDS
                    else:
                        self._limits.refresh()
                        await asyncio.sleep(PAUSE_SECONDS)
                        continue
            if self._link.failure or self._clock() > max(self._lease_end, started + 2 * BEAT_SECONDS):
                self._go_alone()
            await self._wait()

    async def _wait(self) -> None:
        """Wait until there may be something to report, or something else to do."""
        now = self._clock()
        ends = [self._next_beat, self._recovery_end] if self._link.is_up else [self._next_turn]
        seconds = min((end - now for end in ends if end > now), default=BEAT_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(min(seconds, BEAT_SECONDS)):
                await self._event.wait()
        self._event.clear()

    async def _report(self, due: Sequence[SharedLimit], is_beat: bool) -> None:
        if is_beat:
            unused = self._limits.take_unused()
            if unused:
                await self._release(unused)
            for limit in due:
                if isinstance(limit, SharedAdaptiveLimit):
                    limit.begin_period()
        for start in range(0, max(1, len(due)), LIMITS_PER_CALL):
            await self._report_some(due[start : start + LIMITS_PER_CALL])

    async def _report_some(self, limits: Sequence[SharedLimit]) -> None:
        self._sequence += 1
        arguments: list[Argument] = [self._link.replica, self._sequence, int(self._is_leaving), key(WAKE_PREFIX)]
        for limit in limits:
            arguments.extend(limit.report())
        sent = self._clock()
        answer = await self._link.call("report", [MEMBERS, *(LIMIT_PREFIX + limit.name for limit in limits)], arguments)
        if answer:
            self._apply(answer, limits, sent)

    def _apply(self, answer: Sequence[Any], limits: Sequence[SharedLimit], sent: float) -> None:
        server_time, replicas, place, recovery = map(int, answer[:4])
        self._lease_end = sent + LEASE_SECONDS
        self._server_offset = server_time / 1000 - sent
        if recovery:
            self._recovery_end = self._clock() + recovery / 1000
        self.place = place
        self._count(max(1, replicas))
        for number, limit in enumerate(limits):
            self._apply_grant(limit, Grant(*answer[4 + number * GRANT_LENGTH : 4 + (number + 1) * GRANT_LENGTH]))

    def _apply_grant(self, limit: SharedLimit, grant: Grant) -> None:
        if grant.total < limit.configured and not grant.version and limit.name not in self._warned:
            self._warned.add(limit.name)
            _log.warning(
                "limits: %s is %d here and %d on another replica; the smallest counts",
                limit.name, limit.configured, grant.total,
            )  # fmt: skip
        if limit.apply(grant) and isinstance(limit, SharedAdaptiveLimit):
            limit.on_learned()

    def _count(self, replicas: int) -> None:
        if replicas == self.replicas and not self.is_alone and self._has_counted:
            return
        if self.is_alone:
            _log.info("limits: shared by %d replicas again", replicas)
        elif replicas == self.replicas:
            _log.info("limits: shared by %d replicas", replicas)
        else:
            _log.info("limits: shared by %d replicas, before by %d", replicas, self.replicas)
        self.replicas, self.is_alone, self._has_counted = replicas, False, True
        self._on_change()

    async def _release(self, names: Sequence[str], *, is_leaving: bool = False) -> None:
        keys = [MEMBERS, *(LIMIT_PREFIX + name for name in names)]
        await self._link.call("release", keys, [self._link.replica, key(WAKE_PREFIX), int(is_leaving)])

    # Without Redis

    def _go_alone(self) -> None:
        now = self._clock()
        if not self.is_alone:
            self.is_alone = True
            _log.warning(
                "limits: not shared now; this replica goes on with 1/%d of each, until Redis is back", self.replicas
            )
            self._on_change()
        number, position = divmod(now + self._server_offset, SLICE_SECONDS)
        has_begun = position >= GUARD_SECONDS
        self._next_turn = now + (SLICE_SECONDS if has_begun else GUARD_SECONDS) - position
        turn = int(number) if has_begun else None
        self._limits.go_alone(self.replicas, self.place, turn, may_grow=now >= self._lease_end)
