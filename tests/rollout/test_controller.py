"""The roll-out controller logs, counts and persists each change, and migrates queued requests."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from gateway import config
from gateway.rollout import controller as controller_module
from gateway.rollout.assignment import Canary, Change
from gateway.rollout.controller import SECTION, RolloutController
from gateway.rollout.state import Rollout
from gateway.state_file import StateFile
from gateway.telemetry.metrics import Metrics

MODELS = {"ollama": "small", "vllm": "Small"}
DOCUMENT: dict[str, Any] = {
    "llm_backend": "ollama",
    "backends": {
        "ollama": {"kind": "ollama", "base_url": "http://127.0.0.1:1"},
        "vllm": {"kind": "vllm", "base_url": "http://127.0.0.1:2"},
    },
    "tiers": {
        "standard": {"models": MODELS},
        "pro": {"models": MODELS},
        "pinned": {"models": MODELS, "backend": "ollama"},
    },
}


class Controlled:
    """A roll-out with its controller, and what that writes to."""

    def __init__(self, file: Path | None, **changes: Any) -> None:
        settings = config.build(DOCUMENT | changes)
        self.registry = CollectorRegistry()
        self.state_file = StateFile(file)
        self.rollout = Rollout(settings)
        self.migrated: list[Change] = []
        self.controller = RolloutController(
            self.rollout, self.state_file, Metrics(self.registry, "0"), settings.rollback_to, self._migrate
        )

    def _migrate(self, change: Change) -> int:
        self.migrated.append(change)
        return len(change.tiers) * 10

    def switches(self, tier: str, from_backend: str, to_backend: str, cause: str = "operator") -> float:
        labels = {"tier": tier, "from_backend": from_backend, "to_backend": to_backend, "cause": cause}
        return self.registry.get_sample_value("gateway_switches_total", labels) or 0.0


@pytest.fixture
async def controlled(tmp_path: Path) -> AsyncIterator[Controlled]:
    found = Controlled(tmp_path / "state.json")
    yield found
    await found.state_file.close()


async def test_change_is_logged_counted_persisted_and_followed(
    controlled: Controlled, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gateway.rollout")
    change = controlled.rollout.set("vllm", by="0123abcd").change
    assert change is not None
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage() == (
        "roll-out changed (operator by 0123abcd): standard from ollama to vllm, pro from ollama to vllm"
    )
    assert [controlled.switches(tier, "ollama", "vllm") for tier in ("standard", "pro", "pinned")] == [1, 1, 0]
    assert controlled.state_file.get(SECTION) == controlled.rollout.to_persist()
    assert controlled.migrated == [change]


async def test_change_with_a_reason_is_a_warning(controlled: Controlled, caplog: pytest.LogCaptureFixture) -> None:
    controlled.rollout.set("vllm", tier="pro")
    caplog.clear()
    controlled.rollout.rollback(tier="pro", cause="guard", why="errors: too many")
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == (
        "WARNING",
        "roll-out changed (guard): pro from vllm to ollama; errors: too many",
    )
    assert controlled.switches("pro", "vllm", "ollama", "guard") == 1


async def test_report_has_the_state_after_the_change_and_the_number_of_moved_requests(controlled: Controlled) -> None:
    report = await controlled.controller.report(controlled.rollout.set("vllm"))
    assert (report["changed"], report["persisted"], report["moved"], report["unmoved"]) == (True, True, 20, {})
    assert {name: tier["backend"] for name, tier in report["tiers"].items()} == {
        "standard": "vllm",
        "pro": "vllm",
        "pinned": "ollama",
    }
    assert report["rollback_to"] == "ollama"
    again = await controlled.controller.report(controlled.rollout.set("vllm"))
    assert (again["changed"], again["moved"]) == (False, 0)
    rollback = await controlled.controller.report(controlled.rollout.rollback(tier="pinned", to="vllm"))
    assert rollback["unmoved"] == {"pinned": "it is pinned to ollama"}


async def test_report_without_a_state_file_is_not_persisted() -> None:
    controlled = Controlled(None)
    assert not (await controlled.controller.report(controlled.rollout.set("vllm")))["persisted"]


async def test_report_does_not_wait_for_a_slow_disk(controlled: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller_module, "PERSIST_SECONDS", 0.01)

    async def never() -> bool:
        await asyncio.get_running_loop().create_future()
        return True

    monkeypatch.setattr(controlled.state_file, "persisted", never)
    report = await controlled.controller.report(controlled.rollout.set("vllm"))
    assert (report["changed"], report["persisted"]) == (True, False)


async def test_report_shows_the_state_of_its_own_order(controlled: Controlled, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another order may come in while the first one waits for the disk."""
    persisted = controlled.state_file.persisted

    async def overtaken() -> bool:
        controlled.rollout.rollback()
        return await persisted()

    monkeypatch.setattr(controlled.state_file, "persisted", overtaken)
    report = await controlled.controller.report(controlled.rollout.set("vllm"))
    assert report["tiers"]["pro"]["backend"] == "vllm"
    assert len(report["history"]) == 1


async def test_tier_shows_its_share_only_with_a_canary(controlled: Controlled) -> None:
    assert controlled.controller.view_tier("standard") == {
        "backend": "ollama",
        "canary": None,
        "pinned": False,
        "share": None,
    }
    assert controlled.controller.view_tier("pinned")["pinned"] is True
    controlled.rollout.set(canary=Canary("vllm", 25))
    view = controlled.controller.view_tier("standard")
    assert view["canary"] == {"backend": "vllm", "percent": 25}
    assert view["share"] == {"requests": 0, "canary_requests": 0, "percent": None}
    for bucket in (0, 5000, 9000):
        controlled.rollout.tiers["standard"].choose(bucket)
    share = controlled.controller.view_tier("standard")["share"]
    assert share == {"requests": 3, "canary_requests": 1, "percent": 33.33}


async def test_history_begins_with_the_last_change(controlled: Controlled) -> None:
    controlled.rollout.set("vllm", tier="pro")
    controlled.rollout.rollback()
    view = controlled.controller.view()
    assert [change.get("is_rollback", False) for change in view["history"]] == [True, False]
    assert view["history"][1]["tiers"] == {
        "pro": {"from": {"backend": "ollama", "canary": None}, "to": {"backend": "vllm", "canary": None}}
    }


async def test_persisted_roll_out_is_restored_with_a_note(
    controlled: Controlled, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controlled.rollout.set("vllm")
    await controlled.state_file.close()
    again = Controlled(tmp_path / "state.json")
    assert str(again.rollout) == "vllm"
    assert "LLM_BACKEND is ollama, but the roll-out that was set" in caplog.text
    assert (again.migrated, again.switches("pro", "ollama", "vllm")) == ([], 0)


async def test_roll_out_overridden_by_the_variable_is_overwritten_in_the_state_file(
    controlled: Controlled, tmp_path: Path
) -> None:
    """Otherwise the old value of the variable would bring it back."""
    file = tmp_path / "state.json"
    controlled.rollout.set("vllm", canary=Canary("ollama", 10))
    await controlled.state_file.close()
    again = Controlled(file, llm_backend="vllm")
    assert str(again.rollout) == "vllm"
    await again.state_file.close()
    assert json.loads(file.read_text())[SECTION]["llm_backend"] == "vllm"
    assert str(Controlled(file).rollout) == "ollama"


async def test_changed_settings_are_persisted_only_if_something_was(controlled: Controlled) -> None:
    tiers = {**DOCUMENT["tiers"], "new": {"models": MODELS}}
    changed = config.build(DOCUMENT | {"tiers": tiers, "rollback_to": "vllm"})
    controlled.controller.reload(changed)
    assert controlled.state_file.get(SECTION) is None
    assert controlled.controller.view()["rollback_to"] == "vllm"
    controlled.rollout.set("vllm", tier="pro")
    without_pro = {name: tier for name, tier in tiers.items() if name != "pro"}
    controlled.controller.reload(config.build(DOCUMENT | {"tiers": without_pro}))
    assert list(controlled.state_file.get(SECTION)["tiers"]) == ["standard", "new"]
