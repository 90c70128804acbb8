"""Process statistics from the kernel."""

import os
import subprocess
import sys

import pytest

from benchmarks.process_stats import cpu_seconds, family, resident_bytes


def test_cpu_seconds_of_another_process_include_its_threads() -> None:
    program = (
        "import threading, time\n"
        "def work():\n    while time.thread_time() < 0.1: pass\n"
        "threads = [threading.Thread(target=work) for _ in range(2)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "print('done', flush=True); input()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"done\n"
        assert 0.2 <= cpu_seconds([process.pid]) < 2
        assert resident_bytes([process.pid]) > 1_000_000
        assert process.pid in family(os.getpid())
        process.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        cpu_seconds([process.pid])
