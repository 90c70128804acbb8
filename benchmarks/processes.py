"""Commands of the gateway that a benchmark starts, without the settings of the caller's
environment.
"""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 60.0
_SETTINGS = ("GATEWAY_", "OLLAMA_", "VLLM_", "LLM_")


class Started(NamedTuple):
    """A running command: its URL and its process id."""

    url: str
    pid: int


@contextlib.contextmanager
def started(arguments: list[str], log: Path, address: str, **environment: str) -> Iterator[Started]:
    """Run `python -m gateway` with these arguments during the block, with its output in `log`.

    Waits until the output matches the pattern `address`, whose group is the URL.

    Raises:
        RuntimeError: it ended, or did not print its URL within `START_SECONDS`. The message has the
            end of its log.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    clean["PYTHONPATH"] = str(Path(__file__).parents[1])
    with log.open("wb") as out:
        command = [sys.executable, "-m", "gateway", *arguments]
        process = subprocess.Popen(command, stdout=out, stderr=out, env={**clean, **environment}, cwd=log.parent)
    try:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(address, log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{arguments[0]} did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield Started(found[1], process.pid)
    finally:
        process.terminate()
        process.wait()
