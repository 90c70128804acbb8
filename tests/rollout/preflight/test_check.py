"""The check before a switch, on stand-ins that lack this or that and on backends that fail: what it says, what it costs, what it leaves alone."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from gateway.rollout.preflight.probes import KEY
from gateway.simulate.options import Fault
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import PATIENCE, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

NAME = "served"
ADMIN = "admin-key"
CAPABLE = simulate.Model(NAME, family="qwen3", vision=True, tools=True, context_length=8192)
CHAT_PATHS = ("/v1/chat/completions", "/api/chat")


class Checked:
    """A gateway whose tier `standard` is on Ollama, and what its preflight says of vLLM."""

    def __init__(
        self, gateway: Running, client: httpx2.AsyncClient, vllm: simulate.Running, ollama: simulate.Running
    ) -> None:
        self.gateway = gateway
        self.client = client
        self.vllm = vllm
        self.ollama = ollama

    async def check(self, backend: str = "vllm", seconds: float = PATIENCE, **more: str) -> "Report":
        answer = await self.client.post(
            "/ops/preflight", params={"backend": backend, "seconds": f"{seconds:g}", **more}
        )
        assert answer.status_code == 200, answer.text
        return Report(answer.json())


class Report:
    def __init__(self, body: dict[str, Any]) -> None:
        self.body = body

    def __repr__(self) -> str:
        return json.dumps(self.body, indent=1)

    @property
    def breaks(self) -> list[str]:
        return [item["what"] for item in self.body["findings"] if item["severity"] == "breaks"]

    @property
    def notices(self) -> list[str]:
        return [item["what"] for item in self.body["findings"] if item["severity"] == "notices"]

    def of(self, what: str, tier: str | None = "standard") -> dict[str, Any]:
        return next(item for item in self.body["findings"] if (item["what"], item["tier"]) == (what, tier))


def document(vllm: str, ollama: str, **changes: Any) -> dict[str, Any]:
    """Settings; under `backends` more for those that there are."""
    more = changes.pop("backends", {})
    backends = {"ollama": {"kind": "ollama", "base_url": ollama}, "vllm": {"kind": "vllm", "base_url": vllm}}
    return {
        "llm_backend": "ollama",
        "backends": {name: backend | more.get(name, {}) for name, backend in backends.items()},
        "tiers": {"standard": {"models": {"ollama": NAME, "vllm": NAME}}},
        "state_file": "",
        "log_format": "json",
        **changes,
    }


@asynccontextmanager
async def serving(settings: dict[str, Any]) -> AsyncIterator[tuple[Running, httpx2.AsyncClient]]:
    async with (
        running(config.build(settings)) as gateway,
        httpx2.AsyncClient(base_url=gateway.base_url, timeout=2 * PATIENCE, trust_env=False, verify=False) as client,
    ):
        yield gateway, client


@asynccontextmanager
async def before(
    vllm: simulate.Model = CAPABLE, ollama: simulate.Model = CAPABLE, **changes: Any
) -> AsyncIterator[Checked]:
    """`changes` are options of the vLLM where it has them, else of the settings."""
    of_vllm = {name: changes.pop(name) for name in list(changes) if name in simulate.Options.__dataclass_fields__}
    async with AsyncExitStack() as stack:
        one = await stack.enter_async_context(stand_in(simulate.Options("vllm", (vllm,), **of_vllm)))
        two = await stack.enter_async_context(stand_in(simulate.Options("ollama", (ollama,), gpu=True)))
        gateway, client = await stack.enter_async_context(serving(document(one.base_url, two.base_url, **changes)))
        yield Checked(gateway, client, one, two)


def generations(server: simulate.Running) -> int:
    return sum(request["path"] in CHAT_PATHS for request in server.engine.requests)


def model(**changes: Any) -> simulate.Model:
    return simulate.Model(
        **{"name": NAME, "family": "qwen3", "vision": True, "tools": True, "context_length": 8192, **changes}
    )


# What differs


async def test_sides_that_can_the_same_differ_in_nothing() -> None:
    async with before() as here:
        await here.gateway.ask()  # Ollama has it loaded
        report = await here.check()
        assert (report.body["breaks"], report.breaks, report.notices) == (False, [], [])
        asked = (
            "serves",
            "context",
            "streaming",
            "usage",
            "reasoning",
            "tools",
            "forced_tools",
            "structured_output",
            "vision",
            "parameters",
        )
        assert {what: report.of(what)["severity"] for what in asked} == dict.fromkeys(asked, "fine")
        assert (report.of("context")["value"], report.of("context")["other_value"]) == ("8192 tokens", "8192 tokens")
        assert report.body["tiers"] == {"standard": {"model": NAME, "other": "ollama", "other_model": NAME}}


@pytest.mark.parametrize(
    ("lacking", "breaks", "notices"),
    [
        ({"vision": False}, ["vision"], []),
        ({"tools": False}, [], []),
        ({"context_length": 4096}, [], ["context"]),
        ({"thinking": True}, [], ["reasoning"]),
    ],
    ids=str,
)
async def test_what_a_model_lacks_is_told(lacking: dict[str, Any], breaks: list[str], notices: list[str]) -> None:
    async with before(model(**lacking)) as here:
        await here.gateway.ask()
        report = await here.check()
        assert (report.breaks, report.notices) == (breaks, notices)


async def test_vllm_without_tool_parser_breaks_tools_and_says_what_to_do() -> None:
    async with before(tool_parser=False) as here:
        report = await here.check()
        assert "tools" in report.breaks
        assert "--enable-auto-tool-choice" in report.of("tools")["words"]


async def test_thought_is_split_off_only_with_a_reasoning_parser() -> None:
    for has_parser, value in ((True, "split off"), (False, "in the answer's text")):
        async with before(model(thinking=True), model(thinking=True), reasoning_parser=has_parser) as here:
            report = await here.check()
            assert report.of("reasoning")["value"] == value
            assert ("reasoning" in report.notices) is not has_parser


async def test_what_neither_side_has_breaks_nothing() -> None:
    plain = model(vision=False, tools=False)
    async with before(plain, plain, tool_parser=False) as here:
        report = await here.check()
        assert (report.breaks, report.of("vision")["severity"]) == ([], "fine")


async def test_model_that_is_not_there_breaks_and_what_is_there_is_named() -> None:
    async with before(model(name="another")) as here:
        report = await here.check()
        assert report.breaks == ["serves"]
        assert report.of("serves")["value"] == "has no such model; there is: another"
        assert generations(here.vllm) == 0


async def test_tier_without_a_model_there_breaks() -> None:
    async with before(
        tiers={"standard": {"models": {"ollama": NAME, "vllm": NAME}}, "ultra": {"models": {"ollama": NAME}}}
    ) as here:
        report = await here.check()
        assert report.of("serves", "ultra")["severity"] == "breaks"
        assert report.of("serves", "standard")["severity"] == "fine"
        assert not (await here.check(tier="STANDARD")).body["breaks"]


async def test_pinned_tier_is_left_out_and_named_when_asked_for() -> None:
    tiers = {name: {"models": {"ollama": NAME, "vllm": NAME}} for name in ("standard", "pinned")}
    async with before(tiers={**tiers, "pinned": {**tiers["pinned"], "backend": "ollama"}}) as here:
        assert list((await here.check()).body["tiers"]) == ["standard"]
        assert (await here.check(tier="pinned")).of("pinned", "pinned")["severity"] == "note"
        assert generations(here.vllm) == 6


async def test_stream_that_breaks_off_breaks() -> None:
    async with before() as here:
        here.vllm.engine.inject(Fault("truncate", after=3))
        report = await here.check()
        assert report.breaks == ["streaming"]
        assert report.of("streaming")["value"] == "breaks off (fails (truncated))"


async def test_backend_that_fails_every_request_breaks_and_keeps_its_circuit() -> None:
    async with before() as here:
        here.vllm.engine.inject(Fault("status", times=0, status=500))
        for _ in range(4):
            assert (await here.check()).breaks == ["serves"]
        status = (await here.client.get("/ops/status")).json()
        assert status["backends"]["vllm"]["servers"][0]["circuit"] == "closed"


async def test_sleeping_vllm_breaks_and_is_not_asked() -> None:
    async with before(asleep=True) as here:
        assert (await here.check()).of("serves")["value"] == "asleep"
        assert generations(here.vllm) == 0


async def test_parameter_that_a_tier_drops_is_not_judged() -> None:
    tiers = {
        "standard": {
            "models": {"ollama": NAME, "vllm": NAME},
            "params": {"drop": ["tools", "tool_choice", "response_format"]},
        }
    }
    async with before(tool_parser=False, tiers=tiers) as here:
        report = await here.check()
        assert report.breaks == []
        assert {report.of(what)["value"] for what in ("tools", "forced_tools", "structured_output")} == {
            "the tier drops it"
        }


# What it costs, and what it leaves alone


async def test_ollama_that_is_left_is_not_asked_for_a_token_and_loads_nothing() -> None:
    async with before() as here:
        report = await here.check()
        assert generations(here.ollama) == 0
        assert report.of("rollback")["value"] == "not loaded"
        assert "waits" in report.of("rollback")["words"]
        assert report.of("gpu", None)["severity"] == "note"
        assert "perhaps on one GPU" in report.of("gpu", None)["words"]


async def test_ollama_that_is_to_serve_is_loaded_and_that_is_said() -> None:
    async with before(llm_backend="vllm") as here:
        report = await here.check("ollama")
        assert report.breaks == []
        assert "was not loaded, and has been for this check" in report.of("servers")["words"]
        assert report.of("context")["value"] == "8192 tokens"
        again = await here.check("ollama")
        assert all(item["what"] != "servers" for item in again.body["findings"])


async def test_models_that_do_not_fit_an_ollama_together_are_told() -> None:
    models = [model(name=name) for name in ("one", "two")]
    async with (
        stand_in(simulate.Options("ollama", tuple(models), max_loaded=1)) as ollama,
        stand_in(simulate.Options("vllm", (model(name="any"),))) as vllm,
    ):
        tiers = {name: {"models": {"vllm": "any", "ollama": name}} for name in ("one", "two")}
        async with serving(document(vllm.base_url, ollama.base_url, tiers=tiers, llm_backend="vllm")) as (
            gateway,
            client,
        ):
            report = await Checked(gateway, client, vllm, ollama).check("ollama")
            assert report.breaks == []
            assert "it is not any more" in report.of("servers", "one")["words"]
            assert "it is not any more" not in report.of("servers", "two")["words"]


async def test_tiers_with_one_model_share_the_requests_which_are_few() -> None:
    tiers = {name: {"models": {"ollama": NAME, "vllm": NAME}} for name in ("standard", "pro", "ultra")}
    async with before(tiers=tiers) as here:
        report = await here.check()
        assert {report.of("vision", tier)["value"] for tier in tiers} == {"yes"}
        assert generations(here.vllm) == 6
        assert here.vllm.engine.generation_tokens < 150


async def test_nothing_is_counted_moved_or_kept() -> None:
    async with before() as here:
        await here.check()
        assert here.gateway.metric("gateway_requests_total") == 0
        assert [line for line in here.gateway.exchanges() if line["event"] == "exchange"] == []
        assert str(here.gateway.gateway.rollout) == "ollama"
        assert here.gateway.is_idle()


async def test_full_backend_is_no_reason_against_it_and_clients_go_first() -> None:
    backends = {"vllm": {"max_concurrency": 1}}
    async with before(tokens_per_second=50.0, llm_backend="vllm", backends=backends) as here:
        long = {"stream": True, "messages": [{"role": "user", "content": "say 5000 words"}], "max_tokens": 5000}
        async with here.gateway.sent(long) as raw:
            await raw.head()
            report = await here.check("vllm", seconds=1)
            assert report.breaks == []
            assert report.of("serves")["value"] == "busy: no slot came free in time"
            assert (here.gateway.waiting, generations(here.vllm)) == (0, 1)


# What never ends


@asynccontextmanager
async def failing(mode: str, **changes: Any) -> AsyncIterator[tuple[Running, httpx2.AsyncClient, FaultBackend]]:
    async with FaultBackend("vllm", mode) as vllm, FaultBackend("ollama") as ollama:
        tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}}
        async with serving(document(vllm.base_url, ollama.base_url, tiers=tiers, **changes)) as (gateway, client):
            yield gateway, client, vllm


async def test_backend_that_hangs_breaks_in_the_time_given_and_is_let_go() -> None:
    async with failing("silent") as (gateway, client, vllm):
        body = (await client.post("/ops/preflight?backend=vllm&seconds=1")).json()
        assert [item["value"] for item in body["findings"] if item["what"] == "serves"] == ["no first piece in time"]
        assert 0.9 < body["seconds"] < 2.5
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_vllm_whose_engine_hangs_in_everything_is_not_taken_for_busy() -> None:
    """Stopped by a signal, say: it takes connections and says nothing more."""

    async def silence(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with await asyncio.start_server(silence, "127.0.0.1", 0) as hangs, FaultBackend("ollama") as ollama:
        url = f"http://127.0.0.1:{hangs.sockets[0].getsockname()[1]}"
        tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}}
        async with serving(document(url, ollama.base_url, tiers=tiers)) as (gateway, client):
            server = gateway.gateway._backends["vllm"].servers[0]
            await until(lambda: server.circuit.is_open)
            server.circuit.probe_answered()
            server.circuit.probe_answered()
            server.up = True  # as it was before it stopped
            body = (await client.post("/ops/preflight?backend=vllm&seconds=1")).json()
            assert [item["value"] for item in body["findings"] if item["what"] == "serves"] == [
                "no first piece in time"
            ]
            assert body["seconds"] < 2.5


async def test_backend_that_the_probes_find_dead_meanwhile_is_not_waited_for() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        gateway.gateway._backends["vllm"].servers[0].circuit.probe_missed(is_sure=True)
        assert (await check).json()["breaks"]
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_backend_that_is_dead_breaks_at_once() -> None:
    async with failing("healthy") as (_, client, vllm):
        vllm.die()
        body = (await client.post("/ops/preflight?backend=vllm")).json()
        assert body["breaks"]
        assert body["seconds"] < 2


@pytest.mark.parametrize("mode", ["close", "rst", "garbage", "html", "truncated", "redirect", "flood", "big_header"])
async def test_every_kind_of_rubbish_breaks_and_leaves_nothing(mode: str) -> None:
    async with failing(mode) as (gateway, client, _):
        body = (await client.post("/ops/preflight?backend=vllm&seconds=3")).json()
        assert body["breaks"]
        await until(gateway.is_idle)


async def test_caller_that_leaves_ends_the_check() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        check.cancel()
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_gateway_that_stops_does_not_wait_for_a_check() -> None:
    async with failing("silent") as (gateway, client, vllm):
        check = asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60"))
        await until(lambda: len(vllm.open_peers) == 1)
        gateway.gateway.begin_drain()
        answer = await check
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "shutting_down")


@pytest.mark.parametrize(
    "others",
    [
        {"backends": {"vllm": {"api_key": "other"}}},
        {"llm_backend": "ollama", "tiers": {"else": {"models": {"ollama": MODEL}}}},
    ],
)
async def test_check_that_other_settings_overtake_ends_and_says_so(others: dict[str, Any]) -> None:
    """It could only tell of servers, or tiers, that are not there any more."""
    async with failing("silent") as (gateway, client, vllm):
        checks = [asyncio.create_task(client.post("/ops/preflight?backend=vllm&seconds=60")) for _ in range(2)]
        await until(lambda: len(vllm.open_peers) == 1)
        settings = config.build(document(vllm.base_url, vllm.base_url, **others))
        await gateway.gateway.reload.run(lambda: settings, "file")
        for answer in await asyncio.gather(*checks):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "conflict")
        await until(lambda: not vllm.open_peers and gateway.is_idle())


async def test_second_caller_waits_for_the_first() -> None:
    async with before() as here:
        await asyncio.gather(*(here.check() for _ in range(3)))
        assert generations(here.vllm) == 18
    async with failing("silent") as (_, client, vllm):
        await asyncio.gather(*(client.post("/ops/preflight?backend=vllm&seconds=1") for _ in range(2)))
        assert vllm.most_at_once == 1


# The call


async def test_call_wants_the_admin_key_and_right_words() -> None:
    async with before(admin_key=ADMIN) as here:
        assert (await here.client.post("/ops/preflight")).status_code == 401
        here.client.headers["authorization"] = f"Bearer {ADMIN}"
        for words, param in (
            ("backend=nowhere", "backend"),
            ("tier=none", "tier"),
            ("seconds=0", "seconds"),
            ("seconds=nan", "seconds"),
            ("seconds=x", "seconds"),
        ):
            answer = await here.client.post(f"/ops/preflight?{words}")
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        answer = await here.client.get("/ops/preflight")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


async def test_without_a_name_it_is_the_backend_that_is_not_the_way_back() -> None:
    async with before() as here:
        assert (await here.client.post("/ops/preflight")).json()["backend"] == "vllm"
    async with before(llm_backend="vllm", rollback_to="vllm") as here:
        assert (await here.client.post("/ops/preflight")).json()["backend"] == "ollama"


async def test_side_that_serves_already_is_compared_with_the_way_back() -> None:
    async with before(llm_backend="vllm") as here:
        report = await here.check()
        assert report.of("vision")["other"] == "ollama"


def test_key_in_the_line_is_no_callers() -> None:
    assert len(KEY) != 8
    assert not set(KEY) <= set("0123456789abcdef")
