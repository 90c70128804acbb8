"""`gateway top`: its frame, its one frame without a terminal, and its life in one."""

import asyncio
import copy
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from fcntl import ioctl
from typing import Any

import pytest
from rich.console import Console

from gateway.cli.top import frame
from gateway.cli.top_notes import MOST_ERRORS
from tests.cli.harness import ROOT, command, gateway, invoke
from tests.fakes.running_gateway import Running, until

EJECTION = {
    "model": "m",
    "lane": "text",
    "state": "ejected",
    "reason": "status_5xx",
    "until": "2026-01-01T00:00:00Z",
    "gets_requests": True,
}
ESCAPE = r"\x1b\[[0-9;?]*[a-zA-Z]"

pytestmark = pytest.mark.usefixtures("empty_environment")


async def status_of(here: Running) -> dict[str, Any]:
    here.gateway.settle()
    return await here.gateway._operations.status_with_series()


def drawn(status: dict[str, Any], width: int = 80, height: int | None = 24, problem: str | None = None) -> list[str]:
    console = Console(width=width, height=height or 100, force_terminal=False)
    with console.capture() as capture:
        console.print(frame(status, "http://gateway", width, height, problem))
    return capture.get().splitlines()


async def test_frame_shows_both_sides_load_errors_and_the_last_change(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        here.gateway._live.want()
        await here.ask({"stream": True})
        await here.ask({"model": "ultra"})
        await command("switch", "vllm", "--tier", "standard", "--canary", "10", "--force")
        here.gateway.settle()
        here.gateway._live.sample()
        lines = drawn(await status_of(here))
    rows = {tuple(line.split()[:2]): line.split() for line in lines}
    assert lines[0].startswith("LLM gateway")
    assert rows["ollama", "up"][2:5] == ["1.0", "0.2", "0"]
    assert rows["away", "down"]
    assert rows["standard", "ollama"][2:4] == ["90", "%"]
    assert any(line.split()[:3] == ["vllm", "10", "%"] for line in lines)
    assert rows["pinned", "ollama"][2] == "pinned"
    assert any("last change:" in line and "operator" in line for line in lines)


async def test_frame_of_many_tiers_with_long_names_fits_into_80_columns_and_24_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with gateway(monkeypatch) as here:
        status = copy.deepcopy(await status_of(here))
    tier = status["tiers"]["standard"]
    status["tiers"] = {f"{number}-{'x' * 120}": copy.deepcopy(tier) for number in range(200)}
    status["ready"]["unserved_tiers"] = list(status["tiers"])
    busy = status["tiers"][f"150-{'x' * 120}"]["live"]["ollama"]
    busy |= {"requests": 1234.0, "tokens": 123456.0, "time_to_first_token_p50": 111.0, "time_to_first_token_p95": 222.0}
    busy |= {"inter_token_latency_p50": 0.999, "inter_token_latency_p95": 99.9}
    status["backends"] = {f"{name}-{'y' * 100}": value for name, value in status["backends"].items()}
    error = {"at": "2026-01-01T00:00:00.000Z", "status": 502, "code": "upstream_error", "reason": "reset"}
    error |= {"tier": "t" * 120, "backend": "b" * 120, "request_id": "r" * 128, "outcome": "upstream_error"}
    status["errors"] = [error] * 30
    lines = drawn(status, problem="cannot reach a gateway at " + "z" * 200)
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 24 + 3  # a table is never empty, and a terminal crops the rest
    assert any(
        line.startswith("150-") and "1234" in line and "111s/222s" in line for line in lines
    )  # the busiest first
    assert any("more tiers with less traffic" in line for line in lines)
    assert sum("502 upstream_error reset" in line for line in lines) == MOST_ERRORS
    assert any(line.startswith("not current: ") for line in lines)
    assert len(drawn(status, height=None)) > 200


async def test_names_are_shown_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        status = copy.deepcopy(await status_of(here))
    status["tiers"]["standard"]["models"]["ollama"] = "model[bold red]x[/]"
    assert any("model[bold red]x[/]" in line for line in drawn(status, width=140))


async def test_an_engine_that_sleeps_is_not_shown_as_down(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        here.gateway._backends["vllm"].take_turn("asleep")
        assert any(line.split()[:2] == ["vllm", "sleeping"] for line in drawn(await status_of(here)))
        assert "sleeping" in (await command("status")).stdout


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "up"),
        ({"gets_requests": False, "paused": True}, "paused"),
        ({"gets_requests": False, "circuit": "suspect"}, "suspect"),
        ({"ejections": [EJECTION]}, "ejected"),
        ({"ejections": [EJECTION], "gets_requests": False}, "ejected"),
    ],
)
async def test_a_server_that_answers_is_not_shown_as_down_and_not_as_well_if_it_is_ejected(
    changes: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(monkeypatch) as here:
        status = copy.deepcopy(await status_of(here))
    (server,) = status["backends"]["vllm"]["servers"]
    server |= changes
    assert any(line.split()[:2] == ["vllm", expected] for line in drawn(status))
    status["backends"]["vllm"]["servers"].append({**server, "ejections": [], "gets_requests": True})
    several = "up" if expected == "up" else "1/2"
    assert any(line.split()[:2] == ["vllm", several] for line in drawn(status))


async def test_without_a_terminal_it_prints_one_frame_with_fresh_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    async with gateway(monkeypatch) as here:
        result = await command("top")
        assert result.exit_code == 0
        assert result.stdout.count("LLM gateway") == 1
        assert "\x1b" not in result.stdout
        assert "q or Ctrl-C" not in result.stdout
        assert here.gateway._live.number >= 1


def test_exit_status_tells_an_unreachable_gateway_from_wrong_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_URL", "http://127.0.0.1:1")
    unreachable = invoke("top")
    assert (unreachable.exit_code, unreachable.stdout) == (1, "")
    assert "cannot reach a gateway" in unreachable.stderr
    monkeypatch.delenv("GATEWAY_URL")
    assert invoke("top", LLM_BACKEND="nothing").exit_code == 2
    assert invoke("top", "--interval", "0").exit_code == 2


class Terminal:
    """`gateway top` in a terminal of 80 columns and 24 lines."""

    def __init__(self, process: subprocess.Popen[bytes], leader: int) -> None:
        self.process = process
        self.leader = leader
        self.shown = ""
        asyncio.get_running_loop().add_reader(leader, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self.leader, 2**16)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self.leader)
        self.shown += data.decode()

    @property
    def text(self) -> str:
        return re.sub(ESCAPE, "", self.shown)

    async def shows(self, condition: Callable[[str], bool]) -> None:
        await until(lambda: condition(self.text), 20)

    async def ends(self) -> int:
        await until(lambda: self.process.poll() is not None, 20)
        await until(lambda: "\x1b[?1049l" in self.shown)  # the screen of before
        return self.process.returncode


@asynccontextmanager
async def terminal() -> AsyncIterator[Terminal]:
    leader, follower = pty.openpty()
    ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    before = termios.tcgetattr(follower)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm-256color"}
    process = subprocess.Popen(
        [sys.executable, "-m", "gateway", "top", "--interval", "0.2"],
        env=environment,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
    )
    try:
        yield Terminal(process, leader)
        assert termios.tcgetattr(follower) == before  # keys are echoed again
    finally:
        process.kill()
        process.wait()
        asyncio.get_running_loop().remove_reader(leader)
        os.close(leader)
        os.close(follower)


async def test_in_a_terminal_it_refreshes_survives_a_lost_gateway_and_leaves_with_q(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with terminal_of(monkeypatch) as (here, top):
        await top.shows(lambda text: text.count("LLM gateway") >= 3)
        assert "standard" in top.text
        lines = re.split(r"\r?\n|\x1b\[H", top.shown)
        assert max(len(re.sub(ESCAPE, "", line)) for line in lines) == 80
        here.server.stop()
        await top.shows(lambda text: "not current: cannot reach a gateway" in text)
        os.write(top.leader, b"q")
        assert await top.ends() == 0


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
async def test_a_signal_leaves_the_terminal_as_it_was(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals, expected: int
) -> None:
    async with terminal_of(monkeypatch) as (_, top):
        await top.shows(lambda text: "LLM gateway" in text)
        top.process.send_signal(number)
        assert await top.ends() == expected


@asynccontextmanager
async def terminal_of(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Running, Terminal]]:
    async with gateway(monkeypatch) as here, terminal() as top:
        yield here, top
