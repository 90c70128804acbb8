"""Learned limits: keeps them over a restart, in the section `learned` of the state file."""

from collections.abc import Mapping
from typing import Any

from gateway.state_file import StateFile
from gateway.upstream.backend import Backend

SECTION = "learned"


class LearnedLimits:
    """The learned limits of `backends`, which holds the backends in force and may change in place.

    `num_parallel` is the setting OLLAMA_NUM_PARALLEL. Limits that were learned under another value of it are ignored.
    """

    def __init__(self, state: StateFile, backends: Mapping[str, Backend], num_parallel: int | None) -> None:
        self._state = state
        self._backends = backends
        self._num_parallel = num_parallel

    def restore(self) -> None:
        """Give the backends what the state file has. Call it before a backend gets its first request."""
        kept = self._state.get(SECTION)
        if isinstance(kept, dict) and kept.get("num_parallel") == self._num_parallel:
            for name, learned in _well_formed(kept.get("limits")).items():
                if name in self._backends:
                    self._backends[name].recall(learned)

    def save(self) -> None:
        """Write what the backends have learned."""
        limits = {
            name: learned for name, backend in self._backends.items() if any((learned := backend.learned()).values())
        }
        self._state.put(SECTION, {"num_parallel": self._num_parallel, "limits": limits})


def _well_formed(limits: Any) -> dict[str, dict[str, dict[str, int]]]:
    """Return the well-formed entries of `limits`: backend, server, model, a number from 1 to 1024."""
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
