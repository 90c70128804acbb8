"""What a failed attempt means for the server it was sent to. Decides; awaits nothing."""

import math
import time
from email.utils import parsedate_to_datetime

from gateway.errors import (
    BackendUnavailable,
    GatewayError,
    InvalidRequest,
    ModelNotFound,
    SchemaTooComplex,
    UpstreamError,
)
from gateway.upstream.backend import Backend
from gateway.upstream.connection import Connection, WireError
from gateway.upstream.server import Server

UNSENT = frozenset({"connect", "connect_timeout"})
"""Nothing of the request reached the server: trying elsewhere costs nobody anything."""

SERVER_FAULTS = UNSENT | {"closed", "reset", "protocol", "truncated", "stream_error", "status_5xx"}
"""Reasons of upstream errors that are the server's own fault. A wrong key or an answer of the wrong kind is no matter of its health."""

BUSY = "busy"

MISSING = "model_not_found"

FULL_SECONDS = 1.0
"""Pause of a server that is full and does not say for how long."""

LONGEST_PAUSE = 120


def retry_seconds(value: bytes, wall_clock: float) -> int | None:
    """A backend's `Retry-After` (RFC 9110 section 10.2.3: seconds, or a date), within 0 to `LONGEST_PAUSE`; None for what is neither.

    `wall_clock` is in Unix time.
    """
    if value.isdigit():
        return LONGEST_PAUSE if len(value) > 6 else min(LONGEST_PAUSE, int(value))
    try:
        seconds = parsedate_to_datetime(value.decode("latin-1")).timestamp() - wall_clock
    except (ValueError, OverflowError):
        return None
    return min(LONGEST_PAUSE, max(0, math.ceil(seconds)))


def with_retry_after(error: GatewayError, response: Connection) -> GatewayError:
    """`error`, which `response` meant; with a full backend's `Retry-After`, which goes on to the client."""
    told = response.fields.get(b"retry-after")
    if told is not None and isinstance(error, BackendUnavailable):
        seconds = retry_seconds(told, time.time())
        if seconds is not None:
            error.pause, error.retry_after = seconds, max(1, seconds)
    return error


def record_failure(backend: Backend, model: str, server: Server, error: GatewayError, sent: float) -> str | None:
    """Tell `server` what became of the attempt at `model` that was sent at the time `sent`; the reason in a word, where it may be tried elsewhere."""
    if isinstance(error, UpstreamError):
        if error.reason not in SERVER_FAULTS:
            return None
        server.circuit.fail(error.reason, sent)
        return error.reason
    if isinstance(error, BackendUnavailable):
        backend.pause(server, FULL_SECONDS if error.pause is None else error.pause)
        return BUSY
    if isinstance(error, ModelNotFound):
        server.mark_missing(model)
        return MISSING
    if isinstance(error, SchemaTooComplex):
        return None  # nothing was sent
    if isinstance(error, InvalidRequest) and server.circuit.is_troubled:
        server.circuit.succeed()  # the fault is the request's
    return None


JSON = b"application/json"


def check_headers(response: Connection, media_type: bytes = JSON, takes_plain: bool = False) -> bool:
    """Whether the answer is a stream. A server may answer a wish for a stream plainly, which does for who `takes_plain`."""
    fields = response.fields
    if fields.get(b"content-encoding", b"identity").lower() != b"identity":
        raise UpstreamError("content_encoding", "The model backend returned an invalid response.")
    found = fields.get(b"content-type", media_type).lower()
    if found.startswith(media_type):
        return media_type != JSON
    if takes_plain and found.startswith(JSON):
        return False
    raise UpstreamError("content_type", "The model backend returned an invalid response.")


def upstream_error(fault: WireError) -> UpstreamError:
    """What a failure of the connection means to the client."""
    return UpstreamError(fault.fault)
