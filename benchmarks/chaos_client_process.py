"""The client processes of `chaos.py`, as their owner starts, signals and ends them."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from benchmarks.chaos_clients import read_journal
from benchmarks.clients import ClientRecord

_ROOT = Path(__file__).parents[1]


class ClientProcess:
    """One process of clients, and the journals of all that ran in its place."""

    def __init__(self, name: str, port: int, rate: float, folder: Path, grace: float = 0.0) -> None:
        self._name = name
        self._folder = folder
        self._arguments = ["--port", str(port), "--rate", str(rate), "--grace", str(grace)]
        self._started = 0
        self._process: asyncio.subprocess.Process | None = None
        self._ended_at: dict[Path, float] = {}

    @property
    def _journal(self) -> Path:
        return self._folder / f"{self._name}-{self._started}.jsonl"

    async def start(self) -> None:
        self._started += 1
        prefix = f"{self._name}-{self._started}"
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.chaos_clients", *self._arguments, "--prefix", prefix,
            "--seed", str(self._started), "--journal", str(self._journal),
            "--references", str(self._folder / "references.json"),
            stdin=asyncio.subprocess.PIPE, cwd=_ROOT, env=os.environ | {"PYTHONPATH": str(_ROOT)},
        )  # fmt: skip

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    async def wait(self) -> None:
        assert self._process is not None
        await self._process.wait()
        self._ended_at[self._journal] = time.monotonic()

    async def finish(self) -> None:
        """Let it wait for its requests in flight, and end."""
        if self._process is not None and self._process.returncode is None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            await self.wait()

    def records(self) -> list[ClientRecord]:
        found: list[ClientRecord] = []
        for journal, ended_at in self._ended_at.items():
            if journal.exists():
                with journal.open() as lines:
                    found += read_journal(lines, ended_at)
        return found
