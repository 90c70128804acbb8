"""The limits that a request needs at each server of a backend, and the placements made of them.

Synchronous, like `scheduler.py`, which counts the requests.
"""

from collections.abc import Callable, Collection, Iterator

from gateway.admission.concurrency_limits import AdaptiveLimit, ConcurrencyLimit
from gateway.admission.limits import AdmissionLimits, LaneName, LimitSource, TierLimits
from gateway.admission.model_state import ModelState
from gateway.admission.queues import Lane
from gateway.admission.server_slots import Placement, ServerSlots


class ServerLimits:
    """Makes the limits of a backend's servers, and changes them.

    - `source` makes each limit, which replicas of the gateway may share.
    - `canonical` maps the names that a server accepts for a model to one of them.
    """

    def __init__(self, limits: AdmissionLimits, source: LimitSource, canonical: Callable[[str], str]) -> None:
        self._limits = limits
        self._source = source
        self._canonical = canonical

    def __repr__(self) -> str:
        return f"<ServerLimits {self._limits.slots} slots at each server>"

    def add(self, servers: Collection[ServerSlots]) -> None:
        """Give servers their slots."""
        for server in servers:
            server.slots = self._source.fixed(server.place, "slots", self._limits.slots)

    def placement(self, server: ServerSlots, model: str, lane: Lane, own: TierLimits, tier: str) -> Placement:
        """Return what a request for `model` in `lane` needs at `server`.

        `tier` matters only if the tier has limits of its `own`.
        """
        return Placement(
            server,
            self._limits_at(server, model, lane, own, tier),
            server.gate(model, lane.name),
            self._model_state(server, model, lane),
        )

    def _model_state(self, server: ServerSlots, model: str, lane: Lane) -> ModelState | None:
        return (
            None
            if server.residency is None
            else server.residency.state(self._canonical(model), model, lane.limits.is_separate)
        )

    def _limits_at(
        self, server: ServerSlots, model: str, lane: Lane, own: TierLimits, tier: str
    ) -> tuple[ConcurrencyLimit, ...]:
        """Return the limits from the server's own to that of the lane.

        Shared limits are waited for in the opposite order.
        """
        if lane.limits.is_separate:
            return (self._lane_limit(server, server.separate_lanes, lane),)
        prefix = f"tier/{tier}/{lane.name}/{model}"
        limits = [server.slots]
        if own.slots is not None:
            limits.append(self._source.fixed(server.place, f"{prefix}/slots", own.slots))
        limits.append(
            self._model_limit(server, model)
            if own.model_slots is None
            else self._source.fixed(server.place, f"{prefix}/model", own.model_slots)
        )
        if own.lane_slots is not None:
            limits.append(self._source.fixed(server.place, f"{prefix}/lane", own.lane_slots))
        elif lane.limits.slots is not None:
            limits.append(self._lane_limit(server, server.lanes, lane))
        return tuple(limits)

    def _lane_limit(
        self, server: ServerSlots, limits: dict[LaneName, ConcurrencyLimit], lane: Lane
    ) -> ConcurrencyLimit:
        limit = limits.get(lane.name)
        if limit is None:
            slots = lane.limits.slots or self._limits.slots
            limit = limits[lane.name] = self._source.fixed(server.place, f"lane/{lane.name}", slots)
        return limit

    def _model_limit(self, server: ServerSlots, model: str) -> ConcurrencyLimit:
        name = self._canonical(model)
        limit = server.models.get(name)
        if limit is None:
            limits = self._limits
            slots = server.guesses.get(name, limits.first_guess) if limits.model_slots is None else limits.model_slots
            limit = server.models[name] = (
                self._source.adaptive(server.place, f"model/{name}", slots, limits.model_slots is not None)
                if limits.can_learn
                else self._source.fixed(server.place, f"model/{name}", slots)
            )
        return limit

    def change(self, limits: AdmissionLimits, servers: Collection[ServerSlots]) -> None:
        """Apply other limits of the same lanes to `servers`."""
        self._limits = limits
        for server in servers:
            server.slots.change(limits.slots)
            for current in server.models.values():
                if isinstance(current, AdaptiveLimit):
                    current.is_held = limits.model_slots is not None
                if limits.model_slots is not None:
                    current.change(limits.model_slots)
            for name, current in (server.lanes | server.separate_lanes).items():
                current.change(limits.lanes[name].slots or limits.slots)


def limits_of(servers: Collection[ServerSlots]) -> Iterator[ConcurrencyLimit]:
    """Yield the limits that tiers without limits of their own share at `servers`."""
    for server in servers:
        yield server.slots
        yield from (server.models | server.lanes | server.separate_lanes).values()


def forget_models(servers: Collection[ServerSlots], used: Collection[ConcurrencyLimit]) -> None:
    """Drop the limits of models that are not in `used`. What was learned is kept as the next guess."""
    kept = {id(limit) for limit in used}
    for server in servers:
        for name, limit in [item for item in server.models.items() if id(item[1]) not in kept]:
            del server.models[name]
            if isinstance(limit, AdaptiveLimit) and not limit.is_held:
                server.guesses[name] = limit.total
