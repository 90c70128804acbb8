"""Shape of the settings document: types of values, unknown and missing keys, empty values.

Covers: gateway/config/document_backends.py
Covers: gateway/config/document_tiers.py
Covers: gateway/config/field_types.py
"""

import pytest

from tests.config.harness import TIER, assert_refused, load, one_problem

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_empty_keys_count_as_absent_and_an_empty_state_file_turns_it_off() -> None:
    settings = load("commit_after:\nbackends:\n  ollama:\n  vllm: {keep_alive: null, base_url: }\nstate_file:\n")
    assert settings.commit_after == 45.0
    assert settings.backends["vllm"].servers[0].base_url == "http://127.0.0.1:8001"
    assert settings.state_file is None


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (TIER % ", fallback: 3", "tiers.pro.fallback", "got 3; expected true, false or the name of a backend"),
        (TIER % ", aliases: [5]", "tiers.pro.aliases[0]", "got 5; expected a name of printable text"),
        (TIER % ", max_tokens: 0", "tiers.pro.max_tokens", "got 0; expected a whole number of at least 1"),
        (TIER % ", max_tokens: true", "tiers.pro.max_tokens", "got true; expected a whole number of at least 1"),
        (TIER % ", models2: {}", "tiers.pro.models2", "unknown key; did you mean 'models'?"),
        ("tiers: {pro: {models: {ollama: 3}}}", "tiers.pro.models.ollama", "got 3; expected a model name"),
        ("tiers: {'a b': {models: {ollama: a}}}", "tiers.a b", "expected a name of letters, digits"),
        ("tiers: {pro: []}", "tiers.pro", "got a list; expected a mapping of keys"),
        (
            "embeddings: {e: {backend: ollama}}",
            "embeddings.e.model",
            "missing; expected: The model's name on that backend.",
        ),
        (
            "rerankers: {e: {backend: vllm}}",
            "rerankers.e.model",
            "missing; expected: The model's name on that backend.",
        ),
        (
            "backends: {vllm: {servers: []}}\nllm_backend: ollama",
            "backends.vllm.servers",
            "got a list; expected at least one entry",
        ),
        (
            "backends: {vllm: {kind: vlm}}\nllm_backend: ollama",
            "backends.vllm.kind",
            "got 'vlm'; expected 'ollama', 'vllm' or 'openai'",
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
        ("backends: {ollama: {truncate: 1}}", "backends.ollama.truncate", "got 1; expected true or false"),
        ("commit_after: soon", "commit_after", "got 'soon'; expected a duration"),
        ("rollback_cutoff: -1", "rollback_cutoff", "got -1; expected"),
        ("heartbeat: 0", "heartbeat", "got 0; expected more than 0"),
        ("heartbeat: true", "heartbeat", "got true; expected a duration"),
        ("drain_timeout: .nan", "drain_timeout", "expected a duration"),
        ("max_body: big", "max_body", "got 'big'; expected a size"),
        ("max_waiting_bytes: 0", "max_waiting_bytes", "got 0; expected"),
        ("log_level: loud", "log_level", "got 'loud'; expected 'debug', 'info', 'warning' or 'error'"),
        ("log_level: 3", "log_level", "got 3; expected 'debug', 'info', 'warning' or 'error'"),
        ("keep_alive_timeout: 0", "keep_alive_timeout", "expected more than 0"),
        (
            "max_connections_per_address: 0",
            "max_connections_per_address",
            "got 0; expected a whole number of at least 1",
        ),
        ("unlimited_addresses: [proxy]", "unlimited_addresses[0]", "got 'proxy'; expected an IP address or a network"),
        ("unlimited_addresses: [10.0.0.0/33]", "unlimited_addresses[0]", "expected an IP address or a network"),
        ("log_format: xml", "log_format", "got 'xml'; expected 'auto', 'json' or 'text'"),
        ("cors_origins: [example.com]", "cors_origins[0]", "got 'example.com'; expected an origin such as"),
        ("cors_origins: ['http://*.a:*']", "cors_origins[0]", "at most one *, as in http://localhost:*"),
        ("cors_origins: https://a", "cors_origins", "got 'https://a'; expected a list"),
        ("allowed_hosts: [https://a.example]", "allowed_hosts[0]", "got 'https://a.example'; expected a host without"),
        ("allowed_hosts: ['a.example:80']", "allowed_hosts[0]", "expected a host without a port"),
        ("allowed_hosts: ['*']", "allowed_hosts[0]", "expected a host without a port"),
        ("allowed_hosts: [a..b]", "allowed_hosts[0]", "expected a host without a port"),
        ("allowed_hosts: a.example", "allowed_hosts", "got 'a.example'; expected a list"),
        ("user_header: 'a b'", "user_header", "got 'a b'; expected the name of a header"),
        ("host: 1", "host", "got 1; expected text"),
    ],
)
def test_value_of_the_wrong_shape_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "tiers: {a: {models: {ollama: x}, images: {max_pixels: 1000}}}",
            "tiers.a.images.max_pixels: got 1000; expected a whole number from 1024 to 64000000",
        ),
        ("tiers: {a: {models: {ollama: x}, images: {pixels: 5000}}}", "tiers.a.images.pixels: unknown key"),
        ("image_urls: {allow: [http://a]}", "image_urls.allow[0]: got 'http://a'; expected an https address such as"),
        ("image_urls: {allow: ['https://u:p@a/']}", "image_urls.allow[0]: got"),
        ("image_urls: {allow: []}", "image_urls.allow: got a list; expected at least one entry"),
        ("image_urls: {}", "image_urls.allow:"),
        ("guard: {margin: 0.6}", "guard.margin: got 0.6; expected a number from 0 to 0.5"),
        ("guard: {margin: true}", "guard.margin: got true; expected a number"),
        ("guard: {ratio: '1,5'}", "guard.ratio: got '1,5'; expected a number from 1 to 100"),
        ("guard: {false_alarms: 0}", "guard.false_alarms: got 0; expected a number from 0.000001 to 0.5"),
        ("guard: {min_samples: 0}", "guard.min_samples: got 0; expected a whole number of at least 1"),
        ("guard: {rules: [eror]}", "guard.rules[0]: got 'eror'; expected 'errors', 'truncated'"),
        ("guard: {rules: []}", "guard.rules: got a list; expected at least one entry"),
        ("guard: {window: 0}", "guard.window: got 0; expected more than 0"),
        ("guard: {rule: [errors]}", "guard.rule: unknown key; did you mean 'rules'?"),
        ("guard: true", "guard: got true; expected a mapping of keys"),
    ],
)
def test_invalid_guard_or_images_are_refused(text: str, words: str) -> None:
    assert words in one_problem(text)
