"""State machine: whatever arrives, ends, changes or expires, the counts of a key stay true.

Covers: gateway/keys/account.py
"""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.errors import RateLimited
from gateway.keys.hold import Hold
from gateway.keys.policy import Limits
from tests.keys.fakes import Clocks, account, policy

CONCURRENCY, REQUESTS, TOKENS, DAY = 4, 9, 500, 4000
PERSON = Limits(requests_per_minute=5, tokens_per_minute=300, tokens_per_day=900, concurrency=2)


LIMITS: dict[str, Any] = {
    "concurrency": CONCURRENCY,
    "requests_per_minute": REQUESTS,
    "tokens_per_minute": TOKENS,
    "tokens_per_day": DAY,
}


class KeyMachine(RuleBasedStateMachine):
    """One key with all limits and three persons, in virtual time."""

    def __init__(self) -> None:
        super().__init__()
        self.clocks = Clocks()
        self.key = account(self.clocks, per_person=PERSON, **LIMITS)
        self.holds: list[tuple[Hold, str, int]] = []
        self.begun: list[tuple[float, str]] = []

    @rule(person=st.sampled_from("abc"), tokens=st.integers(0, 250))
    def arrive(self, person: str, tokens: int) -> None:
        running = [name for _, name, _ in self.holds]
        try:
            hold = self.key.begin(person)
        except RateLimited as error:
            if error.limit == "concurrency":
                assert len(running) >= CONCURRENCY
            elif error.limit == "person_concurrency":
                assert running.count(person) >= 2
            return
        assert len(running) < CONCURRENCY
        assert running.count(person) < 2
        try:
            hold.reserve("standard", 0, tokens)
        except RateLimited:
            hold.end()
            return
        self.begun.append((self.clocks.passed, person))
        self.holds.append((hold, person, tokens))

    @precondition(lambda self: self.holds)
    @rule(which=st.integers(0, 100), share=st.floats(0, 1), counted=st.booleans())
    def finish(self, which: int, share: float, counted: bool) -> None:
        hold, _, tokens = self.holds.pop(which % len(self.holds))
        if counted:
            hold.count(0, int(tokens * share))
        hold.end()

    @rule(seconds=st.sampled_from([0.3, 1, 7.5, 29, 60, 61, 3600, 43_200]))
    def wait(self, seconds: float) -> None:
        self.clocks.passed += seconds

    @rule()
    def reread(self) -> None:
        self.key.change(policy(per_person=PERSON, **LIMITS))

    @invariant()
    def running_requests_are_counted(self) -> None:
        assert self.key.allowance.running == len(self.holds)
        for name, allowance in self.key.persons.items():
            assert allowance.running == sum(person == name for _, person, _ in self.holds)

    @invariant()
    def no_minute_has_more_requests_than_the_limit(self) -> None:
        recent = [person for at, person in self.begun if at >= self.clocks.passed - 60]
        assert len(recent) <= REQUESTS
        assert all(recent.count(person) <= 5 for person in "abc")

    @invariant()
    def no_count_is_negative_and_reservations_are_within_the_limits(self) -> None:
        own = self.key.allowance
        assert own.tokens is not None
        assert own.day_tokens >= 0
        assert 0 <= own.tokens.used <= TOKENS
        for allowance in self.key.persons.values():
            assert allowance.tokens is not None
            assert allowance.day_tokens >= 0
            assert 0 <= allowance.tokens.used <= 300

    def teardown(self) -> None:
        """Everything ends: nothing is left after a minute."""
        for hold, _, _ in self.holds:
            hold.end()
        self.holds.clear()
        self.clocks.passed += 86_400
        self.key.look_at_clock()
        for allowance in (self.key.allowance, *self.key.persons.values()):
            allowance.turn_to(self.key.day)
            allowance.advance(int(self.clocks.clock()))
            assert allowance.is_idle


TestKeyMachine = KeyMachine.TestCase
