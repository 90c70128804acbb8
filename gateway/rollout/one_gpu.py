"""Which assignments of tiers are possible when one GPU has room for one engine. Pure."""

from collections import Counter
from collections.abc import Mapping

from gateway.config import Settings
from gateway.rollout.assignment import Assignment, backends_of

ONE_ENGINE = "only one engine fits on the GPU (exclusive)"


def engines_of(settings: Settings, assignments: Mapping[str, Assignment]) -> list[str]:
    """Return the backends on the GPU that serve tiers, those of the most tiers first."""
    used = Counter(
        backend
        for assignment in assignments.values()
        for backend in backends_of(assignment)
        if backend in settings.on_gpu
    )
    return [backend for backend, _ in used.most_common()]


def reason_against(settings: Settings, assignments: Mapping[str, Assignment]) -> str | None:
    """Return why the assignments of all unpinned tiers are not possible, or None if they are."""
    engines = engines_of(settings, assignments)
    if len(engines) < 2:
        return None
    names = " and ".join(sorted(engines))
    return f"This would leave tiers on {names}, and {ONE_ENGINE}. Move all tiers at once. Nothing was changed."


def gathered(settings: Settings, assignments: Mapping[str, Assignment]) -> dict[str, Assignment]:
    """Return the assignments that bring all tiers to one engine, by tier: only those that change.

    It is `llm_backend` if tiers are on it, else the engine of the most tiers.
    """
    engines = engines_of(settings, assignments)
    if len(engines) < 2:
        return {}
    engine = settings.llm_backend if settings.llm_backend in engines else engines[0]
    return {
        name: Assignment(engine)
        for name, assignment in assignments.items()
        if assignment != Assignment(engine) and settings.on_gpu.intersection(backends_of(assignment))
    }
