"""State machine test of admission, with random steps on two backends.

Requests arrive, leave, time out, stream, end, move to another server and follow the roll-out to the
other backend. Servers come, go and change. Models are loaded and evicted, limits change, and time
passes.
"""

from math import inf
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import LaneName, TierLimits
from gateway.admission.model_residency import LoadedModels
from gateway.admission.queues import BATCH_SHARE, Queue
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout
from tests.fakes.admission import Request, Server, Setup, limits, setup

MODELS = ("a", "b")
LANES: tuple[LaneName, ...] = ("text", "vision")
MAX_QUEUE = 6
MOST_SERVERS = 4
OWN = TierLimits(model_slots=1, lane_slots=1, max_queue=2)

sides = st.integers(0, 1)
claims = st.builds(
    Claim,
    st.sampled_from(("one", "two")),
    st.sampled_from(("", "", "ann", "bob")),
    st.booleans(),
    st.sampled_from((None, None, None, 0.5, 100.0)),
)


def owner(claim: Claim) -> tuple[str, str, bool]:
    return claim.key, claim.person, claim.is_batch


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backends = (
            setup(Server("a"), Server("a", "b"), slots=3, vision=1, model=None, max_queue=MAX_QUEUE),
            setup(Server("a", "b"), Server("b"), slots=2, vision=2, max_queue=2),
        )
        self.gone: set[Request] = set()
        self.counts: dict[Any, int] = {}

    # Requests and limits

    def requests(self) -> list[Request]:
        return [request for backend in self.backends for request in backend.requests]

    def queued(self) -> list[Request]:
        return [request for request in self.requests() if request.is_queued]

    def in_flight(self) -> list[Request]:
        return [request for request in self.requests() if request.placement is not None]

    def queues(self) -> list[Queue]:
        return [queue for backend in self.backends for queue in backend.admission._queues.values()]

    def adaptive_limits(self) -> list[AdaptiveLimit]:
        limits = [limit for backend in self.backends for server in backend.servers for limit in server.models.values()]
        assert all(isinstance(limit, AdaptiveLimit) for limit in limits)
        return cast("list[AdaptiveLimit]", limits)

    def end(self, request: Request) -> None:
        request.setup.leave(request)
        self.gone.add(request)

    def time_passes(self, seconds: float) -> None:
        for backend in self.backends:
            backend.pass_time(seconds)

    def could_run(self, request: Request) -> bool:
        """Return whether `request` could run now, by another implementation than the code's."""
        placements = [
            placement
            for placement in request.queue.placements
            if placement.server.serves(request.queue.model) and placement.server.is_up()
        ]
        placements = [
            placement
            for placement in placements
            if placement.state is None or (placement.state.is_loaded and not placement.state.is_held)
        ]
        return any(all(limit.count < limit.limit for limit in placement.limits) for placement in placements)

    def could_run_if_loaded(self, request: Request, ahead: int = 0) -> bool:
        """Return whether `request` could run beside those queued, if its model were loaded.

        `ahead` is the number of queued requests not to count: 1 if `request` itself is queued.
        """
        queue = request.queue
        placements = [
            placement
            for placement in queue.placements
            if placement.server.serves(queue.model) and placement.server.is_up()
        ]
        cold = [placement for placement in placements if placement.state is not None and not placement.state.is_ready]
        return any(
            all(limit.limit - limit.count > queue.waiting - ahead for limit in placement.limits) for placement in cold
        )

    def servers_with_residency(self) -> list[tuple[Setup, Server]]:
        return [
            (backend, server) for backend in self.backends for server in backend.servers if server.residency is not None
        ]

    def running_loads(self) -> list[tuple[Setup, Server]]:
        return [(backend, server) for backend, server in self.servers_with_residency() if server.loading is not None]

    # Steps

    @initialize(sides_with_loads=st.sets(sides))
    def begin(self, sides_with_loads: set[int]) -> None:
        for side in sides_with_loads:
            self.backends[side].enable_loading()

    @precondition(lambda self: any(self.servers_with_residency()))
    @rule(data=st.data(), report=st.sets(st.sampled_from(MODELS)))
    def probe_reports_loaded_models(self, data: st.DataObject, report: set[str]) -> None:
        backend, server = data.draw(st.sampled_from(self.servers_with_residency()))
        assert server.residency is not None
        if server.residency.update(report):
            backend.admission.refresh()

    @precondition(lambda self: self.running_loads())
    @rule(
        data=st.data(),
        succeeds=st.booleans(),
        before=st.sets(st.sampled_from(MODELS)),
        after=st.none() | st.sets(st.sampled_from(MODELS)),
    )
    def load_ends(self, data: st.DataObject, succeeds: bool, before: set[str], after: set[str] | None) -> None:
        backend, server = data.draw(st.sampled_from(self.running_loads()))
        state, residency = server.loading, server.residency
        assert state is not None
        assert residency is not None
        if not succeeds:
            for request in [
                request
                for request in self.queued()
                if any(placement.state is state for placement in request.queue.placements)
            ]:
                self.end(request)
        server.loading = None
        residency.ended(
            state,
            succeeds,
            LoadedModels(dict.fromkeys(before, 1e9), 0.0),
            None if after is None else LoadedModels(dict.fromkeys(after, 1e9), 0.0),
        )
        assert state.is_ready == succeeds
        backend.admission.refresh()
        if residency.schedule():
            backend.admission.refresh()

    @rule(
        side=sides,
        model=st.sampled_from(("a", "a", "b", "nowhere")),
        lane=st.sampled_from(LANES),
        claim=claims,
        is_own=st.booleans(),
    )
    def arrive(self, side: int, model: str, lane: LaneName, claim: Claim, is_own: bool) -> None:
        backend = self.backends[side]
        tier, own = ("pro", OWN) if is_own else ("", None)
        queue = backend.admission.queue(model, lane, tier, own)
        candidate = Request(backend, queue, claim)
        could_run_at_once, room = self.could_run(candidate), queue.room.limit - queue.room.count
        is_served = any(model in server.available_models for server in backend.servers)
        try:
            request = backend.arrive(model, lane, claim, tier, own)
        except ModelNotFound:
            assert not is_served
        except QueueFull:
            assert not could_run_at_once
            assert room <= 0
            assert not self.could_run_if_loaded(candidate)
        except QueueTimeout:
            assert not could_run_at_once
            assert claim.timeout is not None
        else:
            assert is_served
            assert not could_run_at_once or request.placement is not None
            assert request.placement is not None or (
                request.is_queued and (room > 0 or self.could_run_if_loaded(candidate, 1))
            )

    @precondition(lambda self: self.queued())
    @rule(data=st.data())
    def leave_or_time_out_while_queued(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.queued())))

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data(), is_served=st.booleans(), seconds=st.floats(0, 3))
    def finish_or_leave(self, data: st.DataObject, is_served: bool, seconds: float) -> None:
        request = data.draw(st.sampled_from(self.in_flight()))
        self.time_passes(seconds)
        request.is_served = is_served
        self.end(request)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        before = [repr(backend.admission) for backend in self.backends]
        request = data.draw(st.sampled_from(sorted(self.gone, key=id)))
        request.setup.leave(request)
        assert [repr(backend.admission) for backend in self.backends] == before

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.in_flight()))
        if request.load_sample is not None and not request.load_sample.is_streaming:
            request.setup.admission.first_token(request)

    @precondition(lambda self: self.in_flight())
    @rule(data=st.data())
    def reassign(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.in_flight()))
        assert request.placement is not None
        before = request.placement.server
        was_reassigned = request.setup.admission.reassign(request)
        assert request.placement is not None
        assert (request.placement.server is not before) == was_reassigned

    @precondition(lambda self: self.queued())
    @rule(data=st.data(), side=sides, model=st.sampled_from(MODELS), is_own=st.booleans())
    def transfer_to_the_other_backend(self, data: st.DataObject, side: int, model: str, is_own: bool) -> None:
        """Transfer any of the waiting requests in order of arrival, however full the target is."""
        target = self.backends[side]
        waiting = sorted(
            (request for request in self.queued() if request.setup is not target), key=lambda request: request.arrival
        )
        transferred = [request for request in waiting if data.draw(st.booleans())]
        before = sum(backend.waiting(lane) + backend.running(lane) for backend in self.backends for lane in LANES)
        staying = [request for request in waiting if request not in transferred]
        target.accept_transfers(transferred, model, *(("pro", OWN) if is_own else ("", None)))
        assert all(request.is_queued or request.placement is not None for request in transferred)
        assert [request.arrival for request in transferred] == sorted(request.arrival for request in transferred)
        assert all(request.is_queued for request in staying)
        assert before == sum(
            backend.waiting(lane) + backend.running(lane) for backend in self.backends for lane in LANES
        )
        for request in transferred:
            self.counts[request.queue.room] = request.queue.room.count

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 70.0)))
    def pass_time(self, seconds: float) -> None:
        self.time_passes(seconds)

    @rule(side=sides, number=st.integers(0, 1), up=st.booleans())
    def server_goes_up_or_down(self, side: int, number: int, up: bool) -> None:
        self.backends[side].servers[number].up = up
        self.backends[side].admission.refresh()

    @rule(side=sides, models=st.sets(st.sampled_from(MODELS)))
    def server_joins(self, side: int, models: set[str]) -> None:
        if len(self.backends[side].servers) < MOST_SERVERS:
            self.backends[side].add(Server(*models))

    @rule(side=sides)
    def last_server_leaves_if_it_has_no_requests(self, side: int) -> None:
        *others, last = self.backends[side].servers
        if len(others) >= 2 and not last.running and last.loading is None:
            self.backends[side].drop(last)

    @rule(side=sides, number=st.integers(0, 1), models=st.sets(st.sampled_from(MODELS)))
    def server_changes_its_models(self, side: int, number: int, models: set[str]) -> None:
        self.backends[side].servers[number].available_models = models
        self.backends[side].admission.refresh()

    @rule(
        side=sides,
        slots=st.integers(1, 4),
        vision=st.integers(1, 2),
        model=st.sampled_from((None, None, 1, 2, 9)),
        max_queue=st.integers(1, MAX_QUEUE),
    )
    def limits_change(self, side: int, slots: int, vision: int, model: int | None, max_queue: int) -> None:
        self.backends[side].admission.change(limits(slots=slots, vision=vision, model=model, max_queue=max_queue))

    # Invariants

    @invariant()
    def every_count_matches_the_requests_there(self) -> None:
        in_flight, waiting = self.in_flight(), self.queued()
        queues = self.queues()
        for limit in {limit for queue in queues for placement in queue.placements for limit in placement.limits}:
            assert limit.count == sum(
                request.placement is not None and limit in request.placement.limits for request in in_flight
            )
        for room in {queue.room for queue in queues}:
            assert room.count == sum(request.queue.room is room for request in waiting)
        for backend in self.backends:
            for lane in LANES:
                assert backend.running(lane) == sum(
                    request.setup is backend and request.queue.lane.name == lane for request in in_flight
                )
                assert backend.waiting(lane) == sum(
                    request.setup is backend and request.queue.lane.name == lane for request in waiting
                )

    @invariant()
    def no_limit_is_exceeded_except_by_a_trial_or_after_it_was_lowered(self) -> None:
        for queue in self.queues():
            for placement in queue.placements:
                for limit in placement.limits:
                    most = limit.limit + (isinstance(limit, AdaptiveLimit) and not limit.is_held)
                    assert limit.count <= max(most, self.counts.get(limit, 0))
                    self.counts[limit] = limit.count
            if all(placement.state is None for placement in queue.placements):
                assert queue.room.count <= max(queue.room.limit, self.counts.get(queue.room, 0))
            self.counts[queue.room] = queue.room.count

    @invariant()
    def no_queued_request_could_run(self) -> None:
        assert not any(self.could_run(request) for request in self.queued())

    @invariant()
    def one_model_is_loaded_at_a_time_and_others_are_held_only_for_it(self) -> None:
        for _, server in self.servers_with_residency():
            assert server.residency is not None
            states = list(server.residency.states.values())
            assert [state for state in states if state.is_loading] == [
                state for state in states if state is server.loading
            ]
            assert all(state.is_ready == (state.is_loaded and not state.is_held) for state in states)
            assert server.residency._next is not None or not any(state.is_held for state in states)
            for state in states:
                assert state.running == sum(
                    request.placement is not None and request.placement.state is state for request in self.in_flight()
                )

    @invariant()
    def wanted_load_has_begun_or_has_a_timer(self) -> None:
        for request in self.queued():
            for placement in request.queue.placements:
                state, residency = placement.state, placement.server.residency
                if (
                    state is not None
                    and residency is not None
                    and not state.is_loaded
                    and residency._may_load(state.model)
                    and request.queue.wants(state)
                ):
                    assert residency._next is not None or request.setup.clock.now <= residency._timer_due < inf

    @invariant()
    def learned_limit_stays_within_its_bounds(self) -> None:
        for limit in self.adaptive_limits():
            assert 1 <= limit.limit <= 99
            assert 0 <= limit.streaming <= limit.count

    @invariant()
    def queued_request_is_in_one_queue_of_one_backend(self) -> None:
        entries = [
            request
            for queue in self.queues()
            for fair_queue in (queue.interactive, queue.batch)
            for request in fair_queue.in_order()
        ]
        assert sorted(map(id, entries)) == sorted(map(id, self.queued()))
        for backend in self.backends:
            assert {queue for queue in backend.admission._queues.values() if queue.waiting} == {
                r.queue for r in backend.requests if r.is_queued
            }
            assert backend.admission._queued == sum(request.is_queued for request in backend.requests)

    @invariant()
    def every_request_is_queued_in_flight_or_gone(self) -> None:
        for request in self.requests():
            assert (request.is_queued, request.placement is not None, request in self.gone).count(True) == 1
            assert request.admissions <= 1

    @invariant()
    def no_request_overtakes_its_equals(self) -> None:
        """Requests with the same queue, key, person and priority run in the order of arrival."""
        waiting = self.queued()
        for request in self.requests():
            if request.admissions and request.placement is not None:
                equals = [
                    other
                    for other in waiting
                    if other.queue is request.queue and owner(other.claim) == owner(request.claim)
                ]
                assert all(other.arrival > request.arrival for other in equals)

    @invariant()
    def batch_is_not_passed_over_more_than_its_share(self) -> None:
        for queue in self.queues():
            assert not queue.batch.count or queue.passed_over < BATCH_SHARE + len(self.queues())

    def teardown(self) -> None:
        while alive := [*self.queued(), *self.in_flight()]:
            self.end(alive[0])
        self.time_passes(1000)
        assert all(server.running == 0 for backend in self.backends for server in backend.servers)
        assert all(limit.count == limit.streaming == 0 for limit in self.adaptive_limits())


AdmissionMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAdmission = AdmissionMachine.TestCase
