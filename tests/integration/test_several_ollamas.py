"""Several Ollamas behind one backend: a server that has the model loaded first, then its slots.

Covers: gateway/admission/scheduler.py
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from gateway import config
from gateway.simulate import Model, Options
from gateway.simulate import Running as StandIn
from tests.fakes.running_gateway import TIMES, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

MODELS = [Model(name, size=4) for name in "abc"]
SLOW = {"stream": True, "max_tokens": 4000}


@asynccontextmanager
async def ollamas(
    count: int = 2, *, backend: Any = None, **options: Any
) -> AsyncIterator[tuple[Running, list[StandIn]]]:
    """Run a gateway in front of Ollamas with memory for one model each, and with nothing loaded."""
    async with AsyncExitStack() as stack:
        one = Options("ollama", tuple(MODELS), memory=4, **options)
        servers = [await stack.enter_async_context(stand_in(one)) for _ in range(count)]
        patient = {**TIMES, "first_token_timeout": 10, "total_timeout": 30, "queue_timeout": 10}
        urls = [server.base_url for server in servers]
        settings = config.build(
            {
                "llm_backend": "ollama",
                "backends": {"ollama": {"servers": urls, **patient, **(backend or {})}},
                "tiers": {model.name: {"models": {"ollama": model.name}} for model in MODELS},
                "state_file": "",
            }
        )
        yield await stack.enter_async_context(running(settings)), servers


def loaded(servers: list[StandIn]) -> list[list[str]]:
    return [[runner.model.name for runner in server.app.scheduler.runners()] for server in servers]


def loads(servers: list[StandIn]) -> int:
    """Count the requests without messages: the loads."""
    bodies = [
        request["body"] for server in servers for request in server.engine.requests if request["path"] == "/api/chat"
    ]
    return len([body for body in bodies if not body.get("messages")])


async def test_requests_stay_at_the_server_that_has_their_model_loaded() -> None:
    async with ollamas() as (gateway, servers):
        for _ in range(4):
            assert (await gateway.ask({"model": "a"})).status == 200
        assert sorted(loaded(servers)) == [[], ["a"]]
        assert loads(servers) == 1


async def test_models_that_do_not_fit_into_one_server_are_loaded_on_several() -> None:
    async with ollamas(3) as (gateway, servers):
        for model in ("a", "b", "c", "b", "a", "c"):
            assert (await gateway.ask({"model": model})).status == 200
        assert sorted(loaded(servers)) == [["a"], ["b"], ["c"]]
        assert loads(servers) == 3


async def test_model_is_loaded_on_a_second_server_when_the_first_one_has_no_slot_left() -> None:
    slow = {"tokens_per_second": 200.0, "answer_tokens": 4000}  # 20 s for one answer
    async with ollamas(backend={"max_concurrency": 1}, **slow) as (gateway, servers):
        async with gateway.sent({"model": "a", **SLOW}) as first:
            assert (await first.head())[0] == 200
            async with gateway.sent({"model": "a", **SLOW}) as second:
                assert (await second.head())[0] == 200
                assert loaded(servers) == [["a"], ["a"]]
                assert [server.engine.running for server in servers] == [1, 1]
                async with gateway.sent({"model": "a"}):
                    await until(lambda: gateway.waiting == 1)
        await until(gateway.is_idle)
        assert loads(servers) == 2
