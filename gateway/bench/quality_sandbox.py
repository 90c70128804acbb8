"""Run of a model's Python code in a child process: a temporary folder, bounded time and memory, no network."""

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CHILD = Path(__file__).with_name("quality_child.py")
SECONDS = 5.0
MEMORY_BYTES = 512 << 20
START_SECONDS = 10.0
"""Additional time for the interpreter to start on a busy machine; the code's own processor time is bounded apart."""

CAN_RUN = os.name == "posix"
"""Without setrlimit(2) nothing bounds the memory of the code, so it is not run."""


@dataclass(frozen=True, slots=True)
class CodeRun:
    """Outcome of one run.

    Attributes:
        results: one for each test; all false if the code itself failed.
        error: name of the exception, `timeout`, or `died` (a limit ended the process); None: no error.
        guards: names of the system's guards that held (`landlock`, `seccomp`); Python's audit hook always does.
    """

    results: tuple[bool, ...]
    error: str | None = None
    guards: Mapping[str, bool] = field(default_factory=dict)


async def run_code(
    code: str,
    tests: Sequence[str],
    *,
    seconds: float = SECONDS,
    memory_bytes: int = MEMORY_BYTES,
    start_seconds: float = START_SECONDS,
) -> CodeRun:
    """Execute `code`, then evaluate each expression of `tests` in its names.

    The process and all that it started are killed after `seconds` of its processor time, or after
    `seconds` + `start_seconds`.
    """
    failed = (False,) * len(tests)
    with tempfile.TemporaryDirectory(prefix="gateway-quality-") as folder:
        token = secrets.token_hex(16)
        job = {
            "code": code,
            "tests": list(tests),
            "seconds": seconds,
            "memory_bytes": memory_bytes,
            "folder": folder,
            "token": token,
        }
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",  # neither the user's folders nor PYTHON* variables
            "-S",
            str(CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=folder,
            env={"LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(json.dumps(job).encode()), seconds + start_seconds)
        except TimeoutError:
            return CodeRun(failed, "timeout")
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    return _outcome(output, token, failed, process.returncode)


def _outcome(output: bytes, token: str, failed: tuple[bool, ...], status: int | None) -> CodeRun:
    try:
        report = json.loads(output)
        if report["token"] != token or len(report["results"]) != len(failed):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        # SIGXCPU ends a process at its limit of processor time.
        return CodeRun(failed, "timeout" if status in (-signal.SIGXCPU, -signal.SIGKILL) else "died")
    return CodeRun(tuple(bool(one) for one in report["results"]), report["error"], report["guards"])
