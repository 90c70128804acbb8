"""The gateway under test, started as a user starts it: its command, its settings in the environment, perhaps a file beside them."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.real_engines.process import Server, free_port

REPOSITORY = Path(__file__).parents[2]
KEY, OTHER_KEY, ADMIN_KEY = "client-key-one", "client-key-two", "operator-key"
# Whoever runs the tests may have settings of their own; none of them may reach the gateway under test.
FOREIGN = ("GATEWAY", "LLM_", "OLLAMA_", "VLLM_", "TEST_")


class Gateway(Server):
    """`python -m gateway serve` with `settings`, in `folder`, where its state, its log and its YAML file (text in `config`) lie."""

    def __init__(self, folder: Path, settings: Mapping[str, str], config: str | None = None) -> None:
        port = free_port()
        environment = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        environment |= {
            "PYTHONPATH": str(REPOSITORY),
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(port),
            "GATEWAY_API_KEYS": f"{KEY},{OTHER_KEY}",
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
            "GATEWAY_STATE_FILE": str(folder / "state.json"),
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

    @property
    def pid(self) -> int:
        """Of the gateway itself, not of its leash."""
        assert self._process is not None
        return int(Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text())

    def command(self, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
        """The operator's command line, run to its end in `folder`, which has no settings."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(REPOSITORY),
            "GATEWAY_URL": self.url,
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
        }
        command = [sys.executable, "-m", "gateway", *words]
        return subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300, check=False
        )
