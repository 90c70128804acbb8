import asyncio

import pytest

from gateway.bench.client_watch import ClientWatch


@pytest.mark.virtual_time
async def test_an_idle_client_has_nothing_to_warn_of() -> None:
    loop = asyncio.get_running_loop()
    async with ClientWatch(loop.time, lambda: 0.0) as watch:
        await asyncio.sleep(1)
    load = watch.load()
    assert load.warnings == ()
    assert load.start_delay_p99_ms is None


@pytest.mark.virtual_time
async def test_a_client_that_uses_a_whole_core_or_sends_late_says_so() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with ClientWatch(loop.time, lambda: (loop.time() - began) * 0.95) as watch:
        await asyncio.sleep(1)
    load = watch.load([0.0, 0.2])
    assert load.cpu_share == pytest.approx(0.95, abs=0.02)
    assert load.warnings == ("client_busy", "client_late")
