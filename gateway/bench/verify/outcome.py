"""Outcome of one check: ok, failed or skipped, with a reason that can be said in two languages."""

from collections.abc import Awaitable, Callable
from typing import Literal

from msgspec import Struct

from gateway.bench.verify.target import Target
from gateway.bench.verify.texts import Language, said

Status = Literal["ok", "failed", "skipped"]
Group = Literal[
    "server", "streaming", "korean", "history", "errors", "concurrency", "dialect", "embeddings", "preflight"
]

GROUPS: tuple[Group, ...] = (
    "server", "streaming", "korean", "history", "errors", "concurrency", "dialect", "embeddings", "preflight",
)  # fmt: skip


class Reason(Struct, frozen=True):
    """A text of `texts.py` with its values."""

    key: str
    values: dict[str, object] = {}

    def said(self, language: Language) -> str:
        return said(self.key, language, **self.values)


class CheckFailed(Exception):
    """The server does not do what the check expects."""

    def __init__(self, key: str, **values: object) -> None:
        self.reason = Reason(key, values)
        super().__init__(self.reason.said("en"))


class CheckSkipped(Exception):
    """The check says nothing about this server or this model."""

    def __init__(self, key: str, **values: object) -> None:
        self.reason = Reason(key, values)
        super().__init__(self.reason.said("en"))


Run = Callable[[Target], Awaitable[Reason | None]]
"""Runs a check; the returned reason says what was seen, for a check that is ok.

Raises:
    CheckFailed, CheckSkipped, ServerUnreachable.
"""


class Check(Struct, frozen=True):
    """A check: its name is a key of `texts.py` with `check.` before it."""

    group: Group
    name: str
    run: Run


class Outcome(Struct, frozen=True):
    """Result of one check. `seconds` is the time that it took."""

    group: Group
    name: str
    status: Status
    reason: Reason | None
    seconds: float
