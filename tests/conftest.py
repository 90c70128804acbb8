"""The event loops that tests run in, a heap that is quick to walk, and a place without anybody's settings."""

import asyncio
import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

settings.register_profile(
    "tests", deadline=None, derandomize=True
)  # what a change did not break passes as it did before
settings.register_profile(
    "explore", deadline=None, max_examples=1000
)  # `pytest --hypothesis-profile=explore` looks for more
settings.load_profile("tests")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loops that a test runs in: asyncio's, uvloop's where it is marked `uvloop`, one after the other where it is marked `both_loops`."""
    if item.get_closest_marker("both_loops"):
        return LOOPS
    name = "uvloop" if item.get_closest_marker("uvloop") else "asyncio"
    return {name: LOOPS[name]}


def pytest_collection_finish() -> None:
    """Some 400,000 objects of pytest's and of the libraries stay to the end. To walk them takes a quarter of a second, in the midst of whatever
    a test waits for; the gateway, too, freezes what it starts with."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No setting of whoever runs the tests, in an empty folder."""
    for name in os.environ:
        if name.startswith(("GATEWAY", "LLM_", "OLLAMA_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
