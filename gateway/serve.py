"""Runs a gateway on its sockets until a signal ends it."""

import asyncio
import gc
import logging
import resource
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

import uvicorn
import uvloop

from gateway.app import Gateway
from gateway.config import Settings
from gateway.config.reload import FileWatcher, read_whole
from gateway.downstream.protocol import ServerLimits, bind_limits
from gateway.downstream.server import GracefulServer, listen
from gateway.telemetry.log import ExchangeLog, Sink, configure

METRICS_DRAIN_SECONDS = 1.0
FEW_FILES = 4096
"""With fewer, default limits let more clients wait and be served than there are files for."""

_log = logging.getLogger("gateway.run")


def run(
    settings: Settings, announce: Callable[[str], None] | None = None, reread: Callable[[], Settings] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT; `announce` is told the base URL once the door is open. `reread` reads the settings anew when their file has
    changed or SIGHUP comes.

    Raises:
        CannotListen: an address is taken, or no address.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, announce, reread))


async def serve(
    settings: Settings, announce: Callable[[str], None] | None = None, reread: Callable[[], Settings] | None = None
) -> None:
    """As `run`, in the loop that runs."""
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())
    listener = _listen("GATEWAY_PORT", settings.host, settings.port)
    beside = (
        None if settings.metrics_port is None else _listen("GATEWAY_METRICS_PORT", settings.host, settings.metrics_port)
    )
    sink = Sink(sys.stderr.buffer)
    if reread is not None:
        _ignore_hang_up()
    try:
        configure(as_json, sink)
        _allow_open_files()
        gateway = Gateway(
            settings, ExchangeLog(as_json, sink)
        )  # its first words are about a roll-out that differs from the settings
        for line in settings.sources:
            _log.info("%s", line)
        for line in settings.warnings:
            _log.warning("%s", line)
        async with gateway, _metrics_port(gateway, beside), _reloading(gateway, settings.file, reread):
            await _serve(settings, gateway, listener, announce)
        _log.info("stopped")
    finally:
        sink.close()


async def _serve(
    settings: Settings, gateway: Gateway, listener: socket.socket, announce: Callable[[str], None] | None
) -> None:
    def tell() -> None:
        base_url = _url(settings.host, listener)
        _log.info("serving %s; tiers %s; active backend %s", base_url, ", ".join(settings.tiers), gateway.rollout)
        if announce is not None:
            announce(base_url)

    server = GracefulServer(
        _config(gateway),
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
        on_open=tell,
        on_drain=gateway.begin_drain,
        on_cutoff=gateway.cut_off,
    )
    gc.collect()
    gc.freeze()  # what is there now stays: no collection need walk it again while requests wait
    await server.serve(sockets=[listener])


def _allow_open_files() -> None:
    """As many as the system lets: a client takes one, and one more while it is served. A login shell commonly gives 1024 to who does not ask."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS says that there is no limit, and has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < FEW_FILES:
        _log.warning(
            "only %d files may be open, two for each request that runs: what comes beyond is cut off; raise the limit (ulimit -Hn)",
            allowed,
        )


class CannotListen(Exception):
    """An address that cannot be had; the text says which variable names it."""


def _listen(variable: str, host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        name = "GATEWAY_HOST" if isinstance(error, socket.gaierror) else variable
        raise CannotListen(f"{name}: cannot listen on {host}:{port}: {error.strerror or error}") from error


def _url(host: str, listener: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


class _MetricsServer(GracefulServer):
    """A server whose end is called by `stop`: signals are the main one's."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def _metrics_port(gateway: Gateway, listener: socket.socket | None) -> AsyncGenerator[None, None]:
    """The second port, where `GATEWAY_METRICS_PORT` asks for one; it serves until the main one has drained."""
    if listener is None:
        yield
        return
    _log.info("metrics at http://%s:%d/metrics, unguarded", *listener.getsockname()[:2])
    server = _MetricsServer(_config(gateway.metrics_port_app), drain_timeout=METRICS_DRAIN_SECONDS)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]))
        yield
        server.stop()


@asynccontextmanager
async def _reloading(
    gateway: Gateway, file: Path | None, reread: Callable[[], Settings] | None
) -> AsyncGenerator[None, None]:
    """While the block runs, the settings are reread when `file` changes, and on SIGHUP."""
    if reread is None:
        yield
        return
    loop = asyncio.get_running_loop()
    hung_up = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, hung_up.set)
    tasks = [asyncio.create_task(_on_signal(gateway, hung_up, lambda: read_whole(file, reread)))]
    if file is not None:
        tasks.append(asyncio.create_task(FileWatcher(file, gateway.reload, reread).run()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        loop.remove_signal_handler(signal.SIGHUP)
        _ignore_hang_up()


def _ignore_hang_up() -> None:
    """Before settings can be reread, and after: by itself the signal would kill the process, with what is not written yet."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def _on_signal(gateway: Gateway, hung_up: asyncio.Event, reread: Callable[[], Settings]) -> None:
    while True:
        await hung_up.wait()
        hung_up.clear()
        await gateway.reload.run(reread, "signal")


def _config(app: object) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # our scope is a mapping, uvicorn's a TypedDict
        http=bind_limits(ServerLimits()),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
