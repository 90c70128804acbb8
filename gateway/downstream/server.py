"""Listening socket, and a server with graceful shutdown."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from gateway.downstream.protocol import HttpProtocol

_HALF_OPEN_SECONDS = 60
_CUTOFF_SECONDS = 1.0
_CANCEL_SECONDS = 0.3
_TOTAL_SECONDS = 1.8  # on top of the drain delay and timeout; the documented bound is 2 s
_POLL_SECONDS = 0.02
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


def listen(host: str, port: int) -> socket.socket:
    """Return a bound TCP socket for `GracefulServer.serve(sockets=[...])`.

    With port 0 the system chooses the port. On Linux accepted sockets inherit the options, so a
    client whose cable was pulled is detected within a minute: by keep-alive probes while nothing is
    sent, by TCP_USER_TIMEOUT while something is.

    Raises:
        OSError: The name has no address, or the address is not available.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in (  # macOS does not have all of them
            ("TCP_KEEPIDLE", 30),
            ("TCP_KEEPINTVL", 10),
            ("TCP_KEEPCNT", 3),
            ("TCP_USER_TIMEOUT", _HALF_OPEN_SECONDS * 1000),
        ):
            if hasattr(socket, name):
                listener.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        listener.setblocking(False)
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _do_nothing() -> None:
    pass


class GracefulServer(uvicorn.Server):
    """uvicorn server with its own graceful shutdown, for `HttpProtocol` connections.

    `on_open` is called once connections are accepted. The first SIGTERM or SIGINT, or `stop()`,
    begins the drain:

    1. `on_drain()` is called at once.
    2. For `drain_delay` seconds requests are served as before, so that load balancers can notice,
       but each response closes its connection.
    3. New connections are refused, and requests in flight have `drain_timeout` seconds to finish.
    4. If any are left, `on_cutoff()` is called, and the last events that it causes have up to a
       second.
    5. The remaining requests are cut off.

    The second signal goes to step 5 at once. In all, the drain takes at most
    `drain_delay + drain_timeout + 2` seconds. The application's shutdown runs when all its tasks
    are done; it does not run if one outlives its cancellation.

    Unlike uvicorn, the server does not raise the signal again afterwards: `run` returns, and its
    caller sets the exit status. Later signals are ignored, since the remaining work is short and
    must be completed.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_delay: float = 0,
        drain_timeout: float = 30,
        on_open: Callable[[], None] = _do_nothing,
        on_drain: Callable[[], None] = _do_nothing,
        on_cutoff: Callable[[], None] = _do_nothing,
    ) -> None:
        super().__init__(config)
        self._drain_delay = drain_delay
        self._drain_timeout = drain_timeout
        self._on_open = on_open
        self._on_drain = on_drain
        self._on_cutoff = on_cutoff
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signalled = asyncio.Event()

    def stop(self) -> None:
        """Begin the drain, or cut it short if it has begun.

        Call it from the event loop's thread; `handle_exit` does the same for a signal.
        """
        self.force_exit = self.should_exit
        self.should_exit = True
        self._signalled.set()

    def begin_stop(self) -> None:
        """Begin the drain, if it has not begun."""
        if not self.should_exit:
            self.stop()

    def stop_at_once(self) -> None:
        """Drain without waiting: the requests in flight are cut off, with their last events."""
        self._drain_delay = self._drain_timeout = 0
        self.begin_stop()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
            yield
            return
        for number in _SIGNALS:
            signal.signal(number, self.handle_exit)
        try:
            yield
        finally:
            for number in _SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is None:
            self.should_exit = True  # the server is still starting: it exits afterwards
        else:
            self._loop.call_soon_threadsafe(self.stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_open()

    async def main_loop(self) -> None:
        self._loop = asyncio.get_running_loop()
        while not await self.on_tick(0):
            try:
                async with asyncio.timeout(1):
                    await self._signalled.wait()
            except TimeoutError:
                pass

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        started_at = loop.time()
        self._loop = loop  # `main_loop` has not run if a signal came during the start
        self._run_hook(self._on_drain)
        await self._wait_until(started_at + self._drain_delay, self._retire_connections)
        self.stop_listening(sockets or [])
        await self._wait_until(started_at + self._drain_delay + self._drain_timeout, self._is_idle)
        if not self._is_idle() and not self.force_exit:
            self._run_hook(self._on_cutoff)
            await self._wait_until(loop.time() + _CUTOFF_SECONDS, self._is_idle)
        await self._cut_off()
        if self.server_state.tasks:
            _log.error("%d requests did not end after they were cancelled", len(self.server_state.tasks))
            return
        end = started_at + self._drain_delay + self._drain_timeout + _TOTAL_SECONDS
        try:
            async with asyncio.timeout_at(end):
                await self.lifespan.shutdown()
        except TimeoutError:
            _log.error("the application's shutdown timed out")

    def stop_listening(self, sockets: list[socket.socket]) -> None:
        """Refuse new connections."""
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()

    def _run_hook(self, hook: Callable[[], None]) -> None:
        try:
            hook()
        except Exception:
            _log.exception("a shutdown hook raised an exception; the shutdown continues")

    def _retire_connections(self) -> bool:
        """Tell every connection to close after its next response; return False.

        Called repeatedly during the drain delay, since clients still connect.
        """
        for connection in self.server_state.connections:
            if isinstance(connection, HttpProtocol):
                connection.retire()
        return False

    def _is_idle(self) -> bool:
        """Shut down every connection; return whether no connection and no task is left.

        Called repeatedly, since connections that were accepted late must be shut down too.
        """
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        return not (self.server_state.connections or self.server_state.tasks)

    async def _wait_until(self, deadline: float, done: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        # Polls, since uvicorn's sets do not signal changes.
        while not (done() or self.force_exit or loop.time() >= deadline):  # noqa: ASYNC110
            await asyncio.sleep(min(_POLL_SECONDS, max(0, deadline - loop.time())))

    async def _cut_off(self) -> None:
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, HttpProtocol):
                connection.abort()
        tasks = set(self.server_state.tasks)
        if tasks:
            # An application first learns that its connection is lost; one that does not react is
            # cancelled.
            await asyncio.wait(tasks, timeout=0.1)
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
            self.server_state.tasks.intersection_update(running)
