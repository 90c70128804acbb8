"""Mapping of the model name in a request to a tier, or to the route of an embedding model or a reranker.

Pure: no I/O, no clock.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.config import Settings, Tier
from gateway.errors import ModelNotFound
from gateway.relay.route import Route

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class PublicModel:
    """Entry of `GET /v1/models`: a name and its tier."""

    name: str
    tier: Tier


class ModelNames:
    """Model names that clients can use.

    A name is a tier, an alias, `auto`, or a backend's own name for a model. Case is ignored.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._catch_all: Tier | None = None
        """Tier for any other name: the one with the alias `*`."""
        self._tiers: dict[str, Tier | None] = {AUTO: None}
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

    def tier(self, name: str) -> Tier | None:
        """Return the tier for `name`; None for `auto`, where the request decides.

        Raises:
            ModelNotFound: No tier has this name. The message lists the public names.
        """
        tier = self._tiers.get(name.lower())
        if tier is not None or name.lower() == AUTO:
            return tier
        other = _other_form(name)
        if (tier := self._tiers.get(other)) is not None or other == AUTO:
            return tier
        if name.lower() in self._embeddings:
            raise ModelNotFound("This is an embedding model. Send the request to /v1/embeddings.", param="model")
        if name.lower() in self._rerankers:
            raise ModelNotFound("This is a reranker. Send the request to /v1/rerank.", param="model")
        if self._catch_all is None:
            names = ", ".join(f"'{public.name}'" for public in self.public_models())
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
        is_auto = AUTO in (lower, other)
        route = self.find_embedding(name) or self._find_reranker(name)
        tier = self._tiers.get(lower) or self._tiers.get(other)
        if tier is None and not is_auto and route is None:
            tier = self._catch_all
        if tier is not None:
            return _spelled(name, *(alias.name for alias in tier.aliases), *tier.models.values()), tier.models
        if route is not None:
            return _spelled(name, route.model), {route.backend: route.model}
        return (_spelled(name, AUTO), {}) if is_auto else None

    @property
    def has_batch(self) -> bool:
        """True if an alias has batch priority."""
        return bool(self._batch)

    def is_batch(self, name: str) -> bool:
        """Return whether `name` is an alias with batch priority."""
        lower = name.lower()
        if lower not in self._tiers:
            lower = _other_form(name)
        return lower in self._batch or ("*" in self._batch and lower not in self._tiers)

    def choose_embedding(self, name: str) -> Route:
        """Return the route of an embedding request for `name`.

        The name is a key of the setting `embeddings`, or a backend's own name for such a model.

        Raises:
            ModelNotFound: No embedding model has this name. The message lists the public names.
        """
        route = self.find_embedding(name)
        if route is None:
            names = ", ".join(f"'{name}'" for name in self._settings.embeddings) or "none are configured"
            is_other = name.lower() in self._tiers or name.lower() in self._rerankers
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

    def _find_reranker(self, name: str) -> Route | None:
        return self._rerankers.get(name.lower()) or self._rerankers.get(_other_form(name))

    def find_embedding(self, name: str) -> Route | None:
        """Return the route of the embedding model with this name, if there is one."""
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
    return lower.removesuffix(":latest") if lower.endswith(":latest") else f"{lower}:latest"
