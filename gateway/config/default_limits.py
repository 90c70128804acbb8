"""Default limits and timeouts for each kind of backend, with their reasons. Pure."""

from typing import Any

from gateway.config.document_backends import LimitKeys
from gateway.config.settings import BackendLimits, Kind

# Ollama runs few requests at once and loads models on demand, so few requests are in flight,
# timeouts are long, and images run one at a time.
_OLLAMA: dict[str, Any] = {
    "max_concurrency": 4, "model_concurrency": "auto", "vision_concurrency": 1,
    "max_queue": 256, "vision_max_queue": 512, "queue_timeout": 300.0, "vision_queue_timeout": 3600.0,
    "connect_timeout": 2.0, "first_token_timeout": 300.0, "idle_timeout": 300.0, "total_timeout": 3600.0,
}  # fmt: skip
# vLLM batches requests, so its throughput rises with the requests in flight, and its model is
# always loaded.
_VLLM: dict[str, Any] = {
    "max_concurrency": 128,
    "max_queue": 512, "vision_max_queue": 512, "queue_timeout": 60.0, "vision_queue_timeout": 300.0,
    "connect_timeout": 2.0, "first_token_timeout": 120.0, "idle_timeout": 120.0, "total_timeout": 3600.0,
}  # fmt: skip


def resolved(kind: Kind, given: LimitKeys) -> BackendLimits:
    """Return all limits of a backend: the given ones, else the defaults of its kind."""
    chosen = dict(_OLLAMA if kind == "ollama" else _VLLM)
    chosen.update({key: value for key in LimitKeys.model_fields if (value := getattr(given, key)) is not None})
    maximum = chosen["max_concurrency"]
    chosen.setdefault("model_concurrency", maximum)
    chosen.setdefault("vision_concurrency", maximum)
    return BackendLimits(**chosen)
