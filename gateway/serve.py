"""Process of the gateway: sockets, signals, open files and garbage collection."""

import asyncio
import ctypes
import logging
import os
import resource
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import NamedTuple, Self

import uvicorn
import uvloop

from gateway.admin_token import AdminToken, new_token, token_path
from gateway.api.named_keys import NamedKeys, open_accounts
from gateway.app import Gateway
from gateway.body_memory import BodyMemory
from gateway.config import Settings
from gateway.config.reload import FileWatcher, files_of_keys, read_whole
from gateway.downstream.connection_limit import ConnectionLimit
from gateway.downstream.fair_accept import ConnectionCounts, FairServer
from gateway.downstream.limits import ServerLimits
from gateway.downstream.protocol import bind_limits
from gateway.downstream.server import GracefulServer, listen
from gateway.garbage import short_collections
from gateway.replicas.member import HubMember
from gateway.telemetry.log import ExchangeLog, Sink, configure, palette_for
from gateway.telemetry.tracing import start_tracing
from gateway.usage.recorder import UsageRecorder

METRICS_DRAIN_SECONDS = 1.0
LARGE_BLOCK = 128 * 1024
"""Bytes from which freed memory goes back to the system at once."""
FEW_FILES = 4096
"""With fewer open files, the default limits allow more queued and running requests than fit."""

_log = logging.getLogger(__name__)


def run(
    settings: Settings, announce: Callable[[str], None] | None = None, reread: Callable[[], Settings] | None = None
) -> None:
    """Serve until SIGTERM or SIGINT.

    `announce` is called with the base URL once the gateway accepts connections. `reread` loads the
    settings again; it is called when their file changes, and on SIGHUP.

    Raises:
        ConfigError: the file of keys cannot be used.
        CannotListen: an address is in use or invalid.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, announce, reread))


class Listeners(NamedTuple):
    """Listening sockets: of the API, of the second port for Ollama's programs, and of the metrics."""

    main: socket.socket
    ollama: socket.socket | None
    metrics: socket.socket | None

    @classmethod
    def of_files(cls, files: Sequence[int | None]) -> Self:
        """Return the sockets that `files` of another process were."""
        main, ollama, metrics = (None if file is None else socket.socket(fileno=file) for file in files)
        assert main is not None
        return cls(main, ollama, metrics)

    def files(self) -> list[int | None]:
        """Return the file descriptors, for `of_files` in a process that inherits them."""
        return [None if listener is None else listener.fileno() for listener in self]

    def close(self) -> None:
        for listener in self:
            if listener is not None:
                listener.close()


class ReplicaParts(NamedTuple):
    """What one of several replicas on a machine has from its parent."""

    listeners: Listeners
    member: HubMember
    counts: ConnectionCounts


def open_listeners(settings: Settings) -> Listeners:
    """Bind the ports of the settings.

    Raises:
        CannotListen: an address is in use or invalid.
    """
    main = _listen("GATEWAY_PORT", settings.host, settings.port)
    ollama = (
        None if settings.ollama_port is None else _listen("GATEWAY_OLLAMA_PORT", settings.host, settings.ollama_port)
    )
    metrics = (
        None if settings.metrics_port is None else _listen("GATEWAY_METRICS_PORT", settings.host, settings.metrics_port)
    )
    return Listeners(main, ollama, metrics)


def logs_as_json(settings: Settings) -> bool:
    """Return whether log lines are JSON: by the settings, or because standard error is not a terminal."""
    return settings.log_format == "json" or (settings.log_format == "auto" and not sys.stderr.isatty())


async def serve(
    settings: Settings,
    announce: Callable[[str], None] | None = None,
    reread: Callable[[], Settings] | None = None,
    *,
    replica: ReplicaParts | None = None,
) -> None:
    """Serve as `run` does, in the running event loop. `replica` is set for one of several on this machine."""
    as_json = logs_as_json(settings)
    accounts = open_accounts(settings)
    listener, ollama_listener, metrics_listener = open_listeners(settings) if replica is None else replica.listeners
    member = None if replica is None else replica.member
    sink = Sink(sys.stderr.buffer)
    if reread is not None:
        ignore_sighup()
    try:
        palette = palette_for(sys.stderr, os.environ)
        configure(as_json, sink, settings.log_level, palette)
        _raise_file_limit()
        return_freed_memory()
        address, port = listener.getsockname()[:2]
        async with AsyncExitStack() as stack:
            usage = await stack.enter_async_context(_recording_usage(settings))
            token = None if member is not None else stack.enter_context(admin_token(settings, port))
            # First, so that the log begins with a roll-out that differs from the settings.
            gateway = Gateway(
                settings,
                ExchangeLog(as_json, sink, settings.log_level, palette),
                token.value if token else member.hello.admin_token if member is not None else None,
                address,
                start_tracing(os.environ),
                ollama_port=None if ollama_listener is None else ollama_listener.getsockname()[1],
                accounts=accounts,
                usage=usage,
                member=member,
            )
            if member is None:
                log_settings(settings)
            else:
                member.start()
            if token is not None:
                report_token(token)
            async with (
                gateway,
                _metrics_port(gateway, metrics_listener, settings, is_replica=member is not None),
                _watching_keys(gateway.named_keys),
                _reloading(gateway, settings.file, reread, member),
            ):
                await _serve(settings, gateway, listener, ollama_listener, announce, replica)
        if member is None:
            _log.info("stopped")
    finally:
        sink.close()


@asynccontextmanager
async def _recording_usage(settings: Settings) -> AsyncGenerator[UsageRecorder | None, None]:
    """Record usage in the file that the settings name, if they name one, while the block runs."""
    if settings.usage_file is None:
        yield None
        return
    recorder = UsageRecorder(settings.usage_file, settings.usage_days)
    try:
        yield recorder
    finally:
        await recorder.close()


@contextmanager
def admin_token(settings: Settings, port: int) -> Generator[AdminToken | None, None, None]:
    """Keep an admin token in its file during the block, if the gateway needs one.

    It does if it has client keys and no admin key.
    """
    if settings.admin_key or settings.is_open:
        yield None
        return
    with new_token(token_path(settings.state_file, port)) as token:
        yield token


def log_settings(settings: Settings) -> None:
    """Log the sources of the settings, and warnings about them."""
    for line in settings.sources:
        _log.info("%s", line)
    for line in settings.warnings:
        _log.warning("%s", line)


def report_token(token: AdminToken) -> None:
    if token.value is not None:
        _log.info("GATEWAY_ADMIN_KEY: not set; the commands on this machine use the admin token in %s", token.path)
        return
    _log.error(
        "GATEWAY_ADMIN_KEY: not set, and the admin token cannot be written to %s (%s); /ops refuses every request, "
        "and so does /metrics without GATEWAY_METRICS_KEY; set GATEWAY_ADMIN_KEY",
        token.path,
        token.problem,
    )


async def _serve(
    settings: Settings,
    gateway: Gateway,
    listener: socket.socket,
    ollama_listener: socket.socket | None,
    announce: Callable[[str], None] | None,
    replica: ReplicaParts | None,
) -> None:
    def report_open() -> None:
        if replica is not None:
            replica.member.opened(str(gateway.rollout))
            return
        base_url = url_of(settings.host, listener)
        _log.info("serving %s; tiers %s; active backend %s", base_url, ", ".join(settings.tiers), gateway.rollout)
        if ollama_listener is not None:
            _log.info("serving %s as well, for programs that expect Ollama", url_of(settings.host, ollama_listener))
        if announce is not None:
            announce(base_url)

    kind: Callable[..., GracefulServer] = GracefulServer
    if replica is not None:
        kind = partial(FairServer, counts=replica.counts, number=replica.member.number)
    server = kind(
        _config(gateway, settings, gateway.body_memory, _connection_limit(settings)),
        drain_delay=settings.drain_delay,
        drain_timeout=settings.drain_timeout,
        on_open=report_open,
        on_drain=gateway.begin_drain,
        on_cutoff=gateway.cut_off,
    )
    if replica is not None:
        follow_orders(replica.member, server)
    with short_collections():
        await server.serve(sockets=[listener] if ollama_listener is None else [listener, ollama_listener])


def follow_orders(member: HubMember, server: GracefulServer) -> None:
    """End the server on the orders of the parent, or at once when the parent is gone.

    Without the parent nobody counts the requests of all replicas, and the port has to be free for a
    parent that is started in its place.
    """
    member.follow_orders({"drain": server.begin_stop, "cut off": server.stop, "orphaned": server.stop_at_once})


def _raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit, and warn if it is low.

    A client connection takes one file, and a second one while its request is served. The soft limit
    of a login shell is commonly 1024.
    """
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # macOS reports no hard limit, but has one
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= allowed < FEW_FILES:
        _log.warning(
            "the limit of open files is only %d, and a running request takes two; connections beyond the limit "
            "are closed without an answer; raise the limit (ulimit -Hn)",
            allowed,
        )


def return_freed_memory() -> None:
    """Make the memory of request bodies go back to the system when they are freed.

    glibc does so with large blocks, but raises the size of what it calls large, up to 32 MiB, when
    such a block is freed (mallopt(3), M_MMAP_THRESHOLD). Later bodies would be parts of its heap,
    which small blocks behind them keep from shrinking. Setting the size ends that.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(-3, LARGE_BLOCK)


class CannotListen(Exception):
    """An address that cannot be listened on; the text names the variable that sets it."""


def _listen(variable: str, host: str, port: int) -> socket.socket:
    try:
        return listen(host, port)
    except OSError as error:
        name = "GATEWAY_HOST" if isinstance(error, socket.gaierror) else variable
        raise CannotListen(f"{name}: cannot listen on {host}:{port}: {error.strerror or error}") from error


def url_of(host: str, listener: socket.socket) -> str:
    """Return the base URL of a listening socket on `host`."""
    return f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"


class _MetricsServer(GracefulServer):
    """Server that ends when `stop` is called; the main server handles the signals."""

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


@asynccontextmanager
async def _metrics_port(
    gateway: Gateway, listener: socket.socket | None, settings: Settings, *, is_replica: bool
) -> AsyncGenerator[None, None]:
    """Serve the port GATEWAY_METRICS_PORT, if it is set, until the main server has drained."""
    if listener is None:
        yield
        return
    if not is_replica:
        _log.info("metrics at http://%s:%d/metrics, without authentication", *listener.getsockname()[:2])
    server = _MetricsServer(_config(gateway.metrics_port_app, settings), drain_timeout=METRICS_DRAIN_SECONDS)
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve(sockets=[listener]))
        yield
        server.stop()


@asynccontextmanager
async def _reloading(
    gateway: Gateway, file: Path | None, reread: Callable[[], Settings] | None, member: HubMember | None
) -> AsyncGenerator[None, None]:
    """Reread the settings when `file` or a file of keys changes, and on SIGHUP, while the block runs.

    A replica rereads them on its parent's order as well.
    """
    if reread is None:
        yield
        return
    loop = asyncio.get_running_loop()
    signalled = asyncio.Event()
    loop.add_signal_handler(signal.SIGHUP, signalled.set)
    if member is not None:
        member.follow_orders({"reload": signalled.set})
    tasks = [asyncio.create_task(_reload_on_signal(gateway, signalled, lambda: read_whole(file, reread)))]
    watcher = FileWatcher(file, gateway.reload, reread, lambda: files_of_keys(gateway.settings))
    tasks.append(asyncio.create_task(watcher.run()))
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        loop.remove_signal_handler(signal.SIGHUP)
        ignore_sighup()


@asynccontextmanager
async def _watching_keys(named_keys: NamedKeys | None) -> AsyncGenerator[None, None]:
    """Reread the keys with names when their file changes, while the block runs.

    They are not a part of the settings: a mistake in these does not keep a key from being revoked.
    """
    if named_keys is None:
        yield
        return
    watcher = FileWatcher(None, named_keys, named_keys.read, lambda: [named_keys.file])
    task = asyncio.create_task(watcher.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def ignore_sighup() -> None:
    """Ignore SIGHUP before and after the time in which it rereads the settings.

    By default it would kill the process, and lose what is not written yet.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


async def _reload_on_signal(gateway: Gateway, signalled: asyncio.Event, reread: Callable[[], Settings]) -> None:
    while True:
        await signalled.wait()
        signalled.clear()
        await gateway.reload.run(reread, "signal")
        if gateway.named_keys is not None:
            await gateway.named_keys.run(gateway.named_keys.read, "signal")


def _connection_limit(settings: Settings) -> ConnectionLimit | None:
    most = settings.max_connections_per_address
    if most is None:
        return None
    return ConnectionLimit(most, [ip_network(text) for text in settings.unlimited_addresses])


def _config(
    app: object,
    settings: Settings,
    body_memory: BodyMemory | None = None,
    connection_limit: ConnectionLimit | None = None,
) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # our scope is a mapping, uvicorn's a TypedDict
        interface="asgi3",  # it would not see that from a function which returns a coroutine
        http=bind_limits(ServerLimits(keep_alive_seconds=settings.keep_alive_timeout), body_memory, connection_limit),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
