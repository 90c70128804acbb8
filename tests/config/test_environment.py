"""Settings from variables: plain ones, nested ones, and those that are not used.

Covers: gateway/config/schema_paths.py
"""

from pathlib import Path

import pytest
from pydantic import SecretStr

from gateway import config
from tests.config.harness import EXAMPLE, SECRET, load, one_problem, warned

pytestmark = pytest.mark.usefixtures("empty_environment")


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
            "GATEWAY_LOG_LEVEL": "WARNING",
            "GATEWAY__KEEP_ALIVE_TIMEOUT": "2m",
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
    assert (settings.log_level, settings.keep_alive_timeout) == ("warning", 120.0)
    assert settings.warnings == ()


def test_empty_variables_count_as_unset_except_the_state_file() -> None:
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


QUOTES = "the value has quotes around it; remove them (docker's --env-file makes them a part of the value)"
COMMENT = "the value contains ' #'; put the comment on a line of its own (docker's --env-file keeps it)"


@pytest.mark.parametrize(
    "variable",
    [*config.VARIABLES, "GATEWAY__HOST", "GATEWAY__BACKENDS__VLLM__API_KEY", "GATEWAY__CORS_ORIGINS", "GATEWAY__PORT"],
)
@pytest.mark.parametrize(
    ("form", "words"), [('"%s"', QUOTES), ("'%s'", QUOTES), ("%s # a comment", COMMENT), ("%s\t# tab", COMMENT)]
)
def test_quotes_and_comments_in_a_value_are_refused_without_the_value(variable: str, form: str, words: str) -> None:
    assert one_problem(environ={variable: form % SECRET}) == f"{variable}: {words} (environment)"


def test_quotes_and_number_signs_in_json_are_a_part_of_it() -> None:
    settings = load(
        EXAMPLE,
        {
            "GATEWAY__TIERS__ULTRA__PARAMS__DEFAULT__STOP": '"a # b"',
            "GATEWAY__TIERS__ULTRA__PARAMS__FORCE": '{"stop": "c # d"}',
            "GATEWAY__TIERS__PRO__ALIASES": "a#b",
        },
    )
    params = settings.tiers["ultra"].params
    assert (params.default["stop"], params.force["stop"]) == ("a # b", "c # d")
    assert settings.tiers["pro"].aliases[0].name == "a#b"


def test_address_variable_applies_to_the_only_backend_of_its_kind() -> None:
    text = "backends: {local: {kind: ollama}, gpu: {kind: vllm}}\ntiers: {a: {models: {local: x, gpu: y}}}"
    settings = load(text, {"OLLAMA_BASE_URL": "box", "VLLM_BASE_URL": "gpu"})
    assert settings.backends["local"].servers[0].base_url == "http://box:11434"
    assert settings.backends["gpu"].servers[0].base_url == "http://gpu:8000"
    assert list(settings.backends) == ["local", "gpu"]


def test_ambiguous_address_variable_is_ignored_with_a_warning() -> None:
    text = "backends: {one: {kind: vllm}, two: {kind: vllm, base_url: x}}\ntiers: {a: {models: {one: x, two: y}}}"
    assert warned(load(text, {"VLLM_BASE_URL": "gpu"})) == [
        "VLLM_BASE_URL: ignored: several backends are of kind vllm, and none is named vllm (environment)"
    ]


def test_nested_variables_reach_every_kind_of_key() -> None:
    settings = load(
        EXAMPLE,
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
            "GATEWAY__ALLOWED_HOSTS": "host.docker.internal,GPU,[fd00::1]",
            "GATEWAY__UNLIMITED_ADDRESSES": "10.1.2.3/8, fd00::1",
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
    assert settings.allowed_hosts == ("host.docker.internal", "gpu", "fd00::1")
    assert settings.unlimited_addresses == ("10.0.0.0/8", "fd00::1/128")
    assert settings.max_body == 5_000_000
    assert list(settings.tiers) == ["standard", "pro", "ultra"]


def test_environment_can_define_a_tier_and_a_backend() -> None:
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


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        (
            {"LLM_BACKEND": "vlm"},
            "LLM_BACKEND: 'vlm' is not a backend; expected one of: ollama, vllm; did you mean 'vllm'? (environment)",
        ),
        ({"GATEWAY_PORT": "http"}, "GATEWAY_PORT: got 'http'; expected a whole number from 0 to 65535 (environment)"),
        (
            {
                "LLM_BACKEND": "BOX",
                "GATEWAY__BACKENDS__BOX__BASE_URL": "http://b",
                "GATEWAY__BACKENDS__BOX__KIND": "openai",
            },
            (
                "tiers.standard.models: tier 'standard' has no model for 'box', the backend of all tiers that are not "
                "pinned; expected models.box"
            ),
        ),
        ({"GATEWAY__PRT": "1"}, "GATEWAY__PRT: unknown setting; did you mean 'GATEWAY__PORT'? (environment)"),
        (
            {"GATEWAY__PORT__X": "1"},
            "GATEWAY__PORT__X: unknown setting: GATEWAY__PORT has no keys below it (environment)",
        ),
        ({"GATEWAY__TIERS": "[1]"}, 'GATEWAY__TIERS: expected a JSON object, such as {"key": "value"} (environment)'),
        (
            {"GATEWAY__TIERS__STANDARD__ALIASES": '["a'},
            (
                'GATEWAY__TIERS__STANDARD__ALIASES: expected a JSON list, such as ["a", "b"], or '
                "comma-separated text (environment)"
            ),
        ),
        (
            {"GATEWAY__TIERS__STANDARD__ALIASES": '[{"name": "a"}, {"nam": "b", "name": "c"}]'},
            "GATEWAY__TIERS__STANDARD__ALIASES[1].nam: unknown key; did you mean 'name'? (environment)",
        ),
        (
            {"GATEWAY__TIERS__STANDARD": '{"fallbck": true}'},
            "GATEWAY__TIERS__STANDARD.fallbck: unknown key; did you mean 'fallback'? (environment)",
        ),
        (
            {"OLLAMA_MODEL": "모델"},
            (
                "OLLAMA_MODEL: got '모델'; expected a model name of printable ASCII text; put one that looks like a "
                "number in quotes (environment)"
            ),
        ),
        ({"GATEWAY_CONFIG": "none.yaml"}, "none.yaml: No such file or directory"),
    ],
)
def test_message_names_the_variable_that_was_set(environ: dict[str, str], line: str) -> None:
    assert one_problem(environ=environ) == line


@pytest.mark.parametrize("name", ["GATEWAY__FOO", "GATEWAY__BACKENDS__VLLM__MODEL"])
def test_unknown_variable_without_a_similar_name_gets_the_list_of_names(name: str) -> None:
    """The correct words before the unknown one do not make other names more similar."""
    assert one_problem(environ={name: "x"}).startswith(f"{name}: unknown setting; expected one of: ")
