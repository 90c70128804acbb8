"""`gateway demo`: engines on the machine, stand-ins for the others, and its output."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

from gateway import config, simulate
from gateway.cli import demo
from gateway.cli.demo import Found
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.stand_ins import stand_in
from tests.real_engines.process import free_port

ROOT = Path(__file__).parents[2]
VARIABLES = ("OLLAMA_BASE_URL", "OLLAMA_MODEL", "VLLM_BASE_URL", "VLLM_MODEL", "VLLM_API_KEY")


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "OLLAMA_URLS", ())
    monkeypatch.setattr(demo, "VLLM_URLS", ())


async def test_without_engines_on_the_machine_none_is_found() -> None:
    assert await demo._find_ollama() == await demo._find_vllm() == "none was found on this machine"


async def test_ollama_without_models_is_reported_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    async with FaultBackend("ollama") as server:
        server.models = lambda: b'{"models":null}'  # type: ignore[method-assign]
        monkeypatch.setattr(demo, "OLLAMA_URLS", (server.base_url,))
        assert await demo._find_ollama() == f"the one at {server.base_url} has no models; `ollama pull` downloads one"


async def test_vllm_behind_a_key_is_found_with_that_key(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in(simulate.Options("vllm", api_key="right")) as server:
        monkeypatch.setenv("VLLM_BASE_URL", server.base_url)
        assert await demo._find_vllm() == f"the one at {server.base_url} requires a VLLM_API_KEY"
        monkeypatch.setenv("VLLM_API_KEY", "wrong")
        assert await demo._find_vllm() == f"the one at {server.base_url} rejects this VLLM_API_KEY"
        monkeypatch.setenv("VLLM_API_KEY", "right")
        found = await demo._find_vllm()
        assert isinstance(found, Found)
        assert found.base_url == server.base_url


async def test_ollama_on_the_machine_is_found_with_its_first_model(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in(simulate.Options("ollama", (simulate.Model("llama"), simulate.Model("other")))) as server:
        monkeypatch.setattr(demo, "OLLAMA_URLS", (server.base_url,))
        assert await demo._find_ollama() == Found(server.base_url, "llama", f"found at {server.base_url}")


async def test_vllm_is_distinguished_from_other_servers_with_the_same_api(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in(simulate.Options("vllm")) as vllm, stand_in(simulate.Options("ollama")) as ollama:
        monkeypatch.setattr(demo, "VLLM_URLS", (ollama.base_url, vllm.base_url))
        found = await demo._find_vllm()
        assert isinstance(found, Found)
        assert found.base_url == vllm.base_url


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("OLLAMA_BASE_URL", "http://[::1", "OLLAMA_BASE_URL: got 'http://[::1'; expected host or host:port"),
        ("GATEWAY_CONFIG", "gateway.yaml", "GATEWAY_CONFIG: the demo does not use a settings file"),
    ],
)
def test_settings_that_the_demo_cannot_use_are_refused_before_it_probes(
    variable: str, value: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "gateway.yaml").write_text("heartbeat: 10")
    monkeypatch.setenv(variable, value)
    with pytest.raises(config.ConfigError) as raised:
        demo.run()
    assert [line for line in raised.value.lines if line.startswith(words)] == list(raised.value.lines)


async def test_address_and_model_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with stand_in(simulate.Options("ollama")) as server:
        monkeypatch.setenv("OLLAMA_BASE_URL", f"{server.base_url}/v1/")
        monkeypatch.setenv("OLLAMA_MODEL", "qwen3:8b")
        found = await demo._find_ollama()
        assert isinstance(found, Found)
        assert (found.base_url, found.model) == (server.base_url, "qwen3:8b")


@pytest.mark.parametrize(("keys", "shown"), [("", "any"), ("a-secret-key", "YOUR-KEY")])
def test_printed_commands_do_not_contain_a_key(keys: str, shown: str) -> None:
    settings = config.load(environ={"GATEWAY_API_KEYS": keys})
    found = Found("http://x", "m", "found")
    text = demo._welcome("http://127.0.0.1:9", settings, found, found)
    assert f"Bearer {shown}" in text
    assert "a-secret-key" not in text
    assert 'base_url="http://127.0.0.1:9/v1"' in text
    assert "GATEWAY_URL=http://127.0.0.1:9 .venv/bin/python -m gateway switch vllm" in text


def test_printed_commands_find_the_admin_token_of_a_demo_with_client_keys() -> None:
    found = Found("http://x", "m", "found")
    variables = {"GATEWAY_API_KEYS": "a-secret-key", "GATEWAY_STATE_FILE": "/tmp/demo/state.json"}
    text = demo._welcome("http://127.0.0.1:8080", config.load(environ=variables), found, found)
    assert "    GATEWAY_STATE_FILE=/tmp/demo/state.json .venv/bin/python -m gateway switch vllm" in text
    settings = config.load(environ=variables | {"GATEWAY_ADMIN_KEY": "an-admin-key"})
    assert "GATEWAY_STATE_FILE" not in demo._welcome("http://127.0.0.1:8080", settings, found, found)


def test_demo_serves_stand_ins_if_there_are_no_engines(tmp_path: Path) -> None:
    """The command prints its address, serves both kinds, and exits with status 0 on SIGTERM."""
    nowhere = f"http://127.0.0.1:{free_port()}"
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GATEWAY", "LLM_", "OLLAMA_", "VLLM_"))
    }
    environment |= {
        "PYTHONPATH": str(ROOT),
        "GATEWAY_PORT": "0",
        "OLLAMA_BASE_URL": nowhere,
        "VLLM_BASE_URL": nowhere,
        "LLM_BACKEND": "vllm",
    }
    command = [sys.executable, "-m", "gateway", "demo"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            printed: list[str] = []
            while not any("gateway undo" in line for line in printed):
                printed.append(process.stdout.readline())
                assert printed[-1], "the demo exited early"
            url = next(word for line in printed for word in line.split() if word.startswith("http")).rstrip(",")
            body = {"model": "auto", "messages": [{"role": "user", "content": "Say 3 words."}]}
            answer = httpx2.post(f"{url}/chat/completions", json=body, timeout=20, trust_env=False)
            assert answer.status_code == 200, answer.text
            assert json.loads(answer.content)["choices"][0]["message"]["content"]
            assert answer.headers["x-gateway-backend"] == "vllm"
            assert sum("a stand-in, since none answers at" in line for line in printed) == 2
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
