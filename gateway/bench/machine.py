"""Facts of the machine that sends the requests, for reports."""

import os
import platform
from pathlib import Path

from gateway import __version__
from gateway.bench.results import CellValue


def machine_facts() -> dict[str, CellValue]:
    """Return the processor, memory, system, versions and GPUs of this machine; what is not known is left out."""
    facts: dict[str, CellValue] = {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": platform.python_version(),
        "gateway": __version__,
    }
    return {key: value for key, value in facts.items() if value}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None
