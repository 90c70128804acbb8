"""Limits of keys and persons that replicas share: each has a quota of every limit that it uses.

A replica admits requests by its quotas alone, so a request waits for Redis only if a quota is used up.
Redis keeps, for each limit and replica, how much the replica may use ("held") and has used. What all
hold together never exceeds the limit, so neither does what all use: a window that counts the last
minute stays below its quota, whenever the minute begins. A replica lowers a quota before it says so,
and raises one after Redis has said so.

A quota is what is used, plus a block for the requests of the next seconds. A block is the smaller the
less of the limit is free, and goes back when the key is idle, so hardly anything of a limit lies idle
with a replica that does not need it.

While Redis cannot be reached, a quota is the limit divided by the number of replicas, at least 1, and of
the tokens of the day, that part of what was left. A replica that was not heard for `SILENT_SECONDS` loses
what it holds and has not used.
"""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

from gateway.keys.account import Account
from gateway.keys.accounts import Accounts
from gateway.keys.allowance import Allowance
from gateway.keys.headers import utc_date
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE
from gateway.replicas.link_down import LinkDown

ROUND_SECONDS = 0.5
"""Time between two reports of what is used."""
WAIT_SECONDS = 0.25
"""Longest time that a request waits for a quota before this replica goes on alone with the limit."""
SILENT_SECONDS = 5.0
REPEAT_SECONDS = 2.0
"""Time after which use is reported again although nothing has changed, so that Redis knows that this replica lives."""
DRY_SECONDS = 0.1
"""Time for which this replica does not ask again for a limit of which it did not get all that it asked for."""
BLOCK_SHARE = 4
"""A block has at most this part (1 / n) of what is free, divided by the number of replicas."""
GROWTH = 4
"""A block is this many times what was used since the last report."""
BATCH = 250
"""Limits in one call."""

_SHORT = {
    REQUESTS_PER_MINUTE: "requests",
    TOKENS_PER_MINUTE: "tokens",
    TOKENS_PER_DAY: "day",
    CONCURRENCY: "running",
}
_log = logging.getLogger(__name__)

Amounts = dict[str, int]
"""Amounts by the name of the limit."""


class SharedAllowance:
    """The limits of a key, or of one person behind it, as this replica shares them."""

    def __init__(self, account: Account, person: str | None, allowance: Allowance) -> None:
        self.account = account
        self.allowance = allowance
        digest = "" if person is None else f":{sha256(person.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
        self.name = f"{account.name}{digest}"
        self.needs: Amounts = {}
        """What requests wait for."""
        self.largest: Amounts = {}
        """The most that one of them waits for."""
        self.free: Amounts = {}
        """What nobody holds, as it was last told."""
        self.reported: Amounts = {}
        """Use that was last reported."""
        self.reported_at = -math.inf
        self.dry_until = 0.0
        """Time until which asking for more is useless."""

        self._alone: tuple[int, int] | None = None
        """Day for which the rest of the tokens was divided, and this replica's part of them."""

    def __repr__(self) -> str:
        return f"<SharedAllowance {self.name} {self.allowance}>"

    @property
    def is_idle(self) -> bool:
        """True if nothing is used, reported as used, or waited for."""
        return not (self.needs or any(self.reported.values()) or any(self.allowance.shared_use().values()))

    def need(self, amounts: Amounts) -> None:
        """Ask for more than the quotas."""
        for limit, amount in amounts.items():
            self.needs[limit] = self.needs.get(limit, 0) + amount
            self.largest[limit] = max(self.largest.get(limit, 0), amount)

    def wanted(self, limit: str, used: int, replicas: int) -> int:
        """Return the quota to ask for: what is used and waited for, and a block."""
        need = self.needs.get(limit, 0)
        growth = max(0, used - self.reported.get(limit, 0)) + need
        most = self.free.get(limit, 0) // (BLOCK_SHARE * replicas)
        return used + need + max(0, min(GROWTH * growth, most))

    def join(self) -> None:
        """Use no more than what is used, until a quota has been told."""
        self.reported_at = -math.inf
        self._alone = None
        for limit, used in self.allowance.shared_use().items():
            self.allowance.set_quota(limit, used)

    def go_alone(self, replicas: int) -> None:
        """Go on with a share of the limits."""
        allowance = self.allowance
        for limit, value in allowance.limits.given().items():
            if limit == TOKENS_PER_DAY:
                if self._alone is None or self._alone[0] != allowance.day:  # once, or each time some of the rest
                    left = max(0, value - allowance.day_tokens - allowance.day_others)
                    self._alone = allowance.day, allowance.day_tokens + left // replicas
                allowance.set_quota(limit, self._alone[1])
            else:
                share = max(1, value // replicas)
                allowance.set_quota(limit, share, value - share)


class _Report(NamedTuple):
    """Report about one limit."""

    of: SharedAllowance
    limit: str
    used: int
    wanted: int


class Link(Protocol):
    """Link to what the replicas share: Redis, or the parent of the replicas of one machine."""

    @property
    def replica(self) -> str:
        """Id of this replica, another one for each start of the process."""

    @property
    def is_up(self) -> bool: ...

    def watch(self, on_up: Callable[[], None], on_down: Callable[[], None]) -> None: ...

    async def call(self, operation: str, keys: Sequence[str], arguments: Sequence[str | int]) -> Any: ...


class SharedKeyLimits:
    """Shares the limits of `accounts` with the other replicas, from `start` to `close`.

    `name` is this replica's, and `predecessor` that of the process that wrote the state file, whose use of
    the day this one continues. `replicas` is the last known number of them.
    """

    def __init__(
        self,
        link: Link,
        accounts: Accounts,
        name: str,
        *,
        predecessor: str = "",
        replicas: int = 1,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._link = link
        self._accounts = accounts
        self.name = name
        self._predecessor = predecessor
        self.replicas = max(1, replicas)
        self._clock = clock
        self._wall = wall
        self._active: dict[tuple[str, str | None], SharedAllowance] = {}
        self._wake = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._reported_at = -math.inf
        self._next_round: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        link.watch(on_up=self._join, on_down=self._go_alone)
        accounts.share(self)

    def __repr__(self) -> str:
        return f"<SharedKeyLimits {len(self._active)} in use, {self.replicas} replicas>"

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give back what is not used, if Redis answers."""
        if self._task is None:
            return
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task
        for each in self._active.values():
            each.needs, each.free, each.reported_at = {}, {}, -math.inf
        with suppress(LinkDown):
            await self._report()

    # Requests

    async def make_room(self, account: Account, person: str, requests: int, tokens: int) -> None:
        """Wait for the quotas that a request needs, if it would exceed those that are here.

        It returns as well if the limit is used up, or Redis does not answer: then a share of the limit counts.
        For the arguments see `Allowance.lacking`; `person` counts only if the key tells persons apart.
        """
        second = account.look_at_clock()
        lacking = []
        for name, allowance in account.allowances(person, second):
            needs = allowance.lacking(requests, tokens, second)
            if needs and (each := self._used(account, name, allowance)).dry_until <= self._clock():
                lacking.append((each, needs))
        if not lacking:
            return
        if self._link.is_up:
            for each, needs in lacking:
                each.need(needs)
            self._wake.set()
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    if await asyncio.shield(self._next_round):
                        return
        for each, _ in lacking:
            each.go_alone(self.replicas)

    def _used(self, account: Account, person: str | None, allowance: Allowance) -> SharedAllowance:
        key = account.name, person
        found = self._active.get(key)
        if found is None or found.allowance is not allowance:
            found = self._active[key] = SharedAllowance(account, person, allowance)
        return found

    # Reports

    def _join(self) -> None:
        """Report everything; until Redis has answered, no more may be used than was."""
        self._reported_at = -math.inf
        for each in self._active.values():
            each.join()
        self._wake.set()

    def _go_alone(self) -> None:
        for each in self._active.values():
            each.go_alone(self.replicas)

    async def _run(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(ROUND_SECONDS):
                    await self._wake.wait()
            self._wake.clear()
            await self._report_now()

    async def _report_now(self) -> None:
        """Make one round: report, and let the requests go on that wait for it."""
        async with self._reporting:
            this_round, self._next_round = self._next_round, asyncio.get_running_loop().create_future()
            has_answer = False
            try:
                await self._report()
                has_answer = True
            except LinkDown:
                pass
            except Exception:
                _log.exception("the limits of keys could not be shared with the other replicas")
            finally:
                this_round.set_result(has_answer)

    async def _report(self) -> None:
        """Report what is used and wanted, and apply the quotas that Redis answers.

        Raises:
            LinkDown: Redis does not answer.
        """
        if not self._link.is_up:
            raise LinkDown
        found, now = list(self._reports()), self._clock()
        if not found and now - self._reported_at < REPEAT_SECONDS:
            return
        self._reported_at = now
        for begin in range(0, max(1, len(found)), BATCH):  # without a report, it counts this replica
            reports = found[begin : begin + BATCH]
            date = utc_date(self._wall())
            keys = ["limit:replicas", *(_key(report, date) for report in reports)]
            arguments: list[str | int] = [self.name, self._predecessor]
            for report in reports:
                total = report.of.allowance.limits.given()[report.limit]
                arguments += [_SHORT[report.limit], total, report.used, report.wanted]
                arguments.append(report.of.largest.pop(report.limit, 0))
            replicas, *answers = await self._link.call("share_limits", keys, arguments)
            self.replicas = max(1, replicas)
            for number, report in enumerate(reports):
                _apply(report, *answers[4 * number : 4 * number + 4])
                if report.of.allowance.quota(report.limit) < report.wanted:
                    report.of.dry_until = self._clock() + DRY_SECONDS

    def _reports(self) -> Iterator[_Report]:
        """Yield what has to be reported, and lower the quotas that are not needed any more."""
        now = self._clock()
        for key, each in list(self._active.items()):
            allowance, account = each.allowance, each.account
            second = account.look_at_clock()
            allowance.turn_to(account.day)
            allowance.advance(second)
            if each.is_idle:
                del self._active[key]
            is_due = bool(each.needs) or now - each.reported_at >= REPEAT_SECONDS
            for limit, used in allowance.shared_use().items():
                wanted, quota = each.wanted(limit, used, self.replicas), allowance.quota(limit)
                if not (is_due or used != each.reported.get(limit, 0) or wanted != quota):
                    continue
                if quota > wanted:
                    allowance.set_quota(limit, wanted)
                each.reported_at = now
                yield _Report(each, limit, used, wanted)
            each.needs = {}


def _key(report: _Report, date: str) -> str:
    day = f"{date}:" if report.limit == TOKENS_PER_DAY else ""
    return f"limit:{_SHORT[report.limit]}:{day}{report.of.name}"


def _apply(report: _Report, quota: int, others: int, held: int, earlier: int) -> None:
    """Apply the answer to a report.

    `others` is what the other replicas have used, `held` what they may use, and `earlier` what the
    predecessor has used besides what is known here.
    """
    each, limit = report.of, report.limit
    if limit == TOKENS_PER_DAY:
        each.allowance.day_tokens += earlier
    each.allowance.set_quota(limit, quota, others)
    each.reported[limit] = report.used + earlier
    total = each.allowance.limits.given().get(limit, 0)
    each.free[limit] = max(0, total - held - quota)
