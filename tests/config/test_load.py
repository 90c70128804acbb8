"""Settings: what is taken from where, what is refused and in which words."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from gateway import config
from gateway.config import ConfigError, Settings

CONTRACT = """
llm_backend: ollama
rollback_to: ollama
backends:
  ollama: {kind: ollama, base_url: http://127.0.0.1:11434}
  vllm:
    kind: vllm
    servers:
      - {base_url: http://10.0.0.5:8001/v1}
      - {base_url: http://10.0.0.5:8002/v1}
      - {base_url: http://10.0.0.6:8003/v1, models: ["Qwen/Qwen3-VL-8B-Instruct"]}
tiers:
  standard: {models: {ollama: "qwen3-vl:2b", vllm: "Qwen/Qwen3-VL-2B-Instruct"}, aliases: [gpt-4o-mini, simple]}
  pro:      {models: {ollama: "qwen3-vl:4b", vllm: "Qwen/Qwen3-VL-4B-Instruct"}, aliases: [medium], limits: {vllm: {concurrency: 20}}}
  ultra:
    models: {ollama: "qwen3-vl:8b", vllm: "Qwen/Qwen3-VL-8B-Instruct"}
    aliases: [gpt-4o, complex, {name: background, priority: batch, listed: false}]
    fallback: true
    params: {default: {temperature: 0.7}, force: {reasoning_effort: none}, drop: [logit_bias]}
default_tier: standard
embeddings:
  bge-m3: {backend: ollama, model: "bge-m3"}
"""
SECRET = "s3cret-of-a-client-0123456789"


@pytest.fixture(autouse=True)
def _empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    file = None
    if text is not None:
        file = Path("gateway.yaml")
        file.write_text(text, encoding="utf-8")
    return config.load(file, environ or {})


def problems(text: str | None = None, environ: Mapping[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(text, environ)
    assert all("\n" not in line for line in caught.value.lines)
    return list(caught.value.lines)


def one_problem(text: str | None = None, environ: Mapping[str, str] | None = None) -> str:
    found = problems(text, environ)
    assert len(found) == 1, found
    return found[0]


def warned(settings: Settings) -> list[str]:
    return [line for line in settings.warnings if "the gateway is open" not in line]


# Without a file


def test_without_file_and_variables_there_is_one_tier_on_two_local_backends() -> None:
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


def test_top_level_defaults_are_those_of_the_contract() -> None:
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
    assert settings.waiting_note is False


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("ollama", (4, "auto", 1, None, 256, 512, 300.0, 3600.0, 2.0, 300.0, 300.0, 3600.0)),
        ("vllm", (128, 128, 128, None, 512, 512, 60.0, 300.0, 2.0, 120.0, 120.0, 3600.0)),
    ],
)
def test_limits_without_settings_are_those_of_the_kind(backend: str, expected: tuple[object, ...]) -> None:
    assert tuple(load().limits_for("standard", backend).model_dump().values()) == expected


def test_one_variable_moves_everything_to_vllm_and_the_way_back_stays_ollama() -> None:
    settings = load(environ={"LLM_BACKEND": "vllm"})
    assert (settings.llm_backend, settings.rollback_to) == ("vllm", "ollama")


def test_plain_variables_reach_their_settings() -> None:
    settings = load(
        environ={
            "OLLAMA_BASE_URL": "http://box:11434/v1/",
            "OLLAMA_MODEL": "llama3.2:3b",
            "VLLM_BASE_URL": "https://gpu/v1",
            "VLLM_MODEL": "meta/Llama",
            "VLLM_API_KEY": SECRET,
            "OLLAMA_NUM_PARALLEL": "2",
            "GATEWAY_HOST": "0.0.0.0",
            "GATEWAY_PORT": "9000",
            "GATEWAY_API_KEYS": f"{SECRET}, second-key-0123456789,{SECRET}",
            "GATEWAY_ADMIN_KEY": "admin-key-0123456789",
            "GATEWAY_METRICS_KEY": "metrics-key-0123456789",
            "GATEWAY_METRICS_PORT": "9001",
            "GATEWAY_STATE_FILE": "/var/lib/gateway/state.json",
        }
    )
    assert settings.backends["ollama"].servers[0].base_url == "http://box:11434"
    assert settings.backends["vllm"].servers[0].base_url == "https://gpu"
    assert settings.backends["vllm"].api_key == SecretStr(SECRET)
    assert settings.tiers["standard"].models == {"ollama": "llama3.2:3b", "vllm": "meta/Llama"}
    assert (settings.host, settings.port, settings.metrics_port, settings.ollama_num_parallel) == (
        "0.0.0.0",
        9000,
        9001,
        2,
    )
    assert [key.get_secret_value() for key in settings.api_keys] == [SECRET, "second-key-0123456789"]
    assert settings.state_file == Path("/var/lib/gateway/state.json")
    assert settings.warnings == ()


def test_empty_variables_do_not_count_except_the_state_file() -> None:
    settings = load(
        environ={
            "LLM_BACKEND": "",
            "VLLM_API_KEY": " ",
            "GATEWAY_API_KEYS": "",
            "GATEWAY__PORT": "",
            "GATEWAY_STATE_FILE": "",
        }
    )
    assert (settings.llm_backend, settings.backends["vllm"].api_key, settings.api_keys, settings.port) == (
        "ollama",
        None,
        (),
        8080,
    )
    assert settings.state_file is None


def test_kubernetes_service_variables_do_no_harm() -> None:
    settings = load(
        environ={
            "GATEWAY_PORT": "tcp://10.0.0.1:8080",
            "GATEWAY_SERVICE_HOST": "10.0.0.1",
            "GATEWAY_SERVICE_PORT_HTTP": "8080",
            "GATEWAY_PORT_8080_TCP_ADDR": "10.0.0.1",
        }
    )
    assert settings.port == 8080
    assert warned(settings) == ["GATEWAY_PORT: not used: Kubernetes set it for a Service named gateway (environment)"]


# The file


def test_contract_example_is_taken_whole() -> None:
    settings = load(CONTRACT)
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
    servers = settings.backends["vllm"].servers
    assert [server.base_url for server in servers] == [
        "http://10.0.0.5:8001",
        "http://10.0.0.5:8002",
        "http://10.0.0.6:8003",
    ]
    assert [server.models for server in servers] == [None, None, ("Qwen/Qwen3-VL-8B-Instruct",)]
    assert settings.embeddings["bge-m3"].model_dump() == {"backend": "ollama", "model": "bge-m3", "warm": False}
    assert warned(settings) == []


def test_tier_limits_stand_above_those_of_the_backend() -> None:
    settings = load(CONTRACT)
    assert settings.limits_for("pro", "vllm").concurrency == 20
    assert settings.limits_for("standard", "vllm").concurrency is None
    assert settings.limits_for(settings.tiers["pro"], settings.backends["vllm"]).max_concurrency == 128


def test_lowered_maximum_lowers_what_cannot_be_above_it() -> None:
    settings = load(
        "tiers: {a: {models: {ollama: x, vllm: y}, limits: {vllm: {max_concurrency: 8, idle_timeout: 5m}}}}"
    )
    limits = settings.limits_for("a", "vllm")
    assert (limits.max_concurrency, limits.model_concurrency, limits.vision_concurrency, limits.idle_timeout) == (
        8,
        8,
        8,
        300.0,
    )
    assert settings.backends["vllm"].limits.max_concurrency == 128


def test_model_and_vision_concurrency_follow_the_maximum_of_a_vllm() -> None:
    limits = load("backends: {vllm: {max_concurrency: 16}}").backends["vllm"].limits
    assert (limits.model_concurrency, limits.vision_concurrency) == (16, 16)


def test_settings_cannot_be_changed() -> None:
    settings = load(CONTRACT)
    for part, name in (
        (settings, "port"),
        (settings.backends["vllm"], "kind"),
        (settings.tiers["pro"].limits["vllm"], "concurrency"),
    ):
        with pytest.raises(ValidationError):
            setattr(part, name, 1)


def test_names_lead_to_backends_and_tiers_without_regard_to_case() -> None:
    settings = load(
        "llm_backend: VLLM\ndefault_tier: a\ntiers: {A: {models: {Ollama: x, vLLM: y}, limits: {VLLM: {concurrency: 1}}}}"
    )
    assert settings.llm_backend == "vllm"
    assert settings.default_tier == "A"
    assert settings.tiers["A"].models == {"ollama": "x", "vllm": "y"}
    assert settings.limits_for("A", "vllm").concurrency == 1


def test_built_in_backends_need_no_entry_where_something_names_them() -> None:
    settings = load("backends: {vllm: {base_url: gpu:8000}}\ntiers: {a: {models: {ollama: x, vllm: y}}}")
    assert list(settings.backends) == ["vllm", "ollama"]
    assert settings.llm_backend == "ollama"


def test_file_that_only_moves_an_address_keeps_both_backends() -> None:
    settings = load("backends: {ollama: {base_url: http://box:11434}}")
    assert list(settings.backends) == ["ollama", "vllm"]
    assert settings.tiers["standard"].models == {"ollama": "qwen3:8b", "vllm": "Qwen/Qwen3-8B"}


def test_backends_under_other_names_serve_the_standard_tier() -> None:
    settings = load("backends: {local: {kind: ollama}, gpu: {kind: vllm}}", {"VLLM_MODEL": "m"})
    assert list(settings.backends) == ["local", "gpu"]
    assert settings.tiers["standard"].models == {"local": "qwen3:8b", "gpu": "m"}
    assert (settings.llm_backend, settings.rollback_to) == ("local", "local")


def test_only_named_backends_are_there_where_nothing_refers_to_others() -> None:
    settings = load("backends: {box: {kind: openai, base_url: http://box/v1}}\ntiers: {a: {models: {box: x}}}")
    assert list(settings.backends) == ["box"]
    assert (settings.llm_backend, settings.rollback_to) == ("box", "box")


def test_empty_keys_are_as_good_as_absent_and_an_empty_state_file_turns_it_off() -> None:
    settings = load("commit_after:\nbackends:\n  ollama:\n  vllm: {keep_alive: null, base_url: }\nstate_file:\n")
    assert settings.commit_after == 45.0
    assert settings.backends["vllm"].servers[0].base_url == "http://127.0.0.1:8001"
    assert settings.state_file is None


def test_tier_names_that_yaml_takes_for_other_things_stay_text() -> None:
    assert list(load("tiers: {on: {models: {ollama: x}}, 4: {models: {ollama: y}}}").tiers) == ["on", "4"]


def test_anchors_and_merge_keys_work() -> None:
    settings = load("tiers:\n  a: &a {models: {ollama: x}, max_tokens: 5}\n  b:\n    <<: *a\n    models: {ollama: y}\n")
    assert (settings.tiers["b"].max_tokens, settings.tiers["b"].models) == (5, {"ollama": "y"})


def test_byte_order_mark_is_no_part_of_the_settings() -> None:
    Path("gateway.yaml").write_bytes(b"\xef\xbb\xbfport: 81\n")
    Path(".env").write_bytes(b"\xef\xbb\xbfGATEWAY_HOST=::1\n")
    settings = config.load(Path("gateway.yaml"), {})
    assert (settings.port, settings.host) == (81, "::1")


# The environment above the file


def test_environment_wins_for_addresses_keys_and_the_flag() -> None:
    text = CONTRACT + f"admin_key: {SECRET}\napi_keys: [from-the-file-0123456789]\n"
    settings = load(
        text,
        {
            "LLM_BACKEND": "vllm",
            "VLLM_BASE_URL": "http://other:8000",
            "GATEWAY_API_KEYS": "from-the-environment-01",
            "OLLAMA_MODEL": "z",
        },
    )
    assert settings.llm_backend == "vllm"
    assert [server.base_url for server in settings.backends["vllm"].servers] == ["http://other:8000"]
    assert [key.get_secret_value() for key in settings.api_keys] == ["from-the-environment-01"]
    assert settings.tiers["standard"].models["ollama"] == "qwen3-vl:2b"
    assert settings.warnings == (
        "OLLAMA_MODEL: not used: the file names tiers",
        "VLLM_BASE_URL: takes the place of all 3 servers of backends.vllm in the file",
    )


def test_address_variable_finds_the_only_backend_of_its_kind() -> None:
    text = "backends: {local: {kind: ollama}, gpu: {kind: vllm}}\ntiers: {a: {models: {local: x, gpu: y}}}"
    settings = load(text, {"OLLAMA_BASE_URL": "box", "VLLM_BASE_URL": "gpu"})
    assert settings.backends["local"].servers[0].base_url == "http://box:11434"
    assert settings.backends["gpu"].servers[0].base_url == "http://gpu:8000"
    assert list(settings.backends) == ["local", "gpu"]


def test_address_variable_that_could_mean_two_backends_is_told() -> None:
    text = "backends: {one: {kind: vllm}, two: {kind: vllm, base_url: x}}\ntiers: {a: {models: {one: x, two: y}}}"
    assert warned(load(text, {"VLLM_BASE_URL": "gpu"})) == [
        "VLLM_BASE_URL: not used: several backends are of kind vllm, and none has that name (environment)"
    ]


def test_every_key_has_a_form_in_the_environment() -> None:
    settings = load(
        CONTRACT,
        {
            "GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY": "64",
            "GATEWAY__COMMIT_AFTER": "30s",
            "GATEWAY__TIERS__PRO__ALIASES": '["middle", {"name": "slow", "priority": "batch"}]',
            "GATEWAY__TIERS__ULTRA__ALIASES": "big, huge",
            "GATEWAY__TIERS__ULTRA__FALLBACK": "vllm",
            "GATEWAY__TIERS__ULTRA__MODELS__OLLAMA": "other:1b",
            "GATEWAY__TIERS__ULTRA__PARAMS__DEFAULT__TEMPERATURE": "0.2",
            "GATEWAY__TIERS__PRO__LIMITS__VLLM__IDLE_TIMEOUT": "1m",
            "GATEWAY__BACKENDS__OLLAMA__HEADERS": '{"X-Team": "chat"}',
            "GATEWAY__BACKENDS__OLLAMA__TRUNCATE": "true",
            "GATEWAY__BACKENDS__OLLAMA__KEEP_ALIVE": "-1",
            "GATEWAY__BACKENDS__OLLAMA__SERVERS": "http://a:1,http://b:2",
            "GATEWAY__EMBEDDINGS__BGE_M3__MODEL": "bge-m3:f16",
            "GATEWAY__CORS_ORIGINS": "https://a.example,https://b.example",
            "GATEWAY__MAX_BODY": "5MB",
        },
    )
    ollama = settings.backends["ollama"]
    assert settings.backends["vllm"].limits.max_concurrency == 64
    assert settings.commit_after == 30.0
    assert [(alias.name, alias.priority) for alias in settings.tiers["pro"].aliases] == [
        ("middle", "interactive"),
        ("slow", "batch"),
    ]
    assert [alias.name for alias in settings.tiers["ultra"].aliases] == ["big", "huge"]
    assert settings.tiers["ultra"].fallback == "vllm"
    assert settings.tiers["ultra"].models["ollama"] == "other:1b"
    assert settings.tiers["ultra"].params.default == {"temperature": 0.2}
    assert settings.limits_for("pro", "vllm").idle_timeout == 60.0
    assert settings.limits_for("pro", "vllm").concurrency == 20
    assert ollama.headers == {"x-team": SecretStr("chat")}
    assert (ollama.truncate, ollama.keep_alive) == (True, -1)
    assert [server.base_url for server in ollama.servers] == ["http://a:1", "http://b:2"]
    assert settings.embeddings["bge-m3"].model == "bge-m3:f16"
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.max_body == 5_000_000
    assert list(settings.tiers) == ["standard", "pro", "ultra"]


def test_environment_can_name_a_tier_and_a_backend_of_its_own() -> None:
    settings = load(
        environ={
            "GATEWAY__BACKENDS__BOX__KIND": "openai",
            "GATEWAY__BACKENDS__BOX__BASE_URL": "https://box/v1",
            "GATEWAY__TIERS__PRO__MODELS": '{"ollama": "x", "box": "y"}',
            "GATEWAY__TIERS__STANDARD__ALIASES": "simple",
        }
    )
    assert list(settings.tiers) == ["standard", "pro"]
    assert settings.tiers["standard"].aliases[0].name == "simple"
    assert settings.tiers["standard"].models == {"ollama": "qwen3:8b", "vllm": "Qwen/Qwen3-8B"}
    assert settings.backends["box"].servers[0].base_url == "https://box"


def test_dotenv_stands_between_the_file_and_the_environment() -> None:
    Path(".env").write_text(
        "LLM_BACKEND=vllm\nexport GATEWAY_HOST='0.0.0.0'\nGATEWAY_PORT=81\nPATH_OF_OTHERS=x\nGATEWAY__HEARTBEAT=7\n"
    )
    settings = load("port: 80\nhost: a\nheartbeat: 5\n", {"GATEWAY__PORT": "82"})
    assert (settings.llm_backend, settings.host, settings.port, settings.heartbeat) == ("vllm", "0.0.0.0", 82, 7.0)


def test_dotenv_can_name_the_file() -> None:
    Path("own.yaml").write_text("port: 83\n")
    Path(".env").write_text("GATEWAY_CONFIG=own.yaml\n")
    assert load().port == 83


def test_address_in_the_environment_wins_over_servers_in_dotenv() -> None:
    Path(".env").write_text("GATEWAY__BACKENDS__VLLM__SERVERS=http://a:1,http://b:2\n")
    assert [server.base_url for server in load(environ={"VLLM_BASE_URL": "http://c:3"}).backends["vllm"].servers] == [
        "http://c:3"
    ]


# What is refused, and in which words


def test_all_problems_are_told_at_once_each_with_its_place() -> None:
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
        "GATEWAY__BACKENDS__VLLM__MAX_CONCURENCY: no such setting; did you mean 'GATEWAY__BACKENDS__VLLM__MAX_CONCURRENCY'? (environment)",
        "port: got 99999; expected a whole number from 0 to 65535 (gateway.yaml line 3)",
        "backends.vllm.max_concurency: no such key; did you mean 'max_concurrency'? (gateway.yaml line 6)",
        "backends.box.max_queue: got -1; expected a whole number, at least 0 (gateway.yaml line 7)",
        "tiers.pro.aliases[1].name: missing; expected: The name; `*` takes any name that nothing else takes. (gateway.yaml line 9)",
        "tiers.pro.aliases[1].naem: no such key; did you mean 'name'? (gateway.yaml line 9)",
        "tiers.ultra.models: missing; expected: Name of a backend: the model's name there. (gateway.yaml line 10)",
        "GATEWAY__HEARTBEAT: got '0'; expected more than 0, as a duration: seconds, or such as 500ms, 30s, 5m, 1h (.env)",
        "OLLAMA_NUM_PARALLEL: got 'two'; expected a whole number, at least 0 (environment)",
        "tirs: no such key; did you mean 'tiers'? (gateway.yaml line 4)",
        (
            "backends.vllm.base_url: got **********; expected an address without user and password; use api_key or headers (gateway.yaml line 6)"
        ),
        "backends.box.kind: missing; expected one of: ollama, vllm, openai (gateway.yaml line 7)",
        "OLLAMA_BASE_URL: got 'ftp://x'; expected an address that begins with http:// or https:// (environment)",
        "llm_backend: 'vlm' is not a backend; expected one of: vllm, box, ollama; did you mean 'vllm'? (gateway.yaml line 2)",
        "tiers.pro.models.vlm: 'vlm' is not a backend; expected one of: vllm, box, ollama; did you mean 'vllm'? (gateway.yaml line 9)",
        "tiers.pro.fallback: 'maybe' is not a backend; expected one of: vllm, box, ollama (gateway.yaml line 9)",
        "default_tier: 'prr' is not a tier; expected one of: pro, ultra; did you mean 'pro'? (gateway.yaml line 11)",
    ]


def test_entry_that_lacks_a_required_key_does_not_hide_what_else_is_wrong_in_it() -> None:
    found = problems(
        """
tiers:
  pro: {fallback: vlm, backend: box, limits: {bix: {}}, params: {force: {model: x}}, aliases: [pro, {naem: y}, {naem: z}]}
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


def test_what_is_put_in_for_a_missing_key_may_be_wrong_itself(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("text", ["backends: 3", "backends: [a]", "tiers: x", "llm_backend: [a]", "embeddings: 1", "_env_file: 1",
                                  "self: 1", "model_config: {a: 1}", "__class__: 1", "copy: 1", "'a\\nb': 1", "'': 1"])  # fmt: skip
def test_one_mistake_at_the_top_makes_one_line(text: str) -> None:
    one_problem(text)


TIER = "tiers: {pro: {models: {ollama: a, vllm: b}%s}}"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (
            "rollback_to: vlm",
            "rollback_to",
            "'vlm' is not a backend; expected one of: ollama, vllm; did you mean 'vllm'?",
        ),
        ("default_tier: ultra", "default_tier", "'ultra' is not a tier; expected one of: standard"),
        (
            "tiers: {pro: {models: {vllm: b}}}\nllm_backend: ollama",
            "tiers.pro.models",
            "tier 'pro' has no model for 'ollama'",
        ),
        (
            "tiers: {pro: {models: {ollama: b}, backend: vllm}}",
            "tiers.pro.models",
            "tier 'pro' is pinned to 'vllm', which has no model",
        ),
        (TIER % ", backend: box", "tiers.pro.backend", "'box' is not a backend; expected one of: ollama, vllm"),
        (
            "tiers: {pro: {models: {ollama: b}, fallback: vllm}}",
            "tiers.pro.fallback",
            "'vllm' has no model in tier 'pro'",
        ),
        (TIER % ", backend: vllm, fallback: vllm", "tiers.pro.fallback", "pinned to; expected another"),
        (TIER % ", fallback: 3", "tiers.pro.fallback", "got 3; expected true, false or the name of a backend"),
        (TIER % ", limits: {box: {}}", "tiers.pro.limits.box", "'box' is not a backend"),
        (
            TIER % ", limits: {vllm: {model_concurrency: auto}}",
            "tiers.pro.limits.vllm.model_concurrency",
            "'auto' is for kind ollama",
        ),
        (TIER % ", aliases: [PRO]", "tiers.pro.aliases[0]", "'PRO' is taken by tiers.pro"),
        (TIER % ", aliases: [auto]", "tiers.pro.aliases[0]", "'auto' is reserved"),
        (TIER % ", aliases: [5]", "tiers.pro.aliases[0]", "got 5; expected a name: printable text"),
        (TIER % ", max_tokens: 0", "tiers.pro.max_tokens", "got 0; expected a whole number, at least 1"),
        (TIER % ", max_tokens: true", "tiers.pro.max_tokens", "got true; expected a whole number, at least 1"),
        (TIER % ", params: {force: {model: x}}", "tiers.pro.params.force.model", "not for a tier to change"),
        (
            TIER % ", params: {force: {seed: 1}, drop: [seed]}",
            "tiers.pro.params.drop[0]",
            "'seed' stands under force too",
        ),
        (TIER % ", models2: {}", "tiers.pro.models2", "no such key; did you mean 'models'?"),
        ("tiers: {pro: {models: {ollama: 3}}}", "tiers.pro.models.ollama", "got 3; expected a model's name"),
        ("tiers: {pro: {models: {ollama: a}}, Pro: {models: {ollama: b}}}", "tiers.Pro", "'Pro' is taken by tiers.pro"),
        ("tiers: {auto: {models: {ollama: a}}}", "tiers.auto", "'auto' is reserved"),
        ("tiers: {'a b': {models: {ollama: a}}}", "tiers.a b", "expected a name of letters, digits"),
        ("tiers: {pro: []}", "tiers.pro", "got a list; expected a mapping of keys"),
        (
            "tiers: {a: {models: {ollama: x}, aliases: ['*']}, b: {models: {ollama: y}, aliases: ['*']}}",
            "tiers.b.aliases[0]",
            "taken by tiers.a",
        ),
        ("embeddings: {e: {backend: box, model: m}}", "embeddings.e.backend", "'box' is not a backend"),
        ("embeddings: {e: {backend: ollama}}", "embeddings.e.model", "missing; expected: The model's name there."),
        (
            "embeddings: {standard: {backend: ollama, model: m}}",
            "embeddings.standard",
            "'standard' is taken by tiers.standard",
        ),
        ("backends: {ollama: {}, Ollama: {}}", "backends.Ollama", "'Ollama' and 'ollama' are one name"),
        (
            "backends: {vllm: {base_url: a, servers: [b]}}\nllm_backend: ollama",
            "backends.vllm.servers",
            "stands beside base_url",
        ),
        (
            "backends: {vllm: {servers: []}}\nllm_backend: ollama",
            "backends.vllm.servers",
            "got a list; expected at least one entry",
        ),
        (
            "backends: {vllm: {servers: [a:1, 'http://a:1/v1']}}\nllm_backend: ollama",
            "backends.vllm.servers[1].base_url",
            "stands twice",
        ),
        (
            "backends: {vllm: {kind: vlm}}\nllm_backend: ollama",
            "backends.vllm.kind",
            "got 'vlm'; expected 'ollama', 'vllm' or 'openai'",
        ),
        (
            "backends: {box: {kind: openai}}\nllm_backend: ollama",
            "backends.box.base_url",
            "missing; expected an address",
        ),
        (
            "backends: {vllm: {num_ctx: 4}}\nllm_backend: ollama",
            "backends.vllm.num_ctx",
            "expected only at kind ollama",
        ),
        (
            "backends: {vllm: {model_concurrency: auto}}\nllm_backend: ollama",
            "backends.vllm.model_concurrency",
            "'auto' at kind vllm",
        ),
        (
            "backends: {vllm: {headers: {Host: x}}}\nllm_backend: ollama",
            "backends.vllm.headers.host",
            "writes this header itself",
        ),
        (
            "backends: {vllm: {headers: {'a b': x}}}\nllm_backend: ollama",
            "backends.vllm.headers.a b",
            "expected the name of a header",
        ),
        (
            "backends: {ollama: {keep_alive: soon}}",
            "backends.ollama.keep_alive",
            "got 'soon'; expected seconds, or a duration",
        ),
        ("backends: {ollama: {ca_file: none.pem}}", "backends.ollama.ca_file", "'none.pem': No such file or directory"),
        ("backends: {ollama: {truncate: 1}}", "backends.ollama.truncate", "got 1; expected true or false"),
        ("commit_after: soon", "commit_after", "got 'soon'; expected a duration"),
        ("rollback_cutoff: -1", "rollback_cutoff", "got -1; expected"),
        ("heartbeat: 0", "heartbeat", "got 0; expected more than 0"),
        ("heartbeat: true", "heartbeat", "got true; expected a duration"),
        ("drain_timeout: .nan", "drain_timeout", "expected a duration"),
        ("max_body: big", "max_body", "got 'big'; expected a size"),
        ("max_body: 1KiB", "max_text_body", "got 1048576; expected at most max_body, which is 1024 bytes"),
        ("log_format: xml", "log_format", "got 'xml'; expected 'auto', 'json' or 'text'"),
        ("cors_origins: [example.com]", "cors_origins[0]", "got 'example.com'; expected an origin such as"),
        ("cors_origins: https://a", "cors_origins", "got 'https://a'; expected a list"),
        ("user_header: 'a b'", "user_header", "got 'a b'; expected the name of a header"),
        ("user_header: X-A\nsession_header: x-a", "session_header", "expected another header than user_header"),
        ("metrics_port: 8080", "metrics_port", "expected another port than the gateway's own"),
        ("host: 1", "host", "got 1; expected text"),
        ("api_keys_file: none.txt", "api_keys_file", "'none.txt': No such file or directory"),
    ],
)
def test_wrong_setting_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    line = one_problem(text)
    assert line.lower().startswith(f"{key}: ".lower())
    assert words in line


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"LLM_BACKEND": "vlm"}, "LLM_BACKEND: 'vlm' is not a backend; expected one of: ollama, vllm; did you mean 'vllm'? (environment)"),
        ({"GATEWAY_PORT": "http"}, "GATEWAY_PORT: got 'http'; expected a whole number from 0 to 65535 (environment)"),
        ({"LLM_BACKEND": "BOX", "GATEWAY__BACKENDS__BOX__BASE_URL": "http://b", "GATEWAY__BACKENDS__BOX__KIND": "openai"},
         ("tiers.standard.models: tier 'standard' has no model for 'box', the backend of all tiers that are not pinned; "
         "expected models.box")),
        ({"GATEWAY__PRT": "1"}, "GATEWAY__PRT: no such setting; did you mean 'GATEWAY__PORT'? (environment)"),
        ({"GATEWAY__PORT__X": "1"}, "GATEWAY__PORT__X: no such setting: nothing stands below GATEWAY__PORT (environment)"),
        ({"GATEWAY__TIERS": "[1]"}, 'GATEWAY__TIERS: expected a JSON object, such as {"key": "value"} (environment)'),
        (
            {"GATEWAY__TIERS__STANDARD__ALIASES": '["a'},
            'GATEWAY__TIERS__STANDARD__ALIASES: expected a JSON list, such as ["a", "b"], or text with commas (environment)',
        ),
        (
            {"GATEWAY__TIERS__STANDARD__ALIASES": '[{"name": "a"}, {"nam": "b", "name": "c"}]'},
            "GATEWAY__TIERS__STANDARD__ALIASES[1].nam: no such key; did you mean 'name'? (environment)",
        ),
        (
            {"GATEWAY__TIERS__STANDARD": '{"fallbck": true}'},
            "GATEWAY__TIERS__STANDARD.fallbck: no such key; did you mean 'fallback'? (environment)",
        ),
        ({"OLLAMA_MODEL": "모델"},
         ("OLLAMA_MODEL: got '모델'; expected a model's name: printable ASCII text; one that looks like a number stands "
         "in quotes (environment)")),
        ({"GATEWAY_CONFIG": "none.yaml"}, "none.yaml: No such file or directory"),
    ],
)  # fmt: skip
def test_message_names_the_variable_that_was_set(environ: dict[str, str], line: str) -> None:
    assert one_problem(environ=environ) == line


@pytest.mark.parametrize("name", ["GATEWAY__FOO", "GATEWAY__BACKENDS__VLLM__MODEL"])
def test_variable_that_is_near_nothing_is_told_all_that_there_is(name: str) -> None:
    """What stands before its last word is right, and makes no other word any nearer."""
    assert one_problem(environ={name: "x"}).startswith(f"{name}: no such setting; expected one of: ")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: 2", "expected ',' or ']', but got ':' (line 2)"),
        ("- a", "expected a mapping of settings"),
        ("port: 1\nport: 2", "port: stands twice (gateway.yaml lines 1 and 2)"),
        ("tiers: {a: {models: {ollama: x}}, a: {models: {ollama: x}}}", "tiers.a: stands twice"),
        ("? [a]\n: b", "expected text as a key (line 1)"),
        ("a: &a {b: *a}", "nested too deep"),
        ("port: !!python/object:os.system 1", "could not determine a constructor"),
    ],
)
def test_broken_file_is_told_with_its_line(text: str, words: str) -> None:
    assert any(words in line for line in problems(text))


def test_file_that_is_no_text_is_told() -> None:
    Path("gateway.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        config.load(Path("gateway.yaml"), {})


@pytest.mark.parametrize(
    "text",
    [
        f"api_keys: ['{SECRET} x']",
        f"admin_key: '{SECRET}\u00e9'",
        f"backends: {{ollama: {{api_key: ['{SECRET}']}}}}",
        f"backends: {{ollama: {{headers: {{x-key: \"{SECRET}\\n\"}}}}, vllm: {{headers: '{SECRET}'}}}}\nllm_backend: x",
        f"backends: {{ollama: {{base_url: 'http://user:{SECRET}@host'}}}}",
        f"backends: {{ollama: {{base_url: 'http://host/?key={SECRET}'}}}}",
        f"admin_key: {SECRET}\napi_keys: [{SECRET}]",
        f"admin_key: *{SECRET}",
    ],
)
def test_no_message_holds_a_secret(text: str) -> None:
    assert not any(SECRET in line for line in problems(text + "\nport: x"))


def test_no_message_holds_a_secret_of_a_variable() -> None:
    environ = {
        "GATEWAY_API_KEYS": f"{SECRET},,b",
        "GATEWAY_ADMIN_KEY": f"{SECRET} x",
        "GATEWAY__BACKENDS__VLLM__HEADERS": f'{{"authorization": "{SECRET}"',
        "VLLM_API_KEY": f"{SECRET}\u00e9",
        "OLLAMA_BASE_URL": f"http://u:{SECRET}@h",
    }
    found = problems(environ=environ)
    assert {line.partition(":")[0] for line in found} == set(environ)
    assert SECRET not in "\n".join(found)


def test_repr_of_settings_hides_keys() -> None:
    assert SECRET not in repr(load(environ={"GATEWAY_API_KEYS": SECRET, "VLLM_API_KEY": SECRET}))


# Keys


def test_keys_file_holds_one_key_a_line_and_comments() -> None:
    Path("keys").write_text("# people\nalice-key-0123456789  # Alice\n\nbob-key-0123456789ab\nalice-key-0123456789\n")
    settings = load(environ={"GATEWAY_API_KEYS_FILE": "keys", "GATEWAY_API_KEYS": SECRET})
    assert [key.get_secret_value() for key in settings.api_keys] == [
        SECRET,
        "alice-key-0123456789",
        "bob-key-0123456789ab",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected at least one key"),
        ("# none\n", "expected at least one key"),
        (f"ok-key\n{SECRET} b\n", "line 2: expected"),
    ],
)
def test_keys_file_without_usable_keys_is_refused(text: str, words: str) -> None:
    Path("keys").write_text(text)
    line = one_problem(environ={"GATEWAY_API_KEYS_FILE": "keys"})
    assert line.startswith("GATEWAY_API_KEYS_FILE: 'keys': ")
    assert words in line
    assert SECRET not in line


def test_admin_key_must_not_be_a_client_key() -> None:
    line = one_problem(environ={"GATEWAY_API_KEYS": SECRET, "GATEWAY_ADMIN_KEY": SECRET})
    assert line == "GATEWAY_ADMIN_KEY: it is one of the client keys; expected a key of its own (environment)"


# Warnings


def test_open_gateway_is_told() -> None:
    assert load().warnings == (
        "GATEWAY_API_KEYS: not set, so the gateway is open: it accepts requests with any key or none",
    )


def test_model_name_of_two_tiers_is_told() -> None:
    settings = load("tiers: {a: {models: {ollama: m, vllm: n}}, b: {models: {ollama: m, vllm: o}}}")
    assert warned(settings) == ["tiers.b.models: 'm' stands in tier 'a' too; a request for that name means 'a'"]


@pytest.mark.parametrize(
    ("text", "environ", "words"),
    [
        ("backends: {ollama: {}, box: {kind: vllm}}", {}, None),
        (
            "backends: {ollama: {}, box: {kind: vllm}}\ntiers: {a: {models: {ollama: x}}}",
            {},
            "backends.box: no tier uses it",
        ),
        (
            "tiers: {a: {models: {ollama: x}, limits: {vllm: {}}}}",
            {},
            "tiers.a.limits.vllm: not used: the tier has no model there",
        ),
        (
            "tiers: {a: {models: {ollama: x}, fallback: true}}",
            {},
            "tiers.a.fallback: true, but only one backend has a model",
        ),
        ("llm_backend: vllm\ntiers: {a: {models: {vllm: x}}}", {}, "backends.ollama: no tier uses it"),
        (
            "llm_backend: vllm\ntiers: {a: {models: {vllm: x}}}",
            {},
            "tiers.a.models: none for 'ollama', so a rollback leaves",
        ),
        (
            "backends: {ollama: {max_concurrency: 2, model_concurrency: 3}}",
            {},
            "backends.ollama.model_concurrency: 3 is above max_concurrency",
        ),
        (None, {"GATEWAY_API_KEYS": "short"}, "GATEWAY_API_KEYS: a key has fewer than 16 characters"),
        (
            None,
            {"GATEWAY_COMMIT_AFTER": "3"},
            "GATEWAY_COMMIT_AFTER: no such setting, not used; did you mean 'GATEWAY__COMMIT_AFTER'?",
        ),
        (
            None,
            {"GATEWAY_APIKEYS": "x"},
            "GATEWAY_APIKEYS: no such setting, not used; did you mean 'GATEWAY_API_KEYS'?",
        ),
        (None, {"OLLAMA_BASE_URL": "localhost:8080"}, "backends.ollama: its address is this gateway's own"),
    ],
)
def test_what_is_likely_not_meant_is_told(text: str | None, environ: dict[str, str], words: str | None) -> None:
    found = warned(load(text, environ))
    assert any(words in line for line in found) if words else found == []


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


def test_guard_is_off_unless_named_and_then_has_its_defaults() -> None:
    assert load().guard is None
    assert load("guard:").guard is None
    defaults = load("guard: {}").guard
    assert defaults is not None
    assert (len(defaults.rules), defaults.margin, defaults.ratio, defaults.grace, defaults.false_alarms) == (
        5,
        0.005,
        1.5,
        30.0,
        0.01,
    )
    assert load(environ={"GATEWAY__GUARD": "{}"}).guard == defaults
    named = load("guard: {margin: 0.02}", {"GATEWAY__GUARD__RULES": "errors,empty,errors"}).guard
    assert named is not None
    assert (named.rules, named.margin) == (("errors", "empty"), 0.02)
    assert config.check(load("guard: {rules: [empty]}"))[-2] == "the guard looks at empty"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("guard: {margin: 0.6}", "guard.margin: got 0.6; expected a number from 0 to 0.5"),
        ("guard: {margin: true}", "guard.margin: got true; expected a number"),
        ("guard: {ratio: '1,5'}", "guard.ratio: got '1,5'; expected a number from 1 to 100"),
        ("guard: {false_alarms: 0}", "guard.false_alarms: got 0; expected a number from 0.000001 to 0.5"),
        ("guard: {min_samples: 0}", "guard.min_samples: got 0; expected a whole number, at least 1"),
        ("guard: {rules: [eror]}", "guard.rules[0]: got 'eror'; expected 'errors', 'truncated'"),
        ("guard: {rules: []}", "guard.rules: got a list; expected at least one entry"),
        ("guard: {window: 0}", "guard.window: got 0; expected more than 0"),
        ("guard: {rule: [errors]}", "guard.rule: no such key; did you mean 'rules'?"),
        ("guard: true", "guard: got true; expected a mapping of keys"),
    ],
)
def test_guard_that_cannot_be_is_refused(text: str, words: str) -> None:
    assert words in one_problem(text)
