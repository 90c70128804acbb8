"""Output of `gateway config check`, `show` and `schema`; example files that match the code."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from gateway import config
from gateway.config.document import SettingsDocument
from gateway.config.document_backends import LimitKeys
from gateway.config.field_types import DocumentSection
from tests.config.harness import EXAMPLE, SECRET, load, warned

ROOT = Path(__file__).parents[2]
VARIABLES = {
    "LLM_BACKEND", "OLLAMA_BASE_URL", "OLLAMA_MODEL", "VLLM_BASE_URL", "VLLM_MODEL", "VLLM_API_KEY",
    "OLLAMA_NUM_PARALLEL", "GATEWAY_HOST", "GATEWAY_PORT", "GATEWAY_CONFIG", "GATEWAY_API_KEYS",
    "GATEWAY_API_KEYS_FILE", "GATEWAY_ADMIN_KEY", "GATEWAY_METRICS_KEY", "GATEWAY_METRICS_PORT", "GATEWAY_OLLAMA_PORT",
    "GATEWAY_KEYS_FILE", "GATEWAY_OLLAMA_AS_KEY", "GATEWAY_STATE_FILE", "GATEWAY_USAGE_FILE", "GATEWAY_REDIS_URL",
    "GATEWAY_URL", "GATEWAY_LOG_LEVEL",
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("empty_environment")


def test_check_prints_sources_tables_and_warnings() -> None:
    Path(".env").write_text("LLM_BACKEND=ollama\nOTHER=1\n")
    lines = config.check(load(EXAMPLE, {"VLLM_API_KEY": SECRET, "HOME": "/"}))
    assert lines[:3] == ["file: gateway.yaml", ".env: LLM_BACKEND", "environment: VLLM_API_KEY"]
    assert any(
        re.match(r"ultra +ollama +ollama: qwen3-vl:8b, vllm: .* gpt-4o, complex, background +the next$", line)
        for line in lines
    )
    assert any(line.startswith("warning: GATEWAY_API_KEYS") for line in lines)
    assert SECRET not in "\n".join(lines)


@pytest.mark.parametrize(
    ("backends", "line"),
    [
        ("ollama: {}, vllm: {}", None),
        ("ollama: {}, vllm: {discover: true}", "models that no setting names are discovered on vllm"),
        (
            "vllm: {discover: true}, ollama: {discover: true}",
            (
                "models that no setting names are discovered on vllm, ollama "
                "(if several have a model, the first of them serves it)"
            ),
        ),
    ],
)
def test_check_tells_where_models_are_discovered_and_in_which_order(backends: str, line: str | None) -> None:
    lines = config.check(load(f"backends: {{{backends}}}\ntiers: {{a: {{models: {{ollama: x, vllm: y}}}}}}"))
    assert [found for found in lines if "discovered" in found] == ([] if line is None else [line])


LITERAL = "tiers: {a: {models: {ollama: 'x$${A}'}, params: {default: {stop: ['$$${', '$']}}}}"


@pytest.mark.parametrize("text", [None, EXAMPLE, LITERAL, (ROOT / "gateway.example.yaml").read_text(encoding="utf-8")])
def test_shown_settings_can_be_loaded_again_unchanged(text: str | None) -> None:
    settings = load(text)
    again = load(config.show(settings))
    assert again.model_dump(exclude={"file", "sources"}) == settings.model_dump(exclude={"file", "sources"})


def test_shown_settings_hide_secrets_and_match_the_schema() -> None:
    environ = {
        "VLLM_API_KEY": SECRET,
        "GATEWAY_API_KEYS": SECRET,
        "GATEWAY_METRICS_KEY": SECRET,
        "GATEWAY_STATE_FILE": "",
    }
    shown = config.show(load(EXAMPLE, environ | {"GATEWAY__BACKENDS__OLLAMA__HEADERS__X_KEY": SECRET}))
    assert SECRET not in shown
    assert shown.count("**********") == 4
    jsonschema.validate(yaml.safe_load(shown), config.schema())


def test_schema_is_valid_and_accepts_the_examples() -> None:
    schema = config.schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in (EXAMPLE, (ROOT / "gateway.example.yaml").read_text(encoding="utf-8")):
        jsonschema.validate(yaml.safe_load(text), schema)


@pytest.mark.parametrize(
    "text",
    ["tirs: {}", "commit_after: 30x", "port: 70000", "backends: {vllm: {kind: x}}",
     "backends: {vllm: {max_queue: -1}}", "tiers: {a: {}}", "guard: {margin: 0.9}", "guard: {rules: [luck]}",
     "guard: {ratio: 0.5}", "guard: {false_alarms: 0}", "guard: {rules: []}", "max_body: 20m",
     "tiers: {a: {models: {o: x}, limits: {o: {conc: 1}}}}", "backends: {o: {model_concurrency: often}}"],
)  # fmt: skip
def test_schema_refuses_what_the_gateway_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(yaml.safe_load(text), config.schema())


@pytest.mark.parametrize(
    "text",
    ["commit_after: 500ms", "commit_after: 30", "guard: {}", "guard: {grace: 0, window: 1h, rules: [errors]}",
     "backends: {vllm: {servers: [a, {base_url: b}]}}", "backends: {vllm: {servers: 'dns://a:1'}}",
     "backends: {vllm: {servers: [{base_url: 'dns://a:1', models: [x]}]}}", "api_keys: a,b", "api_keys: [a]",
     "tiers: {a: {models: {o: x}, fallback: true}}",
     "tiers: {a: {models: {o: x}, fallback: o, aliases: [x, {name: y}]}}", "backends: {o: {keep_alive: -1}}"],
)  # fmt: skip
def test_schema_accepts_every_notation_of_a_value(text: str) -> None:
    jsonschema.validate(yaml.safe_load(text), config.schema())


def _models(model: type[BaseModel] = DocumentSection) -> list[type[BaseModel]]:
    return [model, *(below for item in model.__subclasses__() for below in _models(item))]


def test_every_setting_has_a_description_with_its_default() -> None:
    for model in _models():
        for name, field in model.model_fields.items():
            description = field.description or ""
            assert re.search(r"Default: |Required\.$", description) or (model.__name__, name) in {
                ("AliasDocument", "name"), ("BackendDocument", "servers"), ("TierDocument", "params")
            }, (model.__name__, name)  # fmt: skip


def _uncommented(text: str) -> str:
    return re.sub(r"(?m)^( *)# ( *)(?=([a-z0-9_-]+:|- \{))", r"\1\2", text)


def test_example_file_shows_every_key() -> None:
    text = (ROOT / "gateway.example.yaml").read_text(encoding="utf-8")
    for model in _models():
        for name in model.model_fields:
            assert re.search(rf"\b{name}:", text), (model.__name__, name)


def test_example_file_with_every_key_uncommented_matches_the_schema() -> None:
    document: dict[str, Any] = yaml.safe_load(_uncommented((ROOT / "gateway.example.yaml").read_text(encoding="utf-8")))
    jsonschema.validate(document, config.schema())
    assert set(document) == set(SettingsDocument.model_fields)


def test_example_file_changes_nothing() -> None:
    settings = load((ROOT / "gateway.example.yaml").read_text(encoding="utf-8"))
    assert settings.model_dump(exclude={"file", "sources"}) == load().model_dump(exclude={"file", "sources"})


def test_defaults_in_the_example_file_equal_the_real_ones() -> None:
    document = yaml.safe_load(_uncommented((ROOT / "gateway.example.yaml").read_text(encoding="utf-8")))
    settings = load()
    for name, backend in settings.backends.items():
        for key in LimitKeys.model_fields:
            assert document["backends"][name][key] == getattr(backend.limits, key), (name, key)
    for key in (
        "host",
        "port",
        "commit_after",
        "heartbeat",
        "waiting_note",
        "drain_delay",
        "drain_timeout",
        "log_format",
        "log_level",
        "keep_alive_timeout",
        "default_tier",
    ):
        assert document[key] == getattr(settings, key), key


def test_example_environment_lists_every_variable_and_changes_nothing() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    for name in VARIABLES:
        assert re.search(rf"(?m)^# {name}=", text), name
    assert set(config.VARIABLES) == VARIABLES
    Path(".env").write_text(
        re.sub(r"(?m)^# (?=[A-Z_]+=)", "", text).replace("GATEWAY__TIERS__STANDARD__ALIASES", "OTHER")
    )
    settings = load()
    assert settings.model_dump(exclude={"file", "sources"}) == load(
        environ={"GATEWAY_STATE_FILE": "gateway-state.json"}
    ).model_dump(exclude={"file", "sources"})
    assert warned(settings) == []
