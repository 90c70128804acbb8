"""A model of an Ollama that answers nothing any more is unloaded, and its requests are sent again.

The gateway, a stand-in and the clients share one loop, whose clock skips waits.

Covers: gateway/relay/supervised.py
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any
from unittest.mock import patch

import httpx2
import pytest

from gateway import config
from gateway.admission.model_activity import SLOWNESS
from gateway.admission.model_state import ModelState
from gateway.relay.frozen_models import CHECK_SECONDS
from gateway.simulate import Fault, Model, Options
from gateway.simulate import Running as StandIn
from gateway.simulate import running as stand_in
from gateway.simulate.asgi import HttpExchange
from gateway.upstream.model_loader import REPORT_TIMEOUT_SECONDS
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import Reply, Running, running, until
from tests.fakes.virtual_time import virtual_clock

pytestmark = pytest.mark.virtual_time

LEAST_PATIENCE = 8.0
"""In place of a minute, since a second of the loop's time still costs some milliseconds."""
FIRST_TOKEN_TIMEOUT = 40.0
TOLERANCE = 2 * CHECK_SECONDS + 2.0
MODELS = (Model("a", tools=True), Model("b"), Model("v", vision=True), Model("e", embedding=8))


def settings(url: str, other_url: str | None = None, tier: Mapping[str, Any] = {}, **backend: Any) -> config.Settings:
    """Return settings with a tier for each model. With `other_url`, tier a may move to a vLLM there."""
    ollama = {"kind": "ollama", "base_url": url, "keep_alive": "10m", "model_concurrency": 4}
    ollama |= {"first_token_timeout": FIRST_TOKEN_TIMEOUT, **backend}
    backends: dict[str, Any] = {"ollama": ollama}
    tiers: dict[str, Any] = {name: {"models": {"ollama": name}} for name in "abv"}
    if other_url is not None:
        backends["vllm"] = {"kind": "vllm", "base_url": other_url}
        tiers["a"]["models"]["vllm"] = "a"
        tiers["a"] |= tier
    return config.build(
        {
            "backends": backends,
            "tiers": tiers,
            "embeddings": {"e": {"backend": "ollama", "model": "e"}},
            "llm_backend": "ollama",
            "log_format": "json",
            "state_file": "",
        }
    )


class Setup:
    def __init__(self, gateway: Running, server: StandIn, caplog: pytest.LogCaptureFixture) -> None:
        self.gateway = gateway
        self.server = server
        self._caplog = caplog
        self.began = 0.0

    async def ask(self, tier: str = "a", **body: Any) -> Reply:
        async with self.gateway.sent({"model": tier, **body}) as raw:
            return await raw.reply()

    async def freeze(self, model: str = "a") -> None:
        """Freeze a loaded model, and restart the test's clock."""
        assert self.server.app.scheduler.freeze(self.server.app._catalog.find(model))
        self.began = asyncio.get_running_loop().time()

    @property
    def passed(self) -> float:
        return asyncio.get_running_loop().time() - self.began

    def unloads(self, model: str = "a") -> float:
        return self.gateway.metric("gateway_model_unloads_total", backend="ollama", model=model, reason="frozen")

    def state(self, model: str = "a") -> ModelState:
        residency = self.gateway.gateway._backends["ollama"].servers[0].residency
        assert residency is not None
        return residency.states[model]

    @property
    def log(self) -> list[str]:
        return [r.getMessage() for r in self._caplog.records if r.name == "gateway.upstream.model_loader"]


@pytest.fixture
async def make(caplog: pytest.LogCaptureFixture) -> AsyncIterator[Any]:
    caplog.set_level(logging.INFO)
    async with AsyncExitStack() as stack:
        stack.enter_context(virtual_clock())
        stack.enter_context(patch("gateway.relay.in_flight.CHECK_SECONDS", 0.5))
        stack.enter_context(patch("gateway.relay.frozen_models.LEAST_PATIENCE", LEAST_PATIENCE))
        stack.enter_context(patch("gateway.admission.model_activity.LEAST_PATIENCE", LEAST_PATIENCE))

        async def start(
            backend: dict[str, Any] | None = None, tier: dict[str, Any] | None = None, **options: Any
        ) -> Setup:
            server = await stack.enter_async_context(stand_in(Options("ollama", MODELS, parallel=4, **options)))
            other = None
            if tier is not None:
                other = await stack.enter_async_context(stand_in(Options("vllm", (Model("a"),))))
            gateway = await stack.enter_async_context(
                running(
                    settings(server.base_url, other and other.base_url, tier or {}, **(backend or {})), shares_loop=True
                )
            )
            return Setup(gateway, server, caplog)

        yield start


def statuses(replies: Iterable[Reply]) -> list[int]:
    return [reply.status for reply in replies]


# Rule 1: several requests


async def test_frozen_model_is_unloaded_once_and_every_request_is_served(make: Any) -> None:
    setup = await make(load_seconds=2.0)
    assert (await setup.ask()).status == 200
    await setup.freeze()
    replies = await asyncio.gather(*(setup.ask(stream=number % 2 == 0) for number in range(6)))
    assert statuses(replies) == [200] * 6
    assert LEAST_PATIENCE <= setup.passed <= LEAST_PATIENCE + 2.0 + TOLERANCE
    assert setup.unloads() == 1
    assert setup.gateway.metric("gateway_retries_total", backend="ollama", reason="unloaded") == 4
    assert [line for line in setup.log if "frozen" in line] == [
        "backend ollama: the model 'a' had frozen and was unloaded; requests sent again: 4, answers broken off: 0"
    ]
    assert {reply.headers["x-gateway-attempts"] for reply in replies if not reply.is_stream} == {"1"}
    assert setup.gateway.metric("gateway_circuit_state", backend="ollama") == 0


async def test_clients_that_leave_at_once_freeze_a_model_and_later_ones_are_served(make: Any) -> None:
    setup = await make(freeze_after=4)
    assert (await setup.ask()).status == 200
    setup.server.engine.inject(Fault("stall", after=2, times=4))
    async with AsyncExitStack() as clients:
        for _ in range(4):
            raw = await clients.enter_async_context(setup.gateway.sent({"model": "a", "stream": True}))
            await raw.head()
    replies = await asyncio.gather(*(setup.ask() for _ in range(2)), setup.ask("b"))
    assert statuses(replies) == [200] * 3
    assert (setup.unloads(), setup.unloads("b")) == (1, 0)


async def test_requests_that_wait_in_the_queue_count_as_waiting_too(make: Any) -> None:
    setup = await make({"model_concurrency": 1})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    assert statuses(await asyncio.gather(*(setup.ask() for _ in range(2)))) == [200, 200]
    assert setup.passed <= LEAST_PATIENCE + TOLERANCE
    assert setup.unloads() == 1


async def test_requests_sent_again_come_before_those_that_came_later_and_are_not_refused(make: Any) -> None:
    setup = await make({"max_queue": 3, "max_concurrency": 4})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    order: list[int] = []

    async def ask(number: int) -> int:
        status = (await setup.ask()).status
        order.append(number)
        return status

    asking = [asyncio.create_task(ask(number)) for number in range(4)]
    await asyncio.sleep(LEAST_PATIENCE / 2)
    assert setup.gateway.running == 4
    asking += [asyncio.create_task(ask(number)) for number in range(4, 7)]
    assert await asyncio.gather(*asking) == [200] * 7
    assert set(order[:4]) == set(range(4))
    assert setup.unloads() == 1


async def test_two_models_that_freeze_at_once_are_both_unloaded(make: Any) -> None:
    setup = await make()
    assert statuses([await setup.ask("a"), await setup.ask("b")]) == [200, 200]
    await setup.freeze("b")
    await setup.freeze("a")
    replies = await asyncio.gather(*(setup.ask(tier) for tier in "aabb"))
    assert statuses(replies) == [200] * 4
    assert (setup.unloads("a"), setup.unloads("b")) == (1, 1)


async def test_stalled_stream_of_a_frozen_model_is_broken_off_because_it_keeps_the_model_loaded(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    setup.server.engine.inject(Fault("stall", after=2))
    stalled = asyncio.create_task(setup.ask(stream=True))
    await asyncio.sleep(1)
    await setup.freeze()
    assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [200, 200]
    error = (await stalled).error
    assert error is not None
    assert error["code"] == "upstream_timeout"
    assert setup.passed <= LEAST_PATIENCE + TOLERANCE
    assert "answers broken off: 1" in setup.log[-2]


# Rule 2: one request


async def test_single_request_to_a_frozen_model_is_served_when_its_first_token_timeout_has_passed(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    assert (await setup.ask()).status == 200
    assert FIRST_TOKEN_TIMEOUT <= setup.passed <= FIRST_TOKEN_TIMEOUT + TOLERANCE
    assert setup.unloads() == 1
    assert setup.gateway.gateway._backends["ollama"].servers[0].circuit.is_troubled is False


async def test_model_that_never_answered_is_unloaded_too(make: Any) -> None:
    """Nothing is known of its usual time to the first token, so several requests wait as long as one."""
    setup = await make({"first_token_timeout": 15.0})
    assert (await setup.ask("b")).status == 200
    setup.server.engine.inject(Fault("stall", times=2))
    asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
    assert statuses(await asyncio.gather(*asking)) == [200, 200]
    assert (setup.unloads("a"), setup.unloads("b")) == (1, 0)


# No unload


async def test_slow_first_token_of_several_requests_is_no_reason_to_unload(make: Any) -> None:
    """Ten times the slowest recent time to the first token is longer than the silence."""
    slow = LEAST_PATIENCE / SLOWNESS + 1
    setup = await make(time_to_first_token=slow)
    assert (await setup.ask()).status == 200
    setup.server.engine.options = Options("ollama", MODELS, time_to_first_token=LEAST_PATIENCE + 6)
    assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [200, 200]
    assert setup.unloads() == 0


async def test_long_prompt_that_is_evaluated_slowly_is_not_interrupted(make: Any) -> None:
    setup = await make(prefill_tokens_per_second=50.0)
    assert (await setup.ask()).status == 200
    long = [{"role": "user", "content": "word " * 900}]
    replies = await asyncio.gather(setup.ask(messages=long), setup.ask(messages=long))
    assert statuses(replies) == [200, 200]
    assert setup.passed > LEAST_PATIENCE
    assert setup.unloads() == 0


async def test_request_that_is_late_but_comes_within_its_timeout_is_not_interrupted(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    setup.server.engine.options = Options("ollama", MODELS, time_to_first_token=FIRST_TOKEN_TIMEOUT - 5)
    assert (await setup.ask()).status == 200
    assert setup.unloads() == 0


async def test_model_that_still_answers_another_request_is_not_frozen(make: Any) -> None:
    setup = await make(answer_tokens=40, tokens_per_second=2.0)
    assert (await setup.ask(max_tokens=1)).status == 200
    streaming = asyncio.create_task(setup.ask(stream=True, max_tokens=40))
    await asyncio.sleep(2)
    await setup.freeze()  # requests get no slot any more, but the stream goes on
    asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
    assert (await streaming).status == 200
    assert setup.unloads() == 0
    assert statuses(await asyncio.gather(*asking)) == [200, 200]
    assert setup.unloads() == 1


async def test_images_are_slow_and_judged_by_other_images(make: Any) -> None:
    setup = await make(image_seconds=12.0)
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": png_data_url()}}]}]
    assert statuses([await setup.ask("v")]) == [200]
    replies = await asyncio.gather(*(setup.ask("v", messages=image) for _ in range(2)))
    assert statuses(replies) == [200, 200]
    assert setup.unloads("v") == 0


async def test_tool_call_is_held_back_as_a_whole_and_no_reason_to_unload(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    setup.server.engine.options = Options("ollama", MODELS, parallel=4, time_to_first_token=2 * LEAST_PATIENCE)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    replies = await asyncio.gather(setup.ask(tools=tools), setup.ask())
    assert statuses(replies) == [200, 200]
    assert setup.unloads() == 0


@pytest.mark.parametrize("load", [14.75, 15.0, 15.25, 15.5])
async def test_load_within_a_request_is_not_taken_for_a_freeze(make: Any, load: float) -> None:
    """The gateway's report is outdated: another program has unloaded the model.

    After the load, the prompts have to be evaluated.
    """
    setup = await make({"probe_interval": 1000}, load_seconds=load, time_to_first_token=0.75)
    assert (await setup.ask()).status == 200
    setup.server.app.scheduler.expire(setup.server.app._catalog.find("a"))
    assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [200, 200]
    assert setup.unloads() == 0


async def test_client_that_does_not_read_does_not_make_its_model_look_frozen(make: Any) -> None:
    setup = await make({"model_concurrency": 2})
    assert (await setup.ask()).status == 200
    setup.server.engine.inject(Fault("stall", after=2))
    async with setup.gateway.sent({"model": "a", "stream": True}) as raw:
        await raw.head()
        (relay,) = setup.gateway.live
        relay._client.paused = True
        await setup.freeze()
        asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
        await asyncio.sleep(2 * LEAST_PATIENCE)
        assert setup.unloads() == 0
        relay._client.paused = False
    assert statuses(await asyncio.gather(*asking)) == [200, 200]
    assert setup.unloads() == 1


# Failures on the way


async def answer_500(exchange: HttpExchange) -> None:
    await exchange.reply(500, {"content-type": "application/json"}, b'{"error":"no"}')


async def never_answer(exchange: HttpExchange) -> None:
    await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize(("handler", "reason"), [(answer_500, "status 500"), (never_answer, "no answer in time")])
async def test_unload_that_fails_is_tried_once_and_the_requests_fail_by_their_timeout(
    make: Any, handler: Any, reason: str
) -> None:
    setup = await make({"first_token_timeout": 20.0})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    setup.server.app._routes["/api/generate"] = ("POST", handler)
    assert statuses(await asyncio.gather(*(setup.ask() for _ in range(3)))) == [504] * 3
    assert setup.passed <= 20.0 + TOLERANCE + REPORT_TIMEOUT_SECONDS
    assert setup.unloads() == 0
    assert [line for line in setup.log if "unloaded" in line] == [
        f"backend ollama: the model 'a' was not unloaded ({reason})"
    ]
    assert setup.state().is_ready


async def test_unload_without_effect_is_not_repeated(make: Any) -> None:
    setup = await make({"first_token_timeout": 20.0})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    setup.server.app.scheduler.expire = lambda model: None
    assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [504, 504]
    assert setup.unloads() == 1
    # By then the server is ejected: it gets one request on trial, and the other is refused at once.
    assert sorted(statuses(await asyncio.gather(setup.ask(), setup.ask()))) == [503, 504]
    assert setup.unloads() == 1
    assert len([line for line in setup.log if "does not unload it" in line]) == 1


async def test_model_that_freezes_again_after_it_has_answered_is_unloaded_again(make: Any) -> None:
    setup = await make()
    for count in (1, 2):
        assert (await setup.ask()).status == 200
        await setup.freeze()
        assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [200, 200]
        assert setup.unloads() == count


async def test_model_that_was_removed_meanwhile_is_missing_for_its_requests(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
    await until_true(lambda: setup.gateway.running == 2)
    await until_true(lambda: setup.server.engine.waiting == 2)
    catalog, find = setup.server.app._catalog, setup.server.app._catalog.find

    async def unload_and_remove(exchange: HttpExchange) -> None:
        catalog.find = lambda name: None if name.startswith("a") else find(name)
        setup.server.app.scheduler.expire(find("a"))
        await exchange.reply(200, {"content-type": "application/json"}, b"{}")

    setup.server.app._routes["/api/generate"] = ("POST", unload_and_remove)
    assert statuses(await asyncio.gather(*asking)) == [404, 404]
    assert setup.unloads() == 1


async def test_listed_model_whose_time_is_over_is_unloaded_like_any_other(make: Any) -> None:
    """Ollama lists a model that it is to unload, but that has requests, with a time in the past."""
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    with patch.object(setup.server.app.scheduler, "expires_in", lambda runner: -3600.0):
        assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [200, 200]
    assert setup.unloads() == 1


async def test_shutdown_during_the_unload_leaves_nothing_behind(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    setup.server.app._routes["/api/generate"] = ("POST", never_answer)
    asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
    await until_true(lambda: setup.state().is_unloading)
    setup.gateway.gateway.cut_off()
    assert statuses(await asyncio.gather(*asking)) == [503, 503]


async def test_client_that_leaves_while_its_model_is_unloaded_is_forgotten(make: Any) -> None:
    setup = await make(load_seconds=5.0)
    assert (await setup.ask()).status == 200
    await setup.freeze()
    async with setup.gateway.sent({"model": "a"}), setup.gateway.sent({"model": "a"}):
        await until_true(lambda: setup.unloads() == 1)
    await until_true(setup.gateway.is_idle)
    assert (await setup.ask()).status == 200


async def test_server_that_does_not_report_its_models_is_not_asked_to_unload(make: Any) -> None:
    setup = await make({"first_token_timeout": 20.0, "probe_interval": 1000.0})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    setup.server.app._routes["/api/ps"] = ("GET", never_answer)
    assert statuses(await asyncio.gather(setup.ask(), setup.ask())) == [504, 504]
    assert setup.unloads() == 0
    assert not setup.state().activity.was_unloaded


# Other backends


async def test_requests_sent_again_follow_a_switch_made_meanwhile(make: Any) -> None:
    setup = await make(tier={})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    asking = [asyncio.create_task(setup.ask()) for _ in range(3)]
    await until_true(lambda: setup.server.engine.waiting == 3)
    setup.gateway.gateway.rollout.set("vllm", tier="a")
    replies = await asyncio.gather(*asking)
    assert [(reply.status, reply.headers["x-gateway-backend"]) for reply in replies] == [(200, "vllm")] * 3
    assert setup.passed < LEAST_PATIENCE + TOLERANCE
    await until_true(lambda: setup.unloads() == 1)


async def test_request_of_a_frozen_model_that_cannot_be_loaded_again_falls_back(make: Any) -> None:
    setup = await make(tier={"fallback": True})
    assert (await setup.ask()).status == 200
    await setup.freeze()
    asking = [asyncio.create_task(setup.ask()) for _ in range(2)]
    await until_true(lambda: setup.server.engine.waiting == 2)
    setup.server.app._routes["/api/chat"] = ("POST", answer_500)
    replies = await asyncio.gather(*asking)
    assert [(reply.status, reply.headers["x-gateway-backend"]) for reply in replies] == [(200, "vllm")] * 2


async def test_frozen_embedding_model_is_unloaded_too(make: Any) -> None:
    setup = await make()
    url = f"{setup.gateway.base_url}/v1/embeddings"
    async with httpx2.AsyncClient(timeout=1000.0) as http:

        async def embed() -> int:
            return (await http.post(url, json={"model": "e", "input": "a text"})).status_code

        assert await embed() == 200
        await setup.freeze("e")
        assert await asyncio.gather(*(embed() for _ in range(3))) == [200] * 3
    assert (setup.unloads("e"), setup.passed < LEAST_PATIENCE + TOLERANCE) == (1, True)


async def until_true(condition: Any) -> None:
    async with asyncio.timeout(10 * LEAST_PATIENCE):
        while not condition():
            await asyncio.sleep(0.05)


async def test_request_that_is_sent_again_is_not_refused_for_lack_of_memory(make: Any) -> None:
    """It had left the queue, so its body was not counted any more, and others have taken the room."""
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    memory = setup.gateway.gateway.body_memory
    asked = [asyncio.create_task(setup.ask(max_tokens=8)) for _ in range(3)]
    await until(lambda: len(setup.gateway.live) == 3 and setup.gateway.running == 3)
    memory.change(1, is_shared=False)
    assert statuses(await asyncio.gather(*asked)) == [200] * 3
    assert setup.unloads() == 1
    assert memory.used == 0


async def test_clients_own_deadline_counts_while_a_freeze_is_examined(make: Any) -> None:
    setup = await make()
    assert (await setup.ask()).status == 200
    await setup.freeze()
    setup.server.app._routes["/api/ps"] = ("GET", never_answer)
    timeout = FIRST_TOKEN_TIMEOUT + 2
    async with setup.gateway.sent({"model": "a"}, f"X-Gateway-Timeout: {timeout}") as raw:
        reply = await raw.reply()
    assert reply.status == 504
    assert "client's timeout" in str(reply.error)
    assert setup.passed <= timeout + TOLERANCE
