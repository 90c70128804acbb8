"""Outlier detection: ejects a server that answers its probes but fails its requests.

Passive health checking, after Envoy's outlier detection (Envoy 1.31, "Outlier detection" in the
architecture overview, and `OutlierDetection` of the v3 API). Envoy's names are in parentheses. Pure,
except for its clock.

A detector watches the requests for one model in one lane on one server, because an engine can fail
for one model, or for images only. It learns how each request ended:

1. Failures: a 5xx, a connection that closes or cannot be made, a broken answer (externally and
   locally originated errors, not split). `IN_A_ROW` of them without a success in between
   (`consecutive_5xx`), or `WINDOW_FAILURES` of the last `WINDOW` (`failure_percentage`), make the
   server an outlier. Requests that the server refuses as invalid, clients that leave, and a server
   that is full count neither way.
2. Hangs: `HANGS` first-token timeouts in a row make it an outlier, or a stall: several requests that
   have waited many times as long as requests of their size usually do, while nothing else came from
   the server (`relay/stalls.py`).

An outlier is ejected for `BASE_SECONDS` times the number of its ejections (`base_ejection_time`), at
most `MAX_SECONDS` (`max_ejection_time`). Each `DECAY_SECONDS` without an ejection take one from that
number. Then it gets one request at a time, on trial: a success readmits it, a failure ejects it again.
A successful probe does not readmit it (`successful_active_health_check_uneject_host: false`), because
it kept answering probes while it failed. For `DECAY_SECONDS` after that, `RELAPSES` failures in a row
are enough.

One client must not eject a server for the others by requests that no server can serve. So the
failures have to come from several parties (a key, and the person that it names), or from one while no
other party has had a success for `QUIET_SECONDS`. If a party is the only one to fail but is not the
only one that the server has, the time of its ejections does not grow.

A last resort is never taken out (`panic mode`): if no other server can serve the model, requests
without a fallback are sent to a server that fails, because some may succeed. To one that hangs, they
are sent one at a time, because each costs a long wait; the rest are refused at once. Requests with a
fallback use that.

A failure of a request that was sent before the last ejection or readmission is not counted.
"""

from collections import deque
from collections.abc import Callable
from math import inf
from typing import Literal

from gateway.admission.fair_queue import Claim
from gateway.admission.limits import LaneName
from gateway.admission.server_slots import Gate

IN_A_ROW = 5
"""Envoy's default. An odd request that a client library repeats twice fails three times."""
WINDOW = 20
WINDOW_FAILURES = 8
HANGS = 2
RELAPSES = 2
BASE_SECONDS = 10.0
MAX_SECONDS = 300.0
DECAY_SECONDS = 60.0
QUIET_SECONDS = 30.0
KNOWN_SECONDS = 600.0
"""Time for which a party that had a success counts as one that uses the server."""
RECENT_SECONDS = 10.0
"""Time for which a server that got a request as a last resort counts as getting requests."""
MAX_PARTIES = 64
SAMPLES = 64
ENOUGH_SAMPLES = 8
"""Answers that have to be known before a wait can be called unusually long."""

HANG = "no_first_piece"
"""Reason of an ejection, and of a failure: no first token in time."""
STALL = "stalled"
"""Reason of an ejection: no first token for many times as long as usual."""

Change = Literal["ejected", "readmitted", "explained"]


def party_of(claim: Claim) -> str:
    """Return the party that a request counts for: its key, and the person behind the key."""
    return f"{claim.key}\0{claim.person}" if claim.person else claim.key


class OutlierDetector(Gate):
    """Detector for the requests of `lane` for `model` on one server.

    - `is_last_resort` returns whether no other server can serve these requests.
    - `on_change` is called after each ejection and readmission.
    """

    __slots__ = (
        "_clock",
        "_counted_since",
        "_ejections",
        "_evidence",
        "_hangs",
        "_in_a_row",
        "_is_last_resort",
        "_is_on_trial",
        "_last_resort_at",
        "_on_change",
        "_outcomes",
        "_readmitted_at",
        "_samples",
        "_successes",
        "_warned_at",
        "ejected_at",
        "lane",
        "model",
        "reason",
        "until",
    )

    def __init__(
        self,
        model: str,
        lane: LaneName,
        clock: Callable[[], float],
        is_last_resort: Callable[["OutlierDetector"], bool] = lambda detector: False,
        on_change: Callable[["OutlierDetector", Change], None] = lambda detector, change: None,
    ) -> None:
        super().__init__()
        self.model = model
        self.lane = lane
        self._clock = clock
        self._is_last_resort = is_last_resort
        self._on_change = on_change
        self.reason = ""
        """Reason of the present ejection, or of the last one."""
        self.ejected_at = -inf
        self.until = -inf
        """Time from which an ejected server gets trial requests."""
        self._ejections = 0
        self._readmitted_at = -inf
        self._warned_at = -inf
        """Time at which another replica told that it has ejected the server."""
        self._counted_since = -inf
        self._is_on_trial = False
        self._last_resort_at = -inf
        """Time at which a request last began while the server was ejected, and not on trial."""
        self._in_a_row: deque[str] = deque(maxlen=IN_A_ROW)
        """Parties of the failures since the last success."""
        self._hangs = 0
        self._outcomes: deque[tuple[str, bool]] = deque(maxlen=WINDOW)
        """Party and success of the last requests, from a first failure on."""
        self._evidence: set[str] = set()
        """Parties whose failures led to the present ejection."""
        self._successes: dict[str, float] = {}
        """Time of each party's last success, the latest last."""
        self._samples: deque[tuple[int, float]] = deque(maxlen=SAMPLES)

    def __repr__(self) -> str:
        failed = sum(not succeeded for _, succeeded in self._outcomes)
        return f"<OutlierDetector {self.model} {self.lane} {self.word}, {failed} failed, {self._ejections} ejections>"

    @property
    def is_hung(self) -> bool:
        """True if the server is ejected because no first tokens came."""
        return self.restrains and self.reason in (HANG, STALL)

    @property
    def word(self) -> Literal["in", "ejected", "trial"]:
        """State in a word. `trial`: a request is on trial, or will be as soon as one comes."""
        if not self.restrains:
            return "in"
        return "trial" if self._is_on_trial or self._clock() >= self.until else "ejected"

    @property
    def last_success(self) -> float:
        """Time of the last success; minus infinity without one."""
        return next(reversed(self._successes.values()), -inf)

    @property
    def is_used(self) -> bool:
        """True if a request succeeded in the last `KNOWN_SECONDS`."""
        return self.last_success >= self._clock() - KNOWN_SECONDS

    @property
    def gets_requests(self) -> bool:
        """True if the server gets these requests: all of them, one on trial, or lately as a last resort."""
        return self.word != "ejected" or self._clock() - self._last_resort_at < RECENT_SECONDS

    # Decisions

    def accepts(self) -> bool:
        """Return whether the server may get a request that can be served elsewhere too."""
        return not self.restrains or (not self._is_on_trial and self._clock() >= self.until)

    def allows(self) -> bool:
        """Return whether the server may get a request that no fallback has taken."""
        if self.accepts():
            return True
        return self._is_last_resort(self) and (not self.is_hung or not self._is_on_trial)

    def begin_trial(self) -> bool:
        """Make the request that begins the one on trial, if there is none and its time has come."""
        if self._is_on_trial or not (self.is_hung or self._clock() >= self.until):
            self._last_resort_at = self._clock()
            return False
        self._is_on_trial = True
        return True

    def end_trial(self, began: float) -> None:
        """Allow another request on trial, unless the one that ends began before the present ejection."""
        if began >= self.ejected_at:
            self._is_on_trial = False

    # Results of requests

    def succeed(self, claim: Claim, size: int, seconds: float | None, is_trial: bool) -> None:
        """Record a whole answer to a request of `size` bytes.

        Its first token took `seconds`, or None if the answer was not streamed.
        """
        party = party_of(claim) if claim.person else claim.key
        self._successes.pop(party, None)
        self._successes[party] = self._clock()
        if len(self._successes) > MAX_PARTIES:
            del self._successes[next(iter(self._successes))]
        if seconds is not None:
            self._samples.append((size, seconds))
        if self.restrains:
            if is_trial or self.is_hung:
                self._readmit()
        elif self._outcomes:
            self._in_a_row.clear()
            self._hangs = 0
            self._outcomes.append((party, True))
            if all(succeeded for _, succeeded in self._outcomes):
                self._outcomes.clear()

    def begin_answer(self) -> None:
        """Record the first token of an answer, which shows that the server does not hang.

        Required only while `restrains` is true.
        """
        if self.is_hung:
            self._readmit()

    def fail(self, reason: str, sent: float, claim: Claim, is_trial: bool) -> None:
        """Record the failure of a request that was sent at the time `sent`."""
        party = party_of(claim)
        if self.restrains:
            if is_trial and sent >= self.ejected_at:
                self._evidence.add(party)
                self._eject(reason)
            return
        if sent < self._counted_since:
            return
        self._outcomes.append((party, False))
        self._in_a_row.append(party)
        self._hangs = self._hangs + 1 if reason == HANG else 0
        parties = self._convicting_parties(party)
        if parties:
            self._evidence = parties
            self._eject(reason)

    def warn(self) -> None:
        """Count failures for a while as after a readmission: another replica has ejected the server."""
        self._warned_at = self._clock()

    def stall(self, parties: set[str]) -> None:
        """Eject the server, because requests of `parties` wait far longer than usual."""
        if not self.restrains:
            self._evidence = parties
            self._eject(STALL)

    def explain(self, since: float) -> None:
        """Withdraw an ejection that began at `since` or later, because the server has died.

        Its probes fail, so they decide when it gets requests again.
        """
        self._forget_outcomes()
        self._counted_since = self._clock()  # what ran there fails through the death, perhaps later
        if self.restrains and self.ejected_at >= since:
            self._ejections -= 1
            self.restrains = self._is_on_trial = False
            self._on_change(self, "explained")

    def usual_seconds(self, size: int) -> float | None:
        """Return the longest time to the first token of recent requests of at least `size` bytes.

        Return None if there were fewer than `ENOUGH_SAMPLES`.
        """
        times = [seconds for sample_size, seconds in self._samples if sample_size >= size]
        return max(times) if len(times) >= ENOUGH_SAMPLES else None

    def _convicting_parties(self, party: str) -> set[str]:
        """Return the parties whose failures make the server an outlier; empty if it is none."""
        relapses = self._clock() - max(self._readmitted_at, self._warned_at) < DECAY_SECONDS
        if len(self._in_a_row) >= (RELAPSES if relapses else IN_A_ROW) or self._hangs >= (1 if relapses else HANGS):
            parties = set(self._in_a_row)
            if len(parties) > 1 or self._is_alone(party):
                return parties
        failed = [name for name, succeeded in self._outcomes if not succeeded]
        if len(failed) < WINDOW_FAILURES:
            return set()
        worst = max(set(failed), key=failed.count)
        others = [succeeded for name, succeeded in self._outcomes if name != worst]
        if others:  # they have to fail as often, or the server is sound and the worst party's requests are not
            return set(failed) if others.count(False) * WINDOW >= len(others) * WINDOW_FAILURES else set()
        return {worst} if self._is_alone(worst) else set()

    def _is_alone(self, party: str, seconds: float = QUIET_SECONDS) -> bool:
        """Return whether no other party has had a success in the last `seconds`."""
        since = self._clock() - seconds
        return not any(at >= since for name, at in self._successes.items() if name != party)

    # Changes

    def _eject(self, reason: str) -> None:
        now = self._clock()
        if not self.restrains:
            self._ejections = max(0, self._ejections - int(min(now - self._readmitted_at, 1e9) / DECAY_SECONDS))
        grows = len(self._evidence) > 1 or all(self._is_alone(party, KNOWN_SECONDS) for party in self._evidence)
        self._ejections = self._ejections + 1 if grows else 1
        self.ejected_at = self._counted_since = now
        self.until = now + min(BASE_SECONDS * self._ejections, MAX_SECONDS)
        self.reason = reason
        self.restrains = True
        self._is_on_trial = False
        self._forget_outcomes()
        self._on_change(self, "ejected")

    def _readmit(self) -> None:
        self.restrains = self._is_on_trial = False
        self._readmitted_at = self._counted_since = self._clock()
        self._on_change(self, "readmitted")

    def _forget_outcomes(self) -> None:
        self._outcomes.clear()
        self._in_a_row.clear()
        self._hangs = 0
