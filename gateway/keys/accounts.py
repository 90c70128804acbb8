"""All accounts: looked up by a key's digest or by name, changed as a whole, kept over a restart."""

import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from heapq import merge
from typing import Any

from gateway.keys.account import Account, Clock, LimitSharing
from gateway.keys.allowance import SECONDS_PER_DAY
from gateway.keys.document import KeysError
from gateway.keys.headers import utc_date, utc_midnight
from gateway.keys.policy import KeyPolicy

MAX_SAVED_PERSONS = 20_000
"""Maximum number of persons whose tokens of the day are kept over a restart: those with the most."""

LOOKED_AT_ONCE = 1000
"""Keys and persons of one step; those of one key are together."""

_Saved = tuple[int, str, str]
"""Tokens, and the names of the key and of the person."""

ResolveName = Callable[[str], str | None]
"""Returns a model as the settings spell its tier, embedding model or reranker; None if it is unknown."""

_log = logging.getLogger(__name__)


class Accounts:
    """The accounts in force. `clock` is monotonic, `wall` in Unix time."""

    def __init__(self, policies: Iterable[KeyPolicy], resolve: ResolveName, clock: Clock, wall: Clock) -> None:
        """Open an account for each policy.

        Raises:
            KeysError: A policy names a tier that does not exist.
        """
        self._clock = clock
        self._wall = wall
        self._accounts: dict[str, Account] = {}
        self.by_digest: dict[bytes, Account] = {}
        self._sharing: LimitSharing | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when keys have come or gone."""
        self.change(policies, resolve)

    def __repr__(self) -> str:
        return f"<Accounts {', '.join(self._accounts)}>"

    def __iter__(self) -> Iterator[Account]:
        return iter(self._accounts.values())

    def __len__(self) -> int:
        return len(self._accounts)

    def named(self, name: str) -> Account | None:
        return self._accounts.get(name)

    def change(self, policies: Iterable[KeyPolicy], resolve: ResolveName) -> dict[str, list[str]]:
        """Put other policies in force in one step; return the names that are added, removed and changed.

        An account keeps what it has used as long as its name stays. A request that began under a
        key that is gone goes on.

        Raises:
            KeysError: A policy names a tier that does not exist. Nothing has changed.
        """
        policies = list(policies)
        unknown = _unknown_names(policies, resolve)
        if unknown:
            raise KeysError(unknown)
        before, after = self._accounts, {}
        changed: dict[str, list[str]] = {"added": [], "removed": [], "changed": []}
        for policy in policies:
            account = before.get(policy.name)
            if account is None:
                account = Account(policy, self._clock, self._wall)
                if self._sharing is not None:
                    account.share(self._sharing)
                account.use_names(resolve)
                changed["added"].append(policy.name)
            elif account.policy != policy:
                account.change(policy)
                account.use_names(resolve)
                changed["changed"].append(policy.name)
            after[policy.name] = account
        changed["removed"] = [name for name in before if name not in after]
        self._accounts = after
        self.by_digest = {account.policy.digest: account for account in after.values()}
        self.on_change()
        return changed

    def share(self, sharing: LimitSharing) -> None:
        """Share the limits of all keys with other replicas from now on."""
        self._sharing = sharing
        for account in self:
            account.share(sharing)

    def use_names(self, resolve: ResolveName) -> None:
        """Apply changed settings. A tier that a key names and that is gone is one that it cannot use."""
        for line in _unknown_names([account.policy for account in self], resolve):
            _log.warning("keys: %s", line)
        for account in self:
            account.use_names(resolve)

    # What is used

    def view(self) -> dict[str, Any]:
        """Return the day whose tokens count, and when the next one begins, for `/ops/keys`."""
        now = self._wall()
        return {"day": utc_date(now), "renewed_at": utc_midnight(now)}

    def saved_steps(self) -> Generator[None, None, dict[str, Any]]:
        """Return the tokens of the day, for `restore` in another process.

        It yields after some milliseconds each: there may be 100,000 keys, and more persons.
        """
        date = utc_date(self._wall())
        keys: dict[str, int] = {}
        some: list[_Saved] = []
        sorted_parts: list[list[_Saved]] = []
        looked_at = 0
        for account in list(self):
            account.look_at_clock()
            if account.allowance.day_tokens > 0:
                keys[account.name] = account.allowance.day_tokens
            some += [
                (allowance.day_tokens, account.name, person)
                for person, allowance in account.persons.items()
                if allowance.day == account.day and allowance.day_tokens > 0
            ]
            looked_at += 1 + len(account.persons)
            if looked_at >= LOOKED_AT_ONCE:
                sorted_parts.append(sorted(some, reverse=True))
                some, looked_at = [], 0
                yield
        sorted_parts.append(sorted(some, reverse=True))
        by_key: dict[str, dict[str, int]] = {}
        for number, (tokens, name, person) in enumerate(merge(*sorted_parts, reverse=True)):
            if number == MAX_SAVED_PERSONS:
                break
            by_key.setdefault(name, {})[person] = tokens
            if number % LOOKED_AT_ONCE == 0:
                yield
        return {"day": date, "tokens": keys, "persons": by_key}

    def restore(self, saved: object) -> None:
        """Continue with what `saved_steps` returned on the same day; anything else is ignored."""
        if not isinstance(saved, dict) or saved.get("day") != utc_date(self._wall()):
            return
        tokens, persons = saved.get("tokens"), saved.get("persons")
        day = int(self._wall()) // SECONDS_PER_DAY
        for account in self:
            account.allowance.turn_to(day)
            if isinstance(tokens, dict):
                account.allowance.day_tokens += _count(tokens.get(account.name))
            of_key = persons.get(account.name) if isinstance(persons, dict) else None
            if isinstance(of_key, dict):
                account.restore_persons({name: _count(value) for name, value in of_key.items()}, day)


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _unknown_names(policies: Sequence[KeyPolicy], resolve: ResolveName) -> list[str]:
    """Return a line for each unknown name. Each name is looked up once: many policies have the same few."""
    tiers = {name for policy in policies if policy.tiers is not None for name in policy.tiers}
    names = tiers | {policy.downgrade for policy in policies if policy.downgrade is not None}
    unknown = {name for name in names if resolve(name) is None}
    lines = []
    for policy in policies if unknown else ():
        lines += [
            f"{policy.name}.tiers: {name[:40]!r} is not a tier, an alias, an embedding model or a reranker"
            for name in policy.tiers or ()
            if name in unknown
        ]
        if policy.downgrade is not None and policy.downgrade in unknown:
            lines.append(f"{policy.name}.on_limit: {policy.downgrade[:40]!r} is not a tier")
    return lines
