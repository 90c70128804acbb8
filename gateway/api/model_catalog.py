"""Catalog of the models that a request may name: the lists and entries of OpenAI's and Ollama's API."""

from collections.abc import Callable
from typing import Any, NamedTuple

from gateway.api.model_names import ModelNames
from gateway.config import Settings, Tier
from gateway.errors import ModelNotFound, TierNotAllowed
from gateway.relay.discovery import DiscoveredModel
from gateway.rollout.state import Rollout
from gateway.upstream.backend import Backend

Allows = Callable[[str], bool]
"""Returns whether a caller may use a tier, embedding model, reranker or discovered model, by its name."""


def allow_all(name: str) -> bool:
    """Return True: a caller without restrictions may use everything."""
    return True


CREATED = 1_767_225_600
"""`created` of every model, in Unix time: the same at each start and on each replica."""

_CHAT_CAPABILITIES = ("completion", "tools")
"""Capabilities of a model about which no engine says anything, in Ollama's words."""


class PublicEntry(NamedTuple):
    """Facts about a public model that hold whichever backend serves it."""

    name: str
    context_length: int | None
    """Number of tokens, the smallest of all its backends; None if no backend says it."""
    capabilities: tuple[str, ...]
    """Capabilities in Ollama's words that all its backends have, as far as they say it."""
    is_loaded: bool
    """True if it is ready to serve at the active backend."""
    stays_loaded: bool
    """True if the active backend never unloads it."""


class ModelCatalog:
    """Tiers, their aliases, embedding models, rerankers and discovered models, with facts about each."""

    def __init__(
        self, settings: Settings, backends: dict[str, Backend], model_names: ModelNames, rollout: Rollout
    ) -> None:
        self._settings = settings
        self._backends = backends
        self._model_names = model_names
        self._rollout = rollout

    def change(self, settings: Settings, model_names: ModelNames) -> None:
        """List the models of the changed settings from now on."""
        self._settings = settings
        self._model_names = model_names

    def models(self, allows: Allows = allow_all) -> dict[str, Any]:
        """Return the list of the models that the caller may use."""
        public_models = [public for public in self._model_names.public_models() if allows(public.tier.name)]
        data = [self._entry(public.name, public.tier.models) for public in public_models]
        pinned = (*self._settings.embeddings.items(), *self._settings.rerankers.items())
        data += [self._entry(name, {item.backend: item.model}) for name, item in pinned if allows(name)]
        discovered = [found for found in self._model_names.discovered() if allows(found.name)]
        data += [self._entry(found.name, {found.route.backend: found.name}) for found in discovered]
        return {"object": "list", "data": data}

    def model(self, name: str, allows: Allows = allow_all) -> dict[str, Any]:
        """Return the entry for one model: any name that a request may use, listed or not.

        Raises:
            ModelNotFound: No request can use this name.
            TierNotAllowed: The caller may not use it.
        """
        self._check_allowed(name, allows)
        for known, item in self._settings.embeddings.items():
            if known.lower() == name.lower():
                return self._entry(known, {item.backend: item.model})
        named = self._model_names.find(name)
        if named is None:
            raise ModelNotFound("This model does not exist. GET /v1/models lists the available models.", param="model")
        return self._entry(*named)

    def _check_allowed(self, name: str, allows: Allows) -> None:
        if allows == allow_all:
            return
        found = self._model_names.served_by(name)
        if found is not None and not allows(found):
            raise TierNotAllowed(", ".join(f"'{known}'" for known in self._model_names.names_for(allows)))

    def public_entries(self, allows: Allows = allow_all) -> list[PublicEntry]:
        """Return the tiers, their listed aliases, the embedding models and the discovered models.

        Those that the caller may not use are left out.
        """
        public_models = [public for public in self._model_names.public_models() if allows(public.tier.name)]
        names = [self._public_entry(public.name, public.tier) for public in public_models]
        names += [self._embedding_entry(name) for name in self._settings.embeddings if allows(name)]
        discovered = [found for found in self._model_names.discovered() if allows(found.name)]
        return names + [self._discovered_entry(found.name, found) for found in discovered]

    def public_entry(self, name: str, allows: Allows = allow_all) -> PublicEntry:
        """Return the entry of the model that serves requests for `name`.

        Raises:
            ModelNotFound: No model has this name.
            TierNotAllowed: The caller may not use it.
        """
        self._check_allowed(name, allows)
        embedding = self._model_names.find_embedding(name)
        if embedding is not None:
            return self._embedding_entry(embedding.tier)
        found = self._model_names.find_discovered(name) or self._model_names.tier(name)
        if isinstance(found, DiscoveredModel):
            return self._discovered_entry(name, found)
        return self._public_entry(name, found or self._settings.tiers[self._settings.default_tier])

    def _public_entry(self, name: str, tier: Tier) -> PublicEntry:
        return self._described(name, tier.models, self._rollout.active_backend(tier.name), _CHAT_CAPABILITIES)

    def _embedding_entry(self, name: str) -> PublicEntry:
        item = self._settings.embeddings[name]
        return self._described(name, {item.backend: item.model}, item.backend, ("embedding",))

    def _discovered_entry(self, name: str, found: DiscoveredModel) -> PublicEntry:
        backend = found.route.backend
        return self._described(name, {backend: found.name}, backend, _CHAT_CAPABILITIES)

    def _described(self, name: str, models: dict[str, str], active: str, assumed: tuple[str, ...]) -> PublicEntry:
        entry = self._entry(name, models)
        known = [
            facts.capabilities
            for backend, model in models.items()
            for server in self._backends[backend].servers
            if (facts := server.facts(model)).capabilities is not None
        ]
        capabilities = tuple(sorted(frozenset.intersection(*known))) if known else assumed
        backend, model = self._backends[active], models[active]
        return PublicEntry(
            name,
            entry.get("context_length"),
            capabilities,
            any(server.is_well and server.has_loaded(model) for server in backend.servers),
            backend.loading is None,
        )

    def _entry(self, name: str, models: dict[str, str]) -> dict[str, Any]:
        """Return the entry for `name`; `models` maps each backend to the model's name there."""
        entry: dict[str, Any] = {"id": name, "object": "model", "created": CREATED, "owned_by": "gateway"}
        known = [self._backends[backend].context_length(model) for backend, model in models.items()]
        lengths = [length for length in known if length is not None]
        if lengths:  # the smallest, so that switching backends does not break a client
            entry["context_length"] = entry["max_model_len"] = min(lengths)
        return entry
