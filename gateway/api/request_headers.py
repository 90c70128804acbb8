"""Parsing of the request headers that the gateway reads. Pure: no I/O."""

import math
import random
import re
from collections.abc import Mapping

from msgspec import Struct

from gateway.errors import InvalidRequest, LoopDetected
from gateway.upstream.server import VIA

Fields = Mapping[bytes, bytes]

PRIORITY = b"x-gateway-priority"

TIMEOUT = b"x-gateway-timeout"

MAX_TIMEOUT = 86400.0

SESSION = b"x-gateway-session"

_random_bits = random.getrandbits

_SANE_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class HeaderTerms(Struct, frozen=True, gc=False):
    """What the head of a request says beside who sent it: the same for all requests with this head."""

    came_through: bytes
    read_timeout: float | None
    """How long the client waits for a plain answer, where it says so."""
    extra_lines: bytes
    """Header lines sent with the answer, whatever it is."""
    session: bytes
    """The client's name for the conversation; empty without one."""


def request_id_of(fields: Fields) -> str:
    """The client's own `X-Request-Id` if it is short and plain, else a new one."""
    given = fields.get(b"x-request-id")
    if given is not None and _SANE_ID.fullmatch(given):
        return given.decode()
    return "req-" + _random_id()


def _random_id() -> str:
    return _random_bits(96).to_bytes(12).hex()  # a third of what formatting costs


def reject_loop(fields: Fields, gateway_id: bytes) -> None:
    """Raises `LoopDetected` for a request that this very gateway has sent."""
    via = fields.get(VIA)
    if via is not None and gateway_id in via:
        raise LoopDetected


def priority_is_batch(value: bytes) -> bool:
    """Raises `InvalidRequest` for what is no priority."""
    word = value.strip().lower()
    if word not in (b"interactive", b"batch"):
        raise InvalidRequest(
            "The header x-gateway-priority has to be 'interactive' or 'batch'.", param=PRIORITY.decode()
        )
    return word == b"batch"


def timeout_of(value: bytes) -> float:
    """Raises `InvalidRequest` for what is no number of seconds."""
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidRequest(
            "The header x-gateway-timeout has to be a number of seconds, more than 0 and at most 86400.",
            param=TIMEOUT.decode(),
        )
    return seconds


def _seconds(value: bytes | None) -> float | None:
    """A header's number of seconds; None for what is none, or out of reason."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        return None
    return seconds if 1 <= seconds <= 86400 else None
