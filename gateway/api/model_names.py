"""Mapping of the model name in a request to a tier, or to the route of an embedding model or a reranker.

Pure: no I/O, no clock.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gateway.config import Settings, Tier
from gateway.errors import ModelNotFound
from gateway.relay.discovery import LATEST, DiscoveredModel, Discovery
from gateway.relay.route import Route

AUTO = "auto"

MAX_NAMED = 20
"""Maximum number of discovered models that an error names."""


@dataclass(frozen=True, slots=True)
class PublicModel:
    """Entry of `GET /v1/models`: a name and its tier."""

    name: str
    tier: Tier


class ModelNames:
    """Model names that clients can use.

    A name is a tier, an alias, `auto`, or a backend's own name for a model; last come the discovered
    models, and then the alias `*`. Case is ignored.
    """

    def __init__(self, settings: Settings, discovery: Discovery | None = None) -> None:
        self._settings = settings
        self._discovery = discovery
        self._discovered: tuple[object, list[DiscoveredModel]] = (None, [])
        self._catch_all: Tier | None = None
        """Tier for any other name: the one with the alias `*`."""
        self._tiers: dict[str, Tier | None] = {AUTO: None, AUTO + LATEST: None}
        self._batch: set[str] = set()
        """Aliases with batch priority, in lower case."""
        tiers = list(settings.tiers.values())
        for tier in tiers:
            self._tiers.setdefault(tier.name.lower(), tier)
        for tier in tiers:
            for alias in tier.aliases:
                if alias.name == "*":
                    self._catch_all = tier
                if alias.priority == "batch":
                    self._batch.add(alias.name.lower())
                self._tiers.setdefault(alias.name.lower(), tier)
        for tier in tiers:
            for model in tier.models.values():
                self._tiers.setdefault(model.lower(), tier)
        self._tiers.pop("*", None)
        self._embeddings: dict[str, Route] = {}
        for name, item in settings.embeddings.items():
            self._embeddings[name.lower()] = Route(name, item.backend, item.model)
        for route in list(self._embeddings.values()):
            self._embeddings.setdefault(route.model.lower(), route)

        self._rerankers: dict[str, Route] = {}
        for name, reranker in settings.rerankers.items():
            self._rerankers[name.lower()] = Route(name, reranker.backend, reranker.model)
        for route in list(self._rerankers.values()):
            self._rerankers.setdefault(route.model.lower(), route)

    def tier(self, name: str) -> Tier | DiscoveredModel | None:
        """Return the tier or the discovered model for `name`; None for `auto`, where the request decides.

        Raises:
            ModelNotFound: No request for a chat can use this name. The message lists the public names.
        """
        tier = self._tiers.get(name.lower())
        if tier is not None or self._is_auto(name):
            return tier
        other = _other_form(name)
        if (tier := self._tiers.get(other)) is not None or other == AUTO:
            return tier
        found = self.find_discovered(name)
        if found is not None and found.takes_chats:
            return found
        if found is not None or self.find_embedding(name) is not None:
            raise ModelNotFound("This is an embedding model. Send the request to an API for embeddings.", param="model")
        if name.lower() in self._rerankers:
            raise ModelNotFound("This is a reranker. Send the request to /v1/rerank.", param="model")
        if self._catch_all is None:
            names = self._listing([public.name for public in self.public_models()], chats=True)
            raise ModelNotFound(
                f"The requested model does not exist. Available models: {names}.", param="model", model=name
            )
        return self._catch_all

    def find(self, name: str) -> tuple[str, dict[str, str]] | None:
        """Return a name that is not listed in its own spelling, and its models by backend.

        Such names are aliases with `listed: false`, `auto`, the backends' own names, and with the
        alias `*` all others. Return None if no request can use the name.
        """
        lower, other = name.lower(), _other_form(name)
        if self._is_auto(name):
            return _spelled(name, AUTO), {}
        route = self.find_embedding(name) or self._find_reranker(name)
        tier = self._tiers.get(lower) or self._tiers.get(other)
        if tier is None and route is None:
            if (found := self.find_discovered(name)) is not None:
                return _spelled(name, found.name), {found.route.backend: found.route.model}
            tier = self._catch_all
        if tier is not None:
            spellings = (tier.name, *(alias.name for alias in tier.aliases), *tier.models.values())
            return _spelled(name, *spellings), tier.models
        return None if route is None else (_spelled(name, route.model), {route.backend: route.model})

    def find_discovered(self, name: str) -> DiscoveredModel | None:
        """Return the discovered model with this name, unless the settings use the name."""
        found = None if self._discovery is None else self._discovery.find(name)
        return None if found is None or self._is_named(name) else found

    def discovered(self) -> list[DiscoveredModel]:
        """Return the discovered models whose names the settings do not use."""
        models = {} if self._discovery is None else self._discovery.models
        if models is not self._discovered[0]:
            self._discovered = models, [found for found in models.values() if not self._is_named(found.name)]
        return self._discovered[1]

    def _is_named(self, name: str) -> bool:
        """Return whether the settings use `name`, with or without `:latest`."""
        used = (self._tiers, self._embeddings, self._rerankers)
        return any(spelling in names for spelling in (name.lower(), _other_form(name)) for names in used)

    def _is_auto(self, name: str) -> bool:
        return name.lower() in (AUTO, AUTO + LATEST)

    def _listing(self, names: list[str], *, chats: bool) -> str:
        """Return `names` and the first discovered models for chats, or for embeddings, for an error."""
        found = [item.name for item in self.discovered() if (item.takes_chats if chats else item.takes_embeddings)]
        more = f" and {len(found) - MAX_NAMED} more" if len(found) > MAX_NAMED else ""
        return ", ".join(f"'{name}'" for name in (*names, *found[:MAX_NAMED])) + more

    @property
    def has_batch(self) -> bool:
        """True if an alias has batch priority."""
        return bool(self._batch)

    def is_batch(self, name: str) -> bool:
        """Return whether `name` is an alias with batch priority."""
        if name.lower() in self._batch:
            return True
        if self._is_named(name):
            return name.lower() not in self._tiers and _other_form(name) in self._batch
        return "*" in self._batch and self.find_discovered(name) is None

    def choose_embedding(self, name: str) -> Route:
        """Return the route of an embedding request for `name`.

        The name is a key of the setting `embeddings`, a backend's own name for such a model, or a
        discovered model.

        Raises:
            ModelNotFound: No embedding model has this name. The message lists the public names.
        """
        route = self.find_embedding(name)
        if route is None:
            found = self.find_discovered(name)
            if found is not None and found.takes_embeddings:
                return found.route
            names = self._listing(list(self._settings.embeddings), chats=False) or "none are configured"
            is_other = found is not None or self._is_named(name)
            reason = "does not support embeddings" if is_other else "does not exist"
            raise ModelNotFound(
                f"The requested model {reason}. Embedding models: {names}.",
                param="model",
                model=None if is_other else name,
            )
        return route

    def choose_reranker(self, name: str) -> Route:
        """Return the route of a rerank request for `name`.

        The name is a key of the setting `rerankers`, or a backend's own name for such a model.

        Raises:
            ModelNotFound: No reranker has this name. The message lists the public names.
        """
        route = self._find_reranker(name)
        if route is None:
            names = ", ".join(f"'{name}'" for name in self._settings.rerankers) or "none are configured"
            is_other = name.lower() in self._tiers or name.lower() in self._embeddings
            reason = "does not support reranking" if is_other else "does not exist"
            raise ModelNotFound(f"The requested model {reason}. Rerankers: {names}.", param="model")
        return route

    def resolve(self, name: str) -> str | None:
        """Return the tier, embedding model or reranker of the settings that `name` refers to.

        With backends whose models are discovered, any other name may be one of these.
        """
        tier = self._tiers.get(name.lower()) or self._tiers.get(_other_form(name))
        if tier is not None:
            return tier.name
        route = self.find_embedding(name) or self._find_reranker(name)
        if route is not None:
            return route.tier
        return name if any(backend.discover for backend in self._settings.backends.values()) else None

    def served_by(self, name: str) -> str | None:
        """Return the tier, embedding model, reranker or discovered model that requests for `name` get.

        None for `auto`, where the request decides, and for a name that no request can use.
        """
        if self._is_auto(name):
            return None
        if (found := self.find_discovered(name)) is not None:
            return found.name
        tier = self._tiers.get(name.lower()) or self._tiers.get(_other_form(name))
        route = self.find_embedding(name) or self._find_reranker(name)
        if tier is None and route is not None:
            return route.tier
        tier = tier or self._catch_all
        return None if tier is None else tier.name

    def names_for(self, allows: Callable[[str], bool]) -> list[str]:
        """Return the names of the tiers, embedding models and rerankers that `allows` accepts."""
        settings = self._settings
        return [name for name in (*settings.tiers, *settings.embeddings, *settings.rerankers) if allows(name)]

    def _find_reranker(self, name: str) -> Route | None:
        return self._rerankers.get(name.lower()) or self._rerankers.get(_other_form(name))

    def find_embedding(self, name: str) -> Route | None:
        """Return the route of the embedding model in the settings with this name, if there is one."""
        return self._embeddings.get(name.lower()) or self._embeddings.get(_other_form(name))

    def public_models(self) -> Iterator[PublicModel]:
        """Yield the tiers and their listed aliases, in the order of the settings."""
        for tier in self._settings.tiers.values():
            yield PublicModel(tier.name, tier)
            for alias in tier.aliases:
                if alias.listed and alias.name != "*":
                    yield PublicModel(alias.name, tier)


def _spelled(name: str, *spellings: str) -> str:
    """Return `name` as one of `spellings` writes it, or as it is."""
    return next((known for known in spellings if known.lower() == name.lower()), name)


def _other_form(name: str) -> str:
    """Return `name` in lower case without the tag `:latest`, or with it if it has no tag.

    Ollama and its clients take both for one model.
    """
    lower = name.lower()
    return lower.removesuffix(LATEST) if lower.endswith(LATEST) else lower + LATEST
