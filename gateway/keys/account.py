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

from msgspec import Struct

from gateway.errors import BudgetSpent, ConcurrencyExceeded, ExpiredApiKey, RateLimited
from gateway.keys.allowance import SECONDS_PER_DAY, Allowance, seconds_to_midnight
from gateway.keys.headers import WARNING_SHARE, has_lines, limit_lines, plain_lines, utc_midnight, warning
from gateway.keys.policy import CONCURRENCY, REQUESTS_PER_MINUTE, TOKENS_PER_DAY, TOKENS_PER_MINUTE, KeyPolicy
from gateway.keys.windows import SECONDS, SlidingWindow, Slot

Clock = Callable[[], float]

BYTES_PER_TOKEN = 4
"""Bytes of a request for each estimated token of its prompt."""
IMAGE_TOKENS = 512
"""Tokens that are reserved for an image."""
MAX_COMPLETION = 16_384
"""Maximum tokens that are reserved for one answer: programs send a `max_tokens` that they never use."""
FIRST_COMPLETION = 256.0
"""Tokens that are reserved for an answer without `max_tokens` before anything is known of the key."""
GUESS_SHARE = 10
"""A guess at an answer's length reserves at most this part (1 / n) of the tokens of a minute."""
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
        "_look_again", "_pruned", "allowance", "clock", "day", "downgrade", "has_lines", "is_expired", "name",
        "persons", "policy", "sharing", "template", "tiers", "typical", "wall",
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
        self.day = 0
        """The day in UTC, since the Unix epoch."""
        self.tiers: frozenset[str] | None = None
        """Tiers, embedding models and rerankers that it may use, as the settings spell them; None: all."""
        self.downgrade: str | None = None
        """Tier that serves when the tokens of the day are used up; None: the request is refused."""
        self.is_expired = False
        self.change(policy)

    def __repr__(self) -> str:
        return f"<Account {self.name} {self.allowance}>"

    def change(self, policy: KeyPolicy) -> None:
        """Apply a policy of the same name. What is used stays used."""
        self.policy = policy
        self.allowance.change(policy.limits)
        self.template = plain_lines(policy.limits) if policy.per_person is None else None
        """Lines of an answer with two places for numbers, if nothing else in them changes."""
        self.has_lines = has_lines(policy.limits) or (policy.per_person is not None and has_lines(policy.per_person))
        if policy.per_person is None:
            self.persons = {}
        else:
            for allowance in self.persons.values():
                allowance.change(policy.per_person)
        self.look_at_clock()

    def look_at_clock(self) -> int:
        """Find out which day it is, and whether the key has expired; return the second of `clock`."""
        second, now = int(self.clock()), self.wall()
        self.day = int(now) // SECONDS_PER_DAY
        self.allowance.turn_to(self.day)
        again = min(60, seconds_to_midnight(now))
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

    def begin(self, person: str = "") -> "Hold":
        """Admit a request, which holds a place until its `Hold` ends.

        `person` is who asks, as the header `user_header` says; only a trusted key is believed.

        Raises:
            ExpiredApiKey: The key has expired.
            RateLimited: A limit of requests or of concurrency is reached.
        """
        second = self.second()
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

    def lines(self, person: Allowance | None = None) -> bytes:
        """Return the header lines about the limits at present; empty if there are none."""
        if not self.has_lines:
            return b""
        second = self.look_at_clock()
        self.allowance.advance(second)
        if person is not None:
            person.turn_to(self.day)
            person.advance(second)
        return limit_lines(self.allowance, person, second, self.wall())

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

    def person(self, name: str) -> Allowance | None:
        """Return the allowance of a person who has asked before, if persons are told apart."""
        return self.persons.get(_bounded(name))

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


class Hold(Struct, gc=False):
    """Hold of one request on its key's limits, from its admission to its end.

    `reserve` is called once the tier is known, `count` for each exchange with a backend, and `end`
    once, whatever happened.
    """

    account: Account
    second: int
    """Second of the account's clock at which it was admitted."""
    person: Allowance | None = None
    lines: bytes = b""
    """Header lines about the limits, for the answer."""
    window: SlidingWindow | None = None
    slot: Slot | None = None
    """Place of the reserved tokens in `window`."""
    person_window: SlidingWindow | None = None
    person_slot: Slot | None = None
    day: int = 0
    """Day for which tokens are reserved."""
    reserved: int = 0
    prompt: int = 0
    """Estimated tokens of the prompt."""
    guesses: bool = False
    """True if the request does not limit its answer."""
    prompt_tokens: int = 0
    """Tokens of the prompts that backends have processed so far."""
    completion_tokens: int = 0
    has_ended: bool = False

    @property
    def is_batch(self) -> bool:
        return self.account.policy.is_batch

    def reserve(
        self, tier: str, size: int, max_tokens: int | None, *, images: int = 0, answers: int = 1, has_tiers: bool = True
    ) -> str:
        """Reserve the tokens of a request for `tier`, and return the tier that serves it.

        What was reserved before is given back: the settings may change while a request is prepared.

        The tier is another one if the tokens of the day are used up and the key's policy names a tier
        for that. `size` is that of the request's text in bytes. `max_tokens` is the limit of one of
        its `answers`. Without `has_tiers`, no other model can serve the request.

        Raises:
            RateLimited: The tokens of the minute or of the day are used up.
        """
        if self.reserved:
            self._take_back()
        account, person = self.account, self.person
        own = account.allowance
        second = int(account.clock())
        self.prompt = size // BYTES_PER_TOKEN + IMAGE_TOKENS * images
        self.guesses = max_tokens is None
        tokens = self.estimate(size, max_tokens, images=images, answers=answers)
        if own.day_tokens >= own.tokens_per_day or (person is not None and person.day_tokens >= person.tokens_per_day):
            tier = self._smaller_tier(tier, tokens, second, has_tiers)
        window = own.tokens
        if window is not None:
            self.slot = window.take(tokens, second)
            if self.slot is None:
                raise self._refusal(None, TOKENS_PER_MINUTE, tokens, second)
            self.window = window
        if person is not None:
            self._reserve_person(person, tokens, second)
        own.day_tokens += tokens
        self.day = account.day
        self.reserved = tokens
        if account.has_lines:
            requests, template = own.requests, account.template
            if template is None or requests is None or window is None or second != self.second:
                self.lines += limit_lines(own, person, second, account.wall())
                return tier
            left = window.limit - window.used - window.others
            left_requests = requests.limit - requests.used - requests.others
            self.lines += template % (left_requests if left_requests > 0 else 0, left if left > 0 else 0)  # noqa: FURB136
            if own.day_tokens + own.day_others >= WARNING_SHARE * own.day_limit:
                self.lines += warning(own, account.wall())
        return tier

    def estimate(self, size: int, max_tokens: int | None, *, images: int = 0, answers: int = 1) -> int:
        """Return the tokens that `reserve` reserves for a request."""
        prompt = size // BYTES_PER_TOKEN + IMAGE_TOKENS * images
        if max_tokens is None:
            return prompt + answers * self._guess()
        return prompt + answers * (max_tokens if max_tokens < MAX_COMPLETION else MAX_COMPLETION)  # noqa: FURB136

    def _take_back(self) -> None:
        """Give back what was reserved."""
        reserved, self.reserved = self.reserved, 0
        second = int(self.account.clock())
        _settle(self.account.allowance, -reserved, self.day, self.window, self.slot, second)
        if self.person is not None:
            _settle(self.person, -reserved, self.day, self.person_window, self.person_slot, second)
        self.lines = b""
        self.window = self.slot = self.person_window = self.person_slot = None

    def _guess(self) -> int:
        """Return the tokens to reserve for an answer that the request does not limit."""
        typical, limit = int(self.account.typical), self.account.allowance.limits.tokens_per_minute
        return typical if limit is None else min(typical, limit // GUESS_SHARE)

    def _smaller_tier(self, tier: str, tokens: int, second: int, has_tiers: bool) -> str:
        """Return the tier that serves although the tokens of the day are used up.

        Raises:
            BudgetSpent: None does.
        """
        account = self.account
        smaller = account.downgrade if has_tiers else None
        if smaller is None:
            is_keys = account.allowance.day_tokens >= account.allowance.tokens_per_day
            raise self._refusal(None if is_keys else self.person, TOKENS_PER_DAY, tokens, second)
        if smaller != tier:
            self.lines = b"x-gateway-downgraded-from: %b\r\n" % tier.encode()
        return smaller

    def _refusal(self, person: Allowance | None, limit: str, tokens: int, second: int) -> RateLimited:
        """Return the error for a limit of tokens. The request then does not count as one."""
        for allowance in (self.account.allowance, self.person):
            if allowance is not None and allowance.requests is not None:
                allowance.requests.uncount(1, self.second, second)
        return self.account.refusal(person, limit, tokens, second)

    def _reserve_person(self, person: Allowance, tokens: int, second: int) -> None:
        window = person.tokens
        if window is not None:
            self.person_slot = window.take(tokens, second)
            if self.person_slot is None:
                if self.window is not None and self.slot is not None:
                    self.window.take_back(tokens, self.slot, second)
                    self.slot = None
                raise self._refusal(person, TOKENS_PER_MINUTE, tokens, second)
            self.person_window = window
        person.day_tokens += tokens

    def count(self, prompt_tokens: int | None, completion_tokens: int) -> None:
        """Count the tokens of one exchange with a backend.

        `prompt_tokens` is None if the backend began with the prompt and did not say how long it is.
        """
        self.prompt_tokens += self.prompt if prompt_tokens is None else prompt_tokens
        self.completion_tokens += completion_tokens

    def end(self) -> None:
        """Give the place back, and replace what was reserved by what was counted. Later calls do nothing."""
        if self.has_ended:
            return
        self.has_ended = True
        account, completion = self.account, self.completion_tokens
        if completion and self.guesses:
            account.typical += (completion - account.typical) / 8
        second = int(account.clock())
        more = self.prompt_tokens + completion - self.reserved
        own, person, slot, window = account.allowance, self.person, self.slot, self.window
        own.running -= 1
        if more > 0 or slot is None or window is None or slot.second < second - SECONDS:
            _settle(own, more, self.day, window, slot, second)
        else:  # the common case of `_settle`, inlined: most estimates are too high
            if own.day == self.day:
                own.day_tokens += more
            slot.count += more
            window.used += more
        if person is not None:
            person.running -= 1
            _settle(person, more, self.day, self.person_window, self.person_slot, second)


def _settle(
    allowance: Allowance, more: int, day: int, window: SlidingWindow | None, slot: Slot | None, second: int
) -> None:
    """Count `more` tokens than were reserved on `day`, in `slot` of `window`; the number may be negative.

    What was reserved on an earlier day no longer counts. The limit may have been removed meanwhile,
    and set again, which made another window.
    """
    if more > 0:
        allowance.day_tokens += more
        if allowance.tokens is not None:
            allowance.tokens.add(more, second)
        return
    if allowance.day == day:
        allowance.day_tokens += more
    if slot is not None and window is not None:
        window.take_back(-more, slot, second)


def _bounded(person: str) -> str:
    if len(person) <= MAX_PERSON:
        return person
    return sha256(person.encode("utf-8", "surrogatepass")).hexdigest()
