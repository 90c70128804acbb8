"""Tells a server that has vanished, or hangs, from one that is busy or restarts. Decides, and awaits nothing.

A host that vanishes sends neither FIN nor RST, so requests would hold their slots until their
timeouts. The circuit breaker only keeps new requests away. The rules for those that run:

1. A server is *gone* if its probes have failed for `GONE_SECONDS`, at least `FAILED_PROBES` of
   them, without any sign of life during that time. A sign of life is an answered probe, a byte on
   the connection of any request, or progress in sending one. Everything that runs there is ended.
   - A restarting server whose old process still finishes its streams sends bytes, so it is not gone.
     Streams of a process that has ended are closed by its system.
   - A busy server that answers its probes late sends bytes to others, so a request that waits for
     its first token is not ended either.
2. If a server answers again after an *outage* (`FAILED_PROBES` failed probes and `OUTAGE_SECONDS`
   without a sign of life), an answer that had begun before the outage and stays silent for
   `RETURN_SECONDS` more was lost with it, and is ended. A request without a first token is not:
   the server may still have it in its queue.

`silence.py` records since when each connection has been silent.

The kernel finds a vanished host by itself (`socket_options.py`), if nothing in between answers for
the host. These rules need no help from the network.
"""

GONE_SECONDS = 20.0
"""Longer than a restart or a pause of a healthy server, and short enough that slots are free again
within 30 s of the host's vanishing."""
FAILED_PROBES = 2
OUTAGE_SECONDS = 5.0
RETURN_SECONDS = 10.0
DOUBT_SECONDS = 4.0
"""Silence of all running requests after which a server is probed, however long the probe interval is."""


class Liveness:
    """Signs of life of one server. All times are in seconds on one clock."""

    __slots__ = ("_alive_at", "_failed_probes", "_failing_since", "_outage", "_returned_at")

    def __init__(self, now: float) -> None:
        self._alive_at = now
        self._failed_probes = 0
        self._failing_since = now
        self._outage: float | None = None
        self._returned_at = now

    def __repr__(self) -> str:
        return f"<Liveness alive at {self._alive_at:.1f}, {self._failed_probes} failed probes>"

    @property
    def has_failed(self) -> bool:
        """True if the last probe has failed."""
        return self._failed_probes > 0

    def probe_answered(self, now: float) -> None:
        if self._failed_probes >= FAILED_PROBES and now - self._alive_at >= OUTAGE_SECONDS:
            self._outage, self._returned_at = self._alive_at, now
        self._alive_at = now
        self._failed_probes = 0

    def probe_failed(self, began: float) -> None:
        """Record a failed probe that began at the time `began`."""
        if self._failed_probes == 0:
            self._failing_since = began
        self._failed_probes += 1

    def show_life(self, now: float) -> None:
        """Record a sign of life on a request's connection."""
        self._alive_at = now

    def silence(self, now: float) -> float:
        """Return the seconds since the last sign of life."""
        return now - self._alive_at

    def is_gone(self, now: float) -> bool:
        return self._failed_probes >= FAILED_PROBES and now - max(self._alive_at, self._failing_since) >= GONE_SECONDS

    def take_outage(self, now: float) -> float | None:
        """Return when the last outage began, once, as soon as rule 2 can be applied to it."""
        began = self._outage
        if began is None or now - self._returned_at < RETURN_SECONDS or now - began < GONE_SECONDS:
            return None
        self._outage = None
        return began
