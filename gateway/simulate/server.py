"""Stand-ins on real sockets: uvicorn in the current event loop, for the command line and tests."""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Generator
from types import TracebackType
from typing import Any, Self

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.simulate.engine import SimulatedEngine
from gateway.simulate.ollama.app import OllamaApp
from gateway.simulate.options import Options
from gateway.simulate.vllm.app import VllmApp

VLLM_KEEP_ALIVE = 5  # seconds: VLLM_HTTP_TIMEOUT_KEEP_ALIVE
OLLAMA_KEEP_ALIVE = 24 * 3600  # seconds; Go's server has no limit


class _Protocol(HttpToolsProtocol):
    """Passes the transport to the app, which closes it to simulate a dead server."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn does
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, takes_signals: bool, started: Callable[[int], None]) -> None:
        super().__init__(config)
        self._takes_signals = takes_signals
        self._on_started = started
        self._stop_requested = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        with super().capture_signals() if self._takes_signals else contextlib.nullcontext():
            yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started(self.servers[0].sockets[0].getsockname()[1])

    async def main_loop(self) -> None:
        """Do as uvicorn's `main_loop` does, but wake up as soon as `stop` is called."""
        counter = 0
        try:
            while not await self.on_tick(counter):
                counter = (counter + 1) % 864_000
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop_requested.wait(), 0.1)
        except asyncio.CancelledError:
            await self.shutdown()
            raise

    def stop(self) -> None:
        self.should_exit = True
        self._stop_requested.set()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop at once, as a killed server does, without draining."""
        for server in self.servers:
            server.close()
        tasks = list(self.server_state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        while self.server_state.connections:  # noqa: ASYNC110  # uvicorn has no event for it
            await asyncio.sleep(0)  # each turn of the loop calls connection_lost of some
        for server in self.servers:
            await server.wait_closed()


def application(options: Options) -> OllamaApp | VllmApp:
    """Return the ASGI app for `options.kind`."""
    return OllamaApp(options) if options.kind == "ollama" else VllmApp(options)


def _config(app: Any, options: Options, host: str, port: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Protocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="critical",
        log_config=None,
        server_header=options.kind == "vllm",
        date_header=options.kind == "ollama",
        timeout_keep_alive=VLLM_KEEP_ALIVE if options.kind == "vllm" else OLLAMA_KEEP_ALIVE,
    )


async def serve(options: Options, host: str, port: int, started: Callable[[int], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM.

    Calls `started` with the port once the server listens. With port 0 the system chooses one.
    """
    config = _config(application(options), options, host, port)
    await _Server(config, takes_signals=True, started=started or (lambda _: None)).serve()


class Running:
    """A stand-in that serves on a loopback port while its `async with` block runs.

    `base_url` has no path. `engine` is the live engine, for its counters, `inject` and `say`.
    """

    def __init__(self, options: Options, port: int = 0) -> None:
        self.options = options
        self.app = application(options)
        self.port = port

    @property
    def engine(self) -> SimulatedEngine:
        return self.app.engine

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def __aenter__(self) -> Self:
        opened: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        config = _config(self.app, self.options, "127.0.0.1", self.port)
        self._server = _Server(config, takes_signals=False, started=opened.set_result)
        self._serving = asyncio.create_task(self._server.serve())
        either: set[asyncio.Future[Any]] = {opened, self._serving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            self._serving.result()
        self.port = opened.result()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Close the listener and every connection, as a killed server does. Safe to call twice."""
        self._server.stop()
        await self._serving
        self.engine.gpu.hold(0)


def running(options: Options, port: int = 0) -> Running:
    """Return a stand-in to be used as `async with running(options) as server`.

    With port 0 the system chooses one.
    """
    return Running(options, port)
