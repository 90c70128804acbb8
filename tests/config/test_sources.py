"""Precedence of the sources: environment, then `.env`, then the file."""

from pathlib import Path

import pytest

from tests.config.harness import EXAMPLE, SECRET, load

pytestmark = pytest.mark.usefixtures("empty_environment")


def test_environment_takes_precedence_over_the_file() -> None:
    text = EXAMPLE + f"admin_key: {SECRET}\napi_keys: [from-the-file-0123456789]\n"
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
        "OLLAMA_MODEL: ignored: the file defines tiers",
        "VLLM_BASE_URL: replaces all 3 servers of backends.vllm in the file",
    )


def test_dotenv_takes_precedence_over_the_file_and_the_environment_over_dotenv() -> None:
    Path(".env").write_text(
        "LLM_BACKEND=vllm\nexport GATEWAY_HOST='0.0.0.0'\nGATEWAY_PORT=81\nPATH_OF_OTHERS=x\nGATEWAY__HEARTBEAT=7\n"
    )
    settings = load("port: 80\nhost: a\nheartbeat: 5\n", {"GATEWAY__PORT": "82"})
    assert (settings.llm_backend, settings.host, settings.port, settings.heartbeat) == ("vllm", "0.0.0.0", 82, 7.0)


def test_address_in_the_environment_replaces_a_host_name_in_the_file() -> None:
    settings = load("backends: {vllm: {servers: 'dns://vllm.svc:8000'}}", {"VLLM_BASE_URL": "http://other:8000"})
    assert [server.base_url for server in settings.backends["vllm"].servers] == ["http://other:8000"]
    assert "VLLM_BASE_URL: replaces all servers of backends.vllm in the file" in settings.warnings


def test_address_in_the_environment_replaces_servers_in_dotenv() -> None:
    Path(".env").write_text("GATEWAY__BACKENDS__VLLM__SERVERS=http://a:1,http://b:2\n")
    assert [server.base_url for server in load(environ={"VLLM_BASE_URL": "http://c:3"}).backends["vllm"].servers] == [
        "http://c:3"
    ]
