"""wrk, the load generator of `saturation.py`: a program in C that takes a few µs for an answer.

wrk keeps its connections busy: each sends a request, waits for the whole answer and sends the next
one (https://github.com/wg/wrk). It is Debian's package `wrk`.
"""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks.process_stats import pinned
from benchmarks.subjects import DidNotRun

WARM_UP_SECONDS = 0.5
_END_SECONDS = 30.0

_SCRIPT = """
local file = io.open("%s", "rb")
local message = file:read("*a")
file:close()
function request() return message end
function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format('\\n{"answers":%%d,"microseconds":%%d,"p99":%%d,"failures":%%d}\\n',
    summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
"""
"""wrk sends the bytes of the file as they are, and prints its results as JSON at the end."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class WrkResult:
    """Whole run: answers, its length and the 99th percentile of the latency in µs, and failed requests."""

    answers: int
    microseconds: int
    p99: int
    failures: int


def run_wrk(
    program: str,
    port: int,
    request: bytes,
    connections: int,
    seconds: float,
    cores: frozenset[int],
    scratch: Path,
    during: Callable[[int], T],
) -> tuple[WrkResult, T]:
    """Load `port` with copies of `request`, and return wrk's result and that of `during`.

    `during` is called with wrk's process id once the load is steady; it has `seconds` to return.

    Raises:
        DidNotRun: wrk failed, or a request did.
    """
    (scratch / "request").write_bytes(request)
    script = scratch / "wrk.lua"
    script.write_text(_SCRIPT % (scratch / "request"))
    whole = int(WARM_UP_SECONDS + seconds + 1)  # wrk takes whole seconds; the last one is not measured
    command = [program, "--threads", "1", "--connections", str(connections), "--duration", f"{whole}s"]
    command += ["--timeout", "10s", "--script", str(script), f"http://127.0.0.1:{port}/"]
    with pinned(set(cores)):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    with process:
        try:
            time.sleep(WARM_UP_SECONDS)
            measured = during(process.pid)
            output, _ = process.communicate(timeout=_END_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise DidNotRun(f"wrk did not end within {_END_SECONDS:.0f} s") from error
        except OSError as error:
            raise DidNotRun(f"wrk, or what it loads, has ended: {error}") from error
        finally:
            if process.poll() is None:
                process.kill()
    lines = output.decode(errors="replace").strip().splitlines()
    if process.returncode or not lines or not lines[-1].startswith("{"):
        raise DidNotRun(f"wrk ended with status {process.returncode}: {' '.join(lines)[-500:]}")
    result = WrkResult(**json.loads(lines[-1]))
    if result.failures or not result.answers:
        raise DidNotRun(f"{result.failures} of {result.answers} requests of wrk failed on port {port}")
    return result, measured
