"""Commands of `gateway`: their output and their exit status 0, 1 or 2."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jsonschema
import pytest
import typer
import yaml

from gateway import __version__
from gateway.cli.commands import app
from tests.cli.harness import ROOT, SECRET, assignments, command, gateway, invoke, process

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_version_is_printed() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout.strip()) == (0, __version__)


def test_operators_commands_do_not_import_the_server() -> None:
    code = (
        "import sys, gateway.cli.commands; "
        "print(*({'fastapi', 'uvicorn', 'PIL', 'gateway.simulate', 'gateway.app'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_help_lists_the_commands() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for name in ("serve", "demo", "status", "switch", "verify", "rollback", "undo", "config", "simulate"):
        assert name in result.stdout


@pytest.mark.parametrize(
    "words",
    [
        ("nonsense",),
        ("serve", "--nonsense"),
        ("serve", "--workers", "2"),
        ("config", "nonsense"),
        ("simulate", "--kind", "gpt"),
        ("simulate",),
    ],
)
def test_invalid_arguments_exit_with_2(words: tuple[str, ...]) -> None:
    assert invoke(*words).exit_code == 2


def options(group: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Yield each option and argument of each command, with the command's words."""
    for name, inner in group.commands.items():
        if hasattr(inner, "commands"):
            yield from options(inner, *path, name)
        else:
            yield from ((" ".join((*path, name)), option) for option in inner.params)


def test_every_option_that_takes_a_key_can_be_given_by_a_variable() -> None:
    """Other users of the machine see the words of a command line."""
    secrets = [
        (words, option)
        for words, option in options(typer.main.get_command(app))
        if re.search(r"(^|_)(key|(?<!first_)token|secret|password)(_|$)", option.name)
    ]
    assert {words for words, _ in secrets} == {"bench", "compare", "verify"}, "only commands that call other servers"
    assert [(words, option.name) for words, option in secrets if not option.envvar] == []


# Settings


@pytest.mark.parametrize("words", [("serve",), ("demo",), ("config", "check"), ("config", "show")])
def test_invalid_settings_exit_with_2_and_one_line_each_on_standard_error(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.cli.demo.OLLAMA_URLS", ())
    monkeypatch.setattr("gateway.cli.demo.VLLM_URLS", ())
    result = invoke(*words, GATEWAY_PORT="much", LLM_BACKEND="nowhere")
    assert (result.exit_code, result.stdout) == (2, "")
    port, backend = result.stderr.splitlines()
    assert "GATEWAY_PORT" in port
    assert "much" in port
    assert "LLM_BACKEND" in backend or "llm_backend" in backend
    assert "expected" in port
    assert "expected" in backend


def test_missing_settings_file_exits_with_2() -> None:
    result = invoke("config", "check", "--config", "nowhere.yaml")
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere.yaml" in result.stderr


def test_valid_settings_are_explained() -> None:
    result = invoke("config", "check")
    assert result.exit_code == 0
    assert "standard" in result.stdout


def test_shown_settings_hide_secrets_and_are_a_valid_file() -> None:
    Path("mine.yaml").write_text(f"admin_key: {SECRET}\nheartbeat: 7s\n")
    result = invoke("config", "show", "--config", "mine.yaml", GATEWAY_API_KEYS=f"{SECRET}-2")
    assert result.exit_code == 0
    assert SECRET not in result.stdout
    assert yaml.safe_load(result.stdout)["heartbeat"] in (7, "7s")


def test_schema_accepts_the_example_file() -> None:
    result = invoke("config", "schema")
    assert result.exit_code == 0
    schema = json.loads(result.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load((ROOT / "gateway.example.yaml").read_text()), schema)


# Stand-ins


def test_stand_in_prints_its_address_and_serves() -> None:
    with process("simulate", "--kind", "ollama", "--model", "llama,tools,context=1000") as started:
        assert started.stdout is not None
        try:
            url = started.stdout.readline().strip()
            listed = httpx2.get(f"{url}/api/tags", trust_env=False, timeout=20).json()
            assert [model["name"] for model in listed["models"]] == ["llama:latest"]
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=20)


def test_any_option_of_a_stand_in_can_be_set() -> None:
    with process(
        "simulate", "--kind", "ollama", "--model", "llama", "--set", "gpu=yes", "--set", "time_scale=0.5"
    ) as started:
        assert started.stdout is not None
        try:
            assert started.stdout.readline().startswith("http://127.0.0.1:")
        finally:
            started.send_signal(signal.SIGTERM)
        started.communicate(timeout=20)
    result = invoke("simulate", "--kind", "ollama", "--set", "gpu=maybe")
    assert (result.exit_code, result.stderr) == (2, "--set: 'gpu=maybe': gpu must be yes or no\n")


def test_model_of_a_stand_in_with_an_unknown_property_exits_with_2() -> None:
    result = invoke("simulate", "--kind", "vllm", "--model", "m,wings")
    assert result.exit_code == 2
    assert result.stderr.startswith("--model: unknown model option 'wings'")


# The roll-out


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
