"""Hold of one request on the limits of its key: what is reserved at its start and settled at its end.

Every request of a key with limits runs through this module, so the common cases are written out: the
calls that they save cost as much as the arithmetic.
"""

from typing import TYPE_CHECKING

from msgspec import Struct

from gateway.errors import RateLimited
from gateway.keys.allowance import Allowance
from gateway.keys.headers import limit_lines, person_lines, warning
from gateway.keys.policy import TOKENS_PER_DAY, TOKENS_PER_MINUTE
from gateway.keys.windows import SECONDS, SlidingWindow, Slot

if TYPE_CHECKING:
    from gateway.keys.account import Account

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


Reservation = tuple[int, int, int, bool, SlidingWindow | None, Slot | None, SlidingWindow | None, Slot | None]
"""What a request has reserved: tokens, their day since the Unix epoch, those of them that are its
prompt's, whether the answer's length is a guess, and the places where the tokens count: of the key
and of the person, a window and the slot in it. A tuple, since it is made for each request.
"""


class Hold(Struct, gc=False):
    """Hold of one request on its key's limits, from its admission to its end.

    `reserve` is called once the tier is known, `count` for each exchange with a backend, and `end`
    once, whatever happened.
    """

    account: "Account"
    second: int
    """Second of the account's clock at which it was admitted."""
    person: Allowance | None = None
    lines: bytes = b""
    """Header lines about the limits, for the answer."""
    reservation: Reservation | None = None
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
        if self.reservation is not None:
            self._take_back()
        account, person = self.account, self.person
        own = account.allowance
        second = int(account.clock())
        prompt = size // BYTES_PER_TOKEN + IMAGE_TOKENS * images
        if max_tokens is None:
            tokens = prompt + answers * self._guess()
        else:
            tokens = prompt + answers * (max_tokens if max_tokens < MAX_COMPLETION else MAX_COMPLETION)  # noqa: FURB136
        if own.day_tokens >= own.tokens_per_day or (person is not None and person.day_tokens >= person.tokens_per_day):
            tier = self._smaller_tier(tier, tokens, second, has_tiers)
        window, slot = own.tokens, None
        if window is not None:
            slot = window.take(tokens, second)
            if slot is None:
                raise self._refusal(None, TOKENS_PER_MINUTE, tokens, second)
        if person is None:
            person_window = person_slot = None
        else:
            person_window, person_slot = self._reserve_person(person, tokens, second, window, slot)
        own.day_tokens += tokens
        is_guess = max_tokens is None
        self.reservation = tokens, account.day, prompt, is_guess, window, slot, person_window, person_slot
        if account.has_lines:
            counted_now = second == self.second and tokens > 0
            if counted_now and person is None and (plain_lines := account.plain_lines) is not None:
                self.lines += plain_lines(second)
                if own.day_tokens + own.day_others >= own.warned_from:
                    self.lines += warning(own, account.wall())
            elif counted_now and person is not None:
                self.lines += person_lines(own, person, second, account.day_reset, account.wall)
            else:
                self.lines += limit_lines(own, person, second, account.wall())
        return tier

    def estimate(self, size: int, max_tokens: int | None, *, images: int = 0, answers: int = 1) -> int:
        """Return the tokens that `reserve` reserves for a request."""
        prompt = size // BYTES_PER_TOKEN + IMAGE_TOKENS * images
        return prompt + answers * (self._guess() if max_tokens is None else min(max_tokens, MAX_COMPLETION))

    def _take_back(self) -> None:
        """Give back what was reserved."""
        reserved, self.reservation = self.reservation, None
        assert reserved is not None
        tokens, day, _, _, window, slot, person_window, person_slot = reserved
        second = int(self.account.clock())
        _settle(self.account.allowance, -tokens, day, window, slot, second)
        if self.person is not None:
            _settle(self.person, -tokens, day, person_window, person_slot, second)
        self.lines = b""

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

    def _reserve_person(
        self, person: Allowance, tokens: int, second: int, window: SlidingWindow | None, slot: Slot | None
    ) -> tuple[SlidingWindow | None, Slot | None]:
        """Reserve the tokens of the person; if they do not fit, give back those in `slot` of the key's `window`."""
        own = person.tokens
        place = None
        if own is not None:
            place = own.take(tokens, second)
            if place is None:
                if window is not None and slot is not None:
                    window.take_back(tokens, slot, second)
                raise self._refusal(person, TOKENS_PER_MINUTE, tokens, second)
        person.day_tokens += tokens
        return own, place

    def count(self, prompt_tokens: int | None, completion_tokens: int) -> None:
        """Count the tokens of one exchange with a backend.

        `prompt_tokens` is None if the backend began with the prompt and did not say how long it is.
        """
        if prompt_tokens is None:
            prompt_tokens = 0 if self.reservation is None else self.reservation[2]
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def count_prompts_once(self, told: int, *, are_all_told: bool) -> None:
        """Count each prompt of several exchanges once, as usage does: `told` tokens by their backends.

        If a backend has not told how long its prompt is, the estimate is that of all prompts.
        """
        estimated = 0 if are_all_told or self.reservation is None else self.reservation[2]
        self.prompt_tokens = min(self.prompt_tokens, max(told, estimated))

    def end(self) -> None:
        """Give the place back, and replace what was reserved by what was counted. Later calls do nothing."""
        if self.has_ended:
            return
        self.has_ended = True
        account, reserved, completion = self.account, self.reservation, self.completion_tokens
        own, person = account.allowance, self.person
        own.running -= 1
        if person is not None:
            person.running -= 1
        if reserved is None:
            return
        tokens, day, _, is_guess, window, slot, person_window, person_slot = reserved
        if is_guess and completion:
            account.typical += (completion - account.typical) / 8
        second = int(account.clock())
        more = self.prompt_tokens + completion - tokens
        if more > 0 or slot is None or window is None or slot.second < second - SECONDS:
            _settle(own, more, day, window, slot, second)
        else:  # the common case of `_settle`, inlined: most estimates are too high
            if own.day == day:
                own.day_tokens += more
            slot.count += more
            window.used += more
        if person is not None:
            _settle(person, more, day, person_window, person_slot, second)


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
