"""`${NAME}` in the YAML file: where it counts, what it becomes, and what stops the start."""

from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import SecretStr

from gateway import config
from tests.config.harness import SECRET, load, one_problem, problems, warned

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_text_values_of_every_kind_are_expanded() -> None:
    text = """
        port: ${PORT}
        heartbeat: ${SECONDS:-7}s
        max_body: ${SIZE}
        waiting_note: ${NOTE}
        admin_key: "${ADMIN}"
        api_keys: ["${ONE}", 'client-${TWO}-0123456789']
        cors_origins:
          - https://${HOST}.example
        backends:
          vllm: {base_url: "http://${HOST}:${PORT}/v1", headers: {x-team: "${TEAM:-chat}"}}
        tiers:
          ${NAME}: {models: {vllm: "${MODEL}"}, params: {default: {stop: "${QUOTED}"}}}
        llm_backend: ${BACKEND:-vllm}
    """
    environ = {
        "PORT": "9000", "SIZE": "256MiB", "NOTE": "true", "ADMIN": SECRET, "ONE": "first-key-0123456789", "TWO": "b",
        "HOST": "gpu", "MODEL": "a/b", "BACKEND": "", "QUOTED": '"Issue #5"',
    }  # fmt: skip
    lines = problems(text, environ)
    assert [line.partition(":")[0] for line in lines] == ["tiers.${NAME}"]  # a key is not expanded
    settings = load(text.replace("${NAME}", "pro"), environ)
    assert (settings.port, settings.heartbeat, settings.max_body) == (9000, 7.0, 256 * 2**20)
    assert settings.waiting_note is True
    assert settings.admin_key == SecretStr(SECRET)
    assert [key.get_secret_value() for key in settings.api_keys] == ["first-key-0123456789", "client-b-0123456789"]
    assert settings.cors_origins == ("https://gpu.example",)
    assert settings.backends["vllm"].servers[0].base_url == "http://gpu:9000"
    assert settings.backends["vllm"].headers == {"x-team": SecretStr("chat")}
    assert settings.tiers["pro"].models == {"vllm": "a/b"}
    assert settings.tiers["pro"].params.default == {"stop": '"Issue #5"'}
    assert SECRET not in config.show(settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$${A}", "${A}"),
        ("a$${A}b${A}c", "a${A}bxc"),
        ("$$${A}", "$${A}"),
        ("$A $", "$A $"),
        ("${A}${A}", "xx"),
        ("${EMPTY}b", "b"),
        ("${EMPTY:-d}", "d"),
        ("${NONE:-}b", "b"),
        ("${NONE:-a b:-c$}", "a b:-c$"),
        ("${NESTED}", "${A}"),
        ("$${", "${"),
    ],
)
def test_placeholders_follow_the_rules_of_a_shell(text: str, expected: str) -> None:
    settings = load(
        f"tiers: {{t: {{models: {{ollama: x}}, params: {{default: {{stop: '{text}'}}}}}}}}",
        {"A": "x", "EMPTY": "", "NESTED": "${A}"},
    )
    assert settings.tiers["t"].params.default == {"stop": expected}


@pytest.mark.parametrize(
    ("text", "key", "variable", "line"),
    [
        ("port: 81\nadmin_key: ${ADMIN}", "admin_key", "ADMIN", 2),
        ("llm_backend: ${B}", "llm_backend", "B", 1),
        ("tiers:\n  t:\n    models: {ollama: x}\n    aliases:\n    - a\n    - pre-${C}", "tiers.t.aliases[1]", "C", 6),
        ("tiers:\n  t:\n    models:\n      ollama: ${D}", "tiers.t.models.ollama", "D", 4),
        ("backends:\n  vllm:\n    base_url: http://${E}:1", "backends.vllm.base_url", "E", 3),
        ("x-a: &a {api_key: '${F}'}\nbackends:\n  vllm:\n    <<: *a", "backends.vllm.api_key", "F", 1),
    ],
)
def test_unset_variable_stops_the_start_by_its_name(text: str, key: str, variable: str, line: int) -> None:
    assert one_problem(text) == (
        f"{key}: the variable {variable} is not set; expected a value in the environment, or a default: "
        f"${{{variable}:-default}} (gateway.yaml line {line})"
    )


def test_unset_variable_counts_where_the_environment_takes_precedence() -> None:
    """Otherwise it would depend on another variable whether the file is right."""
    assert "ADMIN is not set" in one_problem("admin_key: ${ADMIN}", {"GATEWAY_ADMIN_KEY": SECRET})


@pytest.mark.parametrize("text", ["${", "${}", "${A", "${A-b}", "${A:b}", "${1A}", "a ${ A }", "${A B}", "${{A}}"])
def test_malformed_placeholder_is_refused(text: str) -> None:
    line = one_problem(f"host: '{text}'", {"A": "x"})
    assert line.startswith("host: expected ${NAME} or ${NAME:-default}; write $${ for the characters ${")


@pytest.mark.parametrize("value", [f'"{SECRET}"', f"'{SECRET}'", f"{SECRET} # the admin's"])
def test_variable_with_leftover_syntax_is_refused_without_its_value(value: str) -> None:
    line = one_problem("admin_key: ${ADMIN}", {"ADMIN": value})
    assert line.startswith("admin_key: the variable ADMIN: the value ")
    assert SECRET not in line


def test_variables_of_dotenv_and_of_services_can_be_used() -> None:
    Path(".env").write_text("A=from-dotenv\nB=from-dotenv\n")
    text = "backends: {ollama: {base_url: 'http://${OLLAMA_SERVICE_HOST}:1'}}\nhost: ${A}\nuser_header: ${B}"
    settings = load(text, {"OLLAMA_SERVICE_HOST": "10.0.0.7", "A": "", "B": "from-environment"})
    assert settings.backends["ollama"].servers[0].base_url == "http://10.0.0.7:1"
    assert (settings.host, settings.user_header) == ("from-dotenv", "from-environment")
    assert warned(settings) == []


def test_schema_accepts_a_variable_for_every_value() -> None:
    text = """
        port: ${PORT}
        heartbeat: ${SECONDS:-7}s
        log_format: ${FORMAT}
        waiting_note: ${NOTE}
        x-anchors: {a: 1}
        guard: {rules: ["${RULE}"], margin: "${MARGIN}"}
        backends: {vllm: {kind: "${KIND}", max_queue: "${QUEUE}", api_key_file: "${FILE}"}}
    """
    jsonschema.validate(yaml.safe_load(text), config.schema())
