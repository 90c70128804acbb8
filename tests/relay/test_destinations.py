"""What old settings needed goes when nobody needs it any more, and not before."""

import asyncio

import pytest

from gateway.relay import destinations
from gateway.relay.destinations import GenerationCleanup
from tests.fakes.running_gateway import until


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations, "CHECK_SECONDS", 0.001)


async def test_clean_up_waits_for_the_last_request_of_its_generation() -> None:
    oldest, done = [0], list[str]()
    here = GenerationCleanup(lambda: oldest[0])
    here.add(0, lambda: done.append("first"))
    here.add(1, lambda: done.append("second"))
    await asyncio.sleep(0.02)
    assert done == []
    oldest[0] = 1
    await until(lambda: done == ["first"])
    here.add(2, lambda: done.append("third"))
    oldest[0] = 3
    await until(lambda: done == ["first", "second", "third"])
    await here.close()


async def test_nothing_runs_while_nothing_is_to_go() -> None:
    before = asyncio.all_tasks()
    here = GenerationCleanup(lambda: 1)
    here.add(0, lambda: None)
    await until(lambda: asyncio.all_tasks() <= before)
    done = list[str]()
    here.add(0, lambda: done.append("again"))
    await until(lambda: done == ["again"])
    await here.close()


async def test_what_is_left_goes_at_the_end() -> None:
    done = list[str]()
    here = GenerationCleanup(lambda: 0)
    here.add(0, lambda: done.append("left"))
    await here.close()
    assert done == ["left"]
    await here.close()
    assert done == ["left"]
