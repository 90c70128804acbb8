"""Exchanges as the relay records them, for tests of what counts or judges them."""

from typing import Any

from msgspec.structs import replace

from gateway.chat.answer import Usage
from gateway.telemetry.exchange import Exchange

OK = Exchange(
    request_id="r",
    key_id="",
    endpoint="chat",
    tier="standard",
    backend="vllm",
    chosen="vllm",
    model="m",
    lane="text",
    stream=True,
    status=200,
    code=None,
    reason=None,
    outcome="ok",
    phase="streaming",
    duration=1.25,
    queue_wait=0.0,
    upstream=1.25,
    time_to_first_token=0.25,
    usage=Usage(10, 101),
    attempts=1,
)
"""Stream with its first token after 0.25 s, then 1 s with 10 ms between tokens."""


def exchange(backend: str = "vllm", **changes: Any) -> Exchange:
    """Return `OK` on this backend, with changes."""
    return replace(OK, **{"backend": backend, "chosen": backend} | changes)


def failed(backend: str = "vllm", **changes: Any) -> Exchange:
    """Return an exchange that failed after 10 ms, before its first token."""
    failure = {
        "outcome": "upstream_error",
        "status": 502,
        "code": "upstream_error",
        "reason": "status_5xx",
        "phase": "waiting",
    }
    return exchange(backend, **failure | {"duration": 0.01, "time_to_first_token": None, "usage": None} | changes)
