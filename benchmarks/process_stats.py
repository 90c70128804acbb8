"""What the kernel says of a process: its CPU time, its resident memory, its descendants; and which cores it may use.

Linux only where /proc is needed. Nothing here touches the network.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_CPUCLOCK_SCHED = 2


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes with all their threads, ended ones too, in nanosecond steps.

    The clock id is what glibc's clock_getcpuclockid(3) computes. ProcessLookupError when a process has gone.
    """
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
        except OSError as exc:
            raise ProcessLookupError(f"process {pid} has gone") from exc
    return total


def family(pid: int) -> list[int]:
    """This process and its descendants that live now."""
    members = [pid]
    for parent in members:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                members.extend(int(child) for child in children.read_text().split())
    return members


def resident_bytes(pids: list[int]) -> int:
    """Resident memory of these processes, summed."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * page


def cores() -> list[int]:
    """The cores that we may use; empty where the system cannot tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def pinned(wanted: set[int]) -> Iterator[None]:
    """Processes started in this block may use only these cores; an empty set leaves things as they are."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
