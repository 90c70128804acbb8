"""Commands that move tiers on a running gateway, and show its status."""

import json

import pytest

from tests.cli.harness import assignments, command, gateway

pytestmark = pytest.mark.usefixtures("empty_environment")


async def test_switch_canary_rollback_and_undo_move_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        canary = await command("switch", "vllm", "--tier", "standard", "--canary", "12.5")
        assert canary.exit_code == 0
        assert "standard from ollama to ollama with 12.5 % on vllm" in canary.stdout
        assert "in force but not saved" in canary.stdout
        assert assignments(here)["standard"] == "ollama with 12.5 % on vllm"
        assert (await command("switch", "VLLM", "--tier", "Standard")).exit_code == 0
        assert assignments(here) == {"standard": "vllm", "ultra": "ollama", "pinned": "ollama"}
        assert "standard from vllm to ollama" in (await command("rollback")).stdout
        again = await command("rollback")
        assert (again.exit_code, "nothing changed" in again.stdout) == (0, True)
        assert (await command("undo")).exit_code == 0
        assert assignments(here)["standard"] == "vllm"
        narrowed = await command("rollback", "--tier", "standard", "--to", "away")
        assert narrowed.exit_code == 0
        assert assignments(here) == {"standard": "away", "ultra": "ollama", "pinned": "ollama"}


async def test_json_output_is_the_response_of_the_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch):
        for words in (("switch", "vllm", "--tier", "standard"), ("undo",), ("rollback",)):
            body = json.loads((await command(*words, "--json")).stdout)
            assert {"changed", "persisted", "moved", "unmoved", "tiers", "history"} <= set(body)
        body = json.loads((await command("status", "--json")).stdout)
        assert {"backends", "tiers", "rollout"} <= set(body)


async def test_switch_that_would_break_a_tier_is_refused_with_the_findings_unless_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch) as here:
        refused = await command("switch", "vllm")
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert (
            "breaks: tier ultra: vllm cannot serve 'not-there': does not have the model; it has: served-model"
            in refused.stderr
        )
        assert "--force" in refused.stderr
        away = await command("switch", "away")
        assert (away.exit_code, "breaks: tiers standard, ultra: away cannot serve" in away.stderr) == (1, True)
        assert assignments(here) == {"standard": "ollama", "ultra": "ollama", "pinned": "ollama"}
        assert (await command("switch", "vllm", "--force")).exit_code == 0
        assert assignments(here) == {"standard": "vllm", "ultra": "vllm", "pinned": "ollama"}


async def test_switch_prints_what_clients_will_notice_and_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        switched = await command("switch", "vllm", "--tier", "standard", "--json")
        assert switched.exit_code == 0
        assert "note: tier standard: " in switched.stderr
        assert json.loads(switched.stdout)["changed"]
        assert assignments(here)["standard"] == "vllm"


async def test_switch_to_rollback_to_runs_no_preflight_check(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, llm_backend="vllm", rollback_to="away") as here:
        switched = await command("switch", "AWAY")
        assert (switched.exit_code, switched.stderr) == (0, "")
        assert assignments(here)["standard"] == "away"


async def test_rollback_to_a_backend_that_is_down_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch, rollback_to="away") as here:
        assert (await command("rollback")).exit_code == 0
        assert assignments(here) == {"standard": "away", "ultra": "away", "pinned": "ollama"}
