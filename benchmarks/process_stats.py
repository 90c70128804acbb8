"""Process statistics from the kernel: CPU time, resident memory, descendants, usable cores.

Functions that read /proc need Linux. Does not use the network.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

_CPUCLOCK_SCHED = 2
_CLOSED_STATES = frozenset(("04", "05", "06", "07", "09", "0A"))
"""States of /proc/net/tcp (Linux, include/net/tcp_states.h) in which this side has closed the
connection, and `LISTEN`.
"""


def cpu_seconds(pids: list[int]) -> float:
    """Return the user and system time of these processes, with all threads, even ended ones.

    The resolution is a nanosecond. The clock id is computed as glibc's clock_getcpuclockid(3) does.

    Raises:
        ProcessLookupError: a process no longer exists.
    """
    total = 0.0
    for pid in pids:
        try:
            total += time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
        except OSError as exc:
            raise ProcessLookupError(f"process {pid} no longer exists") from exc
    return total


def family(pid: int) -> list[int]:
    """Return this process and its living descendants."""
    members = [pid]
    for parent in members:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                members.extend(int(child) for child in children.read_text().split())
    return members


def resident_bytes(pids: list[int]) -> int:
    """Return the sum of the resident memory of these processes."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * page


def cores() -> list[int]:
    """Return the usable cores; empty if the system does not report them."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


@contextlib.contextmanager
def pinned(wanted: set[int]) -> Iterator[None]:
    """Restrict processes started in the block to these cores; an empty set changes nothing."""
    if not wanted:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, wanted)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def descriptors(pid: int) -> int:
    """Return the number of open file descriptors."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """Return the number of threads."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))


def connections_on(port: int) -> int:
    """Return the number of accepted IPv4 connections on a local port that are not closed on this side."""
    found = 0
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        found += int(local.rpartition(":")[2], 16) == port and state not in _CLOSED_STATES
    return found
