"""Runs one scenario from start to result: model, progress, interruption."""

import asyncio
import gc
import signal
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import replace

import orjson
from rich.console import Console

from gateway.bench.bodies import OLLAMA_LACKS
from gateway.bench.http_client import HttpLoadClient
from gateway.bench.options import BenchOptions
from gateway.bench.results import ScenarioResult
from gateway.bench.runner import Runner, Silent
from gateway.bench.scenarios import SCENARIOS
from gateway.bench.target import LoadClient, Target
from gateway.bench.terminal import ProgressBar
from gateway.bench.writers import Style


class NoModel(Exception):
    """No model was named, and the server does not list any."""


async def first_model(client: LoadClient) -> str:
    """Return the first model that the server lists.

    Raises:
        NoModel: it lists none, or cannot be asked.
    """
    path, key, name = ("/api/tags", "models", "name") if client.target.api == "ollama" else ("/v1/models", "data", "id")
    try:
        status, body = await client.get(path)
    except (OSError, EOFError) as problem:
        raise NoModel(f"{client.target.url}{path} cannot be asked for a model; use --model") from problem
    try:
        models = orjson.loads(body)[key] if status == 200 else []
        return str(models[0][name])
    except (ValueError, KeyError, IndexError, TypeError) as problem:
        raise NoModel(f"{client.target.url}{path} names no model (status {status}); use --model") from problem


async def with_model(target: Target) -> Target:
    """Return the target, with the server's first model if it has none.

    Raises:
        NoModel: see `first_model`.
    """
    if target.model:
        return target
    client = HttpLoadClient(target)
    try:
        return replace(target, model=await first_model(client))
    finally:
        await client.close()


async def measure(scenario: str, options: BenchOptions, console: Console | None, style: Style) -> ScenarioResult:
    """Run a scenario and return its result; SIGINT ends it early with what was measured until then.

    Progress is drawn on `console`, None: nowhere.

    Raises:
        NoModel: see `first_model`.
        gateway.bench.scenarios.Unanswered: the server does not answer the first request.
        gateway.bench.images.InvalidImage: an image cannot be read.
    """
    options = replace(options, target=await with_model(options.target))
    client = HttpLoadClient(options.target)
    stop = asyncio.Event()
    gc.collect()
    gc.freeze()  # a collection during a run looks through less, and delays fewer answers that are being timed
    try:
        async with AsyncExitStack() as stack:
            progress = Silent() if console is None else await stack.enter_async_context(ProgressBar(console, style))
            with interruption(stop):
                runner = Runner(client, progress=progress, stop=stop)
                result = await SCENARIOS[scenario].run(options, runner)
    finally:
        gc.unfreeze()
        await client.close()
    if options.target.api == "ollama" and set(OLLAMA_LACKS) & set(options.parameters):
        result = replace(result, notes=(*result.notes, "ollama_ignores_eos"))
    return result


@contextmanager
def interruption(stop: asyncio.Event) -> Iterator[None]:
    """Let the first SIGINT set `stop` during the block; a second one ends the program as usual."""
    loop = asyncio.get_running_loop()
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt() -> None:
        stop.set()
        loop.remove_signal_handler(signal.SIGINT)

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
