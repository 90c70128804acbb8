"""What the gateway lets through at once, as the engine itself counts it."""

import asyncio
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI

from tests.e2e.engines import Engine
from tests.e2e.gateway import KEY, Gateway

AT_ONCE, LIMIT = 64, 16


@pytest.fixture
def wide(pair: tuple[Engine, Engine]) -> Engine:
    """An engine that would take them all."""
    engine = pair[1]
    assert engine.lanes >= AT_ONCE
    return engine


@pytest.fixture
def limited(wide: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    settings = wide.settings | {"GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": str(LIMIT)}
    with Gateway(tmp_path_factory.mktemp("limited"), settings) as gateway:
        yield gateway


async def test_engine_never_has_more_than_the_limit_and_all_are_served(limited: Gateway, wide: Engine) -> None:
    """The answers are long enough for the engine to be asked many times meanwhile: it is busy, and slow to tell."""
    wide.wait_until_idle()
    seen = []
    async with AsyncOpenAI(base_url=f"{limited.url}/v1", api_key=KEY, max_retries=0, timeout=240.0) as client:
        request = wide.long_request("standard", stream=False) | {"max_tokens": 150}
        crowd = asyncio.gather(*(client.chat.completions.create(**request) for _ in range(AT_ONCE)))
        while not crowd.done():
            seen.append(await asyncio.to_thread(wide.now))
        answers = await crowd
    assert {answer.choices[0].finish_reason for answer in answers} == {"length"}
    assert max(load.running + load.waiting for load in seen) == LIMIT
