"""Reload of changed settings by a running gateway."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from tests.e2e.conftest import TEXT_MODEL, TEXT_STAND_IN
from tests.e2e.engines import Engine, stand_in
from tests.e2e.gateway import ADMIN_KEY, KEY, PLAIN_HTTP, Gateway

PATIENCE = 20.0


@pytest.fixture
def engine() -> Iterator[Engine]:
    with stand_in(TEXT_STAND_IN) as engine:
        yield engine


def text(engine: Engine, **more: Any) -> str:
    backends = {"vllm": {"base_url": engine.settings["VLLM_BASE_URL"]}}
    tiers = {"standard": {"models": {"vllm": TEXT_MODEL}}}
    return str(yaml.safe_dump({"llm_backend": "vllm", "backends": backends, "tiers": tiers} | more))


@pytest.fixture
def gateway(engine: Engine, tmp_path: Path) -> Iterator[Gateway]:
    with Gateway(tmp_path, {}, text(engine)) as gateway:
        yield gateway


def status(gateway: Gateway) -> dict[str, Any]:
    answer = httpx2.get(
        f"{gateway.url}/ops/status", headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=PATIENCE, **PLAIN_HTTP
    )
    return dict(answer.json())


def ask(gateway: Gateway, model: str) -> httpx2.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 2}
    headers = {"authorization": f"Bearer {KEY}"}
    return httpx2.post(f"{gateway.url}/v1/chat/completions", json=body, headers=headers, timeout=PATIENCE, **PLAIN_HTTP)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.timeout(120)
def test_changed_file_is_applied_and_an_invalid_one_is_not(gateway: Gateway, engine: Engine, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    assert ask(gateway, "pro").status_code == 404
    assert status(gateway)["reload"] is None
    tiers = {name: {"models": {"vllm": TEXT_MODEL}} for name in ("standard", "pro")}
    file.write_text(text(engine, tiers=tiers))
    wait_for(lambda: ask(gateway, "pro").status_code == 200)
    file.write_text("tirs: {}\n")
    wait_for(lambda: not status(gateway)["reload"]["ok"])
    assert ask(gateway, "pro").status_code == 200
    log = (tmp_path / "gateway.log").read_text()
    assert "settings: tiers.pro: new" in log
    assert "settings: tirs: unknown key; did you mean 'tiers'? (gateway.yaml line 1)" in log


@pytest.mark.timeout(120)
def test_sighup_during_shutdown_does_not_kill_the_gateway(engine: Engine, tmp_path: Path) -> None:
    """A supervisor that sends SIGHUP for each file change does not know that the gateway is
    stopping.
    """
    with Gateway(tmp_path, engine.settings) as gateway:
        leash = gateway._process
        assert leash is not None
        pid = gateway.pid
        os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + PATIENCE
        while leash.poll() is None:
            assert time.monotonic() < end
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)
            time.sleep(0.001)
    assert leash.returncode == 0


@pytest.mark.timeout(120)
def test_sighup_also_rereads_the_env_file(engine: Engine, tmp_path: Path) -> None:
    with Gateway(tmp_path, engine.settings) as gateway:
        (tmp_path / ".env").write_text("GATEWAY__HEARTBEAT=7\nGATEWAY_METRICS_PORT=1\n")
        os.kill(gateway.pid, signal.SIGHUP)
        wait_for(lambda: status(gateway)["reload"] is not None)
        reload = status(gateway)["reload"]
        assert (reload["cause"], reload["changed"]) == ("signal", ["heartbeat: 7.0, was 15.0"])
        assert reload["needs_restart"] == ["metrics_port: 1, was nothing"]
        assert ask(gateway, "standard").status_code == 200
