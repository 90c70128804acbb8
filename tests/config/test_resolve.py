"""Resolution of top-level keys: the guard, client keys, and values that contradict each other."""

import pytest

from gateway import config
from tests.config.harness import SECRET, assert_refused, load, one_problem

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_guard_is_off_unless_it_is_set_and_has_defaults() -> None:
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
    assert config.check(load("guard: {rules: [empty]}"))[-2] == "the guard compares empty"


def test_admin_key_must_not_be_a_client_key() -> None:
    line = one_problem(environ={"GATEWAY_API_KEYS": SECRET, "GATEWAY_ADMIN_KEY": SECRET})
    assert line == "GATEWAY_ADMIN_KEY: the admin key is also a client key; expected a separate key (environment)"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("max_body: 1KiB", "max_text_body", "got 1048576; expected at most max_body, which is 1024 bytes"),
        ("user_header: X-A\nsession_header: x-a", "session_header", "expected a header other than user_header"),
        ("ollama_port: 8080", "ollama_port", "expected a port other than the gateway's own"),
        ("metrics_port: 9000\nollama_port: 9000", "ollama_port", "expected a port other than metrics_port"),
        ("metrics_port: 8080", "metrics_port", "expected a port other than the gateway's own"),
        ("api_keys_file: none.txt", "api_keys_file", "'none.txt': No such file or directory"),
    ],
)
def test_contradictory_value_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)


ONE_GPU = "exclusive: true\nbackends: {ollama: {}, vllm: {}}\n"


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("exclusive: true\nbackends: {ollama: {}}\ntiers: {a: {models: {ollama: x}}}", "exclusive", "fewer than two"),
        (
            ONE_GPU + "tiers: {a: {models: {ollama: x, vllm: y}, backend: vllm}}",
            "exclusive",
            "every tier is pinned",
        ),
        (
            ONE_GPU + "tiers: {a: {models: {ollama: x, vllm: y}}, b: {models: {ollama: x}}}",
            "tiers.b.models",
            "tier 'b' has no model for 'vllm', but with exclusive all tiers move together",
        ),
        (
            (
                "exclusive: true\nbackends: {ollama: {}, vllm: {servers: 'dns://vllm:8000'}}\n"
                "tiers: {a: {models: {ollama: x, vllm: y}}}"
            ),
            "backends.vllm.servers",
            "may be on several machines",
        ),
        ("backends: {vllm: {stop: docker stop vllm}}\nllm_backend: ollama", "backends.vllm.start", "missing, but stop"),
        (
            "backends: {vllm: {start: docker start vllm}}\nllm_backend: ollama",
            "backends.vllm.stop",
            "missing, but start",
        ),
        (
            "backends: {vllm: {stop: a | b, start: c}}\nllm_backend: ollama",
            "backends.vllm.stop",
            "expected one command",
        ),
    ],
)
def test_what_cannot_work_on_one_gpu_is_refused(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)


def test_gateways_that_share_through_redis_do_not_share_a_gpu() -> None:
    text = ONE_GPU + "tiers: {a: {models: {ollama: m, vllm: m}}}"
    assert load(text).exclusive
    line = one_problem(text, environ={"GATEWAY_REDIS_URL": "redis://redis"})
    assert "exclusive: got true with GATEWAY_REDIS_URL; expected a single gateway for one GPU" in line


def test_backends_on_the_gpu_are_known_by_their_kind_or_their_commands() -> None:
    text = (
        "exclusive: true\n"
        "backends: {ollama: {}, vllm: {}, cloud: {kind: openai, base_url: 'http://a'},"
        " local: {kind: openai, base_url: 'http://b', stop: [x], start: [y]}}\n"
        "tiers: {a: {models: {ollama: m, vllm: m, local: m}}}"
    )
    assert load(text).on_gpu == {"ollama", "vllm", "local"}
    assert load(text.replace("true", "false")).on_gpu == frozenset()


@pytest.mark.parametrize(
    "url",
    [
        "redis://redis.internal",
        "redis://redis.internal:6379/0",
        f"rediss://user:{SECRET}@[::1]:6380/1?ssl_ca_certs=/etc/ca.pem&ssl_cert_reqs=required",
        f"unix:///run/redis.sock?db=2&password={SECRET}",
    ],
)
def test_redis_url_is_taken_as_it_is_and_never_shown(url: str) -> None:
    settings = load(environ={"GATEWAY_REDIS_URL": f" {url} "})
    assert settings.redis_url is not None
    assert settings.redis_url.get_secret_value() == url
    assert SECRET not in "\n".join([repr(settings), config.show(settings), *config.check(settings)])


@pytest.mark.parametrize(
    "url",
    [
        "redis.internal:6379",
        f"http://{SECRET}@redis:6379",
        "redis://",
        f"redis://:{SECRET}@",
        f"redis://:{SECRET}@redis:port",
        f"redis://:{SECRET}@redis:0",
        f"redis://:{SECRET}@redis:70000",
        f"redis://:{SECRET}@redis/database",
        f"redis://:{SECRET}@redis/0#part",
        f"redis://:{SECRET}@redis?socket_timeout=9",
        f"redis://:{SECRET}@redis?ssl",
        f"redis://:{SECRET} @redis",
        f"redis://:{SECRET}@[::1",
        "unix://",
        "unix:///",
    ],
)
def test_malformed_redis_url_is_refused_in_one_line_without_its_password(url: str) -> None:
    line = one_problem(environ={"GATEWAY_REDIS_URL": url})
    assert line.startswith("GATEWAY_REDIS_URL: ")
    assert "expected" in line
    assert SECRET not in line
