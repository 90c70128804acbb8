"""Roll-out routes on real sockets: access, validation, effect on requests, and restarts."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import config, simulate
from gateway.rollout.assignment import Assignment
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import PATIENCE, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in

pytestmark = pytest.mark.uvloop

ADMIN = "admin-key"
ADMIN_ID = "69a52655"
VLLM_MODEL, OLLAMA_MODEL = "Qwen/Qwen3-VL-8B-Instruct", "qwen3-vl"
MANY = 500


class TwoEngines:
    """Two stand-ins, and gateways in front of them, one after the other."""

    def __init__(self, vllm: simulate.Running, ollama: simulate.Running) -> None:
        self.vllm = vllm
        self.ollama = ollama

    def settings(self, **changes: Any) -> config.Settings:
        models = {"vllm": VLLM_MODEL, "ollama": OLLAMA_MODEL}
        limits = {"max_concurrency": MANY, "model_concurrency": MANY, "vision_concurrency": MANY}
        document: dict[str, Any] = {
            "llm_backend": "ollama",
            "backends": {
                "vllm": {"kind": "vllm", "base_url": self.vllm.base_url, **limits},
                "ollama": {"kind": "ollama", "base_url": self.ollama.base_url, **limits},
                "cloud": {"kind": "openai", "base_url": "http://127.0.0.1:1"},
            },
            "tiers": {
                "standard": {"models": models},
                "pro": {"models": {**models, "cloud": "huge"}},
                "pinned": {"models": models, "backend": "ollama"},
            },
            "state_file": "",
        }
        return config.build(document | changes)

    @asynccontextmanager
    async def gateway(self, **changes: Any) -> AsyncIterator["Operator"]:
        async with running(self.settings(**changes)) as gateway:
            headers = {"authorization": f"Bearer {ADMIN}"} if "admin_key" in changes else {}
            async with httpx2.AsyncClient(
                base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False, headers=headers
            ) as client:
                yield Operator(gateway, client)


class Operator:
    def __init__(self, gateway: Running, client: httpx2.AsyncClient) -> None:
        self.gateway = gateway
        self.client = client

    async def put(self, **order: Any) -> dict[str, Any]:
        return answer_of(await self.client.put("/ops/rollout", json=order))

    async def rollback(self, **order: Any) -> dict[str, Any]:
        return answer_of(
            await self.client.post("/ops/rollback", json=order) if order else await self.client.post("/ops/rollback")
        )

    async def undo(self) -> dict[str, Any]:
        return answer_of(await self.client.post("/ops/undo"))

    async def side(self, tier: str = "standard", **more: Any) -> str:
        """Send a request and return the backend that served it."""
        reply = await self.gateway.ask({"model": tier, **more})
        assert reply.status == 200
        return reply.headers["x-gateway-backend"]

    async def tiers(self) -> dict[str, Any]:
        tiers: dict[str, Any] = answer_of(await self.client.get("/ops/rollout"))["tiers"]
        return {name: {"backend": tier["backend"], "canary": tier["canary"]} for name, tier in tiers.items()}


def answer_of(answer: httpx2.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def error_of(answer: httpx2.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return answer.status_code, error["code"], error["param"]


def on(backend: str, canary: str | None = None, percent: float = 0) -> dict[str, Any]:
    return {"backend": backend, "canary": None if canary is None else {"backend": canary, "percent": percent}}


@pytest.fixture
async def engines() -> AsyncIterator[TwoEngines]:
    vllm = simulate.Options(
        "vllm", (simulate.Model(VLLM_MODEL, vision=True),), max_num_seqs=MANY, tokens_per_second=100
    )
    ollama = simulate.Options(
        "ollama", (simulate.Model(OLLAMA_MODEL, vision=True),), parallel=MANY, tokens_per_second=100
    )
    async with AsyncExitStack() as stack:
        yield TwoEngines(
            await stack.enter_async_context(stand_in(vllm)), await stack.enter_async_context(stand_in(ollama))
        )


# Changes


async def test_next_request_goes_to_the_backend_that_was_set(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        assert [await operator.side(), await operator.side("pinned")] == ["ollama", "ollama"]
        answer = await operator.put(backend="vllm")
        assert (answer["changed"], answer["tiers"]["standard"]["backend"], answer["unmoved"]) == (True, "vllm", {})
        assert [await operator.side(), await operator.side("pro"), await operator.side("pinned")] == [
            "vllm",
            "vllm",
            "ollama",
        ]
        assert (await operator.rollback())["changed"]
        assert await operator.side() == "ollama"
        assert not (await operator.rollback())["changed"]
        await operator.undo()
        assert await operator.side() == "vllm"


async def test_rollback_of_one_tier_and_to_another_backend(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        await operator.put(backend="cloud", tier="PRO")
        answer = await operator.rollback(to="vllm", tier="pro")
        assert await operator.tiers() == {"standard": on("ollama"), "pro": on("vllm"), "pinned": on("ollama")}
        assert answer["rollback_to"] == "ollama"
        answer = await operator.rollback(to="cloud")
        assert answer["unmoved"] == {"standard": "it has no model on cloud"}


async def test_conflict_changes_nothing(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        for order in (
            {"backend": "cloud"},
            {"backend": "vllm", "tier": "pinned"},
            {"canary": {"backend": "cloud", "percent": 5}},
        ):
            assert error_of(await operator.client.put("/ops/rollout", json=order))[:2] == (409, "conflict")
        assert await operator.tiers() == dict.fromkeys(("standard", "pro", "pinned"), on("ollama"))


@pytest.mark.parametrize(
    ("order", "code", "param"),
    [
        (b"", "invalid_json", None),
        (b"{", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b'"vllm"', "invalid_json", None),
        (b"\xff", "invalid_json", None),
        (b"[" * 30000, "invalid_json", None),
        (b"{}", "invalid_value", "backend"),
        (b'{"backend": 5}', "invalid_value", "backend"),
        (b'{"backend": "nowhere"}', "invalid_value", "backend"),
        (b'{"backend": "vllm", "secret-word": 1}', "invalid_value", None),
        (b'{"backend": "vllm", "canary": {"backend": "ollama"}}', "invalid_value", "canary.percent"),
        (b'{"backend": "vllm", "canary": {"backend": "ollama", "percent": "10"}}', "invalid_value", "canary.percent"),
        (b'{"backend": "vllm", "canary": {"backend": "ollama", "percent": 101}}', "invalid_value", "canary.percent"),
        (b'{"backend": "vllm", "canary": {"backend": "ollama", "percent": true}}', "invalid_value", "canary.percent"),
        (
            b'{"backend": "vllm", "canary": {"backend": "ollama", "percent": 10, "secret-word": 1}}',
            "invalid_value",
            "canary",
        ),
        (b'{"backend": "vllm", "canary": {"backend": "vllm", "percent": 10}}', "invalid_value", "canary.backend"),
        (b'{"backend": "vllm", "tier": "secret-word"}', "invalid_value", "tier"),
    ],
    ids=[
        "empty",
        "broken JSON",
        "array",
        "string",
        "not UTF-8",
        "deep nesting",
        "no field",
        "backend not a string",
        "unknown backend",
        "unknown field",
        "canary without percent",
        "percent as a string",
        "percent over 100",
        "percent as a boolean",
        "unknown field of the canary",
        "canary on the same backend",
        "unknown tier",
    ],
)
async def test_invalid_body_is_400(engines: TwoEngines, order: bytes, code: str, param: str | None) -> None:
    async with engines.gateway() as operator:
        answer = await operator.client.put("/ops/rollout", content=order, headers={"content-type": "application/json"})
        assert error_of(answer) == (400, code, param)
        assert "secret-word" not in answer.text
        assert not operator.gateway.gateway.rollout.history


async def test_bodies_of_rollback_and_undo_are_validated(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        for path, order in (
            ("rollback", {"tier": "no"}),
            ("rollback", {"to": "no"}),
            ("rollback", {"x": 1}),
            ("undo", {"tier": "pro"}),
        ):
            assert error_of(await operator.client.post(f"/ops/{path}", json=order))[:2] == (400, "invalid_value")
        assert (await operator.client.post("/ops/undo", json={})).status_code == 200


async def test_bodies_must_be_json_and_small(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        order = json.dumps({"backend": "vllm"})
        for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            for method, path in (("PUT", "rollout"), ("POST", "rollback")):
                answer = await operator.client.request(
                    method, f"/ops/{path}", content=order, headers={"content-type": media_type}
                )
                assert error_of(answer)[:2] == (415, "unsupported_media_type")
        assert error_of(await operator.client.put("/ops/rollout", json={"backend": "v" * 70000}))[0] == 413
        wrong = await operator.client.delete("/ops/rollout")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, PUT")


async def test_disconnect_during_the_body_changes_nothing_and_logs_no_error(
    engines: TwoEngines, caplog: pytest.LogCaptureFixture
) -> None:
    async with engines.gateway() as operator:
        reader, writer = await asyncio.open_connection("127.0.0.1", operator.gateway.port)
        head = b"PUT /ops/rollout HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        writer.write(head + b'Content-Length: 19\r\n\r\n{"backend": "vllm"')
        server = operator.gateway.server.server_state
        await until(lambda: bool(server.tasks))
        writer.close()
        await until(lambda: not server.tasks)
        assert not operator.gateway.gateway.rollout.history
        assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []
        assert not await reader.read()


# Access

CALLS = (("GET", "rollout"), ("PUT", "rollout"), ("POST", "rollback"), ("POST", "undo"))


async def test_web_page_in_a_local_browser_cannot_change_the_roll_out(engines: TwoEngines) -> None:
    """A browser sends the origin of the page; after DNS rebinding, Host has the page's name."""
    async with engines.gateway() as operator:
        await operator.put(backend="vllm")
        for method, path in CALLS:
            for headers in (
                {"origin": "http://evil.example"},
                {"origin": "null"},
                {"host": "evil.example"},
                {"x-forwarded-for": "127.0.0.1"},
            ):
                body = {"content": b'{"backend": "ollama"}'} if method == "PUT" else {}
                answer = await operator.client.request(
                    method, f"/ops/{path}", headers={"content-type": "text/plain", **headers}, **body
                )  # type: ignore[arg-type]
                assert error_of(answer)[:2] == (403, "forbidden")
        assert (await operator.client.get("/ops/rollout")).json()["tiers"]["standard"]["backend"] == "vllm"


async def test_admin_key_is_required_and_its_id_is_recorded(engines: TwoEngines) -> None:
    async with engines.gateway(admin_key=ADMIN, api_keys=["client-key"], metrics_key="scraper-key") as operator:
        for method, path in CALLS:
            for key in ("client-key", "scraper-key", "wrong"):
                answer = await operator.client.request(
                    method, f"/ops/{path}", headers={"authorization": f"Bearer {key}"}
                )
                assert error_of(answer)[:2] == (401, "invalid_api_key")
        (change,) = (await operator.put(backend="vllm", tier="standard"))["history"]
        assert (change["cause"], change["by"]) == ("operator", ADMIN_ID)
        assert change["tiers"] == {"standard": {"from": on("ollama"), "to": on("vllm")}}


# Canary


async def test_conversation_stays_on_its_side_of_the_canary_and_the_share_is_shown(engines: TwoEngines) -> None:
    async with engines.gateway(session_header="x-chat-id") as operator:
        await operator.put(backend="ollama", canary={"backend": "vllm", "percent": 30})

        async def side(**headers: str) -> str:
            body = {"model": "standard", "max_tokens": 1, "messages": [{"role": "user", "content": "Hello"}]}
            answer = await operator.client.post("/v1/chat/completions", json=body, headers=headers)
            return answer.headers["x-gateway-backend"]

        first = {name: await side(**{"x-gateway-session": name}) for name in map(str, range(40))}
        assert set(first.values()) == {"vllm", "ollama"}
        assert first == {name: await side(**{"x-chat-id": name}) for name in first}
        assert first["7"] == await side(**{"x-gateway-session": "7", "x-chat-id": "8"})
        status = (await operator.client.get("/ops/status")).json()["tiers"]["standard"]
        served = sum(backend == "vllm" for backend in first.values()) * 2 + (first["7"] == "vllm")
        assert status["share"] == {"requests": 81, "canary_requests": served, "percent": round(100 * served / 81, 2)}
        assert status["canary"] == {"backend": "vllm", "percent": 30}
        await operator.put(backend="ollama", canary={"backend": "vllm", "percent": 60})
        second = {name: await side(**{"x-gateway-session": name}) for name in first}
        assert all(second[name] == "vllm" for name in first if first[name] == "vllm")
        await operator.rollback()
        assert {await side(**{"x-gateway-session": name}) for name in first} == {"ollama"}


async def test_without_a_session_the_first_messages_decide_the_side(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        await operator.put(canary={"backend": "vllm", "percent": 50})
        seen = set()
        for word in "abcdefghij":
            question = {"role": "user", "content": word}
            later = [question, {"role": "assistant", "content": "Hm"}, {"role": "user", "content": "And?"}]
            first = await operator.side(messages=[question], max_tokens=1)
            assert first == await operator.side(messages=later, max_tokens=1)
            seen.add(first)
        assert seen == {"vllm", "ollama"}


async def test_request_whose_images_are_being_checked_follows_a_roll_out_change(
    engines: TwoEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request arrived before the change, but has not been sent to a backend yet.

    After the response to the change, no request may begin on the previous backend.
    """
    async with engines.gateway() as operator:
        images = operator.gateway.gateway._images
        checking, go_on, really = asyncio.Event(), asyncio.Event(), images.checked

        async def checked(*args: Any) -> Any:
            checking.set()
            await go_on.wait()
            return await really(*args)

        monkeypatch.setattr(images, "checked", checked)
        content = [{"type": "image_url", "image_url": {"url": png_data_url()}}, {"type": "text", "text": "What is it?"}]
        asked = asyncio.create_task(operator.side(messages=[{"role": "user", "content": content}]))
        await checking.wait()
        await operator.put(backend="vllm")
        go_on.set()
        assert await asked == "vllm"


# Metrics, log and status


async def test_changes_are_counted_logged_and_shown(engines: TwoEngines, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    async with engines.gateway() as operator:
        await operator.put(backend="ollama", canary={"backend": "vllm", "percent": 10}, tier="standard")
        await operator.put(backend="vllm")
        await operator.rollback()
        metric = operator.gateway.metric
        there, back = (
            {"from_backend": one, "to_backend": other, "cause": "operator"}
            for one, other in (("ollama", "vllm"), ("vllm", "ollama"))
        )
        assert metric("gateway_switches_total", tier="standard", **there) == 2
        assert metric("gateway_switches_total", tier="pro", **there) == 1
        assert metric("gateway_switches_total", tier="standard", **back) == 1
        await operator.put(backend="vllm", tier="pro")
        assert (await operator.client.get("/metrics")).status_code == 200
        active = {
            tier: metric("gateway_active_backend", tier=tier, backend="vllm") for tier in ("standard", "pro", "pinned")
        }
        assert active == {"standard": 0, "pro": 1, "pinned": 0}
        assert "roll-out changed (operator by local): standard from ollama to ollama with 10 % on vllm" in caplog.text
        history = (await operator.client.get("/ops/status")).json()["rollout"]["history"]
        assert [list(change["tiers"]) for change in history] == [
            ["pro"],
            ["standard", "pro"],
            ["standard", "pro"],
            ["standard"],
        ]


async def test_openapi_document_has_the_paths_and_their_bodies(engines: TwoEngines) -> None:
    async with engines.gateway() as operator:
        described = (await operator.client.get("/openapi.json")).json()
        assert {"get", "put"} == set(described["paths"]["/ops/rollout"])
        for path, name in (("rollback", "RollbackBody"), ("undo", "EmptyBody")):
            body = described["paths"][f"/ops/{path}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
            assert body == {"$ref": f"#/components/schemas/{name}"}
        assert set(described["components"]["schemas"]["RolloutBody"]["properties"]) == {"backend", "canary", "tier"}
        page = (await operator.client.get("/docs")).text
        assert "/ops/rollback" in page


# Restarts


async def test_roll_out_survives_a_restart(
    engines: TwoEngines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = str(tmp_path / "state.json")
    async with engines.gateway(state_file=file) as operator:
        answer = await operator.put(backend="vllm", canary={"backend": "ollama", "percent": 20}, tier="standard")
        assert answer["persisted"]
        before_restart = await operator.tiers()
    async with engines.gateway(state_file=file) as operator:
        assert await operator.tiers() == before_restart
        assert "LLM_BACKEND is ollama, but the roll-out that was set" in caplog.text
        assert (await operator.rollback())["persisted"]
    caplog.clear()
    async with engines.gateway(state_file=file) as operator:
        assert await operator.side() == "ollama"
        assert "LLM_BACKEND" not in caplog.text


async def test_rollback_by_variable_and_restart_overrides_an_operators_change(
    engines: TwoEngines, tmp_path: Path
) -> None:
    file = str(tmp_path / "state.json")
    async with engines.gateway(llm_backend="vllm", state_file=file) as operator:
        assert await operator.side() == "vllm"
        await operator.put(backend="vllm", canary={"backend": "ollama", "percent": 1})
    async with engines.gateway(llm_backend="ollama", state_file=file) as operator:
        assert await operator.tiers() == dict.fromkeys(("standard", "pro", "pinned"), on("ollama"))
        assert (
            operator.gateway.metric(
                "gateway_switches_total", cause="start", tier="pro", from_backend="vllm", to_backend="ollama"
            )
            == 1
        )
    async with engines.gateway(llm_backend="vllm", state_file=file) as operator:
        assert await operator.tiers() == {"standard": on("vllm"), "pro": on("vllm"), "pinned": on("ollama")}


async def test_roll_out_ended_by_the_variable_does_not_return_with_the_old_value(
    engines: TwoEngines, tmp_path: Path
) -> None:
    file = str(tmp_path / "state.json")
    async with engines.gateway(llm_backend="vllm", state_file=file) as operator:
        await operator.rollback()
    async with engines.gateway(llm_backend="ollama", state_file=file):
        pass
    async with engines.gateway(llm_backend="vllm", state_file=file) as operator:
        assert (await operator.tiers())["standard"] == on("vllm")


async def test_change_that_cannot_be_persisted_takes_effect_and_says_so(engines: TwoEngines, tmp_path: Path) -> None:
    for file in ("", str(tmp_path / "nowhere" / "state.json")):
        async with engines.gateway(state_file=file) as operator:
            answer = await operator.put(backend="vllm")
            assert (answer["changed"], answer["persisted"]) == (True, False)
            assert await operator.side() == "vllm"
            assert not (await operator.rollback())["persisted"]
            assert await operator.side() == "ollama"


@pytest.mark.parametrize(
    "content",
    ['{"llm_gateway_state":1,"rollout":{"llm_ba', '{"theirs": true}', '{"llm_gateway_state":1,"rollout":{"x":1}}'],
    ids=["truncated", "foreign", "other fields"],
)
async def test_damaged_or_foreign_state_file_is_reported_and_the_settings_apply(
    engines: TwoEngines, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "state.json"
    file.write_text(content)
    async with engines.gateway(state_file=str(file)) as operator:
        assert await operator.side() == "ollama"
        assert "state file" in caplog.text
        assert (await operator.put(backend="vllm"))["changed"]


async def test_response_does_not_wait_for_a_hanging_disk(
    engines: TwoEngines, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.rollout.controller.PERSIST_SECONDS", 0.05)
    async with engines.gateway(state_file=str(tmp_path / "state.json")) as operator:
        state = operator.gateway.gateway._state
        disk = asyncio.Event()
        really = state.persisted

        async def persisted() -> bool:
            await disk.wait()
            return await really()

        monkeypatch.setattr(state, "persisted", persisted)
        assert not (await operator.put(backend="vllm"))["persisted"]
        disk.set()
        monkeypatch.setattr("gateway.rollout.controller.PERSIST_SECONDS", 20)
        assert (await operator.rollback())["persisted"]


# Under load


async def test_switching_back_and_forth_under_load_loses_no_request(engines: TwoEngines) -> None:
    """Streams and requests are in flight throughout.

    Every request sent after the response to a change goes to the new backend.
    """
    async with engines.gateway() as operator:
        gateway = operator.gateway
        over = asyncio.Event()

        async def client(tokens: int, stream: bool) -> list[Reply]:
            found = []
            while not over.is_set():
                messages = [{"role": "user", "content": "repeat la"}]
                found.append(
                    await gateway.ask(
                        {"model": "standard", "max_tokens": tokens, "stream": stream, "messages": messages}
                    )
                )
            return found

        clients = [asyncio.create_task(client(30, True)) for _ in range(20)] + [
            asyncio.create_task(client(2, False)) for _ in range(4)
        ]
        for turn in range(20):
            target = "vllm" if turn % 2 == 0 else "ollama"
            await until(lambda: len(gateway.live) >= 20)
            assert (await operator.put(backend=target) if turn % 4 != 3 else await operator.rollback())["changed"]
            after = await asyncio.gather(
                *(gateway.ask({"model": "standard", "max_tokens": 1, "stream": True}) for _ in range(3))
            )
            assert [reply.headers["x-gateway-backend"] for reply in after] == [target] * 3
            assert all(reply.error is None for reply in after)
        over.set()
        async with asyncio.timeout(30):
            replies = [reply for found in await asyncio.gather(*clients) for reply in found]
        assert {reply.status for reply in replies} == {200}
        assert {reply.headers["x-gateway-backend"] for reply in replies} == {"vllm", "ollama"}
        assert all(reply.events[-1] == "[DONE]" for reply in replies if reply.is_stream)
        assert (
            gateway.metric("gateway_requests_total", outcome="ok")
            == gateway.metric("gateway_requests_total")
            == len(replies) + 60
        )
        assert gateway.gateway.rollout.tiers["standard"].assignment == Assignment("ollama")
