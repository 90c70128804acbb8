"""Policies of keys: what a key may use, and how much. Pure values."""

from msgspec import Struct

REQUESTS_PER_MINUTE = "requests_per_minute"
TOKENS_PER_MINUTE = "tokens_per_minute"
TOKENS_PER_DAY = "tokens_per_day"
CONCURRENCY = "concurrency"

LIMIT_NAMES = (REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE, TOKENS_PER_DAY, CONCURRENCY)
"""Names of the limits in the file of keys, which are label values of the metrics as well."""


class Limits(Struct, frozen=True, gc=False):
    """Limits of a key, or of one person behind it; None: unlimited."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Prompt and completion tokens."""
    tokens_per_day: int | None = None
    """Prompt and completion tokens of a day in UTC."""
    concurrency: int | None = None
    """Requests that run or wait at once."""

    def given(self) -> dict[str, int]:
        """Return the limits that are set, by name."""
        found = {name: getattr(self, name) for name in LIMIT_NAMES}
        return {name: value for name, value in found.items() if value is not None}


NO_LIMITS = Limits()


class KeyPolicy(Struct, frozen=True, kw_only=True):
    """One entry of the file of keys."""

    name: str
    digest: bytes
    """SHA-256 of the whole key."""
    limits: Limits = NO_LIMITS
    tiers: tuple[str, ...] | None = None
    """Names of the tiers, embedding models and rerankers that it may use; None: all."""
    is_batch: bool = False
    """True if all its requests have batch priority."""
    expires: float | None = None
    """Unix time from which the key is refused."""
    downgrade: str | None = None
    """Tier that serves when the tokens of the day are used up; None: the request is refused."""
    is_trusted: bool = False
    """True if its program states truthfully, in the header `user_header`, which person asks."""
    per_person: Limits | None = None
    """Limits of each person; only for a trusted key."""
