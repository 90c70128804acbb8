"""Whether a server may be given requests: a synchronous state machine, fed by the ends of exchanges and by probes. Pure but for its clock.

How it works. A circuit is `closed` while all is well.

1. Failures of exchanges make it `suspect`: `IN_A_ROW` of them one after the other, or half of the last `WINDOW`. Nothing new goes to the server
   until a probe has looked, which is asked for at once: one bad instant fails everything in flight, and is no death.
2. The probe finds it well: `closed` again, with a clean slate, and no new suspicion for `CALM` seconds. The probe fails: `open`.
3. `MISSES` probes in a row that fail open it without any traffic, too.
4. `open`: nothing goes there. The first probe that succeeds makes it `half_open`.
5. `half_open`: one request goes there at a time. When one succeeds, or the next probe does, it is `closed`; when either fails, `open`.

An exchange that was sent before the state changed says nothing about the time since: its failure is not counted. So the stragglers of a server
that died do not bring down the one that came in its place.

A server that says that it is full is paused: nothing goes there for a time, and the state stays what it is.

Invariants: `open` and `suspect` last until the next probe, `half_open` until the one after it, a pause until its time, so each state has an end
as long as there are probes. `restrains` is true exactly when `allows` could say no.
"""

from collections.abc import Callable
from math import inf
from typing import Literal

CircuitState = Literal["closed", "suspect", "half_open", "open"]

LEVELS: dict[CircuitState, int] = {"closed": 0, "suspect": 1, "half_open": 2, "open": 3}
"""What `gateway_circuit_state` shows."""

IN_A_ROW = 3
WINDOW = 20
HALF = WINDOW // 2
MISSES = 2
"""Probes of a server that nothing else speaks against."""
CALM = 1.0
"""Seconds after a probe has cleared a server in which it is not asked again for the same: a server can fail each request and answer each probe."""

_ALL = (1 << WINDOW) - 1


class CircuitBreaker:
    """One server's. `on_change` is told of each change of state: the state before, and the reason for the change in a word."""

    __slots__ = (
        "_calm_until", "_clock", "_in_a_row", "_left_over", "_misses", "_on_change", "_paused_until", "_recent", "_since", "is_troubled",
        "restrains", "state",
    )  # fmt: skip

    def __init__(
        self, clock: Callable[[], float], on_change: Callable[[CircuitState, str], None] = lambda was, reason: None
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self.state: CircuitState = "closed"
        self.is_troubled = False
        """Something failed of late: only then does a success have anything to say."""
        self.restrains = False
        """`allows` has to be asked; where it is False, anything goes."""
        self._since = -inf
        self._calm_until = -inf
        self._paused_until = -inf
        self._recent = 0  # a bit for each of the last exchanges, 1 for a failure; what is not known is taken for well
        self._in_a_row = 0
        self._misses = 0
        self._left_over = inf

    def __repr__(self) -> str:
        paused = ", paused" if self.is_paused else ""
        return (
            f"<Circuit {self.state}, {self._recent.bit_count()} of {WINDOW} failed, {self._in_a_row} in a row{paused}>"
        )

    @property
    def is_open(self) -> bool:
        return self.state == "open"

    @property
    def is_paused(self) -> bool:
        return self._clock() < self._paused_until

    def allows(self, running: int) -> bool:
        """Whether one request more may go there beside the `running`."""
        if self._paused_until > -inf:
            if self.is_paused:
                return False
            self._paused_until = -inf
            self._settle()
        if self.state == "half_open":  # those left over from before do not count as the one that is tried
            self._left_over = min(self._left_over, running)
            return running <= self._left_over
        return self.state == "closed"

    # What exchanges tell

    def succeed(self) -> None:
        """An exchange ended well. Needs to be told only while `is_troubled`."""
        if self.state == "half_open":
            self._become("closed", "answered")
        elif self.state == "closed":
            self._recent = self._recent << 1 & _ALL
            self._in_a_row = 0
            self._settle()

    def begin_answer(self) -> None:
        """The first piece of an answer came: enough for a server that is tried. Needs to be told only while `is_troubled`."""
        if self.state == "half_open":
            self._become("closed", "answered")

    def fail(self, reason: str, sent: float) -> None:
        """An exchange that was sent at the time `sent` failed, by the server's fault."""
        if sent < self._since:
            return
        if self.state == "half_open":
            self._become("open", reason)
        elif self.state == "closed":
            self._recent = (self._recent << 1 | 1) & _ALL
            self._in_a_row += 1
            self._settle()
            if (self._in_a_row >= IN_A_ROW or self._recent.bit_count() >= HALF) and self._clock() >= self._calm_until:
                self._become("suspect", reason)

    def mark_suspect(self, reason: str) -> None:
        """Let a probe look before anything else goes there."""
        if self.state == "closed":
            self._become("suspect", reason)

    def pause(self, seconds: float) -> None:
        """The server is full: nothing more for so long. A pause is never made shorter."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)
        if self.state == "half_open":
            self._become("closed", "answered")
        self._settle()

    # What probes tell

    def probe_answered(self) -> None:
        """The server answered a probe."""
        self._misses = 0
        if self.state == "suspect":
            self._calm_until = self._clock() + CALM
        if self.state == "open":
            self._become("half_open", "probe")
        elif self.state != "closed":
            self._become("closed", "probe")

    def probe_missed(self, *, is_sure: bool = False) -> None:
        """The server did not answer a probe; `is_sure`: it was asked more than once."""
        self._misses += 1
        if (
            self.state == "half_open"
            or self.state == "suspect"
            or (self.state == "closed" and (is_sure or self._misses >= MISSES))
        ):
            self._become("open", "probe")

    def _become(self, state: CircuitState, reason: str) -> None:
        was, self.state = self.state, state
        self._since = self._clock()
        self._recent = self._in_a_row = self._misses = 0
        self._left_over = inf
        self._settle()
        self._on_change(was, reason)

    def _settle(self) -> None:
        self.is_troubled = self._recent != 0 or self.state != "closed"
        self.restrains = self.state != "closed" or self._paused_until > -inf
