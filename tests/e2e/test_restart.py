"""The way back that everybody knows: another `LLM_BACKEND` in `.env`, and a restart. Also after an operator has switched, and after a kill."""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest

from gateway.simulate import Model, Options
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import ADMIN_KEY, KEY, Gateway
from tests.real_engines.process import wait_until

OLLAMA, VLLM = "ollama", "vllm"
OLLAMA_STAND_IN = Options(OLLAMA, (Model("qwen3"),))
VLLM_STAND_IN = Options(VLLM, (Model("Qwen/Qwen3-8B"),))
PATIENCE = 30.0
KILLS = int(os.environ.get("TEST_KILLS", "3"))


class Installation:
    """A folder with `.env` and the state file, and what the gateway there says, one start after the other."""

    def __init__(self, folder: Path, *engines: Engine) -> None:
        self.folder = folder
        self._addresses = {
            name: value for engine in engines for name, value in engine.settings.items() if name != "LLM_BACKEND"
        }

    @contextmanager
    def gateway(self, llm_backend: str, **settings: str) -> Iterator[Gateway]:
        """From its start with this `LLM_BACKEND` to its end by SIGTERM."""
        lines = {**self._addresses, "LLM_BACKEND": llm_backend}
        (self.folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        with Gateway(self.folder, settings) as gateway:
            yield gateway

    def first_words(self) -> str:
        """The two lines that the log of the last start begins with."""
        return "\n".join(
            json.loads(line)["event"] for line in (self.folder / "gateway.log").read_text().splitlines()[:2]
        )

    def order(self, gateway: Gateway, *words: str) -> None:
        done = gateway.command(self.folder, *words)
        assert done.returncode == 0, done.stderr


def side(gateway: Gateway) -> str:
    """Who serves a request now."""
    body = {"model": "standard", "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 2}
    answer = httpx2.post(
        f"{gateway.url}/v1/chat/completions",
        json=body,
        headers={"authorization": f"Bearer {KEY}"},
        timeout=PATIENCE,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text
    return answer.headers["x-gateway-backend"]


@pytest.fixture
def installation(tmp_path: Path) -> Iterator[Installation]:
    with stand_in(OLLAMA_STAND_IN) as ollama, stand_in(VLLM_STAND_IN) as vllm:
        yield Installation(tmp_path, ollama, vllm)


@pytest.mark.timeout(120)
def test_variable_and_restart_lead_back_and_vllm_may_be_stopped(tmp_path: Path) -> None:
    with stand_in(OLLAMA_STAND_IN) as ollama, ExitStack() as stack:
        here = Installation(tmp_path, ollama, stack.enter_context(stand_in(VLLM_STAND_IN)))
        with here.gateway(VLLM) as gateway:
            assert side(gateway) == VLLM
        with here.gateway(OLLAMA) as gateway:
            stack.close()
            assert side(gateway) == OLLAMA
        assert "LLM_BACKEND is" not in here.first_words()


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "orders", [["rollback", f"switch {VLLM}"], [f"switch {VLLM} --canary 30"]], ids=["switch", "canary"]
)
def test_variable_that_changes_counts_more_than_what_an_operator_did(
    installation: Installation, orders: list[str]
) -> None:
    with installation.gateway(VLLM) as gateway:
        for order in orders:
            installation.order(gateway, *order.split())
    with installation.gateway(OLLAMA) as gateway:
        assert side(gateway) == OLLAMA
        assert "LLM_BACKEND is ollama and was vllm" in installation.first_words()
        assert "the variable takes precedence" in installation.first_words()
    with installation.gateway(OLLAMA) as gateway:
        assert side(gateway) == OLLAMA
    assert "LLM_BACKEND is" not in installation.first_words()
    with installation.gateway(VLLM) as gateway:
        assert side(gateway) == VLLM


@pytest.mark.timeout(120)
def test_operators_switch_counts_more_than_a_variable_that_stays_and_both_ways_out_lead_out(
    installation: Installation,
) -> None:
    with installation.gateway(OLLAMA) as gateway:
        installation.order(gateway, "switch", VLLM)
    with installation.gateway(OLLAMA) as gateway:
        assert side(gateway) == VLLM
        words = installation.first_words()
        assert "LLM_BACKEND is ollama, but the roll-out that was set" in words
        assert "`gateway rollback`" in words
        assert "an empty GATEWAY_STATE_FILE" in words
    with installation.gateway(OLLAMA, GATEWAY_STATE_FILE="") as gateway:
        assert side(gateway) == OLLAMA
    with installation.gateway(OLLAMA) as gateway:
        assert side(gateway) == VLLM
        installation.order(gateway, "rollback")
        assert side(gateway) == OLLAMA
    with installation.gateway(OLLAMA) as gateway:
        assert side(gateway) == OLLAMA
    assert "LLM_BACKEND is" not in installation.first_words()


# Kill -9


class Operator:
    """Gives one order after the other on a thread of its own, until nobody answers any more."""

    def __init__(self, gateway: Gateway, first: int) -> None:
        self.asked = self.told = first
        """Percent of the canary, in hundredths: of the last order, and of the last that was acknowledged as kept."""
        self._url = f"{gateway.url}/ops/rollout"
        self._thread = threading.Thread(target=self._run, name="operator")
        self._thread.start()

    def wait_for(self, told: int) -> None:
        wait_until(lambda: self.told, lambda now: now >= told, "orders are followed", PATIENCE)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        with httpx2.Client(
            headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=PATIENCE, trust_env=False
        ) as client:
            try:
                while True:
                    self.asked += 1
                    answer = client.put(
                        self._url, json={"backend": OLLAMA, "canary": {"backend": VLLM, "percent": self.asked / 100}}
                    )
                    if answer.json()["persisted"]:  # a disk that stalls for a second is owned up to
                        self.told = self.asked
            except httpx2.TransportError:
                return


def percent(gateway: Gateway) -> int:
    """Of the canary, in hundredths; 0 without one."""
    answer = httpx2.get(
        f"{gateway.url}/ops/rollout",
        headers={"authorization": f"Bearer {ADMIN_KEY}"},
        timeout=PATIENCE,
        trust_env=False,
    )
    canary = answer.json()["tiers"]["standard"]["canary"]
    return round(canary["percent"] * 100) if canary else 0


@pytest.mark.timeout(60 + 20 * KILLS)
def test_kill_in_the_middle_of_a_change_loses_nothing_that_was_acknowledged(installation: Installation) -> None:
    told = asked = 0
    for _ in range(KILLS):
        with installation.gateway(OLLAMA) as gateway:
            here = percent(gateway)
            assert told <= here <= asked, "what was acknowledged is lost, or what nobody asked for is there"
            operator = Operator(gateway, here)
            operator.wait_for(here + 3)
            time.sleep(random.random() * 0.02)
            os.kill(gateway.pid, signal.SIGKILL)
            operator.join()
            told, asked = operator.told, operator.asked
        json.loads((installation.folder / "state.json").read_bytes())
    with installation.gateway(OLLAMA) as gateway:
        assert told <= percent(gateway) <= asked
    assert "is damaged" not in (installation.folder / "gateway.log").read_text()
