"""One GPU: the operator's commands, starts, restarts and changed settings.

Covers: gateway/rollout/gpu_switch.py
Covers: gateway/rollout/gpu_watch.py
Covers: gateway/upstream/gpu_engine.py
Covers: gateway/reconfigure.py
"""

import asyncio
import io
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from gateway import config
from gateway.app import Gateway
from gateway.rollout.gpu_watch import WATCH_SECONDS
from gateway.simulate import Running as StandIn
from gateway.simulate import running as stand_in
from gateway.telemetry.log import ExchangeLog
from tests.fakes.running_gateway import running
from tests.fakes.virtual_time import virtual_clock
from tests.integration.one_gpu import OLLAMA, VLLM, Load, OneGpu, document, one_gpu, until

pytestmark = pytest.mark.virtual_time


def writing(file: Path, word: str, status: int = 0) -> list[str]:
    """Return a command that appends a word to a file and ends with a status."""
    return [sys.executable, "-c", f"open({str(file)!r}, 'a').write({word!r} + ' '); raise SystemExit({status})"]


class Supervised:
    """A vLLM without sleep mode, which this starts and stops as the operator's commands tell."""

    def __init__(self, folder: Path, *, stop: int = 0, start: int = 0) -> None:
        self.file = folder / "commands"
        self.settings = {"stop": writing(self.file, "stop", stop), "start": writing(self.file, "start", start)}

    @property
    def ran(self) -> list[str]:
        return self.file.read_text().split() if self.file.exists() else []

    async def obey(self, server: StandIn) -> None:
        """Stop and start `server` at the commands."""
        done = 0
        while True:
            if len(self.ran) > done:
                await (server.stop() if self.ran[done] == "stop" else server.__aenter__())
                done += 1
            await asyncio.sleep(0.1)


@asynccontextmanager
async def supervised(folder: Path, **statuses: int) -> AsyncIterator[tuple[OneGpu, Supervised]]:
    """Start with the vLLM awake on the GPU; it stops and starts by commands alone."""
    commands = Supervised(folder, **statuses)
    options = {"dev_mode": False, "asleep": False}
    async with one_gpu(folder, of_vllm=options, llm_backend="vllm", of={"vllm": commands.settings}) as setup:
        await setup.ended()
        obeying = asyncio.create_task(commands.obey(setup.vllm))
        yield setup, commands
        obeying.cancel()
        await asyncio.gather(obeying, return_exceptions=True)


async def test_commands_stop_and_start_an_engine_without_sleep_mode(tmp_path: Path) -> None:
    async with supervised(tmp_path) as (setup, commands):
        assert commands.ran == []  # it runs already
        load = Load(setup, 2)
        await until(lambda: len(load.replies) > 2)
        await setup.rollback()
        assert (await setup.ended())["holder"] == "ollama"
        await setup.switch("vllm")
        assert (await setup.ended())["holder"] == "vllm"
        served = await load.stop()
        assert {"ollama", "vllm"} == set(served)
        assert commands.ran == ["stop", "start"]


async def test_a_stop_command_that_fails_brings_the_requests_back(tmp_path: Path) -> None:
    async with supervised(tmp_path, stop=4) as (setup, commands):
        await setup.rollback()
        assert (await setup.ended())["holder"] == "vllm"
        assert "its stop command ended with status 4" in setup.history()[0]["why"]
        assert (await setup.ask()).headers["x-gateway-backend"] == "vllm"
        assert commands.ran == ["stop", "start"]  # whatever the failed command has done


async def test_a_start_command_that_fails_brings_the_requests_back(tmp_path: Path) -> None:
    commands = Supervised(tmp_path, start=5)
    async with one_gpu(tmp_path, of={"vllm": commands.settings}) as setup:
        await setup.ended()
        await setup.vllm.stop()
        await setup.switch("vllm")
        assert (await setup.ended())["holder"] == "ollama"
        assert "vllm did not come up: its start command ended with status 5" in setup.history()[0]["why"]
        assert (await setup.ask()).status == 200
        log = setup.gateway.log.getvalue().decode()
        assert str(tmp_path) not in log  # nothing of the command itself


# Starts


@asynccontextmanager
async def engines(folder: Path, **of_vllm: Any) -> AsyncIterator[tuple[StandIn, StandIn, Path]]:
    """Start both engines, without a gateway."""
    gpu_file = folder / "gpu.json"
    async with AsyncExitStack() as stack:
        stack.enter_context(virtual_clock())
        options = (replace(OLLAMA, gpu_file=str(gpu_file)), replace(VLLM, gpu_file=str(gpu_file), **of_vllm))
        ollama, vllm = [await stack.enter_async_context(stand_in(each)) for each in options]
        yield ollama, vllm, gpu_file


async def test_a_start_takes_the_gpu_from_the_engine_that_has_it(tmp_path: Path) -> None:
    async with (
        engines(tmp_path, asleep=False) as (ollama, vllm, gpu_file),
        running(config.build(document(ollama, vllm)), shares_loop=True) as gateway,
    ):
        setup = OneGpu(gateway, ollama, vllm, gpu_file)
        reply = await setup.ask()
        assert (reply.status, reply.headers["x-gateway-backend"]) == (200, "ollama")
        assert vllm.app.sleeper.is_sleeping  # type: ignore[union-attr]
        assert setup.was_never_on_both()


async def test_a_start_with_the_right_engine_on_the_gpu_switches_nothing(tmp_path: Path) -> None:
    async with (
        engines(tmp_path) as (ollama, vllm, gpu_file),
        running(config.build(document(ollama, vllm)), shares_loop=True) as gateway,
    ):
        setup = OneGpu(gateway, ollama, vllm, gpu_file)
        await setup.ended()
        assert setup.gpu["holder"] == "ollama"
        assert setup.gpu["last"] is None
        assert not ollama.app.scheduler.loads  # type: ignore[union-attr]


async def test_an_engine_that_is_started_while_the_other_has_the_gpu_is_put_to_sleep(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        await setup.vllm.stop()
        await asyncio.sleep(2 * WATCH_SECONDS)  # virtual: it is known to be down
        restarted = replace(VLLM, gpu_file=str(setup.gpu_file), asleep=False)
        async with stand_in(restarted, setup.vllm.port) as vllm:
            await until(lambda: bool(vllm.app.sleeper.is_sleeping))  # type: ignore[union-attr]
            reply = await setup.ask()
            assert (reply.status, reply.headers["x-gateway-backend"]) == (200, "ollama")
            assert setup.was_never_on_both()
            await setup.switch("vllm")
            assert (await setup.ask()).headers["x-gateway-backend"] == "vllm"


async def test_an_engine_that_answers_after_its_stop_command_is_not_stopped_again(tmp_path: Path) -> None:
    commands = Supervised(tmp_path)
    options = {"dev_mode": False, "asleep": False}
    async with one_gpu(tmp_path, of_vllm=options, llm_backend="vllm", of={"vllm": commands.settings}) as setup:
        await setup.ended()
        setup.vllm.engine.gpu.hold(0)  # the command frees the GPU, and the server goes on to answer
        await setup.rollback()
        assert (await setup.ended())["holder"] == "ollama"
        await asyncio.sleep(5 * WATCH_SECONDS)
        assert commands.ran == ["stop"]


@pytest.mark.parametrize("phase", ["draining", "freeing", "waking"])
async def test_a_restart_in_each_phase_goes_on_with_the_switch(phase: str, tmp_path: Path) -> None:
    async with engines(tmp_path, asleep=False) as (ollama, vllm, gpu_file):
        settings = config.build(document(ollama, vllm, llm_backend="vllm", state_file=str(tmp_path / "state.json")))
        async with running(settings, shares_loop=True) as gateway:
            setup = OneGpu(gateway, ollama, vllm, gpu_file)
            await setup.ended()
            asking = asyncio.create_task(setup.ask())
            await until(lambda: vllm.engine.running == 1)
            await setup.rollback()
            await setup.reached(phase)
            if phase != "draining":
                assert (await asking).status == 200
        await asyncio.gather(asking, return_exceptions=True)
        async with running(settings, shares_loop=True) as gateway:
            setup = OneGpu(gateway, ollama, vllm, gpu_file)
            assert (await setup.ask()).headers["x-gateway-backend"] == "ollama"
            assert (await setup.ended())["holder"] == "ollama"
            assert setup.was_never_on_both()


async def test_a_restart_whose_engine_does_not_come_up_goes_back(tmp_path: Path) -> None:
    async with engines(tmp_path) as (ollama, vllm, gpu_file):
        settings = config.build(document(ollama, vllm, state_file=str(tmp_path / "state.json")))
        async with running(settings, shares_loop=True) as gateway:
            setup = OneGpu(gateway, ollama, vllm, gpu_file)
            await setup.ended()
            await setup.switch("vllm")
            await setup.reached("waking")
        await vllm.stop()
        async with running(settings, shares_loop=True) as gateway:
            setup = OneGpu(gateway, ollama, vllm, gpu_file)
            assert (await setup.ask()).headers["x-gateway-backend"] == "ollama"
            assert setup.history()[0]["cause"] == "exclusive"


# Reread settings


async def test_changed_times_and_commands_apply_to_the_next_switch(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        await setup.vllm.stop()
        commands = Supervised(tmp_path)
        changed = document(setup.ollama, setup.vllm, wake_timeout=5, of={"vllm": commands.settings})
        await setup.gateway.gateway._reconfiguration.apply(config.build(changed))
        assert setup.gpu["holder"] == "ollama"
        await setup.switch("vllm")
        assert (await setup.ended())["holder"] == "ollama"
        assert commands.ran[0] == "start"
        assert "wake_timeout has passed" in setup.history()[0]["why"]
        assert (setup.gpu["last"]["outcome"], setup.gpu["last"]["seconds"] < 10) == ("failed", True)


async def test_a_changed_backend_of_the_settings_takes_the_gpu_along(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup:
        await setup.ended()
        load = Load(setup, 2)
        await until(lambda: len(load.replies) > 2)
        await setup.gateway.gateway._reconfiguration.apply(
            config.build(document(setup.ollama, setup.vllm, llm_backend="vllm"))
        )
        assert (await setup.ended())["holder"] == "vllm"
        await until(lambda: load.replies[-1].headers["x-gateway-backend"] == "vllm")
        await load.stop()
        assert setup.was_never_on_both()


async def test_an_engine_at_a_new_address_is_waited_for(tmp_path: Path) -> None:
    async with one_gpu(tmp_path) as setup, stand_in(replace(OLLAMA, gpu_file=str(setup.gpu_file))) as other:
        await setup.ended()
        await setup.gateway.gateway._reconfiguration.apply(config.build(document(other, setup.vllm)))
        assert (await setup.ask()).status == 200
        assert (await setup.ended())["holder"] == "ollama"
        assert other.engine.served == 1


async def test_replicas_that_share_the_roll_out_do_not_share_a_gpu() -> None:
    settings = config.build(document(None, None)).model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1")})
    with pytest.raises(config.ConfigError, match="expected a single gateway"):
        Gateway(settings, ExchangeLog(True, io.BytesIO()))
