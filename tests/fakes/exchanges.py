"""Exchanges as the relay records them, for those who judge or count them."""

from typing import Any

from msgspec.structs import replace

from gateway.chat.answer import Usage
from gateway.telemetry.exchange import Exchange

OK = Exchange(
    request_id="r", key_id="", endpoint="chat", tier="standard", backend="vllm", chosen="vllm", model="m", lane="text", stream=True, status=200,
    code=None, reason=None, outcome="ok", phase="streaming", duration=1.25, queue_wait=0.0, upstream=1.25, time_to_first_token=0.25,
    usage=Usage(10, 101), attempts=1,
)  # fmt: skip
"""A stream of 1 s after 0.25 s, 10 ms between its tokens."""


def exchange(backend: str = "vllm", **changes: Any) -> Exchange:
    return replace(OK, **{"backend": backend, "chosen": backend} | changes)


def failed(backend: str = "vllm", **changes: Any) -> Exchange:
    """At once, before a piece."""
    words = {
        "outcome": "upstream_error",
        "status": 502,
        "code": "upstream_error",
        "reason": "status_5xx",
        "phase": "waiting",
    }
    return exchange(backend, **words | {"duration": 0.01, "time_to_first_token": None, "usage": None} | changes)
