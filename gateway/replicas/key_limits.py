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
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, Self

from gateway.keys.account import Account
from gateway.keys.accounts import Accounts
from gateway.keys.allowance import Allowance
from gateway.keys.headers import utc_date
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE
from gateway.replicas.link_down import LinkDown
from gateway.replicas.shared_allowance import REPEAT_SECONDS, Amounts, Answer, Report, SharedAllowance
from gateway.replicas.tasks import end

ROUND_SECONDS = 0.5
"""Time between two reports of what is used."""
WAIT_SECONDS = 0.25
"""Longest time that a request waits for a quota before this replica goes on alone with the limit."""
SILENT_SECONDS = 5.0
BATCH = 250
"""Limits from which on a call is long enough, and keys and persons that are looked at in one step."""

_SHORT = {
    REQUESTS_PER_MINUTE: "requests",
    TOKENS_PER_MINUTE: "tokens",
    TOKENS_PER_DAY: "day",
    CONCURRENCY: "running",
}
_log = logging.getLogger(__name__)

_Name = tuple[str, str | None]
"""Names of a key, and of a person behind it."""


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
        self._active: dict[_Name, SharedAllowance] = {}
        self._urgent: OrderedDict[_Name, None] = OrderedDict()
        """Those for which requests wait."""
        self._work: OrderedDict[_Name, None] = OrderedDict()
        """Those whose turn it is, unless requests wait for others."""
        self._soon: OrderedDict[_Name, None] = OrderedDict()
        """Those whose turn it is after `ROUND_SECONDS`."""
        self._later: deque[tuple[float, _Name]] = deque()
        """Those whose turn it is from a time on, in its order."""
        self._wake = asyncio.Event()
        self._reporting = asyncio.Lock()
        self._reported_at = -math.inf
        self._next_round: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = None
        link.watch(on_up=self._join, on_down=self._go_alone)
        accounts.share(self)

    def __repr__(self) -> str:
        return f"<SharedKeyLimits {len(self._active)} in use, {self.replicas} replicas>"

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Give back what is not used, if Redis answers."""
        if self._task is None:
            return
        await end(self._task)
        for each in self._active.values():
            each.give_back()
        self._work.update(dict.fromkeys(self._active))
        with suppress(LinkDown):
            while self._work:
                await self._report()

    # Requests

    async def make_room(self, account: Account, person: str, requests: int, tokens: int) -> None:
        """Wait for the quotas that a request needs, if it would exceed those that are here.

        It returns as well if the limit is used up, or Redis does not answer: then a share of the limit counts.
        For the arguments see `Allowance.lacking`; `person` counts only if the key tells persons apart.
        """
        second = account.second()
        if account.policy.per_person is None and account.allowance.has_room(requests, tokens, second):
            return
        lacking = self._lacking(account, person, requests, tokens)
        if not lacking:
            return
        if self._link.is_up:
            with suppress(TimeoutError):
                async with asyncio.timeout(WAIT_SECONDS):
                    while lacking and await self._next_answer(lacking):
                        # other requests may have used what the answer gave
                        lacking = self._lacking(account, person, requests, tokens)
        for each, _ in lacking:
            each.go_alone(self.replicas)

    def _lacking(
        self, account: Account, person: str, requests: int, tokens: int
    ) -> list[tuple[SharedAllowance, Amounts]]:
        """Return what a request needs where a quota is used up, unless asking for more is useless.

        It needs the other quotas of the same allowance too, which a report lowers to what is needed.
        """
        lacking, second = [], account.second()
        for name, allowance in account.allowances(person, second):
            if not allowance.lacking(requests, tokens, second):
                continue
            each = self._used(account, name, allowance)
            if each.dry_until <= self._clock():
                lacking.append((each, allowance.needs(requests, tokens)))
        return lacking

    async def _next_answer(self, lacking: Sequence[tuple[SharedAllowance, Amounts]]) -> bool:
        """Ask for what is lacking, and return whether there was an answer."""
        asked = [(each, each.reports) for each, _ in lacking]
        for each, needs in lacking:
            each.need(needs)
            self._urgent[each.key] = None
        self._wake.set()
        while await asyncio.shield(self._next_round):
            if all(each.reports > before or self._active.get(each.key) is not each for each, before in asked):
                return True
        return False

    def _used(self, account: Account, person: str | None, allowance: Allowance) -> SharedAllowance:
        name = account.name, person
        found = self._active.get(name)
        if found is None or found.allowance is not allowance:
            found = self._active[name] = SharedAllowance(account, person, allowance)
        return found

    # Reports

    def _join(self) -> None:
        """Report everything; until Redis has answered, no more may be used than was."""
        self._reported_at = -math.inf
        for each in self._active.values():
            each.join()
        self._work.update(dict.fromkeys(self._active))
        self._wake.set()

    def _go_alone(self) -> None:
        for each in self._active.values():
            each.go_alone(self.replicas)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        turn_at = loop.time() + ROUND_SECONDS
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(turn_at):
                    await self._wake.wait()
            self._wake.clear()
            is_turn = loop.time() >= turn_at
            if is_turn:
                turn_at = loop.time() + ROUND_SECONDS
            await self._report_now(is_turn)

    async def _report_now(self, is_turn: bool = True) -> None:
        """Make one round: report, and let the requests go on that wait for it.

        Without `is_turn`, only what requests wait for, and what is left of the round before.
        """
        async with self._reporting:
            if is_turn:
                self._collect()
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
        reports: list[Report] = []
        for looked_at, some in enumerate(self._reports(), 1):
            reports += some
            if len(reports) >= BATCH or looked_at >= BATCH:  # requests wait no longer than for one call
                self._wake.set()
                break
        if reports or self._clock() - self._reported_at >= REPEAT_SECONDS:
            await self._send(reports)  # without a report, it counts this replica
        else:
            await asyncio.sleep(0)  # the next round follows at once if there is more to look at

    async def _send(self, reports: Sequence[Report]) -> None:
        self._reported_at = self._clock()
        date = utc_date(self._wall())
        keys = ["limit:replicas", *(_key(report, date) for report in reports)]
        arguments: list[str | int] = [self.name, self._predecessor]
        for report in reports:
            arguments += [_SHORT[report.limit], report.total, report.used, report.wanted, report.largest]
        replicas, *answers = await self._link.call("share_limits", keys, arguments)
        self.replicas = max(1, replicas)
        now = self._clock()
        for number, report in enumerate(reports):
            report.of.apply(report, Answer(*answers[4 * number : 4 * number + 4]), now)

    def _collect(self) -> None:
        """Note whose turn it is. Of many persons, those who can have something to report."""
        now = self._clock()
        if not self._work:  # as a rule: nothing is copied, of which there may be much
            self._work, self._soon = self._soon, self._work
        else:
            self._work.update(self._soon)
            self._soon.clear()
        while self._later and self._later[0][0] <= now:
            self._work[self._later.popleft()[1]] = None

    def _reports(self) -> Iterator[list[Report]]:
        """Yield what has to be reported of each, and lower the quotas that are not needed any more."""
        now = self._clock()
        while self._urgent or self._work:
            name, _ = (self._urgent or self._work).popitem(last=False)
            self._work.pop(name, None)
            each = self._active.get(name)
            if each is None:
                continue
            reports = each.report(now, self.replicas)
            wait = 0.0 if reports else each.next_look(now)  # the answer may change what is held
            if wait is None:
                del self._active[name]
            elif wait:
                self._later.append((now + wait, name))
            else:
                self._soon[name] = None
            yield reports


def _key(report: Report, date: str) -> str:
    day = f"{date}:" if report.limit == TOKENS_PER_DAY else ""
    return f"limit:{_SHORT[report.limit]}:{day}{report.of.name}"
