"""Quotas of a key, or of one person behind it: what this replica reports and asks for. Pure.

`key_limits.py` describes how the replicas share a limit, and sends the reports.
"""

import math
from hashlib import sha256
from typing import NamedTuple

from gateway.keys.account import Account
from gateway.keys.allowance import Allowance
from gateway.keys.policy import REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE

REPEAT_SECONDS = 2.0
"""Time after which a quota is reported again although nothing has changed: Redis forgets those of silent replicas."""
DECAY_SECONDS = 3.0
"""Time between two reports of a limit of which nothing is held but what was used in the last minute."""
DRY_SECONDS = 0.1
"""Time for which this replica does not ask again for a limit of which it did not get all that it asked for."""
BLOCK_SHARE = 4
"""A block has at most this part (1 / n) of what is free, divided by the number of replicas."""
GROWTH = 4
"""A block is this many times what was used since the last report."""

Amounts = dict[str, int]
"""Amounts by the name of the limit."""


class Report(NamedTuple):
    """Report about one limit."""

    of: "SharedAllowance"
    limit: str
    total: int
    used: int
    wanted: int
    largest: int
    """The most that one waiting request needs."""
    day: int


class Answer(NamedTuple):
    """Answer to a report."""

    quota: int
    others: int
    """Use of the other replicas."""
    held: int
    """Amount that the other replicas may use."""
    earlier: int
    """Use of the predecessor, besides what is known here."""


class SharedAllowance:
    """The limits of a key, or of one person behind it, as this replica shares them.

    The caller passes the time, in seconds on a monotonic clock.
    """

    def __init__(self, account: Account, person: str | None, allowance: Allowance) -> None:
        self.key = account.name, person
        self.account = account
        self.allowance = allowance
        digest = "" if person is None else f":{sha256(person.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}"
        self.name = f"{account.name}{digest}"
        self.needs: Amounts = {}
        """Amounts that requests wait for."""
        self.largest: Amounts = {}
        """The most that one of them waits for."""
        self.free: Amounts = {}
        """Amounts that nobody held when Redis last answered."""
        self.reported: Amounts = {}
        """Use that was last reported."""
        self.reported_at = -math.inf
        self.reports = 0
        """Number of reports: what a request needs is in the next one."""
        self.dry_until = 0.0
        """Time until which asking for more is useless."""

        self._alone: tuple[int, int] | None = None
        """Day for which the rest of the tokens was divided, and this replica's part of them."""

    def __repr__(self) -> str:
        return f"<SharedAllowance {self.name} {self.allowance}>"

    def next_look(self, now: float) -> float | None:
        """Return after how many seconds to look again; None: not before a request needs more.

        What a replica has used is counted without a report, until its minute or its day is over.
        """
        allowance = self.allowance
        used = allowance.shared_use()
        if self.needs or allowance.running or any(allowance.quota(limit) > count for limit, count in used.items()):
            return 0.0
        is_used = used.get(REQUESTS_PER_MINUTE) or used.get(TOKENS_PER_MINUTE) or self.dry_until > now
        return DECAY_SECONDS if is_used else None

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

    def give_back(self) -> None:
        """Have the next reports ask for no more than what is used."""
        self.needs, self.free, self.reported_at = {}, {}, -math.inf

    def report(self, now: float, replicas: int) -> list[Report]:
        """Return what has to be reported, and lower the quotas that are not needed any more."""
        allowance = self.allowance
        second = self.account.second()  # this also turns the day
        allowance.turn_to(self.account.day)
        allowance.advance(second)
        is_due = bool(self.needs) or now - self.reported_at >= REPEAT_SECONDS
        totals, reports = allowance.limits.given(), []
        for limit, used in allowance.shared_use().items():
            wanted, quota = self.wanted(limit, used, replicas), allowance.quota(limit)
            if not (is_due or used != self.reported.get(limit, 0) or wanted != quota):
                continue
            if quota > wanted:
                allowance.set_quota(limit, wanted)
            self.reported_at = now
            largest = self.largest.get(limit, 0)
            reports.append(Report(self, limit, totals[limit], used, wanted, largest, allowance.day))
        self.needs, self.largest = {}, {}
        self.reports += 1
        return reports

    def apply(self, report: Report, answer: Answer, now: float) -> None:
        """Apply the answer to a report."""
        limit, allowance = report.limit, self.allowance
        if answer.quota < report.wanted:
            self.dry_until = now + DRY_SECONDS
        if limit not in allowance.limits.given() or (limit == TOKENS_PER_DAY and allowance.day != report.day):
            return  # the limit was removed, or the day has ended, while Redis was asked
        if limit == TOKENS_PER_DAY:
            allowance.day_tokens += answer.earlier
        allowance.set_quota(limit, answer.quota, answer.others)
        self.reported[limit] = report.used + answer.earlier
        self.free[limit] = max(0, report.total - answer.held - answer.quota)
