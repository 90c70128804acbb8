"""Limits of a backend's admission, from the settings. Pure.

Where several replicas share the limits, each has all slots, which they share in other ways, and its
part of the places in the queues.
"""

from gateway.admission.limits import AdmissionLimits, LaneLimits, LaneName, TierLimits
from gateway.config import BackendSettings, LimitOverrides


def admission_limits(settings: BackendSettings, num_parallel: int | None, replicas: int) -> AdmissionLimits:
    """Return the limits of one of several replicas.

    A learned limit starts at `num_parallel`; None means 1.
    """
    limits = settings.limits
    places, vision_places = -(-limits.max_queue // replicas), -(-limits.vision_max_queue // replicas)
    lanes = {
        "text": LaneLimits(None, places, limits.queue_timeout),
        "vision": LaneLimits(limits.vision_concurrency, vision_places, limits.vision_queue_timeout),
        "embedding": LaneLimits(limits.max_concurrency, places, limits.queue_timeout, is_separate=True),
    }
    model_slots = None if limits.model_concurrency == "auto" else limits.model_concurrency
    return AdmissionLimits(limits.max_concurrency, model_slots, lanes, settings.kind == "ollama", num_parallel or 1)


def tier_limits(lane: LaneName, overrides: LimitOverrides | None, replicas: int) -> TierLimits | None:
    """Return the limits that a tier sets for itself in `lane`, or None if it sets none."""
    if overrides is None:
        return None
    is_vision = lane == "vision"
    model_slots = overrides.concurrency or overrides.model_concurrency
    places = overrides.vision_max_queue if is_vision else overrides.max_queue
    own = TierLimits(
        overrides.max_concurrency,
        None if model_slots == "auto" else model_slots,
        overrides.vision_concurrency if is_vision else None,
        None if places is None else -(-places // replicas),
        overrides.vision_queue_timeout if is_vision else overrides.queue_timeout,
    )
    return None if own == TierLimits() else own
