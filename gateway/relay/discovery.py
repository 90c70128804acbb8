"""Discovery: serves models that a backend lists and that no setting names, under their own names.

Each probe of a backend with `discover` updates the names. Such a model is pinned to its backend and
has no tier, so its requests have the tier `none` in metrics and logs. What the gateway keeps for a
model (queues, limits, outlier detectors) is dropped once the model is gone and its last request has
ended, so models that come and go do not add up.
"""

import logging

from msgspec import Struct

from gateway.config import Settings
from gateway.config.parsers import model_name
from gateway.errors import GatewayError, ModelNotFound
from gateway.relay.destinations import Destinations
from gateway.relay.route import Route
from gateway.telemetry.exchange import NONE
from gateway.upstream.backend import Backend
from gateway.upstream.server import MAX_DISCOVERED

LATEST = ":latest"
"""Tag that a name may have or lack."""

_log = logging.getLogger(__name__)


class DiscoveredModel(Struct, frozen=True):
    """A model under its own name. `route.model` is the name as its backend lists it."""

    route: Route
    capabilities: frozenset[str] | None
    """Capabilities in Ollama's words; None if the backend does not report them."""

    @property
    def name(self) -> str:
        return self.route.model

    @property
    def takes_chats(self) -> bool:
        """False if the model is known to do nothing but embeddings."""
        return self.capabilities is None or self.capabilities != {"embedding"}

    @property
    def takes_embeddings(self) -> bool:
        """False if the model is known not to do embeddings."""
        return self.capabilities is None or "embedding" in self.capabilities


class Discovery:
    """The discovered models of the backends in force.

    A name that the settings have too is in here as well: whoever looks it up asks the settings
    first.
    """

    def __init__(self, settings: Settings, destinations: Destinations) -> None:
        self._settings = settings
        self._destinations = destinations
        self._found: dict[str, dict[str, DiscoveredModel]] = {}
        """Models by backend, and by the name that backends use."""
        self.models: dict[str, DiscoveredModel] = {}
        """Models by name in lower case, without `:latest`. Each change makes another dict."""
        self._leaving: dict[Backend, set[str]] = {}
        """Models that are gone, but for which something is still kept."""
        self._limited: set[str] = set()
        """Backends with more than `MAX_DISCOVERED` models."""

    def __repr__(self) -> str:
        return f"<Discovery of {len(self.models)} models, {sum(map(len, self._leaving.values()))} leaving>"

    def find(self, name: str) -> DiscoveredModel | None:
        """Return the model with this name, with or without `:latest`, without regard to case."""
        return self.models.get(name.lower().removesuffix(LATEST)) if self.models else None

    def change(self, settings: Settings) -> None:
        """Apply changed settings, which `destinations` already has."""
        self._settings = settings
        for name in self._found.keys() - settings.backends.keys():
            del self._found[name]
        self._merge()
        for backend in list(self._destinations.backends.values()):
            self.update(backend)

    def update(self, backend: Backend) -> None:
        """Note which models `backend` has, after a probe of one of its servers."""
        if self._destinations.backends.get(backend.name) is not backend:
            return
        before = self._found.get(backend.name, {})
        found = self._listed(backend) if backend.settings.discover else {}
        if found != before:
            self._found[backend.name] = found
            self._merge()
            leaving = self._leaving.setdefault(backend, set())
            leaving.update(before)
            leaving.difference_update(found)
            self._refuse_waiting(backend, leaving)
        if self._leaving:
            self._release()

    def _listed(self, backend: Backend) -> dict[str, DiscoveredModel]:
        found: dict[str, DiscoveredModel] = {}
        known: set[str] = set()
        for server in backend.servers:
            for name, facts in server.listed_models():
                key = name.lower().removesuffix(LATEST)
                if key in known or not _is_usable(name):
                    continue
                if len(found) == MAX_DISCOVERED:
                    self._report_limit(backend)
                    return found
                known.add(key)
                found[name] = DiscoveredModel(Route(NONE, backend.name, name), facts.capabilities)
        self._limited.discard(backend.name)
        return found

    def _report_limit(self, backend: Backend) -> None:
        if backend.name not in self._limited:
            self._limited.add(backend.name)
            _log.warning(
                "backend %s: it lists more than %d models, and only the first %d are discovered",
                backend.name,
                MAX_DISCOVERED,
                MAX_DISCOVERED,
            )

    def _merge(self) -> None:
        """Rebuild the names. A name that two backends have belongs to the first of the settings."""
        merged: dict[str, DiscoveredModel] = {}
        for name in self._settings.backends:
            for model, found in self._found.get(name, {}).items():
                merged.setdefault(model.lower().removesuffix(LATEST), found)
        self.models = merged

    def _refuse_waiting(self, backend: Backend, gone: set[str]) -> None:
        """End the wait of requests for models that no server of `backend` has any longer."""
        for queue in backend.admission.queues:
            if queue.waiting and queue.model in gone and not any(s.serves(queue.model) for s in backend.servers):
                queue.refuse(_gone)

    def _release(self) -> None:
        """Drop what is kept for models that are gone and have no request left."""
        destinations = self._destinations
        if destinations.past:  # requests of earlier settings may return to queues that are empty now
            return
        in_force = set(destinations.backends.values())
        for backend, gone in list(self._leaving.items()):
            if backend in in_force:
                destinations.forget(Route(NONE, backend.name, model) for model in gone)
                gone = backend.forget_models(gone, destinations.queues)
            if backend in in_force and gone:
                self._leaving[backend] = gone
            else:
                del self._leaving[backend]


def _gone() -> GatewayError:
    return ModelNotFound("The requested model no longer exists on its backend.", param="model")


def _is_usable(name: str) -> bool:
    """Return whether the name can be sent in a response header."""
    try:
        return model_name(name) == name
    except ValueError:
        return False
