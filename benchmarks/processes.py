"""Programs of the gateway's that a bench starts beside itself, told apart from whatever settings the caller's environment has."""

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

START_SECONDS = 20.0
_SETTINGS = ("GATEWAY_", "OLLAMA_", "VLLM_", "LLM_")


class Started(NamedTuple):
    """One that runs: where it listens, and its process id."""

    url: str
    pid: int


@contextlib.contextmanager
def started(words: list[str], log: Path, address: str, **environment: str) -> Iterator[Started]:
    """`python -m gateway` with these `words`, once its output, which goes to `log`, has the URL that the pattern `address` finds.

    Raises:
        RuntimeError: it ended, or did not tell within `START_SECONDS`; with the end of its log.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
    clean["PYTHONPATH"] = str(Path(__file__).parents[1])
    with log.open("wb") as out:
        command = [sys.executable, "-m", "gateway", *words]
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env={**clean, **environment}, cwd=log.parent
        )  # ourselves
    try:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(address, log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{words[0]} did not start: {log.read_text()[-500:]}")
            time.sleep(0.05)
        yield Started(found[1], process.pid)
    finally:
        process.terminate()
        process.wait()
