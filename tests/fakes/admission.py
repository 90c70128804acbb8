"""An `Admission` on a manual clock, with servers whose models and state the test sets."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gateway.admission.affinity import Affinity
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import AdmissionLimits, LaneLimits, LaneName, TierLimits
from gateway.admission.model_residency import ModelResidency
from gateway.admission.model_state import ModelState
from gateway.admission.queues import Queue, QueueEntry
from gateway.admission.scheduler import Admission, Transfer
from gateway.admission.server_slots import ServerSlots
from gateway.chat.prompt_blocks import PromptBlocks

FOREVER = 1e6


class Server(ServerSlots):
    """Server slots whose models (`available_models`), health (`up`) and load under way are set by
    the test.
    """

    def __init__(self, *models: str) -> None:
        super().__init__()
        self.available_models = set(models)
        self.up = True
        self.loading: ModelState | None = None
        self.making_room: list[ModelState] = []

    def serves(self, model: str) -> bool:
        return model in self.available_models

    def is_up(self) -> bool:
        return self.up


class Clock:
    """Manual clock: `pass_time` advances it and fires the alarms that become due."""

    def __init__(self) -> None:
        self.now = 0.0
        self._alarms: list[tuple[float, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def alarm(self, seconds: float, callback: Callable[[], None]) -> None:
        self._alarms.append((self.now + seconds, callback))

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        while due := [alarm for alarm in self._alarms if alarm[0] <= end]:
            first = min(due, key=lambda alarm: alarm[0])
            self._alarms.remove(first)
            self.now = max(self.now, first[0])
            first[1]()
        self.now = end


class Request(QueueEntry):
    """Queue entry that counts its admissions and its transfers to another backend.

    `setup` is the admission that holds it now.
    """

    __slots__ = ("admissions", "setup", "transfers")

    def __init__(self, setup: "Setup", queue: Queue, claim: Claim) -> None:
        super().__init__(queue, claim)
        self.setup = setup
        self.admissions = 0
        self.transfers = 0

    def admitted(self) -> None:
        self.admissions += 1

    def transferred(self) -> None:
        self.transfers += 1


class Setup:
    """An admission, its servers, its clock, and all requests that arrived."""

    def __init__(self, servers: tuple[Server, ...], limits: AdmissionLimits, affinity: Affinity | None = None) -> None:
        self.servers = servers
        self.clock = Clock()
        self.admission = Admission(
            servers,
            limits,
            self.clock,
            self.clock.alarm,
            lambda name: name.removesuffix(":latest"),
            affinity=affinity,
        )
        self.running, self.waiting = self.admission.running, self.admission.waiting
        self.leave, self.pass_time = self.admission.leave, self.clock.pass_time
        self.requests: list[Request] = []

    def enable_loading(self, swap_after: float = 5.0) -> None:
        """Make all servers load models from now on; `Server.loading` is the load that has begun."""
        for server in self.servers:
            self._enable_loading_at(server, swap_after)

    def _enable_loading_at(self, server: Server, swap_after: float = 5.0) -> None:
        def begin(state: ModelState) -> None:
            assert server.loading is None
            server.loading = state

        server.residency = ModelResidency(
            self.clock,
            self.clock.alarm,
            lambda: swap_after,
            lambda model: server.is_up() and server.serves(model),
            begin,
            self.admission.refresh,
            server.making_room.append,
            lambda state: None,
        )

    def add(self, server: Server) -> None:
        """Add a server, which loads models if the others do."""
        if any(other.residency is not None for other in self.servers):
            self._enable_loading_at(server)
        self.servers = (*self.servers, server)
        self.admission.add([server])
        self.admission.refresh()

    def drop(self, server: Server) -> None:
        """Drop a server without requests."""
        server.up = False
        self.servers = tuple(other for other in self.servers if other is not server)
        self.admission.drop([server])
        self.admission.refresh()

    def arrive(
        self,
        model: str = "m",
        lane: LaneName = "text",
        claim: Claim | None = None,
        tier: str = "",
        own: TierLimits | None = None,
        prompt: PromptBlocks | None = None,
    ) -> Request:
        request = Request(self, self.admission.queue(model, lane, tier, own), claim or Claim())
        request.prompt = prompt
        self.admission.enter(request)
        self.requests.append(request)
        return request

    def accept_transfers(
        self, requests: Iterable[Request], model: str = "m", tier: str = "", own: TierLimits | None = None
    ) -> None:
        """Move requests that are queued at another setup into this setup's queue for `model`."""
        transfers = []
        for request in requests:
            transfers.append(
                Transfer(
                    request, request.setup.admission, self.admission.queue(model, request.queue.lane.name, tier, own)
                )
            )
            request.setup.requests.remove(request)
            self.requests.append(request)
            request.setup = self
        self.admission.accept_transfers(transfers)

    def only_running(self) -> Request:
        """Return the only request in flight."""
        (request,) = [request for request in self.requests if request.placement is not None]
        return request


def limits(
    *,
    slots: int = 1,
    vision: int = 1,
    model: int | None = 99,
    max_queue: int = 10,
    timeout: float = FOREVER,
    first_guess: int = 1,
    more_lanes: Mapping[LaneName, int] = {},
) -> AdmissionLimits:
    lanes = {"text": None, "vision": vision, **more_lanes}
    return AdmissionLimits(
        slots, model, {lane: LaneLimits(count, max_queue, timeout) for lane, count in lanes.items()}, True, first_guess
    )


def setup(*servers: Server, affinity: Affinity | None = None, **given: Any) -> Setup:
    """Return a setup whose limits are `limits(**given)`."""
    return Setup(servers, limits(**given), affinity)


def serve_one(backend: Setup, seconds: float = 1.0, model: str = "m", lane: LaneName = "text") -> None:
    """Serve one request that takes `seconds`."""
    request = backend.arrive(model, lane)
    backend.clock.now += seconds
    request.is_served = True
    backend.leave(request)
