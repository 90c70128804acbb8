"""Admission: which requests run, wait or are refused.

The tests drive the state machine by plain calls, on a manual clock.
"""

import pytest

from gateway.admission.concurrency_limits import TRY_AGAIN_SECONDS
from gateway.admission.fair_queue import Claim
from gateway.admission.limits import AdmissionLimits, LaneLimits, LaneName, TierLimits
from gateway.admission.queues import BATCH_SHARE
from gateway.errors import ModelNotFound, QueueFull
from tests.fakes.admission import FOREVER, Server, Setup, limits, setup

# Slots and queues


def test_request_that_finds_a_slot_does_not_wait() -> None:
    backend = setup(Server("m"))
    request = backend.arrive()
    assert request.placement is not None
    assert (backend.running("text"), backend.waiting("text")) == (1, 0)
    backend.leave(request)
    assert (backend.running("text"), backend.servers[0].running) == (0, 0)


def test_free_slot_goes_to_the_request_that_arrived_first() -> None:
    backend = setup(Server("m"))
    running, first, second = (backend.arrive() for _ in range(3))
    backend.leave(running)
    assert (first.placement is not None, second.placement is not None) == (True, False)
    backend.leave(first)
    backend.leave(second)
    assert backend.running("text") == backend.waiting("text") == 0


def test_request_that_left_the_queue_is_never_admitted() -> None:
    backend = setup(Server("m"), max_queue=1)
    running, waiting = backend.arrive(), backend.arrive()
    with pytest.raises(QueueFull):
        backend.arrive()
    backend.leave(waiting)
    backend.leave(waiting)
    assert backend.waiting("text") == 0
    backend.leave(running)
    assert waiting.admissions == 0


def test_full_queue_refuses_new_requests_in_its_lane_only() -> None:
    backend = setup(Server("m"), max_queue=1)
    backend.arrive(), backend.arrive()
    with pytest.raises(QueueFull) as caught:
        backend.arrive()
    assert caught.value.retry_after
    assert backend.arrive(lane="vision").is_queued


def test_request_for_a_model_that_no_server_has_is_refused_at_once() -> None:
    with pytest.raises(ModelNotFound) as caught:
        setup(Server("m")).arrive("other")
    assert caught.value.param == "model"


# Limits of lanes, models and tiers


def test_images_run_one_at_a_time_while_texts_overtake_them() -> None:
    backend = setup(Server("m"), slots=3, vision=1)
    first, second = backend.arrive(lane="vision"), backend.arrive(lane="vision")
    backend.arrive(), backend.arrive()
    assert (backend.running("vision"), backend.running("text"), backend.waiting("vision")) == (1, 2, 1)
    backend.leave(first)
    assert second.placement is not None


def test_text_does_not_wait_behind_an_image_that_cannot_run() -> None:
    backend = setup(Server("m"), slots=2, vision=1)
    backend.arrive(lane="vision")
    running, image, text = backend.arrive(), backend.arrive(lane="vision"), backend.arrive()
    backend.leave(running)
    assert (image.placement, text.placement is not None) == (None, True)


@pytest.mark.parametrize("lanes", [("text", "vision"), ("vision", "text")], ids=["text first", "image first"])
def test_lanes_are_served_in_the_order_of_arrival(lanes: tuple[LaneName, LaneName]) -> None:
    backend = setup(Server("m"))
    running, first, second = backend.arrive(), backend.arrive(lane=lanes[0]), backend.arrive(lane=lanes[1])
    backend.leave(running)
    assert (first.placement is not None, second.placement) == (True, None)


def test_long_queue_in_one_lane_does_not_hold_back_another_lane() -> None:
    backend = setup(Server("m"), slots=1, vision=1)
    running = backend.arrive()
    queued = [backend.arrive() for _ in range(9)]
    image = backend.arrive(lane="vision")
    backend.leave(running)
    backend.leave(queued[0])
    assert image.placement is not None


def test_images_take_slots_of_the_server_too() -> None:
    backend = setup(Server("m"), slots=1, vision=1)
    backend.arrive(lane="vision")
    assert backend.arrive().is_queued


def test_model_has_slots_of_its_own() -> None:
    backend = setup(Server("a", "b"), slots=3, model=1)
    backend.arrive("a")
    assert backend.arrive("a").is_queued
    assert backend.arrive("b").placement is not None


def test_names_of_one_model_share_its_slots() -> None:
    backend = setup(Server("a", "a:latest"), slots=3, model=1)
    backend.arrive("a")
    assert backend.arrive("a:latest").is_queued


def test_limits_of_a_tier_count_only_its_own_requests() -> None:
    backend = setup(Server("m"), slots=4, model=2, max_queue=5)
    own = TierLimits(model_slots=1, max_queue=1, queue_timeout=7.0)
    backend.arrive(), backend.arrive()
    assert backend.arrive().is_queued
    assert backend.arrive(tier="pro", own=own).placement is not None
    assert backend.arrive(tier="pro", own=own).is_queued
    with pytest.raises(QueueFull):
        backend.arrive(tier="pro", own=own)
    assert backend.arrive().is_queued
    assert backend.admission.queue("m", "text", "pro", own).queue_timeout == 7.0


def test_slots_of_a_tier_do_not_add_slots_to_the_server() -> None:
    backend = setup(Server("m"), slots=2, model=2)
    own = TierLimits(slots=1, model_slots=8)
    backend.arrive(tier="pro", own=own)
    assert backend.arrive(tier="pro", own=own).is_queued
    backend.arrive()
    assert backend.arrive().is_queued


def test_tiers_without_limits_of_their_own_share_a_queue() -> None:
    backend = setup(Server("m"))
    assert backend.admission.queue("m", "text", "one") is backend.admission.queue("m", "text", "two")


def test_backend_may_have_lanes_of_any_name() -> None:
    backend = setup(Server("m"), slots=2, more_lanes={"embedding": 1})
    backend.arrive(lane="embedding")
    assert backend.arrive(lane="embedding").is_queued
    assert backend.arrive().placement is not None
    assert backend.admission.lanes == ("text", "vision", "embedding")


# Turns


def test_key_with_many_requests_does_not_hold_back_another_key() -> None:
    backend = setup(Server("m"), max_queue=50)
    running = backend.arrive(claim=Claim("greedy"))
    for _ in range(20):
        backend.arrive(claim=Claim("greedy"))
    small = backend.arrive(claim=Claim("small"))
    backend.leave(running)
    backend.leave(backend.only_running())
    assert small.placement is not None


def test_key_has_one_turn_for_all_its_models() -> None:
    """A key with requests for two models has one turn, not two."""
    backend = setup(Server("a", "b"), max_queue=50)
    running = backend.arrive("a")
    for _ in range(3):
        backend.arrive("a", claim=Claim("greedy")), backend.arrive("b", claim=Claim("greedy"))
        backend.arrive("a", claim=Claim("small"))
    backend.leave(running)
    keys = []
    for _ in range(6):
        keys.append(backend.only_running().claim.key)
        backend.leave(backend.only_running())
    assert keys == ["greedy", "small"] * 3


def test_interactive_request_runs_before_a_batch_request() -> None:
    backend = setup(Server("m"))
    running, batch, chat = backend.arrive(), backend.arrive(claim=Claim(is_batch=True)), backend.arrive()
    backend.leave(running)
    assert (chat.placement is not None, batch.placement) == (True, None)


@pytest.mark.parametrize("model", ["m", "other"], ids=["in the same queue", "in another queue"])
def test_batch_gets_one_slot_in_ten(model: str) -> None:
    backend = setup(Server("m", "other"), max_queue=100)
    backend.arrive()
    for _ in range(40):
        backend.arrive()
    for _ in range(4):
        backend.arrive(model, claim=Claim(is_batch=True))
    order = []
    for _ in range(40):
        backend.leave(backend.only_running())
        order.append(backend.only_running().claim.is_batch)
    assert order == ([False] * (BATCH_SHARE - 1) + [True]) * 4


# Servers


def test_least_busy_server_is_chosen_first() -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, two, slots=2)
    assert {backend.arrive().placement.server, backend.arrive().placement.server} == {one, two}
    backend.arrive(), backend.arrive()
    assert (one.running, two.running) == (2, 2)


def test_request_goes_to_a_server_that_has_its_model() -> None:
    one, two = Server("a"), Server("b")
    backend = setup(one, two, slots=2)
    assert backend.arrive("b").placement.server is backend.arrive("b").placement.server is two


def test_request_does_not_wait_behind_one_for_a_busy_server() -> None:
    backend = setup(Server("a"), Server("b"))
    backend.arrive("a"), backend.arrive("a")
    assert backend.arrive("b").placement is not None


def test_server_that_is_down_gets_no_requests_while_another_has_the_model() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    backend = setup(down, up, slots=2)
    assert backend.arrive().placement.server is backend.arrive().placement.server is up
    assert backend.arrive().is_queued


def test_request_waits_for_a_server_that_is_down() -> None:
    server = Server("m")
    server.up = False
    backend = setup(server)
    waiting = backend.arrive()
    assert waiting.is_queued
    server.up = True
    backend.admission.refresh()
    assert waiting.placement is not None


def test_separate_lane_takes_no_slots_from_other_lanes() -> None:
    server = Server("m")
    lanes = {"text": LaneLimits(None, 10, FOREVER), "separate": LaneLimits(2, 10, FOREVER, is_separate=True)}
    backend = Setup((server,), AdmissionLimits(1, 1, lanes))
    texts = [backend.arrive() for _ in range(2)]
    separate = [backend.arrive(lane="separate") for _ in range(3)]
    assert [request.placement is not None for request in (*texts, *separate)] == [True, False, True, True, False]
    assert (server.running, server.load) == (1, 3)
    backend.leave(texts[0])
    assert separate[2].is_queued
    backend.admission.change(AdmissionLimits(1, 1, {**lanes, "separate": LaneLimits(3, 10, FOREVER, is_separate=True)}))
    assert separate[2].placement is not None
    for request in (texts[1], *separate):
        backend.leave(request)
    assert server.load == 0


def test_server_that_comes_up_gets_queued_requests() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    backend = setup(down, up)
    backend.arrive()
    waiting = backend.arrive()
    down.up = True
    backend.admission.refresh()
    assert waiting.placement is not None
    assert waiting.placement.server is down


def test_server_that_is_added_gets_requests_of_the_queues_that_exist_with_the_same_limits() -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, slots=2, vision=1)
    own = TierLimits(model_slots=1)
    running = [backend.arrive(), backend.arrive()]
    waiting = [backend.arrive(tier="t", own=own), backend.arrive(tier="t", own=own), backend.arrive(lane="vision")]
    backend.admission.add([two])
    assert all(request.is_queued for request in waiting)
    backend.admission.refresh()
    assert [request.placement is not None for request in waiting] == [True, False, True]
    assert (two.slots.count, two.slots.limit, two.lanes["vision"].count) == (2, 2, 1)
    backend.leave(running[0])
    assert waiting[1].placement is not None
    assert one.slots.count == 2


def test_server_that_is_dropped_is_forgotten_by_queues_and_loads() -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, two, slots=1)
    backend.enable_loading()
    queue = backend.admission.queue("m", "text")
    assert one.residency is not None
    (state,) = one.residency.states.values()
    assert state.waiters == [queue]
    one.up = False
    backend.admission.drop([one])
    assert ([placement.server for placement in queue.placements], state.waiters) == ([two], [])
    one.up = True
    assert backend.arrive().placement is not None
    assert backend.arrive().is_queued
    assert one.slots.count == 0


def test_load_begins_on_the_server_that_has_the_fewest_models() -> None:
    servers = [Server("a", "b", "c") for _ in range(3)]
    backend = setup(*servers, slots=4)
    backend.enable_loading()
    for server, models in zip(servers, (["a", "x"], ["a", "b"], ["a"]), strict=True):
        assert server.residency is not None
        server.residency.update(models)
    backend.arrive("c")
    assert [server.loading is not None for server in servers] == [False, False, True]
    assert [server.residency.occupancy for server in servers if server.residency is not None] == [2, 2, 2]


def test_transferred_requests_keep_their_order_and_may_exceed_max_queue() -> None:
    left, there = setup(Server("m")), setup(Server("n"), slots=2, max_queue=1)
    left.arrive()
    batch = left.arrive(claim=Claim(is_batch=True))
    waiting = [left.arrive() for _ in range(3)]
    there.arrive("n")
    there.accept_transfers([batch, *waiting], "n")
    assert (left.waiting("text"), left.running("text")) == (0, 1)
    assert [request.placement is not None for request in (batch, *waiting)] == [False, True, False, False]
    assert (there.waiting("text"), there.running("text")) == (3, 2)
    with pytest.raises(QueueFull):
        there.arrive("n")
    for request in waiting:
        there.leave(request)
    assert batch.placement is not None
    assert there.arrive("n").is_queued


def test_transferred_request_queues_behind_the_requests_already_there() -> None:
    left, there = setup(Server("m")), setup(Server("m"))
    left.arrive()
    moved = left.arrive()
    running, first = there.arrive(), there.arrive()
    there.accept_transfers([moved])
    there.leave(running)
    assert (first.placement is not None, moved.is_queued) == (True, True)
    there.leave(first)
    assert (moved.placement is not None, moved.admissions, moved.transfers) == (True, 1, 1)
    there.leave(moved)
    assert left.running("text") == 1


def test_reassigned_request_holds_a_slot_on_the_other_server() -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, two)
    request = backend.arrive()
    assert backend.admission.reassign(request)
    assert (one.running, two.running) == (0, 1)
    backend.arrive(), backend.arrive()
    assert not backend.admission.reassign(request)
    assert request.placement is not None
    assert request.placement.server is two


def test_slot_that_a_reassigned_request_leaves_goes_to_the_next_one() -> None:
    """The next one may need exactly that server."""
    one, two = Server("m", "n"), Server("m")
    backend = setup(one, two)
    request = backend.arrive("m")
    assert one.running == 1
    waiting = backend.arrive("n")
    assert backend.admission.reassign(request)
    assert waiting.placement is not None
    assert waiting.placement.server is one


# Changing limits


def test_raising_a_limit_admits_queued_requests() -> None:
    backend = setup(Server("m"), slots=1, max_queue=1)
    backend.arrive()
    waiting = backend.arrive()
    backend.admission.change(limits(slots=2, max_queue=3))
    assert waiting.placement is not None
    assert [backend.arrive().is_queued for _ in range(3)] == [True] * 3


def test_lowered_limit_admits_nothing_until_the_count_is_below_it() -> None:
    backend = setup(Server("m"), slots=3, vision=3)
    running = [backend.arrive(lane="vision") for _ in range(3)]
    waiting = backend.arrive(lane="vision")
    backend.admission.change(limits(slots=3, vision=1))
    backend.leave(running[0])
    backend.leave(running[1])
    assert waiting.is_queued
    backend.leave(running[2])
    assert waiting.placement is not None


def test_learned_limit_can_be_fixed_and_released_again() -> None:
    backend = setup(Server("m"), slots=4, model=None)
    backend.arrive()
    backend.admission.change(limits(slots=4, model=2))
    assert backend.arrive().placement is not None
    assert backend.arrive().is_queued
    assert backend.servers[0].models["m"].limit == 2
    backend.admission.change(limits(slots=4, model=None))
    assert backend.running("text") == 3  # one on trial


# Learning


def test_one_more_is_admitted_on_trial_while_requests_wait_and_the_limit_follows() -> None:
    backend = setup(Server("m"), slots=4, model=None)
    expected = []
    backend.admission._on_learned = lambda: expected.append(backend.servers[0].models["m"].limit)
    first, trial, waiting = backend.arrive(), backend.arrive(), backend.arrive()
    assert trial.placement is not None
    assert waiting.is_queued
    backend.admission.first_token(first)
    backend.admission.first_token(trial)
    backend.pass_time(1)
    assert (expected, waiting.placement is not None) == ([2], True)  # the next trial
    backend.admission.first_token(waiting)
    backend.pass_time(1)
    assert expected == [2, 3]


def test_failed_trial_is_repeated_after_a_minute() -> None:
    backend = setup(Server("m"), slots=4, model=None)
    first, trial, waiting, more = (backend.arrive() for _ in range(4))
    backend.admission.first_token(first)
    backend.leave(first)
    backend.admission.first_token(trial)
    assert (backend.running("text"), backend.servers[0].models["m"].limit) == (1, 1)
    backend.leave(trial)
    assert waiting.placement is not None
    assert more.is_queued
    backend.pass_time(TRY_AGAIN_SECONDS)  # nothing arrives or leaves: only the timer fires
    assert more.placement is not None


def test_trial_stays_within_the_limits_of_the_server_and_the_lane() -> None:
    backend = setup(Server("m"), slots=1, model=None)
    backend.arrive()
    assert backend.arrive().is_queued
    backend = setup(Server("m"), slots=4, vision=1, model=None)
    backend.arrive(lane="vision")
    assert backend.arrive(lane="vision").is_queued


@pytest.mark.parametrize("reason", ["down", "without the model", "cold"])
def test_trial_goes_only_to_a_server_that_could_serve_it(reason: str) -> None:
    one, two = Server("m"), Server("m")
    backend = setup(one, two, slots=4, model=None)
    if reason == "cold":
        backend.enable_loading()
    backend.arrive(), backend.arrive()
    assert (one.running, two.running) == (1, 1)
    if reason == "down":
        one.up = False
    elif reason == "without the model":
        one.available_models.clear()
    else:
        assert one.residency is not None
        one.residency.update([])
    trial = backend.arrive()
    assert trial.placement is not None
    assert trial.placement.server is two
    assert backend.arrive().is_queued


def test_learning_starts_at_the_limit_learned_earlier_or_at_the_first_guess() -> None:
    server = Server("m", "n")
    server.guesses = {"m": 3}
    backend = setup(server, slots=9, model=None, first_guess=2)
    assert [backend.arrive("m").placement is not None for _ in range(5)] == [True] * 4 + [False]
    assert [backend.arrive("n").placement is not None for _ in range(4)] == [True] * 3 + [False]


# Queues and limits after a change of settings


def test_unneeded_queue_is_dropped_once_it_is_empty() -> None:
    backend = setup(Server("m", "n"), slots=1)
    running, waiting = backend.arrive("m"), backend.arrive("n")
    kept = backend.admission.queue("m", "text")
    backend.admission.forget({kept})
    assert backend.waiting("text") == 1
    backend.leave(running)
    assert waiting.placement is not None
    backend.leave(waiting)
    backend.admission.forget({kept})
    assert list(backend.admission._queues.values()) == [kept]
    assert kept.lane.queues == [kept]
    assert list(backend.servers[0].models) == ["m"]


@pytest.mark.parametrize("is_running", [True, False], ids=["in flight", "queued"])
def test_queue_that_is_no_longer_wanted_stays_as_long_as_it_has_a_request(is_running: bool) -> None:
    backend = setup(Server("m", "n"), slots=1)
    other = None if is_running else backend.arrive("n")
    request = backend.arrive("m")
    assert request.is_queued is not is_running
    queue = request.queue
    backend.admission.forget({backend.admission.queue("n", "text")})
    assert queue in backend.admission._queues.values()
    assert queue in queue.lane.queues
    assert backend.servers[0].models["m"].count == is_running
    for each in (request, other):
        if each is not None:
            backend.leave(each)
    backend.admission.forget(set())
    assert (backend.admission._queues, queue.lane.queues, backend.servers[0].models) == ({}, [], {})


def test_limit_that_the_operator_has_set_is_not_the_next_guess() -> None:
    backend = setup(Server("m"), slots=9, model=None)
    backend.admission.queue("m", "text")
    backend.admission.change(limits(slots=9, model=5))
    backend.admission.forget(set())
    assert not backend.servers[0].models
    assert not backend.servers[0].guesses


def test_learned_limit_of_a_dropped_model_is_its_next_guess() -> None:
    backend = setup(Server("m"), slots=9, model=None)
    backend.admission.queue("m", "text")
    backend.servers[0].models["m"].limit = 3
    backend.admission.forget(set())
    assert not backend.servers[0].models
    backend.admission.queue("m", "text")
    assert backend.servers[0].models["m"].limit == 3


def test_tier_whose_limits_change_gets_another_queue() -> None:
    backend = setup(Server("m"), slots=9)
    first = backend.admission.queue("m", "text", "tier", TierLimits(slots=1))
    assert backend.admission.queue("m", "text", "tier", TierLimits(slots=1)) is first
    assert backend.admission.queue("m", "text", "tier", TierLimits(slots=2)) is not first


# Requests that had a slot before


def test_request_that_enters_again_comes_first_and_is_not_refused_by_a_full_queue() -> None:
    backend = setup(Server("m"), max_queue=1)
    interrupted, waiting = backend.arrive(), backend.arrive()
    with pytest.raises(QueueFull):
        backend.arrive()
    backend.leave(interrupted)
    assert waiting.placement is not None
    other = backend.arrive()
    backend.admission.enter_again(interrupted, is_first=True)
    assert interrupted.is_queued
    backend.leave(waiting)
    assert (interrupted.placement is not None, other.is_queued) == (True, True)


def test_request_that_enters_again_last_comes_after_the_others() -> None:
    backend = setup(Server("m"), max_queue=1)
    interrupted, waiting = backend.arrive(), backend.arrive()
    backend.leave(interrupted)
    other = backend.arrive()
    backend.admission.enter_again(interrupted, is_first=False)
    backend.leave(waiting)
    assert (interrupted.is_queued, other.placement is not None) == (True, True)


def test_request_that_enters_again_takes_a_free_slot_at_once() -> None:
    backend = setup(Server("m"))
    request = backend.arrive()
    backend.leave(request)
    backend.admission.enter_again(request, is_first=True)
    assert request.placement is not None


def test_servers_that_are_full_are_not_asked_whether_they_are_up() -> None:
    """Each end of a request asked all servers for each queue: 64 servers and 50 models took 1.4 ms."""

    class Asked(Server):
        asked = 0

        def serves(self, model: str) -> bool:
            Asked.asked += 1
            return super().serves(model)

        def is_up(self) -> bool:
            Asked.asked += 1
            return super().is_up()

    models = [f"model {number}" for number in range(10)]
    backend = setup(*(Asked(*models) for _ in range(20)), slots=1)
    running = [backend.arrive(models[0]) for _ in range(20)]
    waiting = [backend.arrive(model) for model in models]
    Asked.asked = 0
    backend.leave(running[0])
    assert [request.placement is not None for request in waiting] == [True] + 9 * [False]
    assert Asked.asked == 2 * len(models)  # each queue about the server with a free slot
