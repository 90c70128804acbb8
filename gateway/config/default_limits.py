"""The defaults of limits and times by kind of backend, with their reasons. Pure."""

from typing import Any

from gateway.config.document import LimitKeys
from gateway.config.settings import BackendLimits, Kind

# Ollama runs few requests at once and loads models on demand: few in flight, patient times, one image at a time.
_OLLAMA: dict[str, Any] = {
    "max_concurrency": 4, "model_concurrency": "auto", "vision_concurrency": 1, "max_queue": 256, "vision_max_queue": 512,
    "queue_timeout": 300.0, "vision_queue_timeout": 3600.0, "connect_timeout": 2.0, "first_token_timeout": 300.0,
    "idle_timeout": 300.0, "total_timeout": 3600.0,
}  # fmt: skip
# vLLM batches: the more it sees, the faster it is as a whole, and its model is always loaded.
_VLLM: dict[str, Any] = {
    "max_concurrency": 128, "max_queue": 512, "vision_max_queue": 512, "queue_timeout": 60.0, "vision_queue_timeout": 300.0,
    "connect_timeout": 2.0, "first_token_timeout": 120.0, "idle_timeout": 120.0, "total_timeout": 3600.0,
}  # fmt: skip


def resolved(kind: Kind, given: LimitKeys) -> BackendLimits:
    """All limits of a backend: what was given, else the default of its kind."""
    chosen = dict(_OLLAMA if kind == "ollama" else _VLLM)
    chosen.update({key: value for key in LimitKeys.model_fields if (value := getattr(given, key)) is not None})
    most = chosen["max_concurrency"]
    chosen.setdefault("model_concurrency", most)
    chosen.setdefault("vision_concurrency", most)
    return BackendLimits(**chosen)
