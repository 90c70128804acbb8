"""Models that no setting names are served under the backend's own names, while the backend has them."""

import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from gateway.relay import destinations
from gateway.simulate import Model
from gateway.upstream.server import MAX_DISCOVERED, Server
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend
from tests.fakes.running_gateway import PATIENCE, TIMES, Running, running, until
from tests.fakes.stand_ins import stand_in

KEPT, VECTORS = Model("llama", tools=True), Model("nomic-embed", embedding=8)
PULLED = Model("mistral:7b", context_length=2048, tools=True)
HELLO = [{"role": "user", "content": "Hello?"}]


@pytest.fixture(autouse=True)
def _short_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(destinations, "CHECK_SECONDS", 0.01)


class Discovering:
    """A gateway in front of an Ollama and a vLLM, both of which it discovers unless told otherwise."""

    def __init__(
        self, gateway: Running, client: httpx2.AsyncClient, ollama: simulate.Running, vllm: simulate.Running
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.ollama = ollama
        self.vllm = vllm

    def document(self, **changes: Any) -> dict[str, Any]:
        return document(self.ollama.base_url, self.vllm.base_url, **changes)

    async def reload(self, **changes: Any) -> None:
        await self.gateway.gateway._reconfiguration.apply(config.build(self.document(**changes)))

    async def listed(self) -> list[str]:
        return [entry["id"] for entry in (await self.client.get("/v1/models")).json()["data"]]

    async def post(self, path: str, model: str, **body: Any) -> httpx2.Response:
        return await self.client.post(path, json={"model": model, **body})

    async def chat(self, model: str, **body: Any) -> httpx2.Response:
        return await self.post("/v1/chat/completions", model, messages=HELLO, max_tokens=4, **body)

    async def until_listed(self, *names: str, without: str = "") -> None:
        async def is_so() -> bool:
            listed = await self.listed()
            return set(names) <= set(listed) and without not in listed

        for _ in range(1000):
            if await is_so():
                return
            await self.probed()
        raise AssertionError(await self.listed())

    async def probed(self) -> None:
        """Wait until each server has been probed once more."""
        before = [server.discovered for server in self.servers]
        await until(lambda: all(server.discovered is not old for server, old in zip(self.servers, before, strict=True)))

    @property
    def servers(self) -> list[Server]:
        return [server for backend in self.gateway.gateway._backends.values() for server in backend.servers]

    @property
    def box(self) -> Any:
        return self.gateway.gateway._backends["ollama"]

    async def pull(self, *models: Model) -> None:
        """Let the Ollama have these models besides the one of the settings, and the gateway see it."""
        self.ollama.engine.serve(KEPT, *models)
        await self.until_listed(*(model.tagged for model in models))

    async def remove_all(self, *gone: Model) -> None:
        self.ollama.engine.serve(KEPT)
        for model in gone:
            await self.until_listed(without=model.tagged)


def document(
    ollama: str, vllm: str, *, discover: bool = True, slots: int | str = "auto", **changes: Any
) -> dict[str, Any]:
    more = {"probe_interval": 0.02, "discover": discover}
    return {
        "llm_backend": "ollama",
        "backends": {
            "ollama": {"kind": "ollama", "base_url": ollama, "model_concurrency": slots, **more},
            "vllm": {"kind": "vllm", "base_url": vllm, **more},
        },
        "tiers": {"standard": {"models": {"ollama": "llama"}, "aliases": ["gpt-4o"]}},
        "log_format": "json",
        "state_file": "",
        **changes,
    }


@asynccontextmanager
async def discovering(
    *models: Model, vllm: tuple[Model, ...] = (Model("base"),), options: dict[str, Any] | None = None, **changes: Any
) -> AsyncIterator[Discovering]:
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(stand_in(simulate.Options("ollama", (KEPT, *models), **(options or {}))))
        two = await stack.enter_async_context(stand_in(simulate.Options("vllm", vllm)))
        settings = config.build(document(one.base_url, two.base_url, **changes))
        gateway = await stack.enter_async_context(running(settings))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield Discovering(gateway, await stack.enter_async_context(client), one, two)


@pytest.fixture
async def setup() -> AsyncIterator[Discovering]:
    async with discovering() as found:
        yield found


async def test_a_pulled_model_is_served_within_a_probe_and_disappears_with_the_model(setup: Discovering) -> None:
    assert (await setup.chat("mistral:7b")).status_code == 404
    await setup.pull(PULLED)
    answer = await setup.chat("mistral:7b")
    assert answer.status_code == 200
    assert answer.json()["model"] == "mistral:7b"
    names = ("x-gateway-tier", "x-gateway-backend", "x-gateway-model")
    assert [answer.headers[name] for name in names] == ["none", "ollama", "mistral:7b"]
    await setup.remove_all(PULLED)
    gone = await setup.chat("mistral:7b")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


async def test_an_adapter_that_a_vllm_loads_later_is_served(setup: Discovering) -> None:
    assert await setup.listed() == ["standard", "gpt-4o", "base"]
    setup.vllm.engine.serve(Model("base"), Model("sql-lora"))
    await setup.until_listed("sql-lora")
    answer = await setup.chat("SQL-LoRA")
    names = ("x-gateway-backend", "x-gateway-model")
    assert (answer.status_code, *(answer.headers[name] for name in names)) == (200, "vllm", "sql-lora")


CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello?"},
    "/v1/responses": {"input": "Hello?"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/api/chat": {"messages": HELLO, "stream": False},
    "/api/generate": {"prompt": "Hello?", "stream": False},
}
EMBEDDINGS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "Hello?"},
    "/api/embed": {"input": "Hello?"},
    "/api/embeddings": {"prompt": "Hello?"},
}


@pytest.mark.parametrize("path", [*CHATS, *EMBEDDINGS])
async def test_each_endpoint_serves_the_models_of_its_kind_with_or_without_latest(path: str) -> None:
    body = CHATS.get(path) or EMBEDDINGS[path]
    served, refused = (Model("phi"), VECTORS) if path in CHATS else (VECTORS, Model("phi"))
    async with discovering(served, refused) as setup:
        for name in (served.name, served.tagged, served.tagged.upper()):
            answer = await setup.post(path, name, **body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-gateway-model"] == served.tagged
        assert (await setup.post(path, refused.name, **body)).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
async def test_ollamas_own_api_lists_shows_loads_and_streams_a_discovered_model(stream: bool) -> None:
    async with discovering(PULLED, VECTORS) as setup:
        tags = {item["name"]: item for item in (await setup.client.get("/api/tags")).json()["models"]}
        assert list(tags) == ["standard:latest", "gpt-4o:latest", "mistral:7b", "nomic-embed:latest", "base:latest"]
        assert tags["mistral:7b"]["capabilities"] == ["completion", "tools"]
        assert tags["nomic-embed:latest"]["capabilities"] == ["embedding"]
        for name in ("nomic-embed", "nomic-embed:latest"):
            shown = await setup.post("/api/show", name)
            assert (shown.status_code, shown.json()["capabilities"]) == (200, ["embedding"])
        shown = (await setup.post("/api/show", "mistral:7b")).json()
        assert shown["model_info"]["gateway.context_length"] == 2048
        assert "mistral:7b" not in (await setup.client.get("/api/ps")).text
        answer = await setup.post("/api/generate", "mistral:7b", stream=stream)
        assert json.loads(answer.text.splitlines()[-1])["done_reason"] == "load"
        assert "mistral:7b" in (await setup.client.get("/api/ps")).text


async def test_models_are_retrieved_with_or_without_latest() -> None:
    async with discovering(Model("Phi"), VECTORS, PULLED) as setup:
        for name, known in {
            "phi": "phi",
            "PHI:latest": "Phi:latest",
            "nomic-embed": "nomic-embed",
            "mistral:7b": "mistral:7b",
            "standard:latest": "standard:latest",
            "llama:latest": "llama:latest",
            "auto:latest": "auto:latest",
        }.items():
            answer = await setup.client.get(f"/v1/models/{name}")
            assert (answer.status_code, answer.json().get("id")) == (200, known)
        assert (await setup.client.get("/v1/models/mistral:7b")).json()["max_model_len"] == 2048
        assert (await setup.client.get("/v1/models/mistral")).status_code == 404


async def test_names_of_the_settings_win_over_discovered_models() -> None:
    tiers = {
        "standard": {"models": {"ollama": "llama"}, "aliases": ["phi", "mistral:7b"]},
        "base": {"models": {"ollama": "qwen"}, "backend": "ollama"},
    }
    embeddings = {
        "vectors": {"backend": "ollama", "model": "nomic-embed"},
        "Other": {"backend": "ollama", "model": "x"},
    }
    models = Model("phi"), PULLED, Model("qwen"), VECTORS, Model("other"), Model("auto")
    async with discovering(*models, tiers=tiers, embeddings=embeddings) as setup:
        assert await setup.listed() == ["standard", "phi", "mistral:7b", "base", "vectors", "Other"]
        for name, tier in {"phi:latest": "standard", "mistral:7b": "standard", "base": "base", "qwen": "base"}.items():
            assert (await setup.chat(name)).headers["x-gateway-tier"] == tier
        assert (await setup.chat("auto:latest")).headers["x-gateway-tier"] == "standard"
        answer = await setup.post("/v1/embeddings", "nomic-embed", input="Hello?")
        assert answer.headers["x-gateway-tier"] == "vectors"
        assert (await setup.chat("other")).json()["error"]["message"].startswith("This is an embedding model.")


async def test_a_discovered_model_goes_before_the_alias_for_all_other_names() -> None:
    tiers = {"standard": {"models": {"ollama": "llama"}, "aliases": [{"name": "*", "priority": "batch"}]}}
    async with discovering(PULLED, tiers=tiers) as setup:
        assert (await setup.chat("mistral:7b")).headers["x-gateway-tier"] == "none"
        assert (await setup.chat("anything")).headers["x-gateway-tier"] == "standard"
        names = setup.gateway.gateway._operations._model_names
        assert (names.is_batch("mistral:7b"), names.is_batch("anything"), names.is_batch("standard")) == (
            False,
            True,
            False,
        )


@pytest.mark.parametrize("first", ["ollama", "vllm"])
async def test_of_two_backends_with_a_model_the_first_of_the_settings_serves_it(first: str) -> None:
    async with discovering(Model("shared"), vllm=(Model("shared"),)) as setup:
        backends = setup.document()["backends"]
        await setup.reload(backends={name: backends[name] for name in sorted(backends, key=lambda name: name != first)})
        assert (await setup.chat("shared")).headers["x-gateway-backend"] == first
        assert len([name for name in await setup.listed() if name.startswith("shared")]) == 1


async def test_without_the_setting_nothing_is_discovered() -> None:
    async with discovering(PULLED, discover=False) as setup:
        assert await setup.listed() == ["standard", "gpt-4o"]
        assert (await setup.chat("mistral:7b")).status_code == 404
        assert [backend.name for backend in setup.gateway.gateway._health.backends] == ["ollama"]


async def test_metrics_log_and_status_name_no_tier_and_no_model_in_a_label() -> None:
    async with discovering(PULLED, VECTORS) as setup:
        assert (await setup.chat("mistral:7b")).status_code == 200
        assert (await setup.post("/api/embed", "nomic-embed", input="Hello?")).status_code == 200
        labels = {"tier": "none", "backend": "ollama", "outcome": "ok"}
        assert setup.gateway.metric("gateway_requests_total", endpoint="chat", **labels) == 1
        assert setup.gateway.metric("gateway_requests_total", endpoint="ollama_embed", **labels) == 1
        assert setup.gateway.metric("gateway_backend_load_seconds_count", backend="ollama", model="none") == 2
        assert "mistral" not in (await setup.client.get("/metrics")).text
        logged = setup.gateway.exchanges()[0]
        assert (logged["tier"], logged["backend"], logged["model"]) == ("none", "ollama", "mistral:7b")
        status = (await setup.client.get("/ops/status")).json()
        assert status["discovered"] == {
            "mistral:7b": {"backend": "ollama", "capabilities": ["completion", "tools"]},
            "nomic-embed:latest": {"backend": "ollama", "capabilities": ["embedding"]},
            "base": {"backend": "vllm", "capabilities": None},
        }


async def test_a_discovered_model_has_the_limits_of_its_backend_and_is_not_moved_by_a_switch() -> None:
    tiers = {"standard": {"models": {"ollama": "llama", "vllm": "base"}}}
    async with discovering(PULLED, tiers=tiers) as setup:
        switched = await setup.client.put("/ops/rollout", json={"backend": "vllm"})
        assert switched.status_code == 200
        assert (await setup.chat("mistral:7b")).headers["x-gateway-backend"] == "ollama"
        assert (await setup.chat("standard")).headers["x-gateway-backend"] == "vllm"
        destination = setup.gateway.gateway._context.destination(
            setup.gateway.gateway._discovery.find("mistral:7b").route,  # type: ignore[union-attr]
            "chat",
        )
        assert destination.limits == setup.box.settings.limits
        assert destination.fallback is None


def kept_for(setup: Discovering) -> tuple[Any, ...]:
    """Return everything that the gateway keeps by model, apart from the models that are listed."""
    server, gateway = setup.box.servers[0], setup.gateway.gateway
    return (
        sorted(route.model for known in gateway._destinations._destinations.values() for route in known),
        sorted(queue.model for queue in setup.box.admission.queues),
        sorted(server.models),
        sorted({model for model, _ in server.detectors}),
        sorted(server.residency.states),
        sorted(server.guesses),
        sorted({name for pair in server.residency._compatible for name in pair}),
        gateway._discovery._leaving,
    )


async def test_nothing_is_kept_for_models_that_come_and_go(setup: Discovering) -> None:
    assert (await setup.chat("standard")).status_code == 200
    await until(setup.gateway.is_idle)
    before = kept_for(setup)
    for number in range(12):
        model = Model(f"model-{number}", embedding=8 * (number % 2))
        await setup.pull(model)
        path = "/api/embed" if model.embedding else "/api/generate"
        assert (await setup.post(path, model.name, input="Hello?", prompt="Hello?")).status_code == 200
        assert model.tagged in kept_for(setup)[0]
        await setup.remove_all(model)
    await until(lambda: kept_for(setup) == before)


@pytest.fixture
async def serial() -> AsyncIterator[Discovering]:
    async with discovering(PULLED, slots=1) as found:
        yield found


async def test_a_model_that_goes_ends_the_wait_of_its_requests_and_not_the_running_one(serial: Discovering) -> None:
    setup = serial
    setup.ollama.engine.inject(simulate.Fault("stall", after=1))
    body = {"model": "mistral:7b", "stream": True}
    async with setup.gateway.sent(body) as runs:
        await runs.reader.readuntil(b"content")
        async with setup.gateway.sent({"model": "mistral:7b"}) as waits:
            await until(lambda: setup.gateway.waiting == 1)
            await setup.remove_all(PULLED)
            reply = await waits.reply()
            assert (reply.status, reply.error and reply.error["code"]) == (404, "model_not_found")
        assert len(setup.gateway.live) == 1
        assert setup.gateway.gateway._discovery._leaving[setup.box] == {"mistral:7b"}
    await until(lambda: not setup.gateway.gateway._discovery._leaving)


async def test_requests_finish_when_a_reload_ends_the_discovery(serial: Discovering) -> None:
    setup = serial
    body = {"model": "mistral:7b", "stream": True, "max_tokens": 8}
    setup.ollama.engine.options = setup.ollama.engine.options.with_settings(["tokens_per_second=20"])
    async with setup.gateway.sent(body) as runs, setup.gateway.sent({**body, "stream": False}) as waits:
        await until(lambda: (setup.gateway.running, setup.gateway.waiting) == (1, 1))
        await setup.reload(discover=False, slots=1)
        assert (await setup.chat("mistral:7b")).status_code == 404
        assert await setup.listed() == ["standard", "gpt-4o"]
        first, second = await runs.reply(), await waits.reply()
        assert (first.status, first.error, second.status, second.error) == (200, None, 200, None)
    await until(lambda: not setup.gateway.gateway._destinations.past)
    await until(lambda: not setup.gateway.gateway._discovery._leaving)
    assert "mistral:7b" not in str(kept_for(setup))
    await setup.reload()
    assert "mistral:7b" in await setup.listed()
    assert (await setup.chat("mistral:7b")).status_code == 200


async def test_a_backend_that_only_discovery_uses_is_probed_from_the_reload_on() -> None:
    async with discovering(discover=False) as setup:
        assert await setup.listed() == ["standard", "gpt-4o"]
        await setup.reload()
        assert await setup.listed() == ["standard", "gpt-4o", "base"]
        assert (await setup.chat("base")).status_code == 200


async def test_a_tier_that_takes_over_a_discovered_model_serves_it(setup: Discovering) -> None:
    await setup.pull(PULLED)
    assert (await setup.chat("mistral:7b")).headers["x-gateway-tier"] == "none"
    await setup.reload(tiers={"new": {"models": {"ollama": "mistral:7b"}}})
    assert (await setup.chat("mistral:7b")).headers["x-gateway-tier"] == "new"
    await setup.reload()
    assert (await setup.chat("mistral:7b")).headers["x-gateway-tier"] == "none"


async def test_a_long_list_of_models_is_cut_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    names = [f"adapter-{number}" for number in range(10_000)]
    async with discovering(vllm=tuple(Model(name) for name in names)) as setup:
        listed = await setup.listed()
        assert listed[2:] == names[:MAX_DISCOVERED]
        for _ in range(3):
            await setup.probed()
        assert [line for line in caplog.messages if "lists more than" in line] == [
            "backend vllm: it lists more than 1000 models, and only the first 1000 are discovered"
        ]
        assert (await setup.chat(names[-1])).status_code == 404
        assert (await setup.chat(names[0])).status_code == 200
        error = (await setup.chat("unknown")).json()["error"]["message"]
        assert error.endswith("'adapter-18', 'adapter-19' and 980 more.")
        assert len(error) < 1000


async def test_names_that_cannot_be_in_a_header_are_not_discovered() -> None:
    bad = [Model("two\r\nx-injected: lines"), Model("한국어"), Model(" blank"), Model("")]
    async with discovering(vllm=(Model("base"), *bad)) as setup:
        assert await setup.listed() == ["standard", "gpt-4o", "base"]
        for model in bad:
            assert (await setup.chat(model.name)).status_code in (400, 404)


async def test_models_that_the_settings_of_a_server_exclude_are_not_discovered() -> None:
    async with discovering(vllm=(Model("base"), Model("one"), Model("two"))) as setup:
        backends = setup.document()["backends"]
        vllm = {**backends["vllm"], "servers": [{"base_url": setup.vllm.base_url, "models": ["one"]}]}
        del vllm["base_url"]
        await setup.reload(backends={**backends, "vllm": vllm})
        assert await setup.listed() == ["standard", "gpt-4o", "one"]


async def test_details_of_many_models_are_asked_for_in_several_probes() -> None:
    models = [Model(f"model-{number}", vision=True) for number in range(40)]
    async with discovering(*models) as setup:
        discovery = setup.gateway.gateway._discovery
        assert (
            len(
                [found for found in discovery.models.values() if found.route.backend == "ollama" and found.capabilities]
            )
            < 40
        )
        assert (await setup.chat("model-39")).status_code == 200
        await until(lambda: all(f.capabilities for f in discovery.models.values() if f.route.backend == "ollama"))


@pytest.mark.parametrize("dies_first", [True, False])
async def test_request_queued_for_a_dead_replaced_backend_is_served_by_the_new_one(dies_first: bool) -> None:
    def settings(backend: FaultBackend) -> config.Settings:
        more = {**TIMES, "probe_interval": 0.02, "max_concurrency": 1, "discover": True}
        return config.build(
            {
                "llm_backend": "ollama",
                "backends": {"ollama": {"base_url": backend.base_url, **more}},
                "tiers": {"standard": {"models": {"ollama": "absent"}}},
                "state_file": "",
            }
        )

    body = {"model": MODEL}
    async with FaultBackend("ollama") as old, FaultBackend("ollama") as new, running(settings(old)) as gateway:
        old.script.append("silent")
        reconfiguration, circuit = (
            gateway.gateway._reconfiguration,
            gateway.gateway._backends["ollama"].servers[0].circuit,
        )
        async with gateway.sent(body) as first, gateway.sent(body) as second:
            await until(lambda: (gateway.running, gateway.waiting) == (1, 1))
            if dies_first:
                old.die()
                await until(lambda: circuit.is_open)
                await reconfiguration.apply(settings(new))
            else:
                await reconfiguration.apply(settings(new))
                old.die()
            assert (await first.reply()).status == 502
            reply = await second.reply()
            assert (reply.status, reply.text) == (200, TEXT)
        assert len(new.requests) == 1
        await until(lambda: not gateway.gateway._destinations.past)


async def test_the_guard_does_not_observe_discovered_models() -> None:
    async with discovering(PULLED, guard={}) as setup:
        assert (await setup.chat("mistral:7b")).status_code == 200
        assert (await setup.chat("standard")).status_code == 200
        setup.gateway.gateway.settle()
        guard = setup.gateway.gateway._operations._guard
        assert guard is not None
        assert [tier for tier, _ in guard._recent] == ["standard"]


async def test_a_replaced_model_is_described_anew(setup: Discovering) -> None:
    await setup.pull(Model("mine", embedding=8))
    assert (await setup.chat("mine")).status_code == 404
    await setup.remove_all(Model("mine"))
    await setup.pull(Model("mine"))
    assert (await setup.chat("mine")).status_code == 200
    assert (await setup.post("/api/embed", "mine", input="Hello?")).status_code == 404


async def test_several_choices_come_from_the_discovered_model() -> None:
    async with discovering(PULLED) as setup:
        answer = await setup.chat("mistral:7b", n=3)
        assert (answer.status_code, len(answer.json()["choices"])) == (200, 3)
        setup.gateway.gateway.settle()
        assert setup.gateway.metric("gateway_requests_total", tier="none", backend="ollama", outcome="ok") >= 1
        assert setup.gateway.metric("gateway_requests_total", tier="standard") == 0
