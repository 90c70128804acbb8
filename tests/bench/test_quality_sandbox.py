"""Covers: gateway/bench/quality_child.py"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.bench.quality_sandbox import CHILD, run_code

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="guards of Linux")


async def test_each_test_of_the_code_has_its_own_result() -> None:
    outcome = await run_code("def double(x):\n    return 2 * x", ["double(2) == 4", "double(2) == 5", "double()"])
    assert outcome.results == (True, False, False)
    assert outcome.error == "TypeError"


async def test_code_may_use_the_standard_library_and_its_own_folder() -> None:
    code = """
import asyncio, collections, dataclasses, json, os, re, threading
async def three(): return 3
os.mkdir("d")
with open("d/a.txt", "w") as file: file.write("x")
done = []
thread = threading.Thread(target=done.append, args=(1,))
"""
    tests = ["asyncio.run(three()) == 3", "open('d/a.txt').read() == 'x'", "os.listdir('.') == ['d']"]
    outcome = await run_code(code, tests)
    assert outcome.results == (True, True, True)


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
        "import socket; socket.getaddrinfo('localhost', 80)",
        "import os; os.fork()",
        "import os; os.kill({parent}, 15)",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "open({outside!r}, 'w')",
        "import os; os.remove({existing!r})",
        "import os; os.rename({existing!r}, 'mine')",
        "import shutil; shutil.rmtree({folder!r})",
        "import ctypes; ctypes.CDLL(None).getpid()",
    ],
)
async def test_code_reaches_nothing_outside(code: str, tmp_path: Path) -> None:
    existing = tmp_path / "existing"
    existing.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        source = code.format(
            port=server.getsockname()[1],
            parent=os.getpid(),
            outside=str(tmp_path / "new"),
            existing=str(existing),
            folder=str(tmp_path),
        )
        outcome = await run_code(source, ["True"])
        assert outcome.results == (False,)
        assert outcome.error in ("PermissionError", "OSError", "gaierror")
        with pytest.raises(BlockingIOError):
            server.accept()
    assert existing.read_text() == "kept"
    assert sorted(tmp_path.iterdir()) == [existing]


@LINUX
async def test_code_cannot_read_the_users_files(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("x")
    outcome = await run_code(f"open({str(secret)!r}).read()", ["True"])
    if not outcome.guards["landlock"]:
        pytest.skip("this kernel has no Landlock")
    assert outcome.error == "PermissionError"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("values = bytearray(1 << 31)", "MemoryError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import os; os._exit(0)", "died"),
        (
            "print('x', flush=True)\nimport sys; sys.stdout.write('{\"results\": [true]}'); raise ValueError",
            "ValueError",
        ),
        ("def broken(:", "SyntaxError"),
    ],
)
async def test_code_that_ends_or_breaks_the_process_scores_nothing(code: str, error: str) -> None:
    outcome = await run_code(code, ["True"])
    assert outcome.results == (False,)
    assert outcome.error == error


async def test_endless_code_ends_at_its_limit_of_processor_time() -> None:
    assert (await run_code("while True: pass", ["True"], seconds=0.1)).error == "timeout"


async def test_waiting_code_ends_at_its_limit_of_time() -> None:
    outcome = await run_code("import time; time.sleep(600)", ["True"], seconds=0.1, start_seconds=0.5)
    assert outcome.error == "timeout"


async def test_a_block_for_programs_is_not_run() -> None:
    assert (await run_code("ok = True\nif __name__ == '__main__': ok = False", ["ok"])).results == (True,)


@LINUX
@pytest.mark.parametrize(
    ("guard", "deed"),
    [
        ("_filter_system_calls", "import socket; socket.socket()"),
        ("_filter_system_calls", "import os; os.fork()"),
        ("_filter_system_calls", "import os; os.kill(os.getppid(), 0)"),
        ("_filter_system_calls", "import os; os.execv('/bin/true', ['true'])"),
        ("_restrict_files", "open({outside!r}, 'w')"),
        ("_restrict_files", "open({secret!r}).read()"),
    ],
)
def test_each_guard_of_the_kernel_holds_without_the_others(guard: str, deed: str, tmp_path: Path) -> None:
    """The audit hook would refuse the same deeds first."""
    folder, secret = tmp_path / "folder", tmp_path / "secret"
    folder.mkdir()
    secret.write_text("x")
    arguments = [str(folder)] if guard == "_restrict_files" else []
    script = f"""
import runpy, sys
child = runpy.run_path({str(CHILD)!r}, run_name="child")
if not child[{guard!r}](*{arguments!r}):
    sys.exit(77)
try:
    exec({deed.format(outside=str(tmp_path / "new"), secret=str(secret))!r})
except PermissionError:
    sys.exit(0)
sys.exit(1)
"""
    status = subprocess.run([sys.executable, "-I", "-S", "-c", script], timeout=30, check=False).returncode
    if status == 77:
        pytest.skip("this kernel does not have the guard")
    assert status == 0
