"""The choice of tier, backend and model for one request. Pure: no I/O, no clock."""

from msgspec import Struct

from gateway.config import Tier


class Route(Struct, frozen=True, gc=False):
    """The choice for one request. `model` is the name on the backend. Of embeddings, `tier` is the name under `embeddings`: they have no tier."""

    tier: str
    backend: str
    model: str


def fallback_route(tier: Tier, backend: str) -> Route | None:
    """Who serves `tier` where `backend` cannot: the one that the tier names, or the next under its models; None: nobody."""
    if tier.fallback is False:
        return None
    names = list(tier.models)
    other = names[(names.index(backend) + 1) % len(names)] if tier.fallback is True else tier.fallback
    return None if other == backend else Route(tier.name, other, tier.models[other])
