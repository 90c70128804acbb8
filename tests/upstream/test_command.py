"""Commands of the operator: their ends, and what they do not get."""

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.upstream.command import CommandFailed, environment, run_command

pytestmark = pytest.mark.both_loops


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return sys.executable, "-c", code, *arguments


async def test_words_are_passed_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "words"
    words = ["a b", "$HOME", "; touch x", "*"]
    code = "import json, sys; open(sys.argv[1], 'w').write(json.dumps(sys.argv[2:]))"
    await run_command(python(code, str(file), *words), 30)
    assert json.loads(file.read_text()) == words


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import sys; print('s3cret'); print('s3cret', file=sys.stderr); sys.exit(3)", "ended with status 3"),
        ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
    ],
)
async def test_a_failure_is_told_without_the_output(code: str, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CommandFailed) as failed:
        await run_command(python(code), 30)
    assert failed.value.why == why
    assert capfd.readouterr() == ("", "")


async def test_a_program_that_does_not_exist_is_told() -> None:
    with pytest.raises(CommandFailed, match="could not be started"):
        await run_command(("/nowhere/program",), 30)


@pytest.mark.parametrize("is_starting", [False, True])
async def test_a_command_that_does_not_end_is_killed_with_its_children(
    tmp_path: Path, is_starting: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it runs already, but a busy event loop has not handed it over yet."""
    file, handed_over, start = tmp_path / "child", asyncio.Event(), asyncio.create_subprocess_exec

    async def start_slowly(*words: str, **options: Any) -> asyncio.subprocess.Process:
        process = await start(*words, **options)
        await handed_over.wait()
        return process

    if is_starting:
        monkeypatch.setattr(asyncio, "create_subprocess_exec", start_slowly)
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open(sys.argv[1], 'w').write(str(child.pid)); time.sleep(600)"
    )
    running = asyncio.create_task(run_command(python(code, str(file)), 600))
    async with asyncio.timeout(60):
        while not (file.exists() and file.read_text()):
            await asyncio.sleep(0.01)
    running.cancel()
    handed_over.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    child = int(file.read_text())
    async with asyncio.timeout(60):
        while is_running(child):
            await asyncio.sleep(0.01)


async def test_the_time_limit_ends_a_command() -> None:
    with pytest.raises(CommandFailed, match="did not end within 0 s"):
        await run_command(python("import time; time.sleep(600)"), 0.05)


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_secrets_are_not_passed_on() -> None:
    given = {"PATH": "/bin", "DOCKER_HOST": "unix:///s", "HOME": "/root"}
    hidden = {"GATEWAY_ADMIN_KEY": "1", "GATEWAY__PORT": "1", "VLLM_API_KEY": "1", "HF_TOKEN": "1", "db_password": "1"}
    assert environment(given | hidden) == given
    assert "PATH" in environment(os.environ)
