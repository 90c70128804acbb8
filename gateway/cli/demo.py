"""`gateway demo`: a gateway to try out, in front of the engines on this machine or of stand-ins."""

import asyncio
import os
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import uvloop
from dotenv import dotenv_values

from gateway import config, simulate
from gateway.serve import serve

PROBE_SECONDS = 1.0
OLLAMA_URLS = ("http://127.0.0.1:11434",)
VLLM_URLS = ("http://127.0.0.1:8001", "http://127.0.0.1:8000")
STANDIN_TOKENS_PER_SECOND = 30.0  # slow enough to watch a stream
STANDINS = {
    "ollama": simulate.Model("qwen3-vl:8b", family="qwen3vl", vision=True, tools=True, context_length=32768),
    "vllm": simulate.Model(
        "Qwen/Qwen3-VL-8B-Instruct", family="qwen3vl", vision=True, tools=True, context_length=32768
    ),
}


@dataclass(frozen=True)
class Found:
    """A server for the demo and a model on it; `what` describes the server in the demo's output."""

    base_url: str
    model: str
    what: str


def run() -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        CannotListen: the address is in use.
        ConfigError: the environment has invalid settings, or names a settings file.
    """
    # A settings file names other models than the stand-ins have, and its servers would be replaced.
    if config.load().file is not None:
        raise config.ConfigError(
            ["GATEWAY_CONFIG: the demo does not use a settings file; run `gateway serve`, or unset GATEWAY_CONFIG"]
        )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run())


async def _run() -> None:
    with tempfile.TemporaryDirectory() as folder:
        async with AsyncExitStack() as stack:
            ollama = await _found_or_stand_in(stack, "ollama", await _find_ollama())
            vllm = await _found_or_stand_in(stack, "vllm", await _find_vllm())
            settings = config.load(environ=_environment(ollama, vllm, Path(folder)))
            await serve(settings, lambda base_url: print(_welcome(base_url, settings, ollama, vllm), flush=True))


def _variables() -> dict[str, str]:
    """Return the variables of `.env` and the environment; the environment takes precedence."""
    return {name: value for name, value in dotenv_values(".env").items() if value} | dict(os.environ)


def _environment(ollama: Found, vllm: Found, folder: Path) -> dict[str, str]:
    return {
        **_variables(),
        "OLLAMA_BASE_URL": ollama.base_url,
        "OLLAMA_MODEL": ollama.model,
        "VLLM_BASE_URL": vllm.base_url,
        "VLLM_MODEL": vllm.model,
        "GATEWAY_STATE_FILE": str(folder / "state.json"),
        "GATEWAY_USAGE_FILE": "",
    }


async def _found_or_stand_in(stack: AsyncExitStack, kind: simulate.Kind, found: Found | str) -> Found:
    if isinstance(found, Found):
        return found
    model = STANDINS[kind]
    server = await stack.enter_async_context(
        simulate.running(simulate.Options(kind, (model,), tokens_per_second=STANDIN_TOKENS_PER_SECOND))
    )
    return Found(server.base_url, model.name, f"a stand-in, since {found}")


async def _find_ollama() -> Found | str:
    """Return the first Ollama that has a model, else a text that says why there is none."""
    wanted, without_models = _variables().get("OLLAMA_MODEL"), ""
    for url in _candidates("OLLAMA_BASE_URL", OLLAMA_URLS):
        listed = await _get(f"{url}/api/tags")
        names = [model["name"] for model in listed.get("models") or []] if listed else []
        if names:
            return Found(url, wanted or names[0].removesuffix(":latest"), f"found at {url}")
        if listed and "models" in listed:
            without_models = f"the one at {url} has no models; `ollama pull` downloads one"
    return without_models or _none_found("OLLAMA_BASE_URL")


async def _find_vllm() -> Found | str:
    """Return the first vLLM, else a text that says why there is none."""
    wanted, key = _variables().get("VLLM_MODEL"), _variables().get("VLLM_API_KEY")
    refused = ""
    for url in _candidates("VLLM_BASE_URL", VLLM_URLS):
        listed = await _get(f"{url}/v1/models", key)
        names = [model["id"] for model in listed.get("data") or [] if model.get("owned_by") == "vllm"] if listed else []
        if names:
            return Found(url, wanted or names[0], f"found at {url}")
        if listed == {"error": "Unauthorized"}:
            refused = f"the one at {url} {'rejects this' if key else 'requires a'} VLLM_API_KEY"
    return refused or _none_found("VLLM_BASE_URL")


def _none_found(variable: str) -> str:
    given = _variables().get(variable)
    return f"none answers at {given}" if given else "none was found on this machine"


def _candidates(variable: str, defaults: tuple[str, ...]) -> tuple[str, ...]:
    given = _variables().get(variable)
    return (config.normalise_base_url(given),) if given else defaults


async def _get(url: str, key: str | None = None) -> dict[str, Any] | None:
    """Return the JSON object that the URL answers with, None for any other answer or none."""
    headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
    try:
        async with httpx2.AsyncClient(trust_env=False, timeout=PROBE_SECONDS) as client:
            answer = await client.get(url, headers=headers)
        body = answer.json()
    except (httpx2.HTTPError, ValueError):
        return None
    return body if isinstance(body, dict) else None


def _welcome(base_url: str, settings: config.Settings, ollama: Found, vllm: Found) -> str:
    key = "any" if settings.is_open else "YOUR-KEY"
    other = "vllm" if settings.llm_backend == "ollama" else "ollama"
    command = ".venv/bin/python -m gateway"
    if base_url != "http://127.0.0.1:8080":
        command = f"GATEWAY_URL={base_url} {command}"
    if not (settings.is_open or settings.admin_key):  # the admin token is beside the demo's own state file
        command = f"GATEWAY_STATE_FILE={settings.state_file} {command}"
    return f"""
  The gateway serves {base_url}/v1, active backend {settings.llm_backend}.
    ollama  {ollama.model}  ({ollama.what})
    vllm    {vllm.model}  ({vllm.what})

  In another terminal:

    curl {base_url}/v1/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\
      -d '{{"model": "{settings.default_tier}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  From Python (pip install langchain-openai):

    from langchain_openai import ChatOpenAI
    chat = ChatOpenAI(base_url="{base_url}/v1", api_key="{key}", model="{settings.default_tier}")
    print(chat.invoke("Hello!").content)

  To move to {other} and back, without a restart:

    {command} switch {other}
    {command} undo
"""
