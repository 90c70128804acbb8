"""Restarts with a changed `LLM_BACKEND` in `.env`, after an operator's switch, and after a kill."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway.simulate import Model, Options
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import ADMIN_KEY, KEY, PLAIN_HTTP, Gateway
from tests.real_engines.process import wait_until

OLLAMA, VLLM = "ollama", "vllm"
OLLAMA_STAND_IN = Options(OLLAMA, (Model("qwen3"),))
VLLM_STAND_IN = Options(VLLM, (Model("Qwen/Qwen3-8B"),))
PATIENCE = 30.0
KILLS = int(os.environ.get("TEST_KILLS", "3"))
AS_OPERATOR: dict[str, Any] = {"headers": {"authorization": f"Bearer {ADMIN_KEY}"}, "timeout": PATIENCE, **PLAIN_HTTP}


class Installation:
    """A folder with `.env` and the state file, for several starts of the gateway."""

    def __init__(self, folder: Path, *engines: Engine) -> None:
        self.folder = folder
        self._addresses = {
            name: value for engine in engines for name, value in engine.settings.items() if name != "LLM_BACKEND"
        }

    @contextmanager
    def gateway(self, llm_backend: str, **settings: str) -> Iterator[Gateway]:
        """Start a gateway with this `LLM_BACKEND`, and stop it with SIGTERM at the end of the
        block.
        """
        lines = {**self._addresses, "LLM_BACKEND": llm_backend}
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        with Gateway(self.folder, settings) as gateway:
            yield gateway

    def first_log_lines(self) -> str:
        """Return the first two log lines of the last start."""
        return "\n".join(
            json.loads(line)["event"] for line in (self.folder / "gateway.log").read_text().splitlines()[:2]
        )


def set_rollout(gateway: Gateway, rollout: dict[str, Any]) -> None:
    """Change the roll-out as an operator does; it must be persisted."""
    answer = httpx2.put(f"{gateway.url}/ops/rollout", json=rollout, **AS_OPERATOR)
    assert answer.status_code == 200, answer.text
    assert answer.json()["persisted"]


def roll_back(gateway: Gateway) -> None:
    """Roll back as an operator does; it must be persisted."""
    answer = httpx2.post(f"{gateway.url}/ops/rollback", json={}, **AS_OPERATOR)
    assert answer.status_code == 200, answer.text
    assert answer.json()["persisted"]


def active_backend(gateway: Gateway) -> str:
    """Send a request and return the backend that served it."""
    body = {"model": "standard", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 2}
    answer = httpx2.post(
        f"{gateway.url}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=PATIENCE,
        **PLAIN_HTTP,
    )
    assert answer.status_code == 200, answer.text
    return answer.headers["x-gateway-backend"]


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    with stand_in(OLLAMA_STAND_IN) as ollama, stand_in(VLLM_STAND_IN) as vllm:
        yield Installation(tmp_path, ollama, vllm)


@pytest.mark.timeout(120)
def test_variable_and_restart_roll_back_even_if_vllm_stops(tmp_path: Path) -> None:
    with stand_in(OLLAMA_STAND_IN) as ollama, ExitStack() as stack:
        installation = Installation(tmp_path, ollama, stack.enter_context(stand_in(VLLM_STAND_IN)))
        with installation.gateway(VLLM) as gateway:
            assert active_backend(gateway) == VLLM
        with installation.gateway(OLLAMA) as gateway:
            stack.close()
            assert active_backend(gateway) == OLLAMA
        assert "LLM_BACKEND is" not in installation.first_log_lines()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "changes",
    [["rollback", {"backend": VLLM}], [{"canary": {"backend": VLLM, "percent": 30}}]],
    ids=["switch", "canary"],
)
def test_changed_variable_takes_precedence_over_an_operators_change(
    installation: Installation, changes: list[Any]
) -> None:
    with installation.gateway(VLLM) as gateway:
        for change in changes:
            if change == "rollback":
                roll_back(gateway)
            else:
                set_rollout(gateway, change)
    with installation.gateway(OLLAMA) as gateway:
        assert active_backend(gateway) == OLLAMA
        assert "LLM_BACKEND is ollama and was vllm" in installation.first_log_lines()
        assert "the variable takes precedence" in installation.first_log_lines()
    with installation.gateway(OLLAMA) as gateway:
        assert active_backend(gateway) == OLLAMA
    assert "LLM_BACKEND is" not in installation.first_log_lines()
    with installation.gateway(VLLM) as gateway:
        assert active_backend(gateway) == VLLM


@pytest.mark.timeout(120)
def test_operators_switch_takes_precedence_over_an_unchanged_variable_and_can_be_undone_in_both_ways(
    installation: Installation,
) -> None:
    with installation.gateway(OLLAMA) as gateway:
        set_rollout(gateway, {"backend": VLLM})
    with installation.gateway(OLLAMA) as gateway:
        assert active_backend(gateway) == VLLM
        lines = installation.first_log_lines()
        assert "LLM_BACKEND is ollama, but the roll-out that was set" in lines
        assert "`gateway rollback`" in lines
        assert "an empty GATEWAY_STATE_FILE" in lines
    with installation.gateway(OLLAMA, GATEWAY_STATE_FILE="") as gateway:
        assert active_backend(gateway) == OLLAMA
    with installation.gateway(OLLAMA) as gateway:
        assert active_backend(gateway) == VLLM
        roll_back(gateway)
        assert active_backend(gateway) == OLLAMA
    with installation.gateway(OLLAMA) as gateway:
        assert active_backend(gateway) == OLLAMA
    assert "LLM_BACKEND is" not in installation.first_log_lines()


# SIGKILL


class Operator:
    """Changes the canary's percentage on a thread of its own, until the gateway no longer
    answers.
    """

    def __init__(self, gateway: Gateway, first: int) -> None:
        self.requested = self.acknowledged = first
        """Hundredths of a percent, as last requested and as last acknowledged as persisted."""
        self._url = f"{gateway.url}/ops/rollout"
        self._thread = threading.Thread(target=self._run, name="operator")
        self._thread.start()

    def wait_for(self, acknowledged: int) -> None:
        wait_until(lambda: self.acknowledged, lambda now: now >= acknowledged, "changes are acknowledged", PATIENCE)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        with httpx2.Client(headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=PATIENCE, **PLAIN_HTTP) as client:
            try:
                while True:
                    self.requested += 1
                    canary = {"backend": VLLM, "percent": self.requested / 100}
                    answer = client.put(self._url, json={"backend": OLLAMA, "canary": canary})
                    if answer.json()["persisted"]:  # false if the disk stalls for a second
                        self.acknowledged = self.requested
            except httpx2.TransportError:
                return


def percent(gateway: Gateway) -> int:
    """Return the canary's percentage in hundredths of a percent; 0 without a canary."""
    canary = httpx2.get(f"{gateway.url}/ops/rollout", **AS_OPERATOR).json()["tiers"]["standard"]["canary"]
    return round(canary["percent"] * 100) if canary else 0


@pytest.mark.timeout(60 + 20 * KILLS)
def test_kill_during_a_change_loses_no_acknowledged_change(installation: Installation) -> None:
    acknowledged = requested = 0
    for _ in range(KILLS):
        with installation.gateway(OLLAMA) as gateway:
            restored = percent(gateway)
            assert acknowledged <= restored <= requested, "an acknowledged change is lost, or one was never requested"
            operator = Operator(gateway, restored)
            operator.wait_for(restored + 3)
            time.sleep(random.random() * 0.02)
            os.kill(gateway.pid, signal.SIGKILL)
            operator.join()
            acknowledged, requested = operator.acknowledged, operator.requested
        json.loads((installation.folder / "state.json").read_bytes())
    with installation.gateway(OLLAMA) as gateway:
        assert acknowledged <= percent(gateway) <= requested
    assert "is damaged" not in (installation.folder / "gateway.log").read_text()
