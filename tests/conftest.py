"""The event loops that tests run in, and a place without anybody's settings."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

ON_UVLOOP = {
    "test_api", "test_cancellation", "test_fallback", "test_faults", "test_loader", "test_moves", "test_ops", "test_ops_guard", "test_ops_rollout",
    "test_preflight", "test_relay", "test_reload", "test_together",
}  # fmt: skip
"""The whole gateway: in the loop that it runs in."""
ON_BOTH = {"test_wire"}
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    if item.path.stem in ON_BOTH:
        return LOOPS
    name = "uvloop" if item.path.stem in ON_UVLOOP else "asyncio"
    return {name: LOOPS[name]}


@pytest.fixture
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests, in an empty folder."""
    for name in os.environ:
        if name.startswith(("GATEWAY", "LLM_", "OLLAMA_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
