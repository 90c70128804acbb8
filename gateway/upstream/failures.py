"""Meaning of a failed attempt for the server that it was sent to. Decides, and awaits nothing."""

import logging
import math
import time
from email.utils import parsedate_to_datetime

from gateway.admission.ticket import Ticket
from gateway.errors import (
    BackendUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    SchemaTooComplex,
    UpstreamError,
)
from gateway.upstream.backend import Backend
from gateway.upstream.connection import Connection
from gateway.upstream.outlier_detection import HANG
from gateway.upstream.server import Server
from gateway.upstream.transport_error import TransportError

_log = logging.getLogger(__name__)

UNSENT = frozenset({"connect", "connect_timeout"})
"""Reasons for which nothing of the request has reached the server, so a retry elsewhere is free."""

UNRESPONSIVE = "unresponsive"
"""Reason for which an exchange was given up: the server's host has vanished, or its process hangs."""

SERVER_FAULTS = UNSENT | {
    UNRESPONSIVE, "closed", "reset", "protocol", "truncated", "stream_error", "aborted", "status_5xx", HANG,
}  # fmt: skip
"""Reasons of upstream errors that are the server's fault, and after which a request may go elsewhere.

A wrong key or an answer of the wrong kind says nothing about whether the server is alive.
"""

BROKEN_ANSWERS = frozenset({"malformed", "content_type", "content_encoding"})
"""Reasons for which a request is not sent again, since an answer came, but which eject a server."""

BUSY = "busy"

MISSING = "model_not_found"

NO_FIRST_PIECE = "no first token"
"""Words for the client when `first_token_timeout` has passed."""

NO_NEXT_PIECE = "no next token"
"""Words for the client when `idle_timeout` has passed."""

FULL_SECONDS = 1.0
"""Pause of a full server that does not say how long it stays full."""

LONGEST_PAUSE = 120


def retry_seconds(value: bytes, wall_clock: float) -> int | None:
    """Parse a backend's `Retry-After` (RFC 9110 section 10.2.3: seconds or a date).

    Return seconds from 0 to `LONGEST_PAUSE`, or None if `value` is neither. `wall_clock` is in Unix
    time.
    """
    if value.isdigit():
        return LONGEST_PAUSE if len(value) > 6 else min(LONGEST_PAUSE, int(value))
    try:
        seconds = parsedate_to_datetime(value.decode("latin-1")).timestamp() - wall_clock
    except (ValueError, OverflowError):
        return None
    return min(LONGEST_PAUSE, max(0, math.ceil(seconds)))


def with_retry_after(error: GatewayError, response: Connection) -> GatewayError:
    """Return `error`, with the `Retry-After` of `response` if it means that the backend is full.

    The client gets this `Retry-After` too.
    """
    header = response.fields.get(b"retry-after")
    if header is not None and isinstance(error, BackendUnavailable):
        seconds = retry_seconds(header, time.time())
        if seconds is not None:
            error.pause, error.retry_after = seconds, max(1, seconds)
    return error


def log_engine_reason(server: Server, error: GatewayError) -> None:
    """Log what the engine itself gives as the reason for `error`, if it is known."""
    if error.engine_reason is not None:
        _log.warning("backend %s: the engine reports: %s", server.name, error.engine_reason)


def record_failure(backend: Backend, model: str, server: Server, error: GatewayError, sent: float) -> str | None:
    """Record the failure of an attempt at `model` on `server` that was sent at the time `sent`.

    Return the reason in a word if the request may be tried elsewhere, otherwise None.
    """
    log_engine_reason(server, error)
    if isinstance(error, UpstreamError):
        if error.reason not in SERVER_FAULTS:
            return None
        server.doubt_name()
        if error.reason != HANG:  # which is recorded where it is found
            server.circuit.fail(error.reason, sent)
        return error.reason
    if isinstance(error, BackendUnavailable):
        backend.restraints.pause(server, FULL_SECONDS if error.pause is None else error.pause)
        return BUSY
    if isinstance(error, ModelNotFound):
        server.mark_missing(model)
        return MISSING
    if isinstance(error, SchemaTooComplex):
        return None  # nothing was sent
    if isinstance(error, InvalidRequest) and server.circuit.is_troubled:
        server.circuit.succeed()  # the request is at fault
    return None


def record_outlier(server: Server, ticket: Ticket, error: GatewayError, sent: float) -> None:
    """Record in the outlier detector that the attempt of `ticket` failed through the server's fault.

    Call it before `record_failure`: a dead server is left to its circuit breaker.
    """
    placement = ticket.placement
    if placement is None or server.circuit.is_open or not isinstance(error, UpstreamError) or error.reason == HANG:
        return
    if error.reason in SERVER_FAULTS or error.reason in BROKEN_ANSWERS:
        placement.gate.fail(error.reason, sent, ticket.claim, ticket.is_trial)


JSON = b"application/json"


def check_headers(response: Connection, media_type: bytes = JSON, takes_plain: bool = False) -> bool:
    """Check the type and encoding of an answer. Return whether it is a stream.

    With `takes_plain`, a plain answer is accepted although a stream was requested.

    Raises:
        UpstreamError: the answer has an unexpected content type or content encoding.
    """
    fields = response.fields
    if fields.get(b"content-type") == media_type and b"content-encoding" not in fields:
        return media_type != JSON
    encoding = fields.get(b"content-encoding")
    if encoding is not None and encoding.lower() != b"identity":
        raise UpstreamError("content_encoding", "The model backend returned an invalid response.")
    content_type = fields.get(b"content-type", media_type).lower()
    if content_type.startswith(media_type):
        return media_type != JSON
    if takes_plain and content_type.startswith(JSON):
        return False
    raise UpstreamError("content_type", "The model backend returned an invalid response.")


def upstream_error(fault: TransportError) -> UpstreamError:
    """Return the error that the client gets for a failed connection."""
    return UpstreamError(fault.fault)
