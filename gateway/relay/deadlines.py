"""The deadlines of one exchange, and what keeps its client's connection alive meanwhile.

`gateway/relay/in_flight.py` calls `check_deadlines` for all relays from one timer.
"""

import math

from gateway.errors import UpstreamTimeout
from gateway.relay.supervised import SupervisedRelay
from gateway.upstream.failures import NO_FIRST_PIECE, NO_NEXT_PIECE
from gateway.upstream.outlier_detection import HANG

KEEPALIVE_SHARE = 0.8
"""Share of the client's read timeout after which a plain answer is kept alive."""


class TimedRelay(SupervisedRelay):
    """An exchange that ends in time."""

    __slots__ = ()

    def check_deadlines(self, now: float) -> None:
        """End the exchange if a deadline has passed; send a keep-alive if it has been silent.

        A new phase resets `check_at` to zero, because its deadline may be earlier.
        """
        deadline, phase = self._deadline()
        if now >= deadline and phase == NO_FIRST_PIECE and self.leave_dead_server():
            return
        if now >= deadline and phase == NO_FIRST_PIECE and self._may_be_frozen():
            deadline, phase = self._end_deadline()  # without a first token it fails only if its model is not unloaded
        if now >= deadline:
            self._cancel_scope.end(UpstreamTimeout(phase))
            self.check_at = math.inf
            self._record_timeout(phase)
            return
        if self._next_keepalive is None:
            self._next_keepalive = self._meter.arrived + self._keepalive_after()
        self._next_keepalive = max(self._next_keepalive, self._active_until())
        if now >= self._next_keepalive:
            self._send_keepalive()
            self._next_keepalive = now + self._context.heartbeat
        self.check_at = now if self._is_late and self.awaits_first_token else min(deadline, self._next_keepalive)

    def _deadline(self) -> tuple[float, str]:
        """Return the deadline of the current phase, and what to tell the client when it passes.

        While the client does not read, the backend's own deadlines do not count.
        """
        meter, limits = self._meter, self._limits
        if meter.sent is None:
            return math.inf, ""
        ends = self._end_deadline()
        if self._client.paused:
            return ends
        if meter.first_piece is None:
            return min(ends, (meter.last_piece + limits.first_token_timeout, NO_FIRST_PIECE))
        return min(ends, (meter.last_piece + limits.idle_timeout, NO_NEXT_PIECE))

    def _end_deadline(self) -> tuple[float, str]:
        """Return the deadline of the whole answer, once it was sent."""
        meter, timeout = self._meter, self._request.claim.timeout
        assert meter.sent is not None
        ends = meter.sent + self._limits.total_timeout, "no end"
        if timeout is not None:
            ends = min(ends, (meter.arrived + timeout, "no end within the client's timeout"))
        return ends

    def _record_timeout(self, phase: str) -> None:
        """Record a timeout that is the server's fault."""
        server, placement, since = self._server, self._ticket.placement, self._meter.last_piece
        if server is None or placement is None or phase not in (NO_FIRST_PIECE, NO_NEXT_PIECE):
            return
        if phase == NO_FIRST_PIECE:
            server.circuit.fail(HANG, since)
        if not server.circuit.is_open:
            reason = HANG if phase == NO_FIRST_PIECE else "no_next_piece"
            placement.gate.fail(reason, since, self._request.claim, self._ticket.is_trial)

    def _may_be_frozen(self) -> bool:
        """Return whether it is still being found out whether the model has frozen."""
        if not self.awaits_first_token:
            return False
        frozen_models = self._context.frozen_models
        if not self._is_late:
            self._is_late = True
            frozen_models.suspect(self)
        return frozen_models.is_deciding(self)

    # Keep alive

    def _keepalive_after(self) -> float:
        """Return the seconds of silence after which an answer is kept alive."""
        return math.inf if self._request.read_timeout is None else KEEPALIVE_SHARE * self._request.read_timeout

    def _active_until(self) -> float:
        """Return the time until which no keep-alive is needed, as something has been sent."""
        return -math.inf

    def _send_keepalive(self) -> None:
        if self._client.paused:
            return
        if not self._started:
            self._start(self._form.json_lines)
        self._client.write(b" ")
