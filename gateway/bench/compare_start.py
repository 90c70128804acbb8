"""A server that is started for a comparison: from its command to the first moment at which it can answer."""

import asyncio
import contextlib
import os
import shlex
import signal
import tempfile
import time
from collections.abc import Callable
from typing import IO

from gateway.bench.compare_engine import load_model
from gateway.bench.target import LoadClient

READY_SECONDS = 1800.0
"""Longest start: a large model from a slow disk takes many minutes."""
STOP_SECONDS = 60.0
INTERVAL = 0.1
_READY_PATHS = {"openai": "/v1/models", "ollama": "/api/version"}


class NotStarted(Exception):
    """The server did not become ready; the text says why."""


class StartedServer:
    """The process of one command, in a process group of its own, so that its children end with it."""

    def __init__(self, command: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self.command = command
        self._clock = clock
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, client: LoadClient, ready_seconds: float = READY_SECONDS) -> float:
        """Start the command and return the seconds until the server can answer.

        A vLLM listens once its model is loaded. An Ollama listens at once, so the load of the model by an
        empty prompt is part of the time.

        Raises:
            NotStarted: something answers at the address already, the command fails, or it takes too long.
        """
        if await _is_ready(client):
            raise NotStarted(f"{client.target.url} answers already; stop that server, or leave the start to it")
        with tempfile.TemporaryFile() as log:
            start = self._clock()
            await self._spawn(log)
            try:
                async with asyncio.timeout(ready_seconds):
                    await self._until_ready(client, log)
                    if client.target.api == "ollama" and client.target.model:
                        await load_model(client.target)
            except TimeoutError as late:
                await self.stop()
                raise NotStarted(f"{self.command!r} was not ready within {ready_seconds:g} s") from late
        return self._clock() - start

    async def _spawn(self, log: IO[bytes]) -> None:
        try:
            words = shlex.split(self.command)
            self._process = await asyncio.create_subprocess_exec(
                *words, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        except (OSError, ValueError, IndexError, TypeError) as problem:
            reason = getattr(problem, "strerror", None) or problem
            raise NotStarted(f"{self.command!r} cannot be run: {reason}") from problem

    async def _until_ready(self, client: LoadClient, log: IO[bytes]) -> None:
        assert self._process is not None
        while not await _is_ready(client):
            with contextlib.suppress(TimeoutError):
                status = await asyncio.wait_for(asyncio.shield(self._process.wait()), INTERVAL)
                raise NotStarted(f"{self.command!r} ended with status {status}: {_last_line(log)}")

    async def stop(self) -> None:
        """End the process and its children: by SIGTERM, after STOP_SECONDS by SIGKILL."""
        process, self._process = self._process, None
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, how)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
                break
        with contextlib.suppress(ProcessLookupError):  # workers that outlived it hold the GPU's memory
            os.killpg(process.pid, signal.SIGKILL)


async def _is_ready(client: LoadClient) -> bool:
    try:
        status, _ = await client.get(_READY_PATHS[client.target.api])
    except (OSError, EOFError):
        return False
    return status < 500


def _last_line(log: IO[bytes]) -> str:
    log.seek(0)
    lines = log.read().decode(errors="replace").split("\n")
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it printed nothing")
