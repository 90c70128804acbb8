"""Account: a key at work. It admits requests, reserves their tokens, and settles what they took.

Pure apart from the clocks that it is given. Only the event loop calls it, and nothing here awaits,
so two requests cannot both take the last place.

How many tokens a request takes is known at its end. Before, an estimate is reserved: the size of
its text, and its `max_tokens`, or without one what the key's requests generated on average. At the
end the backend's count replaces the estimate. What an estimate was too low is counted when the
request ends, and later requests wait for it.
"""

from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from typing import Any, Protocol

from gateway.errors import BudgetSpent, ConcurrencyExceeded, ExpiredApiKey, RateLimited
from gateway.keys.allowance import SECONDS_PER_DAY, Allowance, seconds_to_midnight
from gateway.keys.headers import duration, has_lines, limit_lines, plain_lines, utc_midnight
from gateway.keys.hold import FIRST_COMPLETION, Hold
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE, KeyPolicy

Clock = Callable[[], float]

MAX_PERSONS = 10_000
"""Maximum number of persons that a key's account tells apart. Further ones share one allowance."""
MAX_PERSON = 128
"""Characters of a person's name that are kept; of a longer one, a digest."""
OTHERS = "(others)"
"""Name of the persons that have no allowance of their own."""


class LimitSharing(Protocol):
    """Source of quotas where replicas share the limits."""

    async def make_room(self, account: "Account", person: str, requests: int, tokens: int) -> None:
        """Wait for the quotas that a request needs, if there are more."""


class Account:
    """A key: its policy, and what is used of its limits.

    `clock` is monotonic, `wall` in Unix time; both in seconds. The second one is read once a minute,
    and when a day or the key ends: so a request reads one clock.
    """

    __slots__ = (
        "_day_ends", "_look_again", "_pruned", "_reset", "_reset_at", "allowance", "clock", "day", "downgrade",
        "has_lines", "is_expired", "name", "persons", "plain_lines", "policy", "sharing", "tiers", "typical", "wall",
    )  # fmt: skip

    def __init__(self, policy: KeyPolicy, clock: Clock, wall: Clock) -> None:
        self.name = policy.name
        self.clock = clock
        self.wall = wall
        self.sharing: LimitSharing | None = None
        """Source of quotas; None: the limits are this process's alone."""
        self.allowance = Allowance()
        self.persons: dict[str, Allowance] = {}
        self.typical = FIRST_COMPLETION
        """Average tokens of an answer whose request had no `max_tokens`."""
        self._pruned = 0
        self._reset, self._reset_at = b"", -1
        self.day = 0
        """The day in UTC, since the Unix epoch."""
        self.tiers: frozenset[str] | None = None
        """Tiers, embedding models and rerankers that it may use, as the settings spell them; None: all."""
        self.downgrade: str | None = None
        """Tier that serves when the tokens of the day are used up; None: the request is refused."""
        self.is_expired = False
        self.policy = policy
        self.change(policy)

    def __repr__(self) -> str:
        return f"<Account {self.name} {self.allowance}>"

    def change(self, policy: KeyPolicy) -> None:
        """Apply a policy of the same name. What is used stays used."""
        limits_of_persons, self.policy = self.policy.per_person, policy
        self.allowance.change(policy.limits)
        self.plain_lines = plain_lines(self.allowance, self.day_reset) if policy.per_person is None else None
        """Renders the lines of an answer to a request that was counted in the same second."""
        self.has_lines = has_lines(policy.limits) or (policy.per_person is not None and has_lines(policy.per_person))
        if policy.per_person is None:
            self.persons = {}
        elif policy.per_person != limits_of_persons:
            for allowance in self.persons.values():
                allowance.change(policy.per_person)
        self.look_at_clock()

    def look_at_clock(self) -> int:
        """Find out which day it is, and whether the key has expired; return the second of `clock`."""
        second, now = int(self.clock()), self.wall()
        self.day = int(now) // SECONDS_PER_DAY
        self.allowance.turn_to(self.day)
        left = seconds_to_midnight(now)
        self._day_ends, self._reset_at = second + left, -1
        again = min(60, left)
        expires = self.policy.expires
        if expires is not None:
            self.is_expired = now >= expires
            if not self.is_expired:
                again = min(again, int(expires - now))
        else:
            self.is_expired = False
        self._look_again = second + again
        return second

    def second(self) -> int:
        """Return the second of `clock`, after a look at what time it is if that is due."""
        second = int(self.clock())
        if second >= self._look_again:
            self.look_at_clock()
        return second

    def day_reset(self, second: int) -> bytes:
        """Return the time from `second` of `clock` to the end of the day, as headers have it."""
        if second != self._reset_at:
            self._reset, self._reset_at = duration(max(1, self._day_ends - second)), second
        return self._reset

    # What it may use

    def allows(self, tier: str) -> bool:
        """Return whether the key may use a tier, an embedding model or a reranker, by its name."""
        return self.tiers is None or tier in self.tiers

    def check_expiry(self) -> None:
        """Check that the key is still valid.

        Raises:
            ExpiredApiKey: It is not.
        """
        self.look_at_clock()
        if self.is_expired:
            raise ExpiredApiKey

    def use_names(self, resolve: Callable[[str], str | None]) -> None:
        """Spell the names of tiers in the policy as the settings do; unknown ones match nothing."""
        policy = self.policy
        self.tiers = None
        if policy.tiers is not None:
            self.tiers = frozenset(found for name in policy.tiers if (found := resolve(name)) is not None)
        self.downgrade = None if policy.downgrade is None else resolve(policy.downgrade)

    # Requests

    def begin(self, person: str = "") -> Hold:
        """Admit a request, which holds a place until its `Hold` ends.

        `person` is who asks, as the header `user_header` says; only a trusted key is believed.

        Raises:
            ExpiredApiKey: The key has expired.
            RateLimited: A limit of requests or of concurrency is reached.
        """
        second = int(self.clock())  # `second`, inlined
        if second >= self._look_again:
            self.look_at_clock()
        if self.is_expired:
            raise ExpiredApiKey
        own = self.allowance
        refused = own.begin(second)
        if refused is not None:
            raise self.refusal(None, refused, 0, second)
        if self.policy.per_person is None:
            return Hold(self, second)
        allowance = self._person(person, second)
        refused = allowance.begin(second)
        if refused is not None:
            own.running -= 1
            if own.requests is not None:
                own.requests.uncount(1, second, second)
            raise self.refusal(allowance, refused, 0, second)
        return Hold(self, second, allowance)

    def lines(self, person: str = "") -> bytes:
        """Return the header lines about the limits of the key and of `person` at present; empty if there are none."""
        if not self.has_lines:
            return b""
        second = self.look_at_clock()
        self.allowance.advance(second)
        allowance = self._known(person)
        if allowance is not None:
            allowance.turn_to(self.day)
            allowance.advance(second)
        return limit_lines(self.allowance, allowance, second, self.wall())

    def view(self) -> dict[str, Any]:
        """Return the policy and what is used of its limits. It has no key and no digest."""
        policy, second = self.policy, self.look_at_clock()
        self.allowance.advance(second)
        expires = policy.expires
        return {
            "name": self.name,
            "tiers": None if policy.tiers is None else list(policy.tiers),
            "priority": "batch" if policy.is_batch else "interactive",
            "expires": None if expires is None else datetime.fromtimestamp(expires, UTC).isoformat(),
            "expired": self.is_expired,
            "limits": policy.limits.given(),
            "used": self.allowance.used_by_all(),
            "on_limit": None if policy.downgrade is None else {"downgrade": policy.downgrade},
            "trusted": policy.is_trusted,
            "per_person": None if policy.per_person is None else policy.per_person.given(),
            "persons": len(self.persons),
        }

    def restore_persons(self, tokens: Mapping[str, int], day: int) -> None:
        """Continue with the tokens that persons had used on `day` before a restart."""
        if self.policy.per_person is None:
            return
        for name, count in tokens.items():
            if len(self.persons) >= MAX_PERSONS:
                name = OTHERS
            allowance = self.persons.setdefault(name, self._new_allowance(day))
            allowance.turn_to(day)
            allowance.day_tokens += count

    def _known(self, person: str) -> Allowance | None:
        """Return the allowance of a person, a new one that is not kept for one who has not asked before.

        None if persons are not told apart.
        """
        if self.policy.per_person is None:
            return None
        found = self.persons.get(_bounded(person))
        if found is None and len(self.persons) >= MAX_PERSONS:
            found = self.persons.get(OTHERS)
        return self._new_allowance(self.day) if found is None else found

    def _new_allowance(self, day: int) -> Allowance:
        assert self.policy.per_person is not None
        return Allowance(self.policy.per_person, day, is_shared=self.sharing is not None)

    def share(self, sharing: LimitSharing) -> None:
        """Share the limits with other replicas from now on."""
        self.sharing = sharing
        for allowance in (self.allowance, *self.persons.values()):
            allowance.share()

    def allowances(self, person: str, second: int) -> Iterator[tuple[str | None, Allowance]]:
        """Yield the allowance of the key, and that of `person` with a name if persons are told apart."""
        yield None, self.allowance
        if self.policy.per_person is not None:
            allowance = self._person(person, second)
            name = _bounded(person)
            yield (name if self.persons.get(name) is allowance else OTHERS), allowance

    def _person(self, name: str, second: int) -> Allowance:
        assert self.policy.per_person is not None
        if len(name) > MAX_PERSON:
            name = _bounded(name)
        allowance = self.persons.get(name)
        if allowance is None:
            if len(self.persons) >= MAX_PERSONS:
                self._prune(second)
            if len(self.persons) >= MAX_PERSONS:
                name = OTHERS
            allowance = self.persons.get(name)
            if allowance is None:
                allowance = self.persons[name] = self._new_allowance(self.day)
        if allowance.day != self.day:
            allowance.turn_to(self.day)
        return allowance

    def _prune(self, second: int) -> None:
        """Forget the persons of whom nothing is counted, at most once a minute, since it looks at all."""
        if second - self._pruned < 60:
            return
        self._pruned = second
        for allowance in self.persons.values():
            allowance.turn_to(self.day)
            allowance.advance(second)
        self.persons = {name: each for name, each in self.persons.items() if not each.is_idle}

    def refusal(self, person: Allowance | None, limit: str, tokens: int, second: int) -> RateLimited:
        """Return the error for `limit`, of the person if there is one, else of the key."""
        allowance, now = person or self.allowance, self.wall()
        seconds = allowance.seconds_until(limit, tokens, second, now)
        whose = "This API key" if person is None else "This person"
        label = limit if person is None else f"person_{limit}"
        value = getattr(allowance.limits, limit)
        if limit == CONCURRENCY:
            message = f"{whose} may have {value} requests running or waiting at once. Send fewer at a time."
            return ConcurrencyExceeded(label, message, retry_after=seconds)
        if limit == TOKENS_PER_DAY:
            message = (
                f"{whose} has used its budget of {value} tokens for today. "
                f"The budget is renewed at {utc_midnight(now)} (midnight UTC)."
            )
            return BudgetSpent(label, message, retry_after=seconds)
        unit = "requests" if limit == REQUESTS_PER_MINUTE else "tokens"
        needed = f", and the request needs about {tokens}" if limit == TOKENS_PER_MINUTE else ""
        message = (
            f"{whose} may use {value} {unit} per minute, and they are used{needed}. Try again in {seconds} seconds."
        )
        return RateLimited(label, message, retry_after=seconds)


def _bounded(person: str) -> str:
    if len(person) <= MAX_PERSON:
        return person
    return sha256(person.encode("utf-8", "surrogatepass")).hexdigest()
