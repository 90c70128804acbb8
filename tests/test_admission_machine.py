"""Requests arrive, leave, time out, finish, speak and move; servers come, go and change; limits change; time passes: in any order."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.errors import ModelNotFound, QueueFull, QueueTimeout
from gateway.queues import BATCH_SHARE, Lane, OwnLimits
from gateway.slots import LearnedBound
from gateway.turns import Claim
from tests.fakes.line import Request, Server, limits, setup

MODELS = ("a", "b")
LANES: tuple[Lane, ...] = ("text", "vision")
MAX_QUEUE = 6
OWN = OwnLimits(model_slots=1, lane_slots=1, max_queue=2)

claims = st.builds(
    Claim, st.sampled_from(("one", "two")), st.sampled_from(("", "", "ann", "bob")), st.booleans(), st.sampled_from((None, None, None, 0.5, 100.0))
)


def kind(claim: Claim) -> tuple[str, str, bool]:
    return claim.key, claim.person, claim.is_batch


class AdmissionMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.line = setup(Server("a"), Server("a", "b"), slots=3, vision=1, model=None, max_queue=MAX_QUEUE)
        self.slots, self.max_queue = 3, MAX_QUEUE
        self.gone: set[Request] = set()
        self.let_in: list[Request] = []
        self.counts: dict[Any, int] = {}

    # What there is

    def in_line(self) -> list[Request]:
        return [request for request in self.line.requests if request.is_in_line]

    def flying(self) -> list[Request]:
        return [request for request in self.line.requests if request.place is not None]

    def end(self, request: Request) -> None:
        self.line.leave(request)
        self.gone.add(request)

    def could_run(self, request: Request) -> bool:
        """Said once more in other words than the code's."""
        places = [place for place in request.queue.places if place.station.serves(request.queue.model) and place.station.is_up()]
        return any(all(bound.count < bound.limit for bound in place.bounds) for place in places)

    # Steps

    @rule(model=st.sampled_from(("a", "a", "b", "nowhere")), lane=st.sampled_from(LANES), claim=claims, is_own=st.booleans())
    def arrive(self, model: str, lane: Lane, claim: Claim, is_own: bool) -> None:
        tier, own = ("pro", OWN) if is_own else ("", None)
        queue = self.line.admission.queue(model, lane, tier, own)
        probe = Request(queue, claim)
        could, room = self.could_run(probe), queue.room.limit - queue.room.count
        is_served = any(model in server.models_there for server in self.line.servers)
        try:
            request = self.line.arrive(model, lane, claim, tier, own)
        except ModelNotFound:
            assert not is_served
        except QueueFull:
            assert not could
            assert room <= 0
        except QueueTimeout:
            assert not could
            assert claim.timeout is not None
        else:
            assert is_served
            assert not could or request.place is not None
            assert request.place is not None or (request.is_in_line and room > 0)

    @precondition(lambda self: self.in_line())
    @rule(data=st.data())
    def leave_or_time_out_in_line(self, data: st.DataObject) -> None:
        self.end(data.draw(st.sampled_from(self.in_line())))

    @precondition(lambda self: self.flying())
    @rule(data=st.data(), is_served=st.booleans(), seconds=st.floats(0, 3))
    def finish_or_leave(self, data: st.DataObject, is_served: bool, seconds: float) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        self.line.pass_time(seconds)
        request.is_served = is_served
        self.end(request)

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def leave_again(self, data: st.DataObject) -> None:
        before = repr(self.line.admission)
        self.line.leave(data.draw(st.sampled_from(sorted(self.gone, key=id))))
        assert repr(self.line.admission) == before

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def speak(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        if request.part is not None and not request.part.is_speaking:
            self.line.admission.spoke(request)

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.flying()))
        assert request.place is not None
        before = request.place.station
        moved = self.line.admission.move(request)
        assert request.place is not None
        assert (request.place.station is not before) == moved

    @rule(seconds=st.sampled_from((0.01, 0.1, 1.0, 70.0)))
    def pass_time(self, seconds: float) -> None:
        self.line.pass_time(seconds)

    @rule(number=st.integers(0, 1), up=st.booleans())
    def server_goes_up_or_down(self, number: int, up: bool) -> None:
        self.line.servers[number].up = up
        self.line.admission.refresh()

    @rule(number=st.integers(0, 1), models=st.sets(st.sampled_from(MODELS)))
    def server_changes_its_models(self, number: int, models: set[str]) -> None:
        self.line.servers[number].models_there = models
        self.line.admission.refresh()

    @rule(slots=st.integers(1, 4), vision=st.integers(1, 2), model=st.sampled_from((None, None, 1, 2, 9)), max_queue=st.integers(1, MAX_QUEUE))
    def limits_change(self, slots: int, vision: int, model: int | None, max_queue: int) -> None:
        self.line.admission.change(limits(slots=slots, vision=vision, model=model, max_queue=max_queue))

    # Invariants

    @invariant()
    def every_count_is_that_of_who_is_there(self) -> None:
        flying, waiting = self.flying(), self.in_line()
        queues = {queue for lane in LANES for queue in self.line.admission._lanes[lane].queues}
        for bound in {bound for queue in queues for place in queue.places for bound in place.bounds}:
            assert bound.count == sum(request.place is not None and bound in request.place.bounds for request in flying)
        for room in {queue.room for queue in queues}:
            assert room.count == sum(request.queue.room is room for request in waiting)
        for lane in LANES:
            assert self.line.running(lane) == sum(request.queue.lane.name == lane for request in flying)
            assert self.line.waiting(lane) == sum(request.queue.lane.name == lane for request in waiting)

    @invariant()
    def no_bound_is_exceeded_but_by_a_trial_and_after_it_was_lowered(self) -> None:
        for queue in self.line.admission._queues.values():
            for place in queue.places:
                for bound in place.bounds:
                    most = bound.limit + (isinstance(bound, LearnedBound) and not bound.is_held)
                    assert bound.count <= max(most, self.counts.get(bound, 0))
                    self.counts[bound] = bound.count
            assert queue.room.count <= max(queue.room.limit, self.counts.get(queue.room, 0))
            self.counts[queue.room] = queue.room.count

    @invariant()
    def nobody_waits_who_could_run(self) -> None:
        assert not any(self.could_run(request) for request in self.in_line())

    @invariant()
    def a_learned_limit_is_no_higher_than_what_was_there_at_once(self) -> None:
        for server in self.line.servers:
            for bound in server.models.values():
                assert isinstance(bound, LearnedBound)
                assert 1 <= bound.limit <= 9
                assert 0 <= bound.speaking <= bound.count

    @invariant()
    def everybody_is_in_line_in_flight_or_gone(self) -> None:
        for request in self.line.requests:
            assert (request.is_in_line, request.place is not None, request in self.gone).count(True) == 1
            assert request.admissions <= 1

    @invariant()
    def nobody_overtakes_his_like(self) -> None:
        """The same need, key, person and priority: by arrival."""
        waiting = self.in_line()
        for request in self.line.requests:
            if request.admissions and request.place is not None:
                likes = [other for other in waiting if other.queue is request.queue and kind(other.claim) == kind(request.claim)]
                assert all(other.arrival > request.arrival for other in likes)

    @invariant()
    def batch_is_not_passed_over_more_than_its_share(self) -> None:
        for queue in self.line.admission._queues.values():
            assert not queue.batch.count or queue.passed_over < BATCH_SHARE + len(self.line.admission._queues)

    def teardown(self) -> None:
        while alive := [*self.in_line(), *self.flying()]:
            self.end(alive[0])
        self.line.pass_time(1000)
        assert all(server.running == 0 for server in self.line.servers)
        assert all(
            bound.count == bound.speaking == 0 for server in self.line.servers for bound in server.models.values() if isinstance(bound, LearnedBound)
        )


AdmissionMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
TestAdmission = AdmissionMachine.TestCase
