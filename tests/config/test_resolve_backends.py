"""Resolution of backends: addresses, and keys that their kind does not have."""

from pathlib import Path

import pytest

from gateway import config
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
            "backends: {vllm: {servers: ['dns://a:1', 'dns://A:1/v1/']}}\nllm_backend: ollama",
            "backends.vllm.servers[1].base_url",
            "is listed twice",
        ),
        (
            "backends: {vllm: {servers: 'dns:///a:1'}}\nllm_backend: ollama",
            "backends.vllm.servers[0].base_url",
            "expected a host name, as in dns://vllm.example.com:8000",
        ),
        (
            "backends: {vllm: {servers: 'srv://a:1'}}\nllm_backend: ollama",
            "backends.vllm.servers[0].base_url",
            "expected an address that starts with http://, https:// or dns://",
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


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("servers: 'dns://vllm.svc:8000'", [("dns://vllm.svc:8000", None)]),
        ("base_url: 'dns://vllm.svc:8000/v1'", [("dns://vllm.svc:8000", None)]),
        ("servers: ['dns://vllm.svc']", [("dns://vllm.svc:8000", None)]),
        ("servers: [{base_url: 'dns+https://vllm.svc/a/v1', models: [x]}]", [("dns+https://vllm.svc/a", ("x",))]),
        ("servers: ['a:1', 'dns://b:2']", [("http://a:1", None), ("dns://b:2", None)]),
        ("servers: 'http://a:1'", [("http://a:1", None)]),
    ],
)
def test_servers_may_be_the_addresses_of_a_host_name(text: str, servers: list[tuple[str, object]]) -> None:
    found = load(f"backends: {{vllm: {{{text}}}}}\nllm_backend: ollama").backends["vllm"].servers
    assert [(server.base_url, server.models) for server in found] == servers
    assert [server.is_name for server in found] == [url.startswith("dns") for url, _ in servers]


def test_variable_may_name_a_host_whose_addresses_are_servers() -> None:
    for variable in ("GATEWAY__BACKENDS__VLLM__SERVERS", "VLLM_BASE_URL"):
        (server,) = load(environ={variable: "dns://vllm.svc:8000"}).backends["vllm"].servers
        assert (server.base_url, server.is_name) == ("dns://vllm.svc:8000", True)


def test_host_name_is_shown_as_it_can_be_read_again() -> None:
    settings = load("backends: {vllm: {servers: 'dns://vllm.svc:8000'}}\nllm_backend: vllm")
    again = load(config.show(settings))
    assert again.backends["vllm"].servers == settings.backends["vllm"].servers
    assert any("dns://vllm.svc:8000" in line for line in config.check(settings))
