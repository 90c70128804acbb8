"""Ways to run `gateway` commands: in this process, as a process, and against a running gateway."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gateway import config
from gateway.cli.commands import app
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import Running, running

ROOT = Path(__file__).parents[2]
SECRET = "a-key-that-nobody-may-see"


def invoke(*words: str, **variables: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(app, words, env=variables)


async def command(*words: str, **variables: str) -> Result:
    """Run a command in a thread, beside the event loop of a running gateway."""
    return await asyncio.to_thread(invoke, *words, **variables)


def process(*words: str, **variables: str) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    arguments = [sys.executable, "-m", "gateway", *words]
    return subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@asynccontextmanager
async def gateway(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> AsyncIterator[Running]:
    """Run a gateway, and set GATEWAY_URL to its address."""
    async with FaultBackend("vllm") as vllm, FaultBackend("ollama") as ollama:
        document: dict[str, Any] = {
            "backends": {
                "ollama": {"kind": "ollama", "base_url": ollama.base_url},
                "vllm": {"kind": "vllm", "base_url": vllm.base_url},
                "away": {"kind": "openai", "base_url": "http://127.0.0.1:1"},
            },
            "tiers": {
                "standard": {"models": {"ollama": MODEL, "vllm": MODEL, "away": MODEL}},
                "ultra": {"models": {"ollama": MODEL, "vllm": "not-there", "away": MODEL}},
                "pinned": {"models": {"ollama": MODEL}, "backend": "ollama"},
            },
            "state_file": "",
        }
        async with running(config.build(document | changes)) as here:
            monkeypatch.setenv("GATEWAY_URL", f"{here.base_url}/v1/")
            yield here


def assignments(here: Running) -> dict[str, str]:
    """Return which backend serves each tier."""
    return {name: str(route.assignment) for name, route in here.gateway.rollout.tiers.items()}
