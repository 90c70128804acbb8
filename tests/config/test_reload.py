"""Settings that change while the gateway runs: they apply between two requests."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from gateway import config
from gateway.config import ConfigError, Settings, reload
from gateway.config.reload import FileWatcher
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import Running, request_bytes, running, until

pytestmark = pytest.mark.uvloop

TIMES = {
    "connect_timeout": 20,
    "first_token_timeout": 20,
    "idle_timeout": 20,
    "total_timeout": 60,
    "queue_timeout": 20,
    "probe_interval": 60,
}


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.relay.destinations.CHECK_SECONDS", 0.01)
    monkeypatch.setattr(reload, "STABLE_SECONDS", 0.1)
    monkeypatch.setattr(reload, "LOOK_SECONDS", 0.2)
    monkeypatch.setattr(reload, "STEP_SECONDS", 0.05)


class Setup:
    """A gateway in front of an `ollama` and a `vllm`, whose settings the test changes."""

    def __init__(self, ollama: FaultBackend, vllm: FaultBackend) -> None:
        self.ollama = ollama
        self.vllm = vllm
        self.gateway: Running

    def document(self, **more: Any) -> dict[str, Any]:
        """Return settings; `ollama` and `vllm` go into the backends, the rest to the top level."""
        backends = {
            kind: {"kind": kind, "servers": [{"base_url": backend.base_url, "models": [MODEL, "other"]}], **TIMES}
            | more.pop(kind, {})
            for kind, backend in (("ollama", self.ollama), ("vllm", self.vllm))
        }
        document = {
            "llm_backend": "ollama",
            "backends": backends,
            "tiers": {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}},
            "log_format": "json",
            "state_file": "",
        }
        return document | more

    async def change(self, **more: Any) -> dict[str, Any]:
        """Reread the settings, and return what `/ops/status` reports about it."""
        await self.gateway.gateway.reload.run(lambda: config.build(self.document(**more)), "file")
        return self.outcome

    @property
    def outcome(self) -> dict[str, Any]:
        status = self.gateway.gateway._operations.status()
        json.dumps(status)
        return dict(status["reload"])

    @property
    def assignments(self) -> dict[str, str]:
        return {name: str(route.assignment) for name, route in self.gateway.gateway.rollout.tiers.items()}

    def is_settled(self) -> bool:
        """Return whether nothing is left of earlier settings."""
        gateway = self.gateway.gateway
        return not (
            gateway._reconfiguration._destinations.past
            or gateway._health.unused
            or gateway._reconfiguration._cleanup._leaving
        )

    async def exposition(self) -> str:
        return (await self.gateway.gateway._operations.exposition(""))[0].decode()


@asynccontextmanager
async def serving(**more: Any) -> AsyncIterator[Setup]:
    async with FaultBackend("ollama") as ollama, FaultBackend("vllm") as vllm:
        setup = Setup(ollama, vllm)
        async with running(config.build(setup.document(**more))) as gateway:
            setup.gateway = gateway
            yield setup


# Changes that apply at once


async def test_tiers_are_added_removed_and_changed_between_two_requests() -> None:
    async with serving() as setup:
        ask = setup.gateway.ask
        assert (await ask({"model": "pro"})).status == 404
        tiers = {
            "standard": {"models": {"ollama": "other", "vllm": MODEL}},
            "pro": {"models": {"ollama": MODEL}, "aliases": ["gpt-4o"]},
        }
        outcome = await setup.change(tiers=tiers)
        assert (outcome["ok"], outcome["cause"], outcome["reasons"], outcome["needs_restart"]) == (True, "file", [], [])
        assert outcome["changed"] == ["tiers.standard.models.ollama: 'other', was 'served-model'", "tiers.pro: new"]
        assert [(await ask({"model": name})).headers["x-gateway-model"] for name in ("standard", "gpt-4o")] == [
            "other",
            MODEL,
        ]
        await setup.change(tiers={"pro": tiers["pro"]})
        assert (await ask({"model": "standard"})).status == 404
        assert (await ask({"model": "pro"})).status == 200
        assert setup.assignments == {"pro": "ollama"}


async def test_everything_that_affects_routing_changes() -> None:
    """Rules of `auto`, a tier's parameters, embeddings, size limits, and the list of models."""
    async with serving() as setup:
        more = {
            "auto": [{"tier": "standard", "longer_than": 3}],
            "tiers": {
                "first": {"models": {"ollama": MODEL}},
                "standard": {"models": {"ollama": MODEL}, "max_tokens": 5},
            },
            "embeddings": {"e": {"backend": "vllm", "model": MODEL}},
            "rerankers": {"r": {"backend": "vllm", "model": "ranker"}},
            "max_text_body": "1KiB",
        }
        await setup.change(**more)
        reply = await setup.gateway.ask({"model": "auto"})
        assert (reply.headers["x-gateway-tier"], reply.headers["x-gateway-reason"]) == (
            "standard",
            "rule 1: longer_than=3",
        )
        assert b'"num_predict":5' in setup.ollama.requests[-1]
        assert (await setup.gateway.ask({"messages": [{"role": "user", "content": "x" * 2000}]})).status == 413
        assert [entry["id"] for entry in setup.gateway.gateway._operations.catalog.models()["data"]] == [
            "first",
            "standard",
            "e",
            "r",
        ]


async def test_log_level_changes_at_once() -> None:
    own, root = logging.getLogger("gateway"), logging.getLogger()
    levels = own.level, root.level
    try:
        async with serving() as setup:
            await setup.gateway.ask({})
            assert len(setup.gateway.exchanges()) == 1
            await setup.change(log_level="error")
            assert own.level == logging.ERROR
            await setup.gateway.ask({})
            assert len(setup.gateway.exchanges()) == 1
            await setup.change(log_level="info")
            await setup.gateway.ask({})
            assert len(setup.gateway.exchanges()) == 2
            assert own.level == logging.INFO
    finally:
        own.setLevel(levels[0])
        root.setLevel(levels[1])


def bearer(key: str) -> str:
    return f"Authorization: Bearer {key}"


async def test_client_keys_change_at_once_also_on_open_connections() -> None:
    old, new = "old-key-0123456789abc", "new-key-0123456789abc"
    async with serving(api_keys=[old]) as setup:
        reader, writer = await asyncio.open_connection("127.0.0.1", setup.gateway.port)

        async def status(key: str) -> bytes:
            """Return the status line of a request on the same connection."""
            writer.write(request_bytes({}, bearer(key)))
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().splitlines() if line.startswith(b"content-length:"))
            await reader.readexactly(int(length.partition(b":")[2]))
            return head.split()[1]

        async with asyncio.timeout(20):
            assert [await status(key) for key in (old, old, new)] == [b"200", b"200", b"401"]
            assert (await setup.change(api_keys=[new]))["changed"] == ["api_keys: changed"]
            assert [await status(key) for key in (old, new, new)] == [b"401", b"200", b"200"]
            outcome = await setup.change()
            assert (outcome["changed"], outcome["needs_restart"]) == ([], ["api_keys: changed"])
            assert [await status(key) for key in (old, new)] == [b"401", b"200"]
        writer.close()


async def test_new_limits_apply_to_queued_requests() -> None:
    async with (
        serving(ollama={"max_concurrency": 1, "model_concurrency": 1}) as setup,
        setup.gateway.sent({"stream": True}) as first,
    ):
        setup.ollama.script.extend(["slow"])
        await first.head()
        async with setup.gateway.sent({}) as second:
            await until(lambda: setup.gateway.waiting == 1)
            await setup.change(ollama={"max_concurrency": 2, "model_concurrency": 2})
            assert (await second.reply()).status == 200
        assert setup.gateway.running == 1
        await setup.change(ollama={"max_concurrency": 2, "model_concurrency": 2, "max_queue": 0, "queue_timeout": 0})
        async with setup.gateway.sent({}) as third:
            assert (await third.reply()).status == 200
        await setup.change(ollama={"max_concurrency": 1, "model_concurrency": 1, "max_queue": 0})
        reply = await setup.gateway.ask({})
        assert reply.error is not None
        assert (reply.status, reply.error["code"]) == (503, "queue_full")


async def test_limits_of_a_tier_change_and_its_old_queue_is_removed() -> None:
    def own(concurrency: int) -> dict[str, Any]:
        return {
            "tiers": {
                "standard": {
                    "models": {"vllm": MODEL, "ollama": MODEL},
                    "limits": {"vllm": {"concurrency": concurrency, "max_queue": 0}},
                }
            }
        }

    async with serving(llm_backend="vllm", **own(1)) as setup:
        setup.vllm.script.extend(["slow", "slow"])
        async with setup.gateway.sent({"stream": True}) as first:
            await first.head()
            assert (await setup.gateway.ask({})).status == 503
            await setup.change(llm_backend="vllm", **own(2))
            async with setup.gateway.sent({"stream": True}) as second:
                await second.head()
                assert (await setup.gateway.ask({})).status == 200
        await until(setup.is_settled)
        backend = setup.gateway.gateway._backends["vllm"]
        await until(lambda: len(backend.admission._queues) == 2)  # text and vision of the one tier


async def test_stream_continues_when_its_backend_is_replaced() -> None:
    """The address changes: running requests stay on the old server, new ones use the new one."""
    async with FaultBackend("ollama") as other, serving() as setup:
        setup.ollama.mode = "slow"
        async with setup.gateway.sent({"stream": True}) as stream:
            await stream.head()
            servers = [{"base_url": other.base_url}]
            outcome = await setup.change(ollama={"servers": servers})
            assert outcome["changed"] == ["backends.ollama.servers: changed"]
            old = len(setup.ollama.requests)
            assert (await setup.gateway.ask({})).status == 200
            assert (len(setup.ollama.requests), len(other.requests)) == (old, 1)
            for _ in range(20):
                await stream.reader.readuntil(b"word ")
            assert 'gateway_requests_running{backend="ollama",lane="text"} 1.0' in await setup.exposition()
            assert not setup.is_settled()
        await until(setup.is_settled)
        await until(lambda: not setup.ollama.open_peers)
        assert setup.gateway.running == 0


async def test_request_queued_for_a_replaced_backend_is_served_by_the_old_one() -> None:
    async with FaultBackend("ollama") as other, serving(ollama={"max_concurrency": 1}) as setup:
        setup.ollama.script.append("slow")
        async with setup.gateway.sent({"stream": True}) as stream:
            await stream.head()
            async with setup.gateway.sent({}) as waiting:
                await until(lambda: setup.gateway.waiting == 1)
                await setup.change(ollama={"servers": [{"base_url": other.base_url}]})
                stream.leave()
                assert (await waiting.reply()).status == 200
        assert not other.requests
        await until(setup.is_settled)


@pytest.mark.parametrize("dies_first", [True, False])
async def test_request_queued_for_a_dead_replaced_backend_is_served_by_the_new_one(dies_first: bool) -> None:
    """An operator replaces a server that is gone in this way."""
    async with FaultBackend("ollama") as other, serving(ollama={"max_concurrency": 1}) as setup:
        setup.ollama.script.append("silent")
        replacement = {"servers": [{"base_url": other.base_url}]}
        old = setup.gateway.gateway._backends["ollama"].servers[0]
        async with (
            setup.gateway.sent({}) as first,
            setup.gateway.sent({}) as second,
            setup.gateway.sent({"stream": True}) as third,
        ):
            await until(lambda: setup.gateway.waiting == 2)
            if dies_first:
                setup.ollama.die()
                await until(lambda: old.circuit.is_open)
                await setup.change(ollama=replacement)
            else:
                await setup.change(ollama=replacement)
                setup.ollama.die()
            assert (await first.reply()).status == 502
            for raw in (second, third):
                reply = await raw.reply()
                assert (reply.status, reply.text, reply.error) == (200, TEXT, None)
        assert len(other.requests) == 2
        await until(setup.is_settled)
        assert setup.gateway.metric("gateway_requests_total", outcome="ok") == 2


async def test_running_request_continues_when_its_tier_and_backend_are_removed() -> None:
    async with serving(llm_backend="vllm") as setup:
        setup.vllm.mode = "slow"
        async with setup.gateway.sent({"stream": True}) as stream:
            await stream.head()
            document = setup.document()
            del document["backends"]["vllm"]
            document["tiers"] = {"new": {"models": {"ollama": MODEL}}}
            await setup.gateway.gateway.reload.run(lambda: config.build(document), "file")
            assert setup.outcome["ok"]
            for _ in range(20):
                await stream.reader.readuntil(b"word ")
            assert (await setup.gateway.ask({"model": "new"})).status == 200
        await until(setup.is_settled)
        assert list(setup.gateway.gateway._backends) == ["ollama"]


async def test_fallback_follows_the_settings_of_the_start_of_the_request() -> None:
    tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}, "fallback": True}}
    async with serving(tiers=tiers, ollama={"max_concurrency": 1}) as setup:
        setup.ollama.script.extend(["slow", "rst"])
        async with setup.gateway.sent({"stream": True}) as stream:
            await stream.head()
            async with setup.gateway.sent({}) as waiting:
                await until(lambda: setup.gateway.waiting == 1)
                await setup.change(tiers={"new": {"models": {"ollama": MODEL}}})
                stream.leave()
                reply = await waiting.reply()
                assert (reply.status, reply.headers["x-gateway-backend"], reply.headers["x-gateway-attempts"]) == (
                    200,
                    "vllm",
                    "2",
                )
        await until(setup.is_settled)


async def test_request_whose_images_are_being_checked_is_routed_by_the_new_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as setup:
        setup.ollama.capabilities = setup.vllm.capabilities
        images = setup.gateway.gateway._images
        look, may_go, began = images.checked, asyncio.Event(), asyncio.Event()

        async def checked(*args: Any) -> Any:
            began.set()
            await may_go.wait()
            return await look(*args)

        monkeypatch.setattr(images, "checked", checked)
        content = [{"type": "image_url", "image_url": {"url": png_data_url()}}]
        async with setup.gateway.sent({"messages": [{"role": "user", "content": content}]}) as raw:
            await began.wait()
            await setup.change(tiers={"new": {"models": {"ollama": "other"}, "aliases": ["standard"]}})
            may_go.set()
            reply = await raw.reply()
            assert (reply.status, reply.headers["x-gateway-tier"], reply.headers["x-gateway-model"]) == (
                200,
                "new",
                "other",
            )


# The roll-out


async def test_switch_of_an_operator_survives_and_forced_moves_are_counted() -> None:
    async with serving() as setup:
        setup.gateway.gateway.rollout.set("vllm")
        tiers = {
            "standard": {"models": {"ollama": MODEL, "vllm": "other"}},
            "new": {"models": {"ollama": MODEL, "vllm": MODEL}},
        }
        await setup.change(tiers=tiers)
        assert setup.assignments == {"standard": "vllm", "new": "ollama"}
        assert (await setup.gateway.ask({})).headers["x-gateway-model"] == "other"
        await setup.change(tiers={"standard": {"models": {"ollama": MODEL}}})
        assert setup.assignments == {"standard": "ollama"}
        counted = setup.gateway.metric(
            "gateway_switches_total", tier="standard", from_backend="vllm", to_backend="ollama", cause="reload"
        )
        assert counted == 1
        assert setup.gateway.gateway._operations.status()["rollout"]["history"][0]["cause"] == "reload"


async def test_roll_out_survives_a_restart_after_a_reload(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    more: dict[str, Any] = {"state_file": str(tmp_path / "state.json")}
    tiers = {name: {"models": {"ollama": MODEL, "vllm": MODEL}} for name in ("standard", "new")}
    async with FaultBackend("ollama") as ollama, FaultBackend("vllm") as vllm:
        setup = Setup(ollama, vllm)
        async with running(config.build(setup.document(**more))) as setup.gateway:
            setup.gateway.gateway.rollout.set("vllm")
            await setup.change(**more, tiers=tiers)
            assert setup.assignments == {"standard": "vllm", "new": "ollama"}
        async with running(config.build(setup.document(**more, tiers=tiers))) as setup.gateway:
            assert setup.assignments == {"standard": "vllm", "new": "ollama"}
            more["llm_backend"] = "vllm"
            await setup.change(**more, tiers=tiers)
            assert setup.assignments == {"standard": "vllm", "new": "vllm"}
        caplog.clear()
        async with running(config.build(setup.document(**more, tiers=tiers))) as setup.gateway:
            assert setup.assignments == {"standard": "vllm", "new": "vllm"}
            assert "LLM_BACKEND" not in caplog.text


async def test_new_backend_that_does_not_answer_delays_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.upstream.health_checks.READY_SECONDS", 0.5)
    async with serving() as setup:
        document = setup.document(tiers={"standard": {"models": {"ollama": MODEL, "far": "m"}}})
        document["backends"]["far"] = {"kind": "openai", "base_url": "http://192.0.2.1:9"}
        change = asyncio.create_task(setup.gateway.gateway.reload.run(lambda: config.build(document), "file"))
        await until(lambda: len(setup.gateway.gateway._health._tasks) == 3)
        assert (await setup.gateway.ask({})).status == 200
        assert not change.done()
        await change
        assert setup.outcome["ok"]
        assert (await setup.gateway.ask({})).status == 200


async def test_rollback_leads_to_the_target_of_the_new_settings() -> None:
    async with serving() as setup:
        await setup.change(rollback_to="vllm")
        setup.gateway.gateway.rollout.rollback()
        assert setup.assignments == {"standard": "vllm"}
        assert setup.gateway.gateway._operations.status()["rollout"]["rollback_to"] == "vllm"


# Changes that are refused or need a restart


async def test_invalid_settings_are_refused_with_reasons_and_the_old_ones_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving() as setup:
        outcome = await setup.change(tiers={"a": {"modls": {}}}, max_body="x")
        assert (outcome["ok"], outcome["changed"]) == (False, [])
        assert any("modls" in reason for reason in outcome["reasons"])
        assert len(outcome["reasons"]) == 3
        assert (await setup.gateway.ask({})).status == 200
        logged = [record.getMessage() for record in caplog.records if record.name == "gateway.config.reload"]
        assert logged[0] == "settings reread (file) and refused; the old ones stay in force"
        assert len(logged) == 4


async def test_changes_that_need_a_restart_are_named_and_the_others_apply(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as setup:
        outcome = await setup.change(port=1234, admin_key="an-operators-key-0001", heartbeat=3)
        assert outcome["changed"] == ["heartbeat: 3.0, was 15.0"]
        assert outcome["needs_restart"] == ["port: 1234, was 8080", "admin_key: new"]
        assert "settings: port: 1234, was 8080; this change needs a restart" in caplog.messages
        assert "an-operators-key-0001" not in caplog.text
        assert (await setup.gateway.ask({})).status == 200


async def test_invalid_certificate_file_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "own.pem"
    file.write_text("no certificate")
    async with serving() as setup:
        outcome = await setup.change(vllm={"servers": [{"base_url": "https://127.0.0.1:1"}], "ca_file": str(file)})
        assert outcome["reasons"] == ["the settings cannot be put in force: SSLError"]
        assert (await setup.gateway.ask({})).status == 200


# Cleaning up


async def test_many_changes_under_load_fail_no_request_and_leave_nothing_behind() -> None:
    async with serving() as setup:
        setup.ollama.mode = setup.vllm.mode = "brief"
        over, statuses = asyncio.Event(), list[int]()

        async def crowd() -> None:
            while not over.is_set():
                statuses.append((await setup.gateway.ask({"stream": True})).status)

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(crowd())
            for number in range(30):
                more: dict[str, Any] = {
                    "ollama": {"max_concurrency": 1 + number % 4},
                    "llm_backend": ("ollama", "vllm")[number % 2],
                }
                more["vllm"] = {"headers": {"x-number": str(number % 3)}}  # the backend is replaced
                tier = {"models": {"ollama": MODEL, "vllm": MODEL}}
                outcome = await setup.change(tiers={"standard": tier, f"tier{number}": tier}, **more)
                assert outcome["ok"]
                await setup.gateway.ask({"model": f"tier{number}"})
            over.set()
        assert set(statuses) == {200}
        assert len(statuses) > 30
        await setup.change()
        await until(setup.is_settled)
        gateway = setup.gateway.gateway
        await setup.exposition()
        exposition = generate_latest(gateway._metrics.registry).decode()
        assert "tier9" not in exposition
        assert 'gateway_active_backend{backend="ollama",tier="standard"} 1.0' in exposition
        assert {key[0] for key in gateway._metrics._routes} <= {"standard"}
        assert len(gateway._health._tasks) == 2
        assert [len(backend.admission._queues) for backend in gateway._backends.values()] <= [2, 2]
        assert len(gateway._backends["ollama"].servers[0].models) <= 1


async def test_series_of_removed_tiers_and_backends_are_dropped() -> None:
    async with serving() as setup:
        assert 'tier="standard"' in await setup.exposition()
        document = setup.document(tiers={"new": {"models": {"ollama": MODEL}}})
        del document["backends"]["vllm"]
        await setup.gateway.gateway.reload.run(lambda: config.build(document), "file")
        await until(setup.is_settled)
        exposition = await setup.exposition()
        assert 'gateway_active_backend{backend="ollama",tier="new"} 1.0' in exposition
        assert 'tier="standard"' not in exposition
        assert 'backend="vllm"' not in exposition


async def test_change_can_be_cancelled_while_a_new_backend_is_probed() -> None:
    """The gateway may stop during a change that waits for a backend that does not answer."""
    async with FaultBackend("vllm") as silent, serving() as setup:
        silent.mode = "silent"
        change = asyncio.create_task(setup.change(vllm={"servers": [{"base_url": "http://192.0.2.1:9"}]}))
        await asyncio.sleep(0.05)
        change.cancel()
        await asyncio.gather(change, return_exceptions=True)
        assert len(setup.gateway.gateway._health._tasks) == 2
        assert (await setup.gateway.ask({})).status == 200


# The file


class Watched:
    """A settings file that is watched, and the results of the rereads."""

    def __init__(self, file: Path, read: Callable[[], Settings] | None = None) -> None:
        self.results: list[dict[str, Any]] = []
        self.read = read or (lambda: config.load(file, {}))
        self.settings = self.read()

    async def apply(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def heartbeat(self) -> float:
        return self.settings.heartbeat


@asynccontextmanager
async def watching(file: Path) -> AsyncIterator[Watched]:
    watched = Watched(file)
    task = asyncio.create_task(
        FileWatcher(
            file, reload.Reloader(lambda: watched.settings, watched.apply, watched.results.append), watched.read
        ).run()
    )
    try:
        await asyncio.sleep(0.4)  # the first check
        assert watched.results == []
        yield watched
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def content(heartbeat: int) -> str:
    return f"# written by a test\nheartbeat: {heartbeat}\n"


def write_in_place(file: Path, heartbeat: int) -> None:
    file.write_text(content(heartbeat))


def write_and_rename(file: Path, heartbeat: int) -> None:
    other = file.with_name(".new~")
    other.write_text(content(heartbeat))
    other.replace(file)


def move_away_and_write(file: Path, heartbeat: int) -> None:
    file.rename(file.with_name("gateway.yaml~"))
    file.write_text(content(heartbeat))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "gateway.yaml"
    write_in_place(file, 1)
    return file


@pytest.mark.parametrize("write", [write_in_place, write_and_rename, move_away_and_write])
async def test_change_is_noticed_however_the_file_is_written(file: Path, write: Callable[[Path, int], None]) -> None:
    async with watching(file) as watched:
        for heartbeat in (2, 3):
            write(file, heartbeat)
            await until(lambda expected=heartbeat: watched.heartbeat == expected)  # type: ignore[misc]
        assert [outcome["ok"] for outcome in watched.results] == [True, True]


async def test_change_of_a_kubernetes_config_map_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is a link into `..data`, a link to a folder that Kubernetes swaps."""
    monkeypatch.chdir(tmp_path)

    def publish(heartbeat: int) -> None:
        folder = tmp_path / f"..{heartbeat}"
        folder.mkdir()
        (folder / "gateway.yaml").write_text(content(heartbeat))
        (tmp_path / "..data_tmp").symlink_to(folder.name)
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish(1)
    file = tmp_path / "gateway.yaml"
    file.symlink_to(Path("..data") / "gateway.yaml")
    async with watching(file) as watched:
        for heartbeat in (2, 3):
            publish(heartbeat)
            for old in (tmp_path / f"..{heartbeat - 1}").iterdir():
                old.unlink()
            (tmp_path / f"..{heartbeat - 1}").rmdir()
            await until(lambda expected=heartbeat: watched.heartbeat == expected)  # type: ignore[misc]
        assert all(outcome["ok"] for outcome in watched.results)


async def test_change_of_a_file_behind_a_link_is_noticed(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    there = tmp_path / "there" / "real.yaml"
    write_in_place(there, 1)
    file.unlink()
    file.symlink_to(there)
    async with watching(file) as watched:
        write_in_place(there, 2)
        await until(lambda: watched.heartbeat == 2)


async def test_half_written_file_is_never_applied(file: Path) -> None:
    """Each part of the file would be valid settings."""
    async with watching(file) as watched:
        with file.open("w") as out:
            for key in ("heartbeat: 5\n", "commit_after: 7\n", "drain_timeout: 9\n", "waiting_note: true\n"):
                out.write(key)
                out.flush()
                os.fsync(out.fileno())
                await asyncio.sleep(0.03)
        await until(lambda: watched.settings.waiting_note)
        assert len(watched.results) == 1
        assert watched.results[0]["changed"] == [
            "commit_after: 7.0, was 45.0",
            "heartbeat: 5.0, was 1.0",
            "waiting_note: true, was false",
        ]


async def test_file_that_changes_while_it_is_read_is_read_again(file: Path) -> None:
    async with watching(file) as watched:
        read, texts = watched.read, [content(3)]

        def read_late() -> Settings:
            settings = read()
            if texts:
                file.write_text(texts.pop())
            return settings

        watched.read = read_late
        watcher = asyncio.create_task(
            FileWatcher(
                file, reload.Reloader(lambda: watched.settings, watched.apply, watched.results.append), watched.read
            ).run()
        )
        await until(lambda: watched.heartbeat == 3)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)


@pytest.mark.parametrize("left", [None, b"", b"# only a comment\n\n  # and another\n"])
async def test_missing_or_empty_file_changes_nothing(
    file: Path, left: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with watching(file) as watched:
        if left is None:
            file.unlink()
        else:
            file.write_bytes(left)
        await until(lambda: "nothing changes" in caplog.text)
        await asyncio.sleep(0.5)
        assert caplog.text.count("nothing changes") == 1
        assert (watched.heartbeat, watched.results) == (1, [])
        write_in_place(file, 4)
        await until(lambda: watched.heartbeat == 4)


async def test_invalid_file_is_refused_once_and_accepted_when_corrected(file: Path) -> None:
    async with watching(file) as watched:
        file.write_text("hartbeat: 1\n")
        await until(lambda: len(watched.results) == 1)
        assert watched.results[0]["reasons"] == [
            "hartbeat: unknown key; did you mean 'heartbeat'? (gateway.yaml line 1)"
        ]
        await asyncio.sleep(0.5)
        assert len(watched.results) == 1
        write_in_place(file, 2)
        await until(lambda: watched.heartbeat == 2)


async def test_file_is_watched_again_after_its_folder_was_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "etc"
    folder.mkdir()
    write_in_place(folder / "gateway.yaml", 1)
    async with watching(folder / "gateway.yaml") as watched:
        folder.rename(tmp_path / "old")
        await asyncio.sleep(0.5)
        folder.mkdir()
        write_in_place(folder / "gateway.yaml", 2)
        await until(lambda: watched.heartbeat == 2)


async def test_change_before_the_watch_began_is_noticed(file: Path) -> None:
    watched = Watched(file)
    write_in_place(file, 7)
    task = asyncio.create_task(
        FileWatcher(
            file, reload.Reloader(lambda: watched.settings, watched.apply, watched.results.append), watched.read
        ).run()
    )
    await until(lambda: watched.heartbeat == 7)
    assert watched.results[0]["cause"] == "start"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_pipe_is_not_watched(tmp_path: Path) -> None:
    """Reading a pipe without a writer would block forever."""
    pipe = tmp_path / "gateway.yaml"
    os.mkfifo(pipe)
    settings = config.build({})
    results = list[dict[str, Any]]()
    reread = reload.Reloader(lambda: settings, lambda settings: asyncio.sleep(0), results.append)
    async with asyncio.timeout(20):
        await FileWatcher(pipe, reread, lambda: settings).run()
    with pytest.raises(ConfigError):
        reload.read_whole(pipe, lambda: settings)


async def test_empty_file_at_a_signal_is_refused_and_does_not_mean_the_defaults(file: Path) -> None:
    settings = config.load(file, {})
    results = list[dict[str, Any]]()
    file.write_bytes(b"")
    await reload.Reloader(lambda: settings, lambda settings: asyncio.sleep(0), results.append).run(
        lambda: reload.read_whole(file, lambda: config.load(file, {})), "signal"
    )
    assert results[0]["reasons"] == [f"{file}: the file is missing, empty or unreadable"]
