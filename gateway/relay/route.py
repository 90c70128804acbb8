"""The choice of tier, backend and model for one request. Pure: no I/O, no clock."""

from collections.abc import Collection

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


def fallback_route(tier: Tier, backend: str, on_gpu: Collection[str] = ()) -> Route | None:
    """Return the route that serves `tier` when `backend` cannot, or None if there is none.

    It leads to the backend that the tier names, or to the next one under its `models`. From a
    backend `on_gpu`, which has room for one engine, it does not lead to another one there.
    """
    if tier.fallback is False:
        return None
    excluded = on_gpu if backend in on_gpu else ()
    if tier.fallback is not True:
        others = [tier.fallback]
    else:
        names = list(tier.models)
        place = names.index(backend)
        others = names[place + 1 :] + names[:place]
    other = next((name for name in others if name != backend and name not in excluded), None)
    return None if other is None else Route(tier.name, other, tier.models[other])
