"""Before two backends requests arrive, leave, time out, finish, speak, move to another server and follow the roll-out to the other backend; servers
come, go and change; models are loaded and evicted; limits change; time passes: in any order."""

from math import inf
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.admission.concurrency_limits import AdaptiveLimit
from gateway.admission.fair_queue import Claim
from gateway.admission.model_residency import LoadedModels
from gateway.admission.queues import BATCH_SHARE, LaneName, Queue, TierLimits
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout
from tests.fakes.waiting import Request, Server, Setup, limits, setup

MODELS = ("a", "b")
LANES: tuple[LaneName, ...] = ("text", "vision")
MAX_QUEUE = 6
OWN = TierLimits(model_slots=1, lane_slots=1, max_queue=2)

sides = st.integers(0, 1)
claims = st.builds(
    Claim,
    st.sampled_from(("one", "two")),
    st.sampled_from(("", "", "ann", "bob")),
    st.booleans(),
    st.sampled_from((None, None, None, 0.5, 100.0)),
)


def kind(claim: Claim) -> tuple[str, str, bool]:
    return claim.key, claim.person, claim.is_batch


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.lines = (
            setup(Server("a"), Server("a", "b"), slots=3, vision=1, model=None, max_queue=MAX_QUEUE),
            setup(Server("a", "b"), Server("b"), slots=2, vision=2, max_queue=2),
        )
        self.gone: set[Request] = set()
        self.counts: dict[Any, int] = {}

    # What there is

    def requests(self) -> list[Request]:
        return [request for line in self.lines for request in line.requests]

    def in_line(self) -> list[Request]:
        return [request for request in self.requests() if request.is_queued]

    def flying(self) -> list[Request]:
        return [request for request in self.requests() if request.placement is not None]

    def queues(self) -> list[Queue]:
        return [queue for line in self.lines for queue in line.admission._queues.values()]

    def learned_bounds(self) -> list[AdaptiveLimit]:
        limits = [bound for line in self.lines for server in line.servers for bound in server.models.values()]
        assert all(isinstance(bound, AdaptiveLimit) for bound in limits)
        return cast("list[AdaptiveLimit]", limits)

    def end(self, request: Request) -> None:
        request.home.leave(request)
        self.gone.add(request)

    def time_passes(self, seconds: float) -> None:
        for line in self.lines:
            line.pass_time(seconds)

    def could_run(self, request: Request) -> bool:
        """Said once more in other words than the code's."""
        places = [
            place
            for place in request.queue.placements
            if place.server.serves(request.queue.model) and place.server.is_up()
        ]
        places = [
            place for place in places if place.state is None or (place.state.is_loaded and not place.state.is_held)
        ]
        return any(all(bound.count < bound.limit for bound in place.limits) for place in places)

    def could_run_if_loaded(self, request: Request, ahead: int = 0) -> bool:
        """Of those in its queue one is `ahead` of its own count: itself."""
        queue = request.queue
        places = [place for place in queue.placements if place.server.serves(queue.model) and place.server.is_up()]
        cold = [place for place in places if place.state is not None and not place.state.is_ready]
        return any(all(bound.limit - bound.count > queue.waiting - ahead for bound in place.limits) for place in cold)

    def servers_with_loads(self) -> list[tuple[Setup, Server]]:
        return [(line, server) for line in self.lines for server in line.servers if server.residency is not None]

    def loading(self) -> list[tuple[Setup, Server]]:
        return [(line, server) for line, server in self.servers_with_loads() if server.loading is not None]

    # Steps

    @initialize(with_loads=st.sets(sides))
    def begin(self, with_loads: set[int]) -> None:
        for side in with_loads:
            self.lines[side].have_loads()

    @precondition(lambda self: any(self.servers_with_loads()))
    @rule(data=st.data(), shown=st.sets(st.sampled_from(MODELS)))
    def probe_shows_what_is_loaded(self, data: st.DataObject, shown: set[str]) -> None:
        line, server = data.draw(st.sampled_from(self.servers_with_loads()))
        assert server.residency is not None
        if server.residency.update(shown):
            line.admission.refresh()

    @precondition(lambda self: self.loading())
    @rule(
        data=st.data(),
        succeeds=st.booleans(),
        before=st.sets(st.sampled_from(MODELS)),
        after=st.none() | st.sets(st.sampled_from(MODELS)),
    )
    def load_ends(self, data: st.DataObject, succeeds: bool, before: set[str], after: set[str] | None) -> None:
        line, server = data.draw(st.sampled_from(self.loading()))
        state, loads = server.loading, server.residency
        assert state is not None
        assert loads is not None
        if not succeeds:
            for request in [
                request for request in self.in_line() if any(place.state is state for place in request.queue.placements)
            ]:
                self.end(request)
        server.loading = None
        loads.ended(
            state,
            succeeds,
            LoadedModels(dict.fromkeys(before, 1e9), 0.0),
            None if after is None else LoadedModels(dict.fromkeys(after, 1e9), 0.0),
        )
        assert state.is_ready == succeeds
        line.admission.refresh()
        if loads.schedule():
            line.admission.refresh()

    @rule(
        side=sides,
        model=st.sampled_from(("a", "a", "b", "nowhere")),
        lane=st.sampled_from(LANES),
        claim=claims,
        is_own=st.booleans(),
    )
    def arrive(self, side: int, model: str, lane: LaneName, claim: Claim, is_own: bool) -> None:
        line = self.lines[side]
        tier, own = ("pro", OWN) if is_own else ("", None)
        queue = line.admission.queue(model, lane, tier, own)
        probe = Request(line, queue, claim)
        could, room = self.could_run(probe), queue.room.limit - queue.room.count
        is_served = any(model in server.models_there for server in line.servers)
        try:
            request = line.arrive(model, lane, claim, tier, own)
        except ModelNotFound:
            assert not is_served
        except QueueFull:
            assert not could
            assert room <= 0
            assert not self.could_run_if_loaded(probe)
        except QueueTimeout:
            assert not could
            assert claim.timeout is not None
        else:
            assert is_served
            assert not could or request.placement is not None
            assert request.placement is not None or (
                request.is_queued and (room > 0 or self.could_run_if_loaded(probe, 1))
            )

    @precondition(lambda self: self.in_line())
    @rule(data=st.data())
    def leave_or_time_out_in_line(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.in_line())))

    @precondition(lambda self: self.flying())
    @rule(data=st.data(), is_served=st.booleans(), seconds=st.floats(0, 3))
    def finish_or_leave(self, data: st.DataObject, is_served: bool, seconds: float) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        self.time_passes(seconds)
        request.is_served = is_served
        self.end(request)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        before = [repr(line.admission) for line in self.lines]
        request = data.draw(st.sampled_from(sorted(self.gone, key=id)))
        request.home.leave(request)
        assert [repr(line.admission) for line in self.lines] == before

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def speak(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        if request.load_sample is not None and not request.load_sample.is_streaming:
            request.home.admission.first_token(request)

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        assert request.placement is not None
        before = request.placement.server
        moved = request.home.admission.reassign(request)
        assert request.placement is not None
        assert (request.placement.server is not before) == moved

    @precondition(lambda self: self.in_line())
    @rule(data=st.data(), side=sides, model=st.sampled_from(MODELS), is_own=st.booleans())
    def follow_to_the_other_backend(self, data: st.DataObject, side: int, model: str, is_own: bool) -> None:
        """Any of those who wait, in the order of their arrival, and however full it is there."""
        there = self.lines[side]
        waiting = sorted(
            (request for request in self.in_line() if request.home is not there), key=lambda request: request.arrival
        )
        movers = [request for request in waiting if data.draw(st.booleans())]
        before = sum(line.waiting(lane) + line.running(lane) for line in self.lines for lane in LANES)
        stay = [request for request in waiting if request not in movers]
        there.take_over(movers, model, *(("pro", OWN) if is_own else ("", None)))
        assert all(request.is_queued or request.placement is not None for request in movers)
        assert [request.arrival for request in movers] == sorted(request.arrival for request in movers)
        assert all(request.is_queued for request in stay)
        assert before == sum(line.waiting(lane) + line.running(lane) for line in self.lines for lane in LANES)
        for request in movers:
            self.counts[request.queue.room] = request.queue.room.count

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 70.0)))
    def pass_time(self, seconds: float) -> None:
        self.time_passes(seconds)

    @rule(side=sides, number=st.integers(0, 1), up=st.booleans())
    def server_goes_up_or_down(self, side: int, number: int, up: bool) -> None:
        self.lines[side].servers[number].up = up
        self.lines[side].admission.refresh()

    @rule(side=sides, number=st.integers(0, 1), models=st.sets(st.sampled_from(MODELS)))
    def server_changes_its_models(self, side: int, number: int, models: set[str]) -> None:
        self.lines[side].servers[number].models_there = models
        self.lines[side].admission.refresh()

    @rule(
        side=sides,
        slots=st.integers(1, 4),
        vision=st.integers(1, 2),
        model=st.sampled_from((None, None, 1, 2, 9)),
        max_queue=st.integers(1, MAX_QUEUE),
    )
    def limits_change(self, side: int, slots: int, vision: int, model: int | None, max_queue: int) -> None:
        self.lines[side].admission.change(limits(slots=slots, vision=vision, model=model, max_queue=max_queue))

    # Invariants

    @invariant()
    def every_count_is_that_of_who_is_there(self) -> None:
        flying, waiting = self.flying(), self.in_line()
        queues = self.queues()
        for bound in {bound for queue in queues for place in queue.placements for bound in place.limits}:
            assert bound.count == sum(
                request.placement is not None and bound in request.placement.limits for request in flying
            )
        for room in {queue.room for queue in queues}:
            assert room.count == sum(request.queue.room is room for request in waiting)
        for line in self.lines:
            for lane in LANES:
                assert line.running(lane) == sum(
                    request.home is line and request.queue.lane.name == lane for request in flying
                )
                assert line.waiting(lane) == sum(
                    request.home is line and request.queue.lane.name == lane for request in waiting
                )

    @invariant()
    def no_bound_is_exceeded_but_by_a_trial_and_after_it_was_lowered(self) -> None:
        for queue in self.queues():
            for place in queue.placements:
                for bound in place.limits:
                    most = bound.limit + (isinstance(bound, AdaptiveLimit) and not bound.is_held)
                    assert bound.count <= max(most, self.counts.get(bound, 0))
                    self.counts[bound] = bound.count
            if all(place.state is None for place in queue.placements):
                assert queue.room.count <= max(queue.room.limit, self.counts.get(queue.room, 0))
            self.counts[queue.room] = queue.room.count

    @invariant()
    def nobody_waits_who_could_run(self) -> None:
        assert not any(self.could_run(request) for request in self.in_line())

    @invariant()
    def one_model_is_loaded_at_a_time_and_others_are_held_only_for_it(self) -> None:
        for _, server in self.servers_with_loads():
            assert server.residency is not None
            states = list(server.residency.states.values())
            assert [state for state in states if state.is_loading] == [
                state for state in states if state is server.loading
            ]
            assert all(state.is_ready == (state.is_loaded and not state.is_held) for state in states)
            assert server.residency._next is not None or not any(state.is_held for state in states)
            for state in states:
                assert state.running == sum(
                    request.placement is not None and request.placement.state is state for request in self.flying()
                )

    @invariant()
    def load_that_is_waited_for_is_begun_or_has_its_time(self) -> None:
        for request in self.in_line():
            for place in request.queue.placements:
                state, loads = place.state, place.server.residency
                if (
                    state is not None
                    and loads is not None
                    and not state.is_loaded
                    and loads._may_load(state.model)
                    and request.queue.wants(state)
                ):
                    assert loads._next is not None or request.home.clock.now <= loads._alarm_at < inf

    @invariant()
    def a_learned_limit_is_no_higher_than_what_was_there_at_once(self) -> None:
        for bound in self.learned_bounds():
            assert 1 <= bound.limit <= 99
            assert 0 <= bound.streaming <= bound.count

    @invariant()
    def who_is_in_line_is_in_one_line_of_one_backend(self) -> None:
        standing = [
            request
            for queue in self.queues()
            for line in (queue.interactive, queue.batch)
            for request in line.in_order()
        ]
        assert sorted(map(id, standing)) == sorted(map(id, self.in_line()))
        for line in self.lines:
            assert {queue for queue in line.admission._queues.values() if queue.waiting} == {
                r.queue for r in line.requests if r.is_queued
            }
            assert line.admission._queued == sum(request.is_queued for request in line.requests)

    @invariant()
    def everybody_is_in_line_in_flight_or_gone(self) -> None:
        for request in self.requests():
            assert (request.is_queued, request.placement is not None, request in self.gone).count(True) == 1
            assert request.admissions <= 1

    @invariant()
    def nobody_overtakes_his_like(self) -> None:
        """The same need, key, person and priority: by arrival."""
        waiting = self.in_line()
        for request in self.requests():
            if request.admissions and request.placement is not None:
                likes = [
                    other
                    for other in waiting
                    if other.queue is request.queue and kind(other.claim) == kind(request.claim)
                ]
                assert all(other.arrival > request.arrival for other in likes)

    @invariant()
    def batch_is_not_passed_over_more_than_its_share(self) -> None:
        for queue in self.queues():
            assert not queue.batch.count or queue.passed_over < BATCH_SHARE + len(self.queues())

    def teardown(self) -> None:
        while alive := [*self.in_line(), *self.flying()]:
            self.end(alive[0])
        self.time_passes(1000)
        assert all(server.running == 0 for line in self.lines for server in line.servers)
        assert all(bound.count == bound.streaming == 0 for bound in self.learned_bounds())


AdmissionMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAdmission = AdmissionMachine.TestCase
