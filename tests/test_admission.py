"""Who may go upstream now, who waits, who is refused."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.admission import Admission, Lane, LaneLimits, Station, Ticket
from gateway.errors import GatewayError, ModelNotFound, QueueFull, QueueTimeout

FOREVER = 1e6


class Server(Station):
    """A server whose models and state the test sets."""

    def __init__(self, *models: str) -> None:
        super().__init__()
        self.models = set(models)
        self.up = True

    def serves(self, model: str) -> bool:
        return model in self.models

    def is_up(self) -> bool:
        return self.up


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def admission(
    *servers: Server, slots: int = 1, vision: int = 1, max_queue: int = 10, timeout: float = FOREVER, clock: Callable[[], float] = lambda: 0.0
) -> Admission:
    return Admission(servers, LaneLimits(slots, max_queue, timeout), LaneLimits(vision, max_queue, timeout), clock)


@asynccontextmanager
async def in_line(ticket: Ticket) -> AsyncIterator[asyncio.Task[Ticket]]:
    """A task that waits for `ticket`'s slot."""
    task = asyncio.create_task(ticket.__aenter__())
    await asyncio.sleep(0)
    assert not task.done()
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


# Slots and the line


async def test_request_that_finds_a_slot_does_not_wait() -> None:
    server = Server("m")
    line = admission(server)
    async with line.ticket("m", "text") as ticket:
        assert ticket.station is server
        assert (line.running("text"), line.waiting("text")) == (1, 0)
    assert (line.running("text"), server.running) == (0, 0)


async def test_slot_that_comes_free_goes_to_who_came_first() -> None:
    line = admission(Server("m"))
    running = await line.ticket("m", "text").__aenter__()
    first, second = line.ticket("m", "text"), line.ticket("m", "text")
    async with in_line(first) as first_task, in_line(second) as second_task:
        line.leave(running)
        await first_task
        assert not second_task.done()
        line.leave(first)
        await second_task
        line.leave(second)
    assert (line.running("text"), line.waiting("text")) == (0, 0)


async def test_client_that_leaves_the_queue_frees_its_place() -> None:
    line = admission(Server("m"), max_queue=1)
    async with line.ticket("m", "text"):
        async with in_line(line.ticket("m", "text")):
            with pytest.raises(QueueFull):
                await line.ticket("m", "text").__aenter__()
        assert line.waiting("text") == 0
        async with in_line(line.ticket("m", "text")):
            assert line.waiting("text") == 1


async def test_client_that_leaves_at_the_moment_of_its_admission_gives_the_slot_back() -> None:
    """Cancelled after the slot was assigned and before its task ran again."""
    line = admission(Server("m"))
    running = await line.ticket("m", "text").__aenter__()
    async with in_line(line.ticket("m", "text")) as task:
        line.leave(running)
        assert line.running("text") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert line.running("text") == 0


async def test_waiting_ends_after_the_queue_timeout() -> None:
    line = admission(Server("m"), timeout=0.01)
    async with line.ticket("m", "text"):
        with pytest.raises(QueueTimeout, match=r"0\.01 seconds") as caught:
            await line.ticket("m", "text").__aenter__()
    assert caught.value.retry_after
    assert line.waiting("text") == 0


async def test_full_queue_refuses_one_more_and_only_in_its_lane() -> None:
    line = admission(Server("m"), max_queue=1)
    async with line.ticket("m", "text"), in_line(line.ticket("m", "text")):
        with pytest.raises(QueueFull) as caught:
            await line.ticket("m", "text").__aenter__()
        assert caught.value.retry_after
        async with in_line(line.ticket("m", "vision")):
            assert line.waiting("vision") == 1


async def test_model_that_no_server_has_is_refused_at_once() -> None:
    with pytest.raises(ModelNotFound) as caught:
        await admission(Server("m")).ticket("other", "text").__aenter__()
    assert caught.value.param == "model"


async def test_slot_is_given_back_when_the_request_fails() -> None:
    line = admission(Server("m"))
    with pytest.raises(ValueError, match="it broke"):
        async with line.ticket("m", "text"):
            raise ValueError("it broke")
    assert line.running("text") == 0


# Images


async def test_images_go_one_at_a_time_while_texts_pass() -> None:
    line = admission(Server("m"), slots=3, vision=1)
    first, second = line.ticket("m", "vision"), line.ticket("m", "vision")
    await first.__aenter__()
    async with in_line(second) as waiting:
        async with line.ticket("m", "text"), line.ticket("m", "text"):
            assert (line.running("vision"), line.running("text"), line.waiting("vision")) == (1, 2, 1)
        line.leave(first)
        await waiting
        assert line.running("vision") == 1
        line.leave(second)


async def test_text_does_not_wait_behind_an_image_that_cannot_go() -> None:
    line = admission(Server("m"), slots=2, vision=1)
    async with line.ticket("m", "vision"):
        running = await line.ticket("m", "text").__aenter__()
        image, text = line.ticket("m", "vision"), line.ticket("m", "text")
        async with in_line(image), in_line(text) as text_task:
            line.leave(running)
            await text_task
            assert line.waiting("vision") == 1
            line.leave(text)


@pytest.mark.parametrize("lanes", [("text", "vision"), ("vision", "text")])
async def test_lanes_are_served_in_the_order_of_arrival(lanes: tuple[Lane, Lane]) -> None:
    line = admission(Server("m"))
    running = await line.ticket("m", "text").__aenter__()
    first, second = (line.ticket("m", lane) for lane in lanes)
    async with in_line(first) as first_task, in_line(second) as second_task:
        line.leave(running)
        await first_task
        assert not second_task.done()
        line.leave(first)
        line.leave(await second_task)


async def test_images_count_against_all_slots_of_a_server() -> None:
    line = admission(Server("m"), slots=1, vision=1)
    async with line.ticket("m", "vision"), in_line(line.ticket("m", "text")):
        assert line.running("text") == 0


# Servers


async def test_least_busy_server_is_taken_first() -> None:
    one, two = Server("m"), Server("m")
    line = admission(one, two, slots=2)
    async with line.ticket("m", "text") as first, line.ticket("m", "text") as second:
        assert {first.station, second.station} == {one, two}
        async with line.ticket("m", "text"), line.ticket("m", "text"):
            assert (one.running, two.running) == (2, 2)


async def test_request_goes_where_its_model_is() -> None:
    one, two = Server("a"), Server("b")
    line = admission(one, two, slots=2)
    async with line.ticket("b", "text") as first, line.ticket("b", "text") as second:
        assert first.station is second.station is two


async def test_request_does_not_wait_behind_one_for_a_busy_server() -> None:
    line = admission(Server("a"), Server("b"))
    async with line.ticket("a", "text"), in_line(line.ticket("a", "text")), line.ticket("b", "text") as other:
        assert other.station is not None


async def test_server_that_is_down_is_left_out_while_another_has_the_model() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    line = admission(down, up, slots=2)
    async with line.ticket("m", "text") as first, line.ticket("m", "text") as second, in_line(line.ticket("m", "text")):
        assert first.station is second.station is up


async def test_server_that_is_down_is_tried_where_it_is_the_only_one() -> None:
    """A probe may be wrong; refusing everything would be sure to fail."""
    server = Server("m")
    server.up = False
    async with admission(server).ticket("m", "text") as ticket:
        assert ticket.station is server


async def test_server_that_comes_up_takes_who_waits() -> None:
    down, up = Server("m"), Server("m")
    down.up = False
    line = admission(down, up)
    waiting = line.ticket("m", "text")
    async with line.ticket("m", "text"), in_line(waiting) as task:
        down.up = True
        line.refresh()
        await task
        assert waiting.station is down
        line.leave(waiting)


async def test_request_moves_to_another_server_with_its_slot() -> None:
    one, two = Server("m"), Server("m")
    line = admission(one, two)
    waiting = line.ticket("m", "text")
    async with line.ticket("m", "text") as ticket:
        assert ticket.station is one
        assert ticket.move()
        assert ticket.station is two
        assert (one.running, two.running) == (0, 1)
        async with line.ticket("m", "text"), in_line(waiting):
            assert not ticket.move()
            assert ticket.station is two


# When to come back


def test_without_samples_five_seconds_are_told() -> None:
    assert admission(Server("m")).retry_after("text") == 5


@pytest.mark.parametrize(
    ("seconds", "slots", "waiting", "least", "most"), [(10.0, 2, 0, 4, 6), (10.0, 2, 3, 16, 24), (0.001, 8, 0, 1, 1), (500.0, 1, 5, 60, 60)]
)
async def test_retry_after_follows_the_line_and_the_service_time(seconds: float, slots: int, waiting: int, least: int, most: int) -> None:
    """(waiting + 1) × median service time ÷ slots × 0.8 to 1.2, within 1 to 60."""
    clock = Clock()
    line = admission(Server("m"), slots=slots, clock=clock)
    for duration in (seconds, seconds, seconds * 50):  # a median, not a mean
        async with line.ticket("m", "text") as ticket:
            clock.now += duration
            ticket.is_served = True
    async with line.ticket("m", "text"):  # one that left early tells nothing of how long service takes
        clock.now += seconds / 1000
    running = [await line.ticket("m", "text").__aenter__() for _ in range(slots)]
    tasks = [asyncio.create_task(line.ticket("m", "text").__aenter__()) for _ in range(waiting)]
    await asyncio.sleep(0)
    assert line.waiting("text") == waiting
    assert all(least <= line.retry_after("text") <= most for _ in range(50))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for ticket in running:
        line.leave(ticket)


def test_representation_shows_the_state() -> None:
    assert repr(admission(Server("m"))) == "<Admission 0+0 in flight, 0+0 waiting>"


# All orders of events

MODELS = ("a", "b")
LANES: tuple[Lane, ...] = ("text", "vision")
SLOTS, VISION_SLOTS, MAX_QUEUE = 2, 1, 3


@dataclass(eq=False)
class Client:
    """One request of the machine. `endings` says how its block ended, once if all is well."""

    ticket: Ticket
    finished: asyncio.Future[None]
    task: asyncio.Task[None] | None = None
    endings: list[str] = field(default_factory=list)
    started: bool = False

    async def run(self, starts: list["Client"]) -> None:
        try:
            async with self.ticket:
                self.started = True
                starts.append(self)
                await self.finished
            self.endings.append("finished")
        except GatewayError as error:
            self.endings.append(str(error.code))
        except asyncio.CancelledError:
            self.endings.append("left")

    @property
    def kind(self) -> tuple[str, Lane]:
        return self.ticket.model, self.ticket.lane


class AdmissionMachine(RuleBasedStateMachine):
    """Clients arrive, leave, finish and move; servers come, go and change their models, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.servers = [Server("a"), Server("a", "b")]
        self.line = admission(*self.servers, slots=SLOTS, vision=VISION_SLOTS, max_queue=MAX_QUEUE)
        self.clients: list[Client] = []
        self.starts: list[Client] = []

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(4):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    def alive(self) -> list[Client]:
        return [client for client in self.clients if not client.endings]

    def waiting(self) -> list[Client]:
        return [client for client in self.alive() if not client.started]

    def flying(self) -> list[Client]:
        return [client for client in self.alive() if client.started]

    def could_run(self, client: Client) -> bool:
        fit = [server for server in self.servers if client.ticket.model in server.models]
        fit = [server for server in fit if server.up] or fit
        return any(server.running < SLOTS and (client.ticket.lane == "text" or server.running_vision < VISION_SLOTS) for server in fit)

    @rule(model=st.sampled_from(("a", "a", "b", "nowhere")), lane=st.sampled_from(LANES))
    def one_arrives(self, model: str, lane: Lane) -> None:
        self.arrive(model, lane)

    def arrive(self, model: str, lane: Lane) -> None:
        waited = sum(client.ticket.lane == lane for client in self.waiting())
        client = Client(self.line.ticket(model, lane), self.loop.create_future())
        fits, is_served = self.could_run(client), any(model in server.models for server in self.servers)
        self.clients.append(client)
        client.task = self.loop.create_task(client.run(self.starts))
        self.settle()
        if fits:
            assert client.started
        elif not is_served:
            assert client.endings == ["model_not_found"]
        elif waited >= MAX_QUEUE:
            assert client.endings == ["queue_full"]
        else:
            assert not client.endings

    @rule(model=st.sampled_from(MODELS), lanes=st.lists(st.sampled_from(LANES), min_size=3, max_size=6))
    def several_arrive(self, model: str, lanes: list[Lane]) -> None:
        for lane in lanes:
            self.arrive(model, lane)

    @precondition(lambda self: self.alive())
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.alive()))
        assert client.task is not None
        client.task.cancel()
        self.settle()
        assert client.endings == ["left"]

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.waiting()))
        client.ticket._expire()
        self.settle()
        assert client.endings == ["queue_timeout"]

    @precondition(lambda self: self.flying())
    @rule(data=st.data(), also_leaves=st.booleans())
    def finish(self, data: st.DataObject, also_leaves: bool) -> None:
        """Perhaps somebody who waits leaves in the same turn of the loop, admitted or not."""
        client = data.draw(st.sampled_from(self.flying()))
        client.finished.set_result(None)
        waiting = self.waiting()
        leaver = data.draw(st.sampled_from(waiting)) if also_leaves and waiting else None
        if leaver is not None and leaver.task is not None:
            self.loop.call_soon(leaver.task.cancel)
        self.settle()
        assert client.endings == ["finished"]
        assert leaver is None or leaver.endings == ["left"]

    @precondition(lambda self: self.flying())
    @rule(data=st.data())
    def move(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(self.flying()))
        before = client.ticket.station
        moved = client.ticket.move()
        assert (client.ticket.station is not before) == moved
        assert client.ticket.station is not None
        self.settle()

    @rule(number=st.integers(0, 1), up=st.booleans())
    def server_goes_up_or_down(self, number: int, up: bool) -> None:
        self.servers[number].up = up
        self.line.refresh()
        self.settle()

    @rule(number=st.integers(0, 1), models=st.sets(st.sampled_from(MODELS)))
    def server_changes_its_models(self, number: int, models: set[str]) -> None:
        self.servers[number].models = models
        self.line.refresh()
        self.settle()

    @invariant()
    def never_more_in_flight_than_slots(self) -> None:
        for server in self.servers:
            assert 0 <= server.running_vision <= VISION_SLOTS
            assert server.running_vision <= server.running <= SLOTS
            assert server.running == sum(client.ticket.station is server for client in self.flying())

    @invariant()
    def in_line_and_in_flight_are_all_that_live(self) -> None:
        for lane in LANES:
            assert self.line.waiting(lane) == sum(client.ticket.lane == lane for client in self.waiting()) <= MAX_QUEUE
            assert self.line.running(lane) == sum(client.ticket.lane == lane for client in self.flying())

    @invariant()
    def nobody_waits_while_he_could_run(self) -> None:
        """So a text never stands behind an image that cannot go, nor a model behind another one's busy server."""
        assert not any(self.could_run(client) for client in self.waiting())

    @invariant()
    def nobody_overtakes_his_like(self) -> None:
        for kind in {client.kind for client in self.starts}:
            arrivals = [client.ticket.arrival for client in self.starts if client.kind == kind]
            assert arrivals == sorted(arrivals)

    @invariant()
    def every_ticket_ends_once(self) -> None:
        assert all(len(client.endings) <= 1 for client in self.clients)

    def teardown(self) -> None:
        while self.alive():
            for client in self.alive():
                if client.started and not client.finished.done():
                    client.finished.set_result(None)
                elif client.task is not None and not client.started:
                    client.task.cancel()
            self.settle()
        assert all(server.running == server.running_vision == 0 for server in self.servers)
        assert all(len(client.endings) == 1 for client in self.clients)
        self.loop.close()


@pytest.fixture(autouse=True)
def _no_loop_left() -> Iterator[None]:
    yield
    asyncio.set_event_loop(None)


AdmissionMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
TestAdmission = AdmissionMachine.TestCase
