"""The operator's commands, against a gateway that runs, one that does not, and what is none."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway import config
from gateway.cli.commands import app
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import Running, running

ADMIN = "admin-key"


pytestmark = pytest.mark.usefixtures("empty_environment")


async def command(*words: str, **variables: str) -> Result:
    return await asyncio.to_thread(CliRunner().invoke, app, words, env=variables)


@asynccontextmanager
async def gateway(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> AsyncIterator[Running]:
    """One that GATEWAY_URL leads to."""
    async with FaultBackend("vllm") as vllm, FaultBackend("ollama") as ollama:
        document: dict[str, Any] = {
            "backends": {
                "ollama": {"kind": "ollama", "base_url": ollama.base_url},
                "vllm": {"kind": "vllm", "base_url": vllm.base_url},
                "away": {"kind": "openai", "base_url": "http://127.0.0.1:1"},
            },
            "tiers": {
                "standard": {"models": {"ollama": MODEL, "vllm": MODEL, "away": MODEL}},
                "ultra": {"models": {"ollama": MODEL, "vllm": "not-there", "away": MODEL}},
                "pinned": {"models": {"ollama": MODEL}, "backend": "ollama"},
            },
            "state_file": "",
        }
        async with running(config.build(document | changes)) as here:
            monkeypatch.setenv("GATEWAY_URL", f"{here.base_url}/v1/")
            yield here


def positions(here: Running) -> dict[str, str]:
    return {name: str(line.assignment) for name, line in here.gateway.rollout.tiers.items()}


async def test_switch_canary_rollback_undo(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        told = await command("switch", "vllm", "--tier", "standard", "--canary", "12.5")
        assert told.exit_code == 0
        assert "standard from ollama to ollama with 12.5 % on vllm" in told.stdout
        assert "not kept" in told.stdout
        assert positions(here)["standard"] == "ollama with 12.5 % on vllm"
        assert (await command("switch", "VLLM", "--tier", "Standard")).exit_code == 0
        assert positions(here) == {"standard": "vllm", "ultra": "ollama", "pinned": "ollama"}
        assert "standard from vllm to ollama" in (await command("rollback")).stdout
        again = await command("rollback")
        assert (again.exit_code, "nothing to change" in again.stdout) == (0, True)
        assert (await command("undo")).exit_code == 0
        assert positions(here)["standard"] == "vllm"
        narrowed = await command("rollback", "--tier", "standard", "--to", "away")
        assert narrowed.exit_code == 0
        assert positions(here) == {"standard": "away", "ultra": "ollama", "pinned": "ollama"}


async def test_requests_that_moved_along_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        monkeypatch.setattr(here.gateway._operations.controller, "_migrate", lambda change: 3)
        assert "requests in line that moved along: 3" in (await command("switch", "vllm", "--tier", "standard")).stdout
        monkeypatch.setattr(here.gateway._operations.controller, "_migrate", lambda change: 0)
        assert "moved along" not in (await command("rollback")).stdout


async def test_json_is_what_the_gateway_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch):
        for words in (("switch", "vllm", "--tier", "standard"), ("undo",), ("rollback",)):
            body = json.loads((await command(*words, "--json")).stdout)
            assert {"changed", "persisted", "moved", "unmoved", "tiers", "history"} <= set(body)
        body = json.loads((await command("status", "--json")).stdout)
        assert {"backends", "tiers", "rollout"} <= set(body)


async def test_status_is_a_table_of_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        assert (await here.ask({"stream": True})).status == 200
        here.gateway.settle()
        await command("switch", "vllm", "--tier", "standard", "--canary", "10")
        told = await command("status")
        assert told.exit_code == 0
        lines = told.stdout.splitlines()
        rows = {tuple(line.split()[:2]): line for line in lines}
        assert "active" in rows["standard", "ollama"]
        assert "ms" in rows["standard", "ollama"]
        assert any("vllm" in line and "canary 10 %" in line and "no request yet" in line for line in lines)
        assert "pinned" in rows["pinned", "ollama"]
        assert rows["away", "openai"].split() == ["away", "openai", "no", "0", "0"]
        assert "operator local: standard from ollama to ollama with 10 % on vllm" in told.stdout
        assert "leads to ollama" in told.stdout


async def test_status_tells_of_settings_that_were_refused_or_need_a_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        document = {"port": 1, "backends": {"vllm": {}}, "tiers": {"standard": {"models": {"vllm": "m"}}}}

        def read() -> config.Settings:
            return config.build(document)

        await here.gateway.reload.run(read, "file")
        assert "need a restart:\n  port: 1, was" in (await command("status")).stdout
        document["tirs"] = {}
        await here.gateway.reload.run(read, "file")
        assert "refused; the old ones stay:\n  tirs: no such key" in (await command("status")).stdout


async def test_switch_that_would_break_a_tier_is_refused_with_the_list_unless_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch) as here:
        told = await command("switch", "vllm")
        assert (told.exit_code, told.stdout) == (1, "")
        assert (
            "breaks: tier ultra: vllm cannot serve 'not-there': does not have the model; it has: served-model"
            in told.stderr
        )
        assert "--force" in told.stderr
        away = await command("switch", "away")
        assert (away.exit_code, "breaks: tiers standard, ultra: away cannot serve" in away.stderr) == (1, True)
        assert positions(here) == {"standard": "ollama", "ultra": "ollama", "pinned": "ollama"}
        assert (await command("switch", "vllm", "--force")).exit_code == 0
        assert positions(here) == {"standard": "vllm", "ultra": "vllm", "pinned": "ollama"}


async def test_switch_says_what_clients_will_notice_and_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        told = await command("switch", "vllm", "--tier", "standard", "--json")
        assert told.exit_code == 0
        assert "note: tier standard: " in told.stderr
        assert json.loads(told.stdout)["changed"]
        assert positions(here)["standard"] == "vllm"


async def test_way_back_by_switch_asks_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, llm_backend="vllm", rollback_to="away") as here:
        told = await command("switch", "AWAY")
        assert (told.exit_code, told.stderr) == (0, "")
        assert positions(here)["standard"] == "away"


async def test_preflight_is_a_table_and_1_where_a_tier_would_break(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        told = await command("verify", "--preflight", "vllm", "--seconds", "5")
        assert told.exit_code == 1
        rows = [line.split() for line in told.stdout.splitlines()]
        assert ["ultra", "serves", "breaks"] in [row[:3] for row in rows]
        assert ["standard", "serves", "ok"] in [row[:3] for row in rows]
        assert "a switch to vllm would break" in told.stdout
        one = await command("verify", "--preflight", "vllm", "--tier", "standard")
        assert (one.exit_code, "breaks nothing" in one.stdout) == (0, True)
        body = json.loads((await command("verify", "--preflight", "away", "--json")).stdout)
        assert body["breaks"]
        assert {"backend", "findings", "seconds", "tiers"} <= set(body)
        assert positions(here) == {"standard": "ollama", "ultra": "ollama", "pinned": "ollama"}
        assert (await command("verify")).exit_code == 2


async def test_way_back_to_a_backend_that_is_down_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, rollback_to="away") as here:
        assert (await command("rollback")).exit_code == 0
        assert positions(here) == {"standard": "away", "ultra": "away", "pinned": "ollama"}


async def test_what_the_gateway_refuses_is_told_in_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch):
        for words, told in (
            (("switch", "nowhere"), "'backend' must be one of: ollama, vllm, away. (400 invalid_value)"),
            (("switch", "vllm", "--tier", "pinned", "--force"), "(409 conflict)"),
            (("rollback", "--tier", "nothing"), "'tier' must be one of"),
        ):
            result = await command(*words)
            assert (result.exit_code, result.stdout) == (1, "")
            assert told in result.stderr


async def test_admin_key_is_sent_and_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, admin_key=ADMIN):
        refused = await command("rollback")
        assert (refused.exit_code, "GATEWAY_ADMIN_KEY" in refused.stderr) == (1, True)
        assert (await command("rollback", GATEWAY_ADMIN_KEY=ADMIN)).exit_code == 0
        Path(".env").write_text(f"GATEWAY_ADMIN_KEY={ADMIN}\n")
        assert (await command("rollback")).exit_code == 0


async def test_without_an_url_the_settings_say_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, admin_key=ADMIN) as here:
        monkeypatch.delenv("GATEWAY_URL")
        Path("mine.yaml").write_text(f"host: 0.0.0.0\nport: {here.port}\nadmin_key: {ADMIN}\napi_keys: [a]\n")
        assert (await command("status", "--config", "mine.yaml")).exit_code == 0
        assert (await command("status", GATEWAY_CONFIG="mine.yaml")).exit_code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("status",),
        ("switch", "vllm"),
        ("switch", "vllm", "--force"),
        ("verify", "--preflight"),
        ("rollback",),
        ("undo",),
    ],
)
async def test_gateway_that_cannot_be_reached_is_1_in_one_line(words: tuple[str, ...]) -> None:
    result = await command(*words, GATEWAY_URL="http://127.0.0.1:1")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == "no gateway can be reached at http://127.0.0.1:1; is it running? GATEWAY_URL sets another address\n"
    )


async def test_what_is_no_gateway_is_told() -> None:
    async with FaultBackend("vllm") as other:
        for mode in ("healthy", "html"):
            other.mode = mode
            result = await command("status", GATEWAY_URL=other.base_url)
            assert result.exit_code == 1
            assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "variables", "told"),
    [
        (("status",), {"GATEWAY_URL": "ftp://x"}, "GATEWAY_URL"),
        (("status",), {"GATEWAY_PORT": "much"}, "set GATEWAY_URL and GATEWAY_ADMIN_KEY"),
        (("status",), {"GATEWAY_PORT": "0"}, "GATEWAY_URL"),
        (("switch",), {}, "BACKEND"),
        (("switch", "vllm", "--canary", "101"), {}, "canary"),
        (("rollback", "vllm"), {}, "vllm"),
    ],
)
async def test_wrong_words_and_settings_are_2(words: tuple[str, ...], variables: dict[str, str], told: str) -> None:
    result = await command(*words, **variables)
    assert result.exit_code == 2
    assert told in result.stderr


async def test_wrong_settings_do_not_stand_in_the_way_where_the_address_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody edits `.env` while the gateway has to go back."""
    async with gateway(monkeypatch):
        assert (await command("rollback", LLM_BACKEND="nowhere")).exit_code == 0
