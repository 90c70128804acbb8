"""Who may go upstream now, who waits, who is refused. The state machine is driven as plain calls, on a clock that the test sets."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.admission.concurrency_limits import TRY_AGAIN_SECONDS
from gateway.admission.fair_queue import Claim
from gateway.admission.queues import BATCH_SHARE, AdmissionLimits, LaneLimits, LaneName, TierLimits
from gateway.admission.ticket import Ticket
from gateway.errors import ModelNotFound, QueueFull, QueueTimeout
from tests.fakes.waiting import FOREVER, Server, Setup, limits, setup

ANYONE = Claim()


@asynccontextmanager
async def in_line(ticket: Ticket) -> AsyncIterator[asyncio.Task[None]]:
    """A task that waits for `ticket`'s slot."""
    with ticket:
        assert ticket.placement is None
        task = asyncio.create_task(ticket.wait())
        await asyncio.sleep(0)
        assert not task.done()
        yield task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def served(line: Setup, seconds: float = 1.0, model: str = "m", lane: LaneName = "text") -> None:
    """One request that took so long."""
    request = line.arrive(model, lane)
    line.clock.now += seconds
    request.is_served = True
    line.leave(request)


# Slots and the line


def test_request_that_finds_a_slot_does_not_wait() -> None:
    line = setup(Server("m"))
    request = line.arrive()
    assert request.placement is not None
    assert (line.running("text"), line.waiting("text")) == (1, 0)
    line.leave(request)
    assert (line.running("text"), line.servers[0].running) == (0, 0)


def test_slot_that_comes_free_goes_to_who_came_first() -> None:
    line = setup(Server("m"))
    running, first, second = (line.arrive() for _ in range(3))
    line.leave(running)
    assert (first.placement is not None, second.placement is not None) == (True, False)
    line.leave(first)
    line.leave(second)
    assert line.running("text") == line.waiting("text") == 0


def test_who_left_the_line_is_never_let_in() -> None:
    line = setup(Server("m"), max_queue=1)
    running, waiting = line.arrive(), line.arrive()
    with pytest.raises(QueueFull):
        line.arrive()
    line.leave(waiting)
    line.leave(waiting)
    assert line.waiting("text") == 0
    line.leave(running)
    assert waiting.admissions == 0


def test_full_queue_refuses_one_more_and_only_in_its_lane() -> None:
    line = setup(Server("m"), max_queue=1)
    line.arrive(), line.arrive()
    with pytest.raises(QueueFull) as caught:
        line.arrive()
    assert caught.value.retry_after
    assert line.arrive(lane="vision").is_queued


def test_model_that_no_server_has_is_refused_at_once() -> None:
    with pytest.raises(ModelNotFound) as caught:
        setup(Server("m")).arrive("other")
    assert caught.value.param == "model"


# What needs what


def test_images_go_one_at_a_time_while_texts_pass() -> None:
    line = setup(Server("m"), slots=3, vision=1)
    first, second = line.arrive(lane="vision"), line.arrive(lane="vision")
    line.arrive(), line.arrive()
    assert (line.running("vision"), line.running("text"), line.waiting("vision")) == (1, 2, 1)
    line.leave(first)
    assert second.placement is not None


def test_text_does_not_wait_behind_an_image_that_cannot_go() -> None:
    line = setup(Server("m"), slots=2, vision=1)
    line.arrive(lane="vision")
    running, image, text = line.arrive(), line.arrive(lane="vision"), line.arrive()
    line.leave(running)
    assert (image.placement, text.placement is not None) == (None, True)


@pytest.mark.parametrize("lanes", [("text", "vision"), ("vision", "text")])
def test_lanes_are_served_in_the_order_of_arrival(lanes: tuple[LaneName, LaneName]) -> None:
    line = setup(Server("m"))
    running, first, second = line.arrive(), line.arrive(lane=lanes[0]), line.arrive(lane=lanes[1])
    line.leave(running)
    assert (first.placement is not None, second.placement) == (True, None)


def test_crowd_in_one_lane_does_not_hold_back_another() -> None:
    line = setup(Server("m"), slots=1, vision=1)
    running = line.arrive()
    crowd = [line.arrive() for _ in range(9)]
    image = line.arrive(lane="vision")
    line.leave(running)
    line.leave(crowd[0])
    assert image.placement is not None


def test_images_count_against_all_slots_of_a_server() -> None:
    line = setup(Server("m"), slots=1, vision=1)
    line.arrive(lane="vision")
    assert line.arrive().is_queued


def test_model_has_slots_of_its_own() -> None:
    line = setup(Server("a", "b"), slots=3, model=1)
    line.arrive("a")
    assert line.arrive("a").is_queued
    assert line.arrive("b").placement is not None


def test_names_of_one_model_share_its_slots() -> None:
    line = setup(Server("a", "a:latest"), slots=3, model=1)
    line.arrive("a")
    assert line.arrive("a:latest").is_queued


def test_own_limits_of_a_tier_count_its_own_requests() -> None:
    line = setup(Server("m"), slots=4, model=2, max_queue=5)
    own = TierLimits(model_slots=1, max_queue=1, queue_timeout=7.0)
    line.arrive(), line.arrive()
    assert line.arrive().is_queued
    assert line.arrive(tier="pro", own=own).placement is not None
    assert line.arrive(tier="pro", own=own).is_queued
    with pytest.raises(QueueFull):
        line.arrive(tier="pro", own=own)
    assert line.arrive().is_queued
    assert line.admission.queue("m", "text", "pro", own).queue_timeout == 7.0


def test_own_slots_of_a_tier_do_not_widen_the_server() -> None:
    line = setup(Server("m"), slots=2, model=2)
    own = TierLimits(slots=1, model_slots=8)
    line.arrive(tier="pro", own=own)
    assert line.arrive(tier="pro", own=own).is_queued
    line.arrive()
    assert line.arrive().is_queued


def test_tiers_without_limits_of_their_own_share_a_queue() -> None:
    line = setup(Server("m"))
    assert line.admission.queue("m", "text", "one") is line.admission.queue("m", "text", "two")


def test_lane_of_any_name_can_be_given() -> None:
    line = setup(Server("m"), slots=2, more_lanes={"embedding": 1})
    line.arrive(lane="embedding")
    assert line.arrive(lane="embedding").is_queued
    assert line.arrive().placement is not None
    assert line.admission.lanes == ("text", "vision", "embedding")


# Turns


def test_greedy_key_does_not_hold_back_another() -> None:
    line = setup(Server("m"), max_queue=50)
    running = line.arrive(claim=Claim("greedy"))
    for _ in range(20):
        line.arrive(claim=Claim("greedy"))
    small = line.arrive(claim=Claim("small"))
    line.leave(running)
    line.leave(line.one_running())
    assert small.placement is not None


def test_turns_of_a_key_hold_over_its_models() -> None:
    """A key that waits for two models has one turn, not two."""
    line = setup(Server("a", "b"), max_queue=50)
    running = line.arrive("a")
    for _ in range(3):
        line.arrive("a", claim=Claim("greedy")), line.arrive("b", claim=Claim("greedy"))
        line.arrive("a", claim=Claim("small"))
    line.leave(running)
    keys = []
    for _ in range(6):
        keys.append(line.one_running().claim.key)
        line.leave(line.one_running())
    assert keys == ["greedy", "small"] * 3


def test_interactive_comes_before_batch() -> None:
    line = setup(Server("m"))
    running, batch, chat = line.arrive(), line.arrive(claim=Claim(is_batch=True)), line.arrive()
    line.leave(running)
    assert (chat.placement is not None, batch.placement) == (True, None)


@pytest.mark.parametrize("model", ["m", "other"])
def test_batch_gets_one_slot_in_ten(model: str) -> None:
    line = setup(Server("m", "other"), max_queue=100)
    line.arrive()
    for _ in range(40):
        line.arrive()
    for _ in range(4):
        line.arrive(model, claim=Claim(is_batch=True))
    order = []
    for _ in range(40):
        line.leave(line.one_running())
        order.append(line.one_running().claim.is_batch)
    assert order == ([False] * (BATCH_SHARE - 1) + [True]) * 4


# Servers


def test_least_busy_server_is_taken_first() -> None:
    one, two = Server("m"), Server("m")
    line = setup(one, two, slots=2)
    assert {line.arrive().placement.server, line.arrive().placement.server} == {one, two}
    line.arrive(), line.arrive()
    assert (one.running, two.running) == (2, 2)


def test_request_goes_where_its_model_is() -> None:
    one, two = Server("a"), Server("b")
    line = setup(one, two, slots=2)
    assert line.arrive("b").placement.server is line.arrive("b").placement.server is two


def test_request_does_not_wait_behind_one_for_a_busy_server() -> None:
    line = setup(Server("a"), Server("b"))
    line.arrive("a"), line.arrive("a")
    assert line.arrive("b").placement is not None


def test_server_that_is_down_is_left_out_while_another_has_the_model() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    line = setup(down, up, slots=2)
    assert line.arrive().placement.server is line.arrive().placement.server is up
    assert line.arrive().is_queued


def test_request_waits_for_a_server_that_is_down() -> None:
    server = Server("m")
    server.up = False
    line = setup(server)
    waiting = line.arrive()
    assert waiting.is_queued
    server.up = True
    line.admission.refresh()
    assert waiting.placement is not None


def test_lane_apart_takes_no_slots_of_the_others() -> None:
    server = Server("m")
    apart = {"text": LaneLimits(None, 10, FOREVER), "aside": LaneLimits(2, 10, FOREVER, is_apart=True)}
    line = Setup((server,), AdmissionLimits(1, 1, apart))
    crowd = [line.arrive() for _ in range(2)]
    aside = [line.arrive(lane="aside") for _ in range(3)]
    assert [request.placement is not None for request in (*crowd, *aside)] == [True, False, True, True, False]
    assert (server.running, server.load) == (1, 3)
    line.leave(crowd[0])
    assert aside[2].is_queued
    line.admission.change(AdmissionLimits(1, 1, {**apart, "aside": LaneLimits(3, 10, FOREVER, is_apart=True)}))
    assert aside[2].placement is not None
    for request in (crowd[1], *aside):
        line.leave(request)
    assert server.load == 0


async def test_wait_can_be_ended_with_a_reason() -> None:
    line = setup(Server("m"))
    with ticket(line) as running, ticket(line) as waiting:
        task = asyncio.create_task(waiting.wait())
        await asyncio.sleep(0)
        for each in (running, waiting):
            each.refuse(QueueTimeout("elsewhere"))
        with pytest.raises(QueueTimeout, match="elsewhere"):
            await task
        assert running.placement is not None
        assert (running.has_waited, waiting.has_waited) == (False, True)
        assert line.waiting("text") == 0


def test_server_that_comes_up_takes_who_waits() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    line = setup(down, up)
    line.arrive()
    waiting = line.arrive()
    down.up = True
    line.admission.refresh()
    assert waiting.placement is not None
    assert waiting.placement.server is down


def test_line_is_taken_over_by_another_backend_in_its_order_and_however_full_that_is() -> None:
    left, there = setup(Server("m")), setup(Server("n"), slots=2, max_queue=1)
    left.arrive()
    batch = left.arrive(claim=Claim(is_batch=True))
    waiting = [left.arrive() for _ in range(3)]
    there.arrive("n")
    there.take_over([batch, *waiting], "n")
    assert (left.waiting("text"), left.running("text")) == (0, 1)
    assert [request.placement is not None for request in (batch, *waiting)] == [False, True, False, False]
    assert (there.waiting("text"), there.running("text")) == (3, 2)
    with pytest.raises(QueueFull):
        there.arrive("n")
    for request in waiting:
        there.leave(request)
    assert batch.placement is not None
    assert there.arrive("n").is_queued


def test_taken_over_request_stands_behind_those_who_wait_there() -> None:
    left, there = setup(Server("m")), setup(Server("m"))
    left.arrive()
    moved = left.arrive()
    running, first = there.arrive(), there.arrive()
    there.take_over([moved])
    there.leave(running)
    assert (first.placement is not None, moved.is_queued) == (True, True)
    there.leave(first)
    assert (moved.placement is not None, moved.admissions, moved.moves) == (True, 1, 1)
    there.leave(moved)
    assert left.running("text") == 1


def test_request_moves_to_another_server_with_its_slot() -> None:
    one, two = Server("m"), Server("m")
    line = setup(one, two)
    request = line.arrive()
    assert line.admission.reassign(request)
    assert (one.running, two.running) == (0, 1)
    line.arrive(), line.arrive()
    assert not line.admission.reassign(request)
    assert request.placement is not None
    assert request.placement.server is two


# Limits that change


def test_raised_limit_lets_in_who_waits() -> None:
    line = setup(Server("m"), slots=1, max_queue=1)
    line.arrive()
    waiting = line.arrive()
    line.admission.change(limits(slots=2, max_queue=3))
    assert waiting.placement is not None
    assert [line.arrive().is_queued for _ in range(3)] == [True] * 3


def test_lowered_limit_lets_nobody_in_until_it_is_kept() -> None:
    line = setup(Server("m"), slots=3, vision=3)
    running = [line.arrive(lane="vision") for _ in range(3)]
    waiting = line.arrive(lane="vision")
    line.admission.change(limits(slots=3, vision=1))
    line.leave(running[0])
    line.leave(running[1])
    assert waiting.is_queued
    line.leave(running[2])
    assert waiting.placement is not None


def test_learned_limit_can_be_set_and_let_go_again() -> None:
    line = setup(Server("m"), slots=4, model=None)
    line.arrive()
    line.admission.change(limits(slots=4, model=2))
    assert line.arrive().placement is not None
    assert line.arrive().is_queued
    assert line.servers[0].models["m"].limit == 2
    line.admission.change(limits(slots=4, model=None))
    assert line.running("text") == 3  # one on trial


# Learning


def test_one_more_is_let_in_while_someone_waits_and_the_limit_follows() -> None:
    line = setup(Server("m"), slots=4, model=None)
    told = []
    line.admission._on_learned = lambda: told.append(line.servers[0].models["m"].limit)
    first, trial, waiting = line.arrive(), line.arrive(), line.arrive()
    assert trial.placement is not None
    assert waiting.is_queued
    line.admission.first_token(first)
    line.admission.first_token(trial)
    line.pass_time(1)
    assert (told, waiting.placement is not None) == ([2], True)  # the next trial
    line.admission.first_token(waiting)
    line.pass_time(1)
    assert told == [2, 3]


def test_trial_that_fails_is_made_again_after_a_minute() -> None:
    line = setup(Server("m"), slots=4, model=None)
    first, trial, waiting, more = (line.arrive() for _ in range(4))
    line.admission.first_token(first)
    line.leave(first)
    line.admission.first_token(trial)
    assert (line.running("text"), line.servers[0].models["m"].limit) == (1, 1)
    line.leave(trial)
    assert waiting.placement is not None
    assert more.is_queued
    line.pass_time(TRY_AGAIN_SECONDS)  # nobody comes or goes: the alarm alone
    assert more.placement is not None


def test_nothing_is_tried_beyond_the_server_or_the_lane() -> None:
    line = setup(Server("m"), slots=1, model=None)
    line.arrive()
    assert line.arrive().is_queued
    line = setup(Server("m"), slots=4, vision=1, model=None)
    line.arrive(lane="vision")
    assert line.arrive(lane="vision").is_queued


def test_learning_begins_with_what_was_learned_before_else_with_the_guess() -> None:
    server = Server("m", "n")
    server.guesses = {"m": 3}
    line = setup(server, slots=9, model=None, first_guess=2)
    assert [line.arrive("m").placement is not None for _ in range(5)] == [True] * 4 + [False]
    assert [line.arrive("n").placement is not None for _ in range(4)] == [True] * 3 + [False]


# Time


def test_without_samples_five_seconds_are_told() -> None:
    line = setup(Server("m"))
    assert line.admission.retry_after(line.admission.queue("m", "text")) == 5


@pytest.mark.parametrize(
    ("seconds", "slots", "waiting", "least", "most"),
    [(10.0, 2, 0, 4, 6), (10.0, 2, 3, 16, 24), (0.001, 8, 0, 1, 1), (500.0, 1, 5, 60, 60)],
)
def test_retry_after_follows_the_line_and_the_service_time(
    seconds: float, slots: int, waiting: int, least: int, most: int
) -> None:
    """(waiting + 1) × median service time ÷ slots × 0.8 to 1.2, within 1 to 60."""
    line = setup(Server("m"), slots=slots)
    for duration in (seconds, seconds, seconds * 50):  # a median, not a mean
        served(line, duration)
    left = line.arrive()  # one that left early tells nothing of how long service takes
    line.clock.now += seconds / 1000
    line.leave(left)
    for _ in range(slots + waiting):
        line.arrive()
    assert line.waiting("text") == waiting
    queue = line.admission.queue("m", "text")
    assert all(least <= line.admission.retry_after(queue) <= most for _ in range(50))


def test_deadline_that_the_line_cannot_meet_is_refused_at_once() -> None:
    line = setup(Server("m"), max_queue=50)
    served(line, 10.0)
    line.arrive()
    for _ in range(3):
        line.arrive()
    with pytest.raises(QueueTimeout, match="within 39 seconds") as caught:
        line.arrive(claim=Claim(timeout=39))
    assert caught.value.retry_after
    assert line.arrive(claim=Claim(timeout=41)).is_queued
    with pytest.raises(QueueTimeout):
        line.arrive(claim=Claim(is_batch=True, timeout=49))
    assert line.arrive(claim=Claim("another key", timeout=41)).is_queued  # its turn comes sooner


def test_deadline_is_no_reason_against_one_who_finds_a_slot() -> None:
    """Else a measure that is out of date would refuse everybody for ever."""
    line = setup(Server("m"))
    served(line, 100.0)
    assert line.arrive(claim=Claim(timeout=1)).placement is not None


def test_those_who_wait_are_told_place_and_estimate() -> None:
    line = setup(Server("m"), slots=2, max_queue=50)
    running = line.arrive(), line.arrive()
    waiting = [line.arrive(claim=Claim("a")) for _ in range(3)] + [line.arrive(claim=Claim("b"))]
    assert line.admission.wait_estimate(waiting[2])[:2] == (4, None)
    running[0].is_served = True
    line.clock.now += 30
    line.leave(running[0])
    assert [line.admission.wait_estimate(request)[:2] for request in (waiting[3], waiting[1], waiting[2])] == [
        (1, 15.0),
        (2, 30.0),
        (3, 45.0),
    ]


# Tickets


def ticket(line: Setup, claim: Claim = ANYONE) -> Ticket:
    return Ticket(line.admission, line.admission.queue("m", "text"), claim)


async def test_ticket_waits_for_its_slot_and_gives_it_back() -> None:
    line = setup(Server("m"))
    with ticket(line) as running:
        async with in_line(ticket(line)) as task:
            line.leave(running)
            await task
            assert line.running("text") == 1
    assert line.running("text") == line.waiting("text") == 0


async def test_slot_is_given_back_when_the_request_fails() -> None:
    line = setup(Server("m"))
    with pytest.raises(ValueError, match="it broke"), ticket(line):
        raise ValueError("it broke")
    assert line.running("text") == 0


async def test_client_that_leaves_the_queue_frees_its_place() -> None:
    line = setup(Server("m"), max_queue=1)
    with ticket(line):
        async with in_line(ticket(line)):
            assert line.waiting("text") == 1
        assert line.waiting("text") == 0


async def test_client_that_leaves_at_the_moment_of_its_admission_gives_the_slot_back() -> None:
    """Cancelled after the slot was assigned and before its task ran again."""
    line = setup(Server("m"))
    running = ticket(line).__enter__()
    async with in_line(ticket(line)) as task:
        line.admission.leave(running)
        assert line.running("text") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert line.running("text") == 0


@pytest.mark.parametrize(
    ("timeout", "claim", "told"),
    [(0.01, ANYONE, r"within 0\.01 seconds"), (FOREVER, Claim(timeout=0.01), "in the time that the client gave")],
    ids=["the line's", "the client's"],
)
async def test_waiting_ends_after_the_queue_timeout_or_the_clients_own(timeout: float, claim: Claim, told: str) -> None:
    line = setup(Server("m"), timeout=timeout)
    with ticket(line), ticket(line, claim) as waiting:
        with pytest.raises(QueueTimeout, match=told) as caught:
            await waiting.wait()
        assert caught.value.retry_after
        assert line.waiting("text") == 0


def test_representations_show_the_state() -> None:
    line = setup(Server("m"))
    first, second = ticket(line).__enter__(), ticket(line).__enter__()
    assert repr(line.admission) == "<Admission in flight+waiting: text 1+1, vision 0+0; slots [<ConcurrencyLimit 1/1>]>"
    assert repr(first) == "<Ticket in flight <Queue m text 1 in flight, 1 waiting>>"
    assert "in line" in repr(second)
    line.admission.leave(first)
    assert "gone" in repr(first)


# Other settings


def test_line_that_nobody_needs_any_more_is_forgotten_once_it_is_empty() -> None:
    line = setup(Server("m", "n"), slots=1)
    running, waiting = line.arrive("m"), line.arrive("n")
    kept = line.admission.queue("m", "text")
    line.admission.forget({kept})
    assert line.waiting("text") == 1
    line.leave(running)
    assert waiting.placement is not None
    line.leave(waiting)
    line.admission.forget({kept})
    assert list(line.admission._queues.values()) == [kept]
    assert kept.lane.queues == [kept]
    assert list(line.servers[0].models) == ["m"]


def test_what_was_learned_of_a_forgotten_model_is_its_next_guess() -> None:
    line = setup(Server("m"), slots=9, model=None)
    line.admission.queue("m", "text")
    line.servers[0].models["m"].limit = 3
    line.admission.forget(set())
    assert not line.servers[0].models
    line.admission.queue("m", "text")
    assert line.servers[0].models["m"].limit == 3


def test_tier_with_other_limits_of_its_own_gets_another_queue() -> None:
    line = setup(Server("m"), slots=9)
    first = line.admission.queue("m", "text", "tier", TierLimits(slots=1))
    assert line.admission.queue("m", "text", "tier", TierLimits(slots=1)) is first
    assert line.admission.queue("m", "text", "tier", TierLimits(slots=2)) is not first
