"""`gateway config check`, `show` and `schema`, and settings that stop a command."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from tests.cli.harness import ROOT, SECRET, invoke

pytestmark = pytest.mark.usefixtures("empty_environment")


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
