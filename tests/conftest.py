"""Shared set-up: event loops, garbage collection and an empty environment."""

import asyncio
import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from hypothesis import settings

from tests.fakes.virtual_time import VirtualTimeLoop

# The same examples in each run, so that a change fails only tests that it breaks.
settings.register_profile("tests", deadline=None, derandomize=True)
# For a longer search: `pytest --hypothesis-profile=explore`.
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile("tests")

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Return the event loops in which a test runs.

    It is asyncio's by default, uvloop's with the marker `uvloop`, both in turn with the marker
    `both_loops`, and one that skips waits with the marker `virtual_time`: there, a test of times is
    exact on any machine. With `uvloop` and `virtual_time`, it runs in both; with
    `virtual_time(only=True)` it does not, because its timeouts are shorter than a busy machine's delays.
    """
    if virtual := item.get_closest_marker("virtual_time"):
        is_real_too = item.get_closest_marker("uvloop") and not virtual.kwargs.get("only")
        real = {"uvloop": LOOPS["uvloop"]} if is_real_too else {}
        return real | {"virtual time": VirtualTimeLoop}
    if item.get_closest_marker("both_loops"):
        return LOOPS
    name = "uvloop" if item.get_closest_marker("uvloop") else "asyncio"
    return {name: LOOPS[name]}


def pytest_configure() -> None:
    """Receive SIGINT even where a shell has started the tests in the background, with that signal ignored.

    Processes inherit that, so a test could not interrupt a command that it started.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Freeze the objects that exist before the first test.

    Some 400,000 objects of pytest and the libraries live to the end. A collection that walks them
    takes a quarter of a second, while a test waits for something. The gateway freezes its own, too.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Remove the gateway's variables from the environment, and change to an empty folder."""
    for name in os.environ:
        if name.startswith(("GATEWAY", "LLM_", "OLLAMA_", "VLLM_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
