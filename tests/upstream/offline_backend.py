"""A backend whose servers are never asked for anything, and what tests do to it."""

import time
from typing import Any

from gateway import config
from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.upstream.backend import Backend
from gateway.upstream.outlier_detection import IN_A_ROW, OutlierDetector

MODEL = "llama"


def backend(*, kind: str = "vllm", servers: int = 2, **keys: Any) -> Backend:
    """Return a backend of `kind`, named `here`."""
    addresses = [{"base_url": f"http://127.0.0.1:{number + 1}"} for number in range(servers)]
    settings = config.build(
        {
            "llm_backend": "here",
            "backends": {"here": {"kind": kind, "servers": addresses, **keys}},
            "tiers": {"standard": {"models": {"here": MODEL}}},
        }
    )
    return Backend(settings.backends["here"])


def open_circuit(backend: Backend, number: int = 0) -> None:
    backend.servers[number].circuit.probe_missed(is_sure=True)


def eject(backend: Backend, number: int = 0, reason: str = "status_5xx") -> OutlierDetector:
    """Let a server fail until it is ejected for `MODEL` in the text lane."""
    detector = backend.servers[number].gate(MODEL, "text")
    for _ in range(IN_A_ROW):
        detector.fail(reason, time.monotonic(), Claim(), False)
    assert detector.restrains
    return detector


def ticket(backend: Backend) -> Ticket:
    return Ticket(backend.admission, backend.admission.queue(MODEL, "text"), Claim())
