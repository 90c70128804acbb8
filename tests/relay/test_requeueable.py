"""What the roll-out may do with a queued request. `tests/rollout/test_migration.py` moves whole queues."""

from contextlib import AsyncExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from tests.fakes.running_gateway import Running, until
from tests.relay.serving import IMAGE, PATIENT, serving

pytestmark = pytest.mark.uvloop

TEXT = [{"role": "user", "content": "x" * 9000}]


async def queued(stack: AsyncExitStack, gateway: Running, messages: list[dict[str, Any]]) -> Any:
    """Send a request that has to wait for another one, and return its relay."""
    await stack.enter_async_context(gateway.sent({}))
    await until(lambda: gateway.running == 1)
    await stack.enter_async_context(gateway.sent({"messages": messages}))
    await until(lambda: gateway.waiting == 1)
    return next(relay for relay in gateway.live if relay.is_queued)


def place(*, context_length: int | None = None, lacks: str = "") -> Any:
    """Return a destination with a model of this kind."""
    backend = SimpleNamespace(context_length=lambda _: context_length, lacks=lambda _, capability: capability == lacks)
    return SimpleNamespace(route=SimpleNamespace(model="m"), backend=backend)


@pytest.mark.parametrize(
    ("messages", "destination", "can_be_served"),
    [
        (TEXT, place(), True),
        (TEXT, place(context_length=8192), True),
        (TEXT, place(context_length=512), False),
        (TEXT, place(lacks="vision"), True),
        (IMAGE, place(), True),
        (IMAGE, place(lacks="vision"), False),
    ],
)
async def test_request_is_not_moved_to_a_model_that_certainly_cannot_serve_it(
    messages: list[dict[str, Any]], destination: Any, can_be_served: bool
) -> None:
    async with serving("vllm", "silent", max_concurrency=1, **PATIENT) as (gateway, _), AsyncExitStack() as stack:
        relay = await queued(stack, gateway, messages)
        assert relay.as_requeueable() is relay
        assert relay.can_be_served_by(destination) is can_be_served
