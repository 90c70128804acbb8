"""Resolution of backends: addresses, and keys that their kind does not have."""

from pathlib import Path

import pytest

from tests.config.harness import TIER, assert_refused, load

pytestmark = pytest.mark.usefixtures("empty_environment")


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        (
            "backends: {vllm: {base_url: a, servers: [b]}}\nllm_backend: ollama",
            "backends.vllm.servers",
            "both servers and base_url are set",
        ),
        (
            "backends: {vllm: {servers: [a:1, 'http://a:1/v1']}}\nllm_backend: ollama",
            "backends.vllm.servers[1].base_url",
            "is listed twice",
        ),
        (
            "backends: {box: {kind: openai}}\nllm_backend: ollama",
            "backends.box.base_url",
            "missing; expected an address",
        ),
        (
            "backends: {vllm: {num_ctx: 4}}\nllm_backend: ollama",
            "backends.vllm.num_ctx",
            "expected only for kind ollama",
        ),
        (
            "backends: {vllm: {model_concurrency: auto}}\nllm_backend: ollama",
            "backends.vllm.model_concurrency",
            "got 'auto' for kind vllm",
        ),
        (
            "backends: {vllm: {headers: {Host: x}}}\nllm_backend: ollama",
            "backends.vllm.headers.host",
            "sets this header itself",
        ),
        (
            "backends: {vllm: {api_key: k, headers: {Authorization: Basic x}}}\nllm_backend: ollama",
            "backends.vllm.headers.authorization",
            "sets this header itself",
        ),
        ("backends: {ollama: {ca_file: none.pem}}", "backends.ollama.ca_file", "'none.pem': No such file or directory"),
    ],
)
def test_contradictory_backend_is_refused_in_one_line(text: str, key: str, words: str) -> None:
    assert_refused(text, key, words)


def test_authorization_header_beside_a_key_file_is_refused() -> None:
    Path("key").write_text("s3cret-of-a-backend-01\n")
    assert_refused(
        "backends: {vllm: {api_key_file: key, headers: {Authorization: Basic x}}}\nllm_backend: ollama",
        "backends.vllm.headers.authorization",
        "sets this header itself",
    )


def test_authorization_header_without_a_key_is_sent() -> None:
    settings = load(TIER % "" + "\nbackends: {ollama: {}, vllm: {headers: {Authorization: Basic x}}}")
    assert settings.backends["vllm"].headers["authorization"].get_secret_value() == "Basic x"
