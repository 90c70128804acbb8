"""The exchange of the roll-out with other replicas: woken, polled, cut off, and with a store that misbehaves."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.rollout import sharing as sharing_module
from gateway.rollout.assignment import Change
from gateway.rollout.controller import SECTION, RolloutController
from gateway.rollout.shared import SharedRollout
from gateway.rollout.sharing import RolloutSharing
from gateway.state_file import StateFile
from gateway.telemetry.metrics import Metrics
from tests.fakes.running_gateway import until
from tests.fakes.shared_document import MemoryDocument, Store
from tests.rollout.test_state import DOCUMENT, ON_OLLAMA, ON_VLLM


class Replica:
    """The roll-out of one replica with all that belongs to it."""

    def __init__(self, name: str, store: Store, file: Path | None = None, **changes: Any) -> None:
        settings = config.build(DOCUMENT | changes)
        self.document: MemoryDocument = store.document(name)
        self.registry = CollectorRegistry()
        self.state_file = StateFile(file)
        self.rollout = SharedRollout(settings, name, common_clock=self.document.now)
        self.sharing = RolloutSharing(self.rollout, self.document)
        self.migrated: list[Change] = []
        self.controller = RolloutController(
            self.rollout,
            self.state_file,
            Metrics(self.registry, "0"),
            settings.rollback_to,
            self._migrate,
            self.sharing,
        )

    def _migrate(self, change: Change) -> int:
        self.migrated.append(change)
        return 1

    @property
    def standard(self) -> Any:
        return self.rollout.tiers["standard"].assignment

    def switches(self) -> float:
        labels = {"tier": "standard", "from_backend": "ollama", "to_backend": "vllm", "cause": "operator"}
        return self.registry.get_sample_value("gateway_switches_total", labels) or 0.0


class Replicas:
    """Replicas that share a store and are closed at the end of a test."""

    def __init__(self) -> None:
        self.store = Store()
        self.all: list[Replica] = []

    async def start(self, name: str, **given: Any) -> Replica:
        made = Replica(name, self.store, **given)
        self.all.append(made)
        await made.sharing.start()
        return made


@pytest.fixture
async def replicas(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Replicas]:
    monkeypatch.setattr(sharing_module, "SHARE_SECONDS", 0.1)
    monkeypatch.setattr(sharing_module, "START_SECONDS", 0.1)
    made = Replicas()
    yield made
    for each in made.all:
        await each.sharing.close()
        await each.state_file.close()


async def test_order_reaches_the_others_without_a_poll(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sharing_module, "POLL_SECONDS", 3600.0)
    caplog.set_level(logging.INFO, "gateway.rollout")
    a, b, c = [await replicas.start(name) for name in "abc"]
    answer = await a.controller.report(a.rollout.set("vllm", by="0123abcd"))
    assert answer["changed"]
    assert answer["shared"] is True
    await until(lambda: b.standard == c.standard == ON_VLLM)
    assert [len(each.migrated) for each in (a, b, c)] == [1, 1, 1]  # queued requests move on each
    assert [each.switches() for each in (a, b, c)] == [1, 0, 0]  # and the sum counts one change
    messages = [record.getMessage() for record in caplog.records]
    moves = "standard from ollama to vllm, Pro from ollama to vllm"
    assert messages.count(f"roll-out changed (operator by 0123abcd): {moves}") == 1
    assert messages.count(f"roll-out changed (operator by 0123abcd on replica a): {moves}") == 2
    assert c.state_file.get(SECTION) == c.rollout.to_persist()
    assert b.controller.view()["history"][0]["replica"] == "a"


async def test_lost_wake_up_costs_one_poll(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "POLL_SECONDS", 0.05)
    a, b = [await replicas.start(name) for name in "ab"]
    b.document.is_deaf = True
    a.rollout.set("vllm")
    await until(lambda: b.standard == ON_VLLM)


async def test_idle_replicas_do_not_write(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "POLL_SECONDS", 0.01)
    a, b = [await replicas.start(name) for name in "ab"]
    await a.controller.report(a.rollout.set("vllm"))
    await until(lambda: b.standard == ON_VLLM)
    writes, reads = replicas.store.writes, replicas.store.reads
    await until(lambda: replicas.store.reads > reads + 10)
    assert replicas.store.writes == writes


async def test_replica_that_is_cut_off_rolls_back_by_itself_and_tells_it_later(replicas: Replicas) -> None:
    a, b = [await replicas.start(name) for name in "ab"]
    await a.controller.report(a.rollout.set("vllm"))
    await until(lambda: b.standard == ON_VLLM)
    a.document.cut_off()
    answer = await a.controller.report(a.rollout.rollback())
    assert answer["shared"] is False
    assert a.controller.is_shared is False
    assert (a.standard, b.standard) == (ON_OLLAMA, ON_VLLM)
    a.document.join()
    await until(lambda: b.standard == ON_OLLAMA)
    await until(lambda: a.controller.is_shared is True)


async def test_answer_does_not_wait_long_for_a_store_that_hangs(replicas: Replicas) -> None:
    a = await replicas.start("a")
    a.document.hangs = True
    async with asyncio.timeout(5):
        answer = await a.controller.report(a.rollout.set("vllm"))
    assert answer["shared"] is False
    assert a.standard == ON_VLLM
    a.document.hangs = False


async def test_two_orders_at_once_both_count(replicas: Replicas) -> None:
    a, b, c = [await replicas.start(name) for name in "abc"]
    answers = await asyncio.gather(
        a.controller.report(a.rollout.set("vllm", tier="standard")),
        b.controller.report(b.rollout.set("cloud", tier="Pro")),
    )
    assert all(answer["shared"] for answer in answers)
    await until(lambda: str(a.rollout) == str(b.rollout) == str(c.rollout))
    assert str(c.rollout) == "standard on vllm, Pro on cloud, pinned on ollama"


async def test_replica_starts_with_the_state_of_the_others(
    replicas: Replicas, caplog: pytest.LogCaptureFixture
) -> None:
    a = await replicas.start("a")
    await a.controller.report(a.rollout.set("vllm"))
    b = await replicas.start("b")
    assert b.standard == ON_VLLM  # before its first request
    assert "the roll-out that the replicas share takes precedence" in caplog.text


async def test_replica_starts_without_the_store(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    a = Replica("a", replicas.store)
    replicas.all.append(a)
    a.document.cut_off()
    await a.sharing.start()
    assert a.standard == ON_OLLAMA
    a.rollout.set("vllm")
    a.document.join()
    b = await replicas.start("b")
    await until(lambda: b.standard == ON_VLLM)


async def test_store_that_lost_its_data_is_filled_again(replicas: Replicas, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing_module, "POLL_SECONDS", 0.05)
    a, b = [await replicas.start(name) for name in "ab"]
    await a.controller.report(a.rollout.set("vllm"))
    await until(lambda: b.standard == ON_VLLM)
    replicas.store.lose_data()
    await until(lambda: replicas.store.content != b"")
    c = await replicas.start("c")
    assert c.standard == ON_VLLM
    assert a.standard == b.standard == ON_VLLM


async def test_garbage_in_the_store_is_replaced_and_reported_once(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sharing_module, "POLL_SECONDS", 0.01)
    a = await replicas.start("a")
    replicas.store.replace(b"garbage")
    reads = replicas.store.reads
    await until(lambda: replicas.store.reads > reads + 5)  # it has nothing to put there yet
    assert caplog.text.count("it cannot be read") == 1
    answer = await a.controller.report(a.rollout.set("vllm"))
    assert answer["shared"] is True
    replicas.store.replace(b"\xff" * 100)
    await until(lambda: replicas.store.content.startswith(b'{"llm_gateway_rollout":1'))
    assert a.standard == ON_VLLM


async def test_document_of_another_version_is_left_alone(replicas: Replicas, caplog: pytest.LogCaptureFixture) -> None:
    a = await replicas.start("a")
    replicas.store.replace(b'{"llm_gateway_rollout":2,"new":true}')
    await until(lambda: "another version of the gateway wrote it" in caplog.text)
    answer = await a.controller.report(a.rollout.set("vllm"))
    assert answer["shared"] is False
    assert a.standard == ON_VLLM
    assert replicas.store.content == b'{"llm_gateway_rollout":2,"new":true}'


async def test_tier_that_cannot_follow_is_logged_once(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    only_ollama = DOCUMENT["tiers"] | {"standard": {"models": {"ollama": "small"}}}
    a, b = await replicas.start("a"), await replicas.start("b", tiers=only_ollama)
    await a.controller.report(a.rollout.set("vllm"))
    await a.controller.report(a.rollout.set("cloud", tier="Pro"))
    await until(lambda: str(b.rollout.tiers["Pro"].assignment) == "cloud")
    assert b.standard == ON_OLLAMA
    assert caplog.text.count("tier standard does not follow the other replicas: it was ordered to vllm") == 1


async def test_order_right_before_the_stop_is_sent(replicas: Replicas) -> None:
    a, b = [await replicas.start(name) for name in "ab"]
    a.rollout.set("vllm")
    await a.sharing.close()
    await until(lambda: b.standard == ON_VLLM)
