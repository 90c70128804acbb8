"""Keeps the learned limits of backends over a restart, in the state's section `learned`."""

from collections.abc import Mapping
from typing import Any

from gateway.state_file import StateFile
from gateway.upstream.backend import Backend

SECTION = "learned"


def persist_learned_limits(state: StateFile, backends: Mapping[str, Backend], num_parallel: int | None) -> None:
    """Give `backends` what is kept, and keep what they learn from now on. A guess of the settings that has changed since counts more."""
    kept = state.get(SECTION)
    if isinstance(kept, dict) and kept.get("num_parallel") == num_parallel:
        for name, learned in _sound(kept.get("limits")).items():
            if name in backends:
                backends[name].recall(learned)

    def save() -> None:
        limits = {name: learned for name, backend in backends.items() if any((learned := backend.learned()).values())}
        state.put(SECTION, {"num_parallel": num_parallel, "limits": limits})

    for backend in backends.values():
        backend.admission.on_learned = save


def _sound(limits: Any) -> dict[str, dict[str, dict[str, int]]]:
    """Of what the file says, what has the right shape: backend, server, model, a number from 1 on."""
    if not isinstance(limits, dict):
        return {}
    return {
        backend: {
            server: {model: limit for model, limit in models.items() if isinstance(limit, int) and 1 <= limit <= 1024}
            for server, models in servers.items()
            if isinstance(models, dict)
        }
        for backend, servers in limits.items()
        if isinstance(servers, dict)
    }
