"""Clocks and accounts for tests of keys."""

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from gateway.keys.account import Account
from gateway.keys.accounts import Accounts
from gateway.keys.policy import KeyPolicy, Limits

NOON = 1_796_040_000.0 - 1_796_040_000.0 % 86_400 + 43_200
"""Noon of a day in UTC, in Unix time."""


class Clocks:
    """A monotonic clock and the time of day, which tests move together."""

    def __init__(self, wall: float = NOON) -> None:
        self.passed = 0.0
        self._wall = wall

    def clock(self) -> float:
        return 1000.0 + self.passed

    def wall(self) -> float:
        return self._wall + self.passed


def policy(name: str = "web", *, per_person: Limits | None = None, **fields: Any) -> KeyPolicy:
    """Return the policy of a key whose text is its name; limits and fields as in the file."""
    limits = Limits(**{field: fields.pop(field) for field in list(fields) if field in Limits.__struct_fields__})
    return KeyPolicy(
        name=name,
        digest=sha256(name.encode()).digest(),
        limits=limits,
        per_person=per_person,
        is_trusted=per_person is not None,
        **fields,
    )


def account(clocks: Clocks, **fields: Any) -> Account:
    made = Account(policy(**fields), clocks.clock, clocks.wall)
    made.use_names(lambda name: name)
    return made


def accounts(clocks: Clocks, policies: Iterable[KeyPolicy], known: Iterable[str] = ("standard", "pro")) -> Accounts:
    names = set(known)
    return Accounts(policies, lambda name: name if name in names else None, clocks.clock, clocks.wall)


def headers(lines: bytes) -> dict[str, str]:
    """Return header lines as a dict."""
    assert lines.endswith(b"\r\n") or not lines
    return {name: value for name, _, value in (line.partition(": ") for line in lines.decode().splitlines())}
