"""Process statistics from the kernel."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from benchmarks.process_stats import connections_on, cpu_seconds, descriptors, family, resident_bytes, threads


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


def test_connections_on_a_port_are_those_that_are_not_closed_on_its_side() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert connections_on(port) == 0
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = listener.accept()
            assert connections_on(port) == 1
            client.close()
            assert connections_on(port) == 1
            accepted.close()
            assert connections_on(port) == 0


def test_open_descriptors_and_threads_are_counted() -> None:
    before = descriptors(os.getpid())
    with socket.socket():
        assert descriptors(os.getpid()) == before + 1
    assert descriptors(os.getpid()) == before
    running, done = threads(os.getpid()), threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    assert threads(os.getpid()) == running + 1
    done.set()
    thread.join()
