"""Concurrency limit of the gateway, as counted by the engine."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.e2e.engines import Engine
from tests.e2e.gateway import Gateway

AT_ONCE, LIMIT = 64, 16


@pytest.fixture
def large_engine(pair: tuple[Engine, Engine]) -> Engine:
    """An engine that would run all requests at once."""
    engine = pair[1]
    assert engine.slots >= AT_ONCE
    return engine


@pytest.fixture
def limited(large_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = large_engine.settings | {"GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(LIMIT)}
    with Gateway(tmp_path_factory.mktemp("limited"), settings) as gateway:
        yield gateway


async def test_engine_never_gets_more_than_the_limit_and_all_requests_are_served(
    limited: Gateway, large_engine: Engine
) -> None:
    """The answers are long enough to read the load of a busy, slow engine many times."""
    large_engine.wait_until_idle()
    seen = []
    async with limited.async_openai() as client:
        request = large_engine.long_arguments("standard", stream=False) | {"max_tokens": 150}
        requests = asyncio.gather(*(client.chat.completions.create(**request) for _ in range(AT_ONCE)))
        while not requests.done():
            seen.append(await asyncio.to_thread(large_engine.current_load))
        answers = await requests
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert max(load.running + load.waiting for load in seen) == LIMIT
