"""Loading: defaults, built-in backends and tiers, precedence, and all mistakes at once."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.config import ConfigError
from tests.config.harness import EXAMPLE, load, one_problem, problems, warned

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_default_settings_have_one_tier_on_two_local_backends() -> None:
    settings = load()
    assert (settings.host, settings.port, settings.llm_backend, settings.rollback_to) == (
        "127.0.0.1",
        8080,
        "ollama",
        "ollama",
    )
    assert {name: backend.servers[0].base_url for name, backend in settings.backends.items()} == {
        "ollama": "http://127.0.0.1:11434",
        "vllm": "http://127.0.0.1:8001",
    }
    assert list(settings.tiers) == ["standard"]
    assert settings.tiers["standard"].models == {"ollama": "qwen3:8b", "vllm": "Qwen/Qwen3-8B"}
    assert settings.default_tier == "standard"
    assert settings.state_file == Path("gateway-state.json")
    assert warned(settings) == []


def test_top_level_defaults_are_the_documented_ones() -> None:
    settings = load()
    assert (settings.commit_after, settings.heartbeat, settings.drain_delay, settings.drain_timeout) == (
        45.0,
        15.0,
        0.0,
        30.0,
    )
    assert settings.rollback_cutoff is None
    assert [load(f"rollback_cutoff: {text}").rollback_cutoff for text in ("0", "1m", "")] == [0.0, 60.0, None]
    assert (settings.max_body, settings.max_text_body) == (20 * 1024 * 1024, 1024 * 1024)
    assert settings.max_waiting_bytes == 1024**3
    assert (settings.cors_origins, settings.log_format, settings.user_header, settings.session_header) == (
        (),
        "auto",
        None,
        None,
    )
    assert (settings.api_keys, settings.admin_key, settings.metrics_key, settings.metrics_port) == (
        (),
        None,
        None,
        None,
    )
    assert settings.ollama_num_parallel is None
    assert settings.allowed_hosts == ()
    assert settings.waiting_note is False
    assert (settings.max_connections_per_address, settings.unlimited_addresses) == (None, ())
    assert (settings.log_level, settings.keep_alive_timeout) == ("info", 75.0)


def test_every_section_of_the_example_is_loaded() -> None:
    settings = load(EXAMPLE)
    assert list(settings.tiers) == ["standard", "pro", "ultra"]
    ultra = settings.tiers["ultra"]
    assert [alias.model_dump() for alias in ultra.aliases] == [
        {"name": "gpt-4o", "priority": "interactive", "listed": True},
        {"name": "complex", "priority": "interactive", "listed": True},
        {"name": "background", "priority": "batch", "listed": False},
    ]
    assert ultra.fallback is True
    assert ultra.params.model_dump() == {
        "default": {"temperature": 0.7},
        "force": {"reasoning_effort": "none"},
        "drop": ("logit_bias",),
    }
    assert ultra.images.max_pixels == 1003520
    assert settings.tiers["pro"].images.max_pixels is None
    servers = settings.backends["vllm"].servers
    assert [server.base_url for server in servers] == [
        "http://10.0.0.5:8001",
        "http://10.0.0.5:8002",
        "http://10.0.0.6:8003",
    ]
    assert [server.models for server in servers] == [None, None, ("Qwen/Qwen3-VL-8B-Instruct",)]
    assert settings.rerankers["bge-reranker"].model_dump() == {"backend": "vllm", "model": "BAAI/bge-reranker-v2-m3"}
    assert settings.embeddings["bge-m3"].model_dump() == {"backend": "ollama", "model": "bge-m3", "warm": False}
    assert warned(settings) == []


def test_built_in_backends_need_no_entry_if_something_refers_to_them() -> None:
    settings = load("backends: {vllm: {base_url: gpu:8000}}\ntiers: {a: {models: {ollama: x, vllm: y}}}")
    assert list(settings.backends) == ["vllm", "ollama"]
    assert settings.llm_backend == "ollama"


def test_file_that_only_sets_an_address_keeps_both_backends() -> None:
    settings = load("backends: {ollama: {base_url: http://box:11434}}")
    assert list(settings.backends) == ["ollama", "vllm"]
    assert settings.tiers["standard"].models == {"ollama": "qwen3:8b", "vllm": "Qwen/Qwen3-8B"}


def test_backends_with_other_names_serve_the_standard_tier() -> None:
    settings = load("backends: {local: {kind: ollama}, gpu: {kind: vllm}}", {"VLLM_MODEL": "m"})
    assert list(settings.backends) == ["local", "gpu"]
    assert settings.tiers["standard"].models == {"local": "qwen3:8b", "gpu": "m"}
    assert (settings.llm_backend, settings.rollback_to) == ("local", "local")


def test_backends_that_nothing_refers_to_are_not_added() -> None:
    settings = load("backends: {box: {kind: openai, base_url: http://box/v1}}\ntiers: {a: {models: {box: x}}}")
    assert list(settings.backends) == ["box"]
    assert (settings.llm_backend, settings.rollback_to) == ("box", "box")


def test_llm_backend_moves_everything_to_vllm_and_a_rollback_still_leads_to_ollama() -> None:
    settings = load(environ={"LLM_BACKEND": "vllm"})
    assert (settings.llm_backend, settings.rollback_to) == ("vllm", "ollama")


def test_dotenv_can_name_the_settings_file() -> None:
    Path("own.yaml").write_text("port: 83\n")
    Path(".env").write_text("GATEWAY_CONFIG=own.yaml\n")
    assert load().port == 83


def test_all_mistakes_are_reported_at_once_with_their_places() -> None:
    Path(".env").write_text("GATEWAY__HEARTBEAT=0\n")
    found = problems(
        """
llm_backend: vlm
port: 99999
tirs: {}
backends:
  vllm: {max_concurency: 3, base_url: "http://u:pw@h/v1"}
  box: {max_queue: -1}
tiers:
  pro: {models: {ollama: a, vlm: b}, aliases: [x, {naem: y}], fallback: maybe}
  ultra: {}
default_tier: prr
""",
        {"GATEWAY__BACKENDS__VLLM__MAX_CONCURENCY": "64", "OLLAMA_BASE_URL": "ftp://x", "OLLAMA_NUM_PARALLEL": "two"},
    )
    assert found == [
        (
            "GATEWAY__BACKENDS__VLLM__MAX_CONCURENCY: unknown setting; "
            "did you mean 'GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY'? (environment)"
        ),
        "port: got 99999; expected a whole number from 0 to 65535 (gateway.yaml line 3)",
        "backends.vllm.max_concurency: unknown key; did you mean 'max_concurrency'? (gateway.yaml line 6)",
        "backends.box.max_queue: got -1; expected a whole number of at least 0 (gateway.yaml line 7)",
        (
            "tiers.pro.aliases[1].name: missing; expected: The name; "
            "`*` matches any name that nothing else uses. (gateway.yaml line 9)"
        ),
        "tiers.pro.aliases[1].naem: unknown key; did you mean 'name'? (gateway.yaml line 9)",
        (
            "tiers.ultra.models: missing; expected: The model's name on each backend, by the name of the "
            "backend. (gateway.yaml line 10)"
        ),
        (
            "GATEWAY__HEARTBEAT: got '0'; expected more than 0, as a duration: seconds, or text such as "
            "500ms, 30s, 5m, 1h (.env)"
        ),
        "OLLAMA_NUM_PARALLEL: got 'two'; expected a whole number of at least 0 (environment)",
        "tirs: unknown key; did you mean 'tiers'? (gateway.yaml line 4)",
        (
            "backends.vllm.base_url: got **********; expected an address without user and password; "
            "use api_key or headers (gateway.yaml line 6)"
        ),
        "backends.box.kind: missing; expected one of: ollama, vllm, openai (gateway.yaml line 7)",
        (
            "OLLAMA_BASE_URL: got 'ftp://x'; expected an address that starts with http://, https:// or dns:// "
            "(environment)"
        ),
        (
            "llm_backend: 'vlm' is not a backend; expected one of: vllm, box, ollama; "
            "did you mean 'vllm'? (gateway.yaml line 2)"
        ),
        (
            "tiers.pro.models.vlm: 'vlm' is not a backend; expected one of: vllm, box, ollama; "
            "did you mean 'vllm'? (gateway.yaml line 9)"
        ),
        "tiers.pro.fallback: 'maybe' is not a backend; expected one of: vllm, box, ollama (gateway.yaml line 9)",
        "default_tier: 'prr' is not a tier; expected one of: pro, ultra; did you mean 'pro'? (gateway.yaml line 11)",
    ]


def test_missing_required_key_does_not_hide_other_mistakes_of_the_entry() -> None:
    found = problems(
        """
tiers:
  pro:
    fallback: vlm
    backend: box
    limits: {bix: {}}
    params: {force: {model: x}}
    aliases: [pro, {naem: y}, {naem: z}]
embeddings:
  e: {model: m, backend: olama}
  f: {backend: olama}
auto: [{images: true}, {}]
backends:
  vllm: {servers: [{models: [a]}, {base_url: "ftp://x"}, {models: [b]}]}
  ollama: {}
"""
    )
    assert [line.partition(": ")[0] for line in found] == [
        "backends.vllm.servers[0].base_url",
        "backends.vllm.servers[2].base_url",
        "tiers.pro.models",
        "tiers.pro.aliases[1].name",
        "tiers.pro.aliases[1].naem",
        "tiers.pro.aliases[2].name",
        "tiers.pro.aliases[2].naem",
        "auto[0].tier",
        "auto[1].tier",
        "embeddings.f.model",
        "backends.vllm.servers[1].base_url",
        "tiers.pro.backend",
        "tiers.pro.limits.bix",
        "tiers.pro.params.force.model",
        "tiers.pro.fallback",
        "embeddings.e.backend",
        "embeddings.f.backend",
        "tiers.pro.aliases[0]",
    ]


def test_invalid_placeholder_for_a_missing_key_ends_the_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_in_rubbish(data: Any, path: tuple[str | int, ...], key: tuple[str, ...]) -> bool:
        for part in path:
            data = data[part]
        data[key[-1]] = []
        return True

    monkeypatch.setattr(import_module("gateway.config.load"), "_fill", put_in_rubbish)
    assert [line.partition(":")[0] for line in problems("tiers: {pro: {}, max: {models: {ollama: 3}}}\nport: x")] == [
        "port",
        "tiers.pro.models",
        "tiers.max.models.ollama",
    ]


@pytest.mark.parametrize(
    "text",
    ["backends: 3", "backends: [a]", "tiers: x", "llm_backend: [a]", "embeddings: 1", "_env_file: 1", "self: 1",
     "model_config: {a: 1}", "__class__: 1", "copy: 1", "'a\\nb': 1", "'': 1"],
)  # fmt: skip
def test_mistake_at_the_top_level_is_reported_in_one_line(text: str) -> None:
    one_problem(text)


def test_settings_can_be_built_from_a_mapping_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_BACKEND", "vllm")
    Path(".env").write_text("LLM_BACKEND=vllm")
    document = {
        "port": 0,
        "backends": {"ollama": {"base_url": "http://127.0.0.1:1"}},
        "tiers": {"a": {"models": {"ollama": "m"}}},
    }
    assert config.build(document).llm_backend == "ollama"
    assert document["port"] == 0
    with pytest.raises(ConfigError):
        config.build({"port": "x"})
