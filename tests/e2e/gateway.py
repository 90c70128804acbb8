"""The gateway under test, started as a user starts it: by its command, with settings in the
environment and optionally in a YAML file.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2
import openai
from openai import AsyncOpenAI, OpenAI

from tests.real_engines.process import Server, free_port, wait_until

REPOSITORY = Path(__file__).parents[2]
KEY, OTHER_KEY, ADMIN_KEY = "client-key-one", "client-key-two", "operator-key"
PLAIN_HTTP: dict[str, Any] = {"verify": False, "trust_env": False}
"""Options of HTTP clients: to load the CA certificates costs 30 ms for each, and nothing here uses
TLS.
"""
# The environment of the tests may have such settings; none of them may reach the gateway under
# test.
EXCLUDED_PREFIXES = ("GATEWAY", "LLM_", "OLLAMA_", "VLLM_", "TEST_")


class Gateway(Server):
    """`python -m gateway serve` with `settings` in the environment.

    `folder` has its state file, its log and, if `config` is given, its YAML file with that text.
    """

    def __init__(self, folder: Path, settings: Mapping[str, str], config: str | None = None) -> None:
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(EXCLUDED_PREFIXES)}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "GATEWAY_API_KEYS": f"{KEY},{OTHER_KEY}",
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
            "GATEWAY_STATE_FILE": str(folder / "state.json"),
            "GATEWAY_USAGE_FILE": str(folder / "usage.db"),
            **settings,
        }
        if config is not None:
            file = folder / "gateway.yaml"
            file.write_text(config)
            environment["GATEWAY_CONFIG"] = str(file)
        command = [sys.executable, "-m", "gateway", "serve"]
        super().__init__(
            command, port=port, health_path="/readyz", log=folder / "gateway.log", environment=environment, cwd=folder
        )

    def openai(self, key: str = KEY, path: str = "/v1") -> OpenAI:
        """Return a client of openai-python without retries."""
        http = openai.DefaultHttpxClient(timeout=120.0, **PLAIN_HTTP)
        return OpenAI(base_url=f"{self.url}{path}", api_key=key, max_retries=0, http_client=http)

    def async_openai(self) -> AsyncOpenAI:
        """Return an asynchronous client of openai-python without retries."""
        http = openai.DefaultAsyncHttpxClient(timeout=240.0, **PLAIN_HTTP)
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, http_client=http)

    def running(self) -> int:
        """Return the number of requests that the gateway has at its backends now."""
        headers = {"authorization": f"Bearer {ADMIN_KEY}"}
        status = httpx2.get(f"{self.url}/ops/status", headers=headers, timeout=30.0, **PLAIN_HTTP).raise_for_status()
        return sum(sum(backend["running"].values()) for backend in status.json()["backends"].values())

    def wait_until_idle(self) -> None:
        wait_until(self.running, lambda running: running == 0, f"the gateway has released every slot ({self.url})")

    @property
    def pid(self) -> int:
        """Process id of the gateway itself, not of its leash."""
        assert self._process is not None
        return child_of(self._process.pid)

    def command(self, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run an operator's command to its end, in `folder`, which has no settings."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "GATEWAY_URL": self.url,
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
        }
        command = [sys.executable, "-m", "gateway", *arguments]
        return subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )


def child_of(pid: int) -> int:
    """Return the id of the only child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    if children.exists():
        return int(children.read_text())
    return int(subprocess.run(["pgrep", "-P", str(pid)], check=True, capture_output=True).stdout)  # macOS
