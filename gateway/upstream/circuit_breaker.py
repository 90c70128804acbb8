"""Circuit breaker: decides whether a server may get requests.

A synchronous state machine, driven by the ends of exchanges and by probes. Pure, except for its
clock.

A circuit is `closed` while the server is healthy.

1. Failed exchanges make it `suspect`: `IN_A_ROW` failures in a row, or half of the last `WINDOW`
   exchanges. The server then gets no new requests until a probe has checked it. The probe is
   requested at once. One bad moment fails everything in flight, but does not mean that the server
   is dead.
2. If the probe succeeds, the circuit is `closed` again, the counts start over, and it does not
   become suspect for `CALM` seconds. If the probe fails, the circuit is `open`.
3. `MISSES` failed probes in a row open the circuit even without traffic.
4. `open`: the server gets no requests. The first successful probe makes the circuit `half_open`.
5. `half_open`: the server gets one request at a time. If a request or the next probe succeeds, the
   circuit is `closed`. If either fails, it is `open`.

An exchange that was sent before the last change of state says nothing about the time since, so its
failure is not counted. Thus the stragglers of a server that died do not bring down its successor.

A server can answer its probes and fail its requests for ever. `outlier_detection.py` ejects it.

A server that reports that it is full is paused: it gets no requests for a while. A pause does not
change the state, except that it closes a `half_open` circuit, because a full server is alive.

Invariants: `open` and `suspect` last until the next probe, `half_open` until the probe after that,
and a pause until its time is up. So every state ends as long as there are probes. `restrains` is
true exactly if `allows` could return False.
"""

from collections.abc import Callable
from math import inf
from typing import Literal

CircuitState = Literal["closed", "suspect", "half_open", "open"]

LEVELS: dict[CircuitState, int] = {"closed": 0, "suspect": 1, "half_open": 1, "open": 2}
"""Values of the metric `gateway_circuit_state`; a half-open circuit is on trial."""

IN_A_ROW = 3
WINDOW = 20
WINDOW_FAILURES = WINDOW // 2
MISSES = 2
"""Failed probes in a row that open the circuit of a server without other signs of trouble."""
CALM = 1.0
"""Seconds after a probe cleared a suspect server in which it does not become suspect again.

A server can fail every request and still answer every probe.
"""

_ALL = (1 << WINDOW) - 1


class CircuitBreaker:
    """Circuit breaker of one server.

    `on_change` is called after each change of state, with the previous state and the reason in a
    word.
    """

    __slots__ = (
        "_calm_until",
        "_changed_at",
        "_clock",
        "_in_a_row",
        "_leftover",
        "_misses",
        "_on_change",
        "_paused_until",
        "_recent",
        "is_troubled",
        "restrains",
        "state",
        "suspected_at",
    )

    def __init__(
        self, clock: Callable[[], float], on_change: Callable[[CircuitState, str], None] = lambda was, reason: None
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self.state: CircuitState = "closed"
        self.is_troubled = False
        """True if something failed recently. Only then does a success have to be recorded."""
        self.restrains = False
        """True if `allows` has to be asked. Otherwise every request is allowed."""
        self.suspected_at = inf
        """Time at which the circuit became suspect; infinite in any state but `suspect`, and in `open` after it."""
        self._changed_at = -inf
        self._calm_until = -inf
        self._paused_until = -inf
        self._recent = 0  # one bit per recent exchange, 1 for a failure; unknown ones count as successes
        self._in_a_row = 0
        self._misses = 0
        self._leftover = inf

    def __repr__(self) -> str:
        paused = ", paused" if self.is_paused else ""
        return (
            f"<CircuitBreaker {self.state}, {self._recent.bit_count()} of {WINDOW} failed, "
            f"{self._in_a_row} in a row{paused}>"
        )

    @property
    def is_open(self) -> bool:
        return self.state == "open"

    @property
    def is_paused(self) -> bool:
        return self._clock() < self._paused_until

    def allows(self, running: int) -> bool:
        """Return whether the server may get one more request beside the `running` ones."""
        if self._paused_until > -inf:
            if self.is_paused:
                return False
            self._paused_until = -inf
            self._update_flags()
        if self.state == "half_open":  # requests left over from before do not count as the trial request
            self._leftover = min(self._leftover, running)
            return running <= self._leftover
        return self.state == "closed"

    # Results of exchanges

    def succeed(self) -> None:
        """Record a successful exchange. Required only while `is_troubled`."""
        if self.state == "half_open":
            self._change_to("closed", "answered")
        elif self.state == "closed":
            self._recent = self._recent << 1 & _ALL
            self._in_a_row = 0
            self._update_flags()

    def begin_answer(self) -> None:
        """Record the first token of an answer, which closes a half-open circuit.

        Required only while `is_troubled`.
        """
        if self.state == "half_open":
            self._change_to("closed", "answered")

    def fail(self, reason: str, sent: float) -> None:
        """Record that an exchange, sent at the time `sent`, failed through the server's fault."""
        if sent < self._changed_at:
            return
        if self.state == "half_open":
            self._change_to("open", reason)
        elif self.state == "closed":
            self._recent = (self._recent << 1 | 1) & _ALL
            self._in_a_row += 1
            self._update_flags()
            if (
                self._in_a_row >= IN_A_ROW or self._recent.bit_count() >= WINDOW_FAILURES
            ) and self._clock() >= self._calm_until:
                self._change_to("suspect", reason)

    def mark_suspect(self, reason: str) -> None:
        """Send nothing more to the server until a probe has checked it."""
        if self.state == "closed":
            self._change_to("suspect", reason)

    def pause(self, seconds: float) -> None:
        """Send nothing more to the full server for `seconds`. Never shortens a pause."""
        self._paused_until = max(self._paused_until, self._clock() + seconds)
        if self.state == "half_open":
            self._change_to("closed", "answered")
        self._update_flags()

    def reset(self) -> None:
        """Close the circuit, whatever has failed: the engine sleeps, or is started anew."""
        self._paused_until = -inf
        if self.state == "closed":
            self._recent = self._in_a_row = self._misses = 0
            self._update_flags()
        else:
            self._change_to("closed", "reset")

    # Results of probes

    def probe_answered(self) -> None:
        """Record an answered probe."""
        self._misses = 0
        if self.state == "suspect":
            self._calm_until = self._clock() + CALM
        if self.state == "open":
            self._change_to("half_open", "probe")
        elif self.state != "closed":
            self._change_to("closed", "probe")

    def probe_missed(self, *, is_sure: bool = False) -> None:
        """Record a failed probe. `is_sure` means that the server was asked more than once."""
        self._misses += 1
        if (
            self.state == "half_open"
            or self.state == "suspect"
            or (self.state == "closed" and (is_sure or self._misses >= MISSES))
        ):
            self._change_to("open", "probe")

    def _change_to(self, state: CircuitState, reason: str) -> None:
        was, self.state = self.state, state
        self._changed_at = self._clock()
        if state != "open":
            self.suspected_at = self._changed_at if state == "suspect" else inf
        self._recent = self._in_a_row = self._misses = 0
        self._leftover = inf
        self._update_flags()
        self._on_change(was, reason)

    def _update_flags(self) -> None:
        self.is_troubled = self._recent != 0 or self.state != "closed"
        self.restrains = self.state != "closed" or self._paused_until > -inf
