"""The choice of tier, backend and model for one request. Pure: no I/O, no clock."""

from msgspec import Struct

from gateway.config import Tier


class Route(Struct, frozen=True, gc=False):
    """The choice for one request. `model` is the model's name on the backend.

    Embeddings and rerankers have no tier: theirs is the name under `embeddings` or `rerankers` in
    the settings.
    """

    tier: str
    backend: str
    model: str


def fallback_route(tier: Tier, backend: str) -> Route | None:
    """Return the route that serves `tier` when `backend` cannot, or None if there is none.

    It leads to the backend that the tier names, or to the next one under its `models`.
    """
    if tier.fallback is False:
        return None
    names = list(tier.models)
    other = names[(names.index(backend) + 1) % len(names)] if tier.fallback is True else tier.fallback
    return None if other == backend else Route(tier.name, other, tier.models[other])
