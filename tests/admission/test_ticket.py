"""Tickets: waiting for a slot, and giving it back however a request ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.admission.fair_queue import Claim
from gateway.admission.ticket import Ticket
from gateway.errors import QueueTimeout
from tests.fakes.admission import FOREVER, Server, Setup, setup

ANYONE = Claim()


def ticket(backend: Setup, claim: Claim = ANYONE) -> Ticket:
    return Ticket(backend.admission, backend.admission.queue("m", "text"), claim)


@asynccontextmanager
async def waiting_task(ticket: Ticket) -> AsyncIterator[asyncio.Task[None]]:
    """Enter `ticket`, which has to be queued, and yield the task that waits for its slot."""
    with ticket:
        assert ticket.placement is None
        task = asyncio.create_task(ticket.wait())
        await asyncio.sleep(0)
        assert not task.done()
        yield task
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_ticket_waits_for_its_slot_and_releases_it() -> None:
    backend = setup(Server("m"))
    with ticket(backend) as running:
        async with waiting_task(ticket(backend)) as task:
            backend.leave(running)
            await task
            assert backend.running("text") == 1
    assert backend.running("text") == backend.waiting("text") == 0


async def test_slot_is_released_when_the_request_fails() -> None:
    backend = setup(Server("m"))
    with pytest.raises(ValueError, match="it broke"), ticket(backend):
        raise ValueError("it broke")
    assert backend.running("text") == 0


async def test_client_that_leaves_the_queue_frees_its_place() -> None:
    backend = setup(Server("m"), max_queue=1)
    with ticket(backend):
        async with waiting_task(ticket(backend)):
            assert backend.waiting("text") == 1
        assert backend.waiting("text") == 0


async def test_client_that_leaves_at_the_moment_of_its_admission_releases_the_slot() -> None:
    """The task is cancelled after the slot was assigned and before the task runs again."""
    backend = setup(Server("m"))
    running = ticket(backend).__enter__()
    async with waiting_task(ticket(backend)) as task:
        backend.admission.leave(running)
        assert backend.running("text") == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert backend.running("text") == 0


@pytest.mark.parametrize(
    ("timeout", "claim", "expected"),
    [
        (0.01, ANYONE, r"within 0\.01 seconds"),
        (FOREVER, Claim(timeout=0.01), "within the client's deadline"),
        (0.01, Claim(timeout=FOREVER), r"within 0\.01 seconds"),
    ],
    ids=["queue timeout", "client deadline", "queue timeout before the client deadline"],
)
async def test_wait_ends_after_the_queue_timeout_or_at_the_client_deadline(
    timeout: float, claim: Claim, expected: str
) -> None:
    backend = setup(Server("m"), timeout=timeout)
    with ticket(backend), ticket(backend, claim) as waiting:
        async with asyncio.timeout(20):
            with pytest.raises(QueueTimeout, match=expected) as caught:
                await waiting.wait()
        assert caught.value.retry_after
        assert backend.waiting("text") == 0


def test_representations_show_the_state() -> None:
    backend = setup(Server("m"))
    first, second = ticket(backend).__enter__(), ticket(backend).__enter__()
    assert (
        repr(backend.admission) == "<Admission in flight+waiting: text 1+1, vision 0+0; slots [<ConcurrencyLimit 1/1>]>"
    )
    assert repr(first) == "<Ticket in flight <Queue m text 1 in flight, 1 waiting>>"
    assert "queued" in repr(second)
    backend.admission.leave(first)
    assert "gone" in repr(first)


async def test_wait_can_be_ended_with_an_error() -> None:
    backend = setup(Server("m"))
    with ticket(backend) as running, ticket(backend) as waiting:
        task = asyncio.create_task(waiting.wait())
        await asyncio.sleep(0)
        for entered in (running, waiting):
            entered.refuse(QueueTimeout("elsewhere"))
        with pytest.raises(QueueTimeout, match="elsewhere"):
            await task
        assert running.placement is not None
        assert (running.has_waited, waiting.has_waited) == (False, True)
        assert backend.waiting("text") == 0
