"""The engine that `chaos.py` kills and stops: a real vLLM, or its stand-in for a short try."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import httpx2

from benchmarks.process_stats import family
from tests.real_engines.process import free_port
from tests.real_engines.vllm import Vllm, tiny_models

MODEL = "chaos-model"
_LAUNCHER = Path(__file__).with_name("vllm_launcher.py")
_ROOT = Path(__file__).parents[1]
_ENGINE_CORE = ("VLLM::EngineCor", "VLLM::Worker")
"""Names of vLLM's processes behind its API server, as the kernel keeps them: 15 characters."""
READY_SECONDS = 300.0


class ChaosEngine(ABC):
    """A server that is started again and again at the same address."""

    has_core = False
    """True if processes of its own compute the answers, behind the one that serves HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.pid = 0

    @abstractmethod
    def start(self) -> None:
        """Start the server without waiting for it."""

    @abstractmethod
    def has_ended(self) -> bool:
        """Return whether the server has ended; what is left of its processes is killed then."""

    @abstractmethod
    def close(self) -> None:
        """End everything."""

    def processes(self) -> list[int]:
        return family(self.pid)

    def core(self) -> list[int]:
        """Return the processes that compute the answers."""
        return [pid for pid in self.processes() if _name(pid) in _ENGINE_CORE]

    def is_ready(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=2.0, trust_env=False).status_code == 200
        except httpx2.TransportError:
            return False

    def wait_until_ended(self, seconds: float) -> bool:
        """Return False if it has not ended by itself within `seconds`; it is killed then."""
        deadline, is_killed = time.monotonic() + seconds, False
        while not self.has_ended():
            if time.monotonic() > deadline and not is_killed:
                is_killed = True
                send_signal(self.processes(), signal.SIGKILL)
            time.sleep(0.05)
        return not is_killed

    def wait_until_ready(self) -> None:
        """Wait for its health endpoint.

        Raises:
            RuntimeError: it ended, or was not ready within `READY_SECONDS`.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_ready():
            if self.has_ended() or time.monotonic() > deadline:
                raise RuntimeError(f"the engine at {self.url} was not ready within {READY_SECONDS:g} s, or ended")
            time.sleep(0.1)

    def load(self) -> int:
        """Return the number of requests that the engine runs or has queued."""
        text = httpx2.get(f"{self.url}/metrics", timeout=20.0, trust_env=False).text
        names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
        return round(sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(names)))


class RealVllm(ChaosEngine):
    """A real vLLM with a tiny model on the CPU, forked from a process that has imported it."""

    has_core = True

    def __init__(self, venv: Path, log: Path, options: Sequence[str] = (), **environment: str) -> None:
        server = Vllm(venv, tiny_models(venv) / "tiny-qwen3", [MODEL], log=log)
        super().__init__(server.url)
        with log.open("wb") as out:
            self._launcher = subprocess.Popen(
                [venv / "bin" / "python", "-P", _LAUNCHER, *server.arguments, *options],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out,
                env=server.environment | environment, text=True, cwd=log.parent,
            )  # fmt: skip
        if self._answer() != "ready":
            raise RuntimeError(f"vLLM did not start: {log.read_text(errors='replace')[-1000:]}")

    def start(self) -> None:
        self.pid = int(self._ask("start"))

    def has_ended(self) -> bool:
        return self._ask("poll") != "running"

    def close(self) -> None:
        assert self._launcher.stdin is not None
        self._launcher.stdin.close()
        self._launcher.wait()

    def _ask(self, command: str) -> str:
        assert self._launcher.stdin is not None
        self._launcher.stdin.write(f"{command}\n")
        self._launcher.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._launcher.stdout is not None
        return self._launcher.stdout.readline().strip()


class StandIn(ChaosEngine):
    """The vLLM stand-in."""

    def __init__(self, log: Path, options: Sequence[str]) -> None:
        port = free_port()
        super().__init__(f"http://127.0.0.1:{port}")
        self._command = [
            sys.executable, "-m", "gateway", "simulate", "--kind", "vllm", "--port", str(port),
            "--model", MODEL, *options,
        ]  # fmt: skip
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=out, cwd=_ROOT)
        self.pid = self._process.pid

    def has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def send_signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
