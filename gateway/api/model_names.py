"""The name that a client asks for to the tier that it means. Pure: no I/O, no clock."""

from collections.abc import Iterator
from dataclasses import dataclass

from gateway.config import Settings, Tier
from gateway.errors import ModelNotFound
from gateway.relay.route import Route

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class PublicModel:
    """One entry of `GET /v1/models`: a name and the tier that it stands for."""

    name: str
    tier: Tier


class ModelNames:
    """Which tier a name means: a tier, an alias, `auto`, or a backend's own name of a model. Names match without regard to case."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._rest: Tier | None = None
        """Who takes any other name: the tier with the alias `*`."""
        self._tiers: dict[str, Tier | None] = {AUTO: None}
        self._batch: set[str] = set()
        """Aliases, in lower case, whose requests wait behind the others."""
        tiers = list(settings.tiers.values())
        for tier in tiers:
            self._tiers.setdefault(tier.name.lower(), tier)
        for tier in tiers:
            for alias in tier.aliases:
                if alias.name == "*":
                    self._rest = tier
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

    def tier(self, name: str) -> Tier | None:
        """The tier that `name` means; None: `auto`, which says that the request decides.

        Raises:
            ModelNotFound: it means none; the message has the public names.
        """
        tier = self._tiers.get(name.lower())
        if tier is not None or name.lower() == AUTO:
            return tier
        if name.lower() in self._embeddings:
            raise ModelNotFound("This model makes embeddings: send it to /v1/embeddings.", param="model")
        if self._rest is None:
            names = ", ".join(f"'{public.name}'" for public in self.public_models())
            raise ModelNotFound(f"The model you asked for does not exist here. Models: {names}.", param="model")
        return self._rest

    @property
    def has_batch(self) -> bool:
        """Whether there is an alias of low priority."""
        return bool(self._batch)

    def is_batch(self, name: str) -> bool:
        """Whether `name` is one."""
        lower = name.lower()
        return lower in self._batch or ("*" in self._batch and lower not in self._tiers)

    def choose_embedding(self, name: str) -> Route:
        """The route of a request for embeddings by `name`: one under `embeddings`, or a backend's own name of its model.

        Raises:
            ModelNotFound: it means none; the message has the public names.
        """
        route = self._embeddings.get(name.lower())
        if route is None:
            names = ", ".join(f"'{name}'" for name in self._settings.embeddings) or "none are set up"
            what = "makes no embeddings" if name.lower() in self._tiers else "does not exist here"
            raise ModelNotFound(f"The model you asked for {what}. Embedding models: {names}.", param="model")
        return route

    def public_models(self) -> Iterator[PublicModel]:
        """Tiers and listed aliases, in the order of the settings."""
        for tier in self._settings.tiers.values():
            yield PublicModel(tier.name, tier)
            for alias in tier.aliases:
                if alias.listed and alias.name != "*":
                    yield PublicModel(alias.name, tier)
