"""The listening socket, and a server that stops without losing a request."""

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
_TOTAL_SECONDS = 1.8  # what may pass besides the delay and the timeout; 2 s are promised
_POLL_SECONDS = 0.02
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger("gateway.front")


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket for `Server.serve(sockets=[...])`; port 0 lets the system choose.

    Its options pass to the accepted sockets on Linux, so a client whose cable was pulled is found out within a minute: by keep-alive
    probes while nothing is sent, by TCP_USER_TIMEOUT while something is.

    Raises:
        OSError: the name has no address, or the address cannot be taken.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in (  # macOS lacks some
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


def _nothing() -> None:
    pass


class GracefulServer(uvicorn.Server):
    """uvicorn's server with a drain of its own (reliability M19), for `Door` connections. `on_open` is called once they are accepted.

    On the first SIGTERM or SIGINT, or `stop()`: `on_drain()` at once; `drain_delay` seconds of service as before, so that balancers can
    see it, but each answer ends its connection; then no new connections, and `drain_timeout` seconds for the requests that run; then
    `on_cutoff()`, whose last events get up to a second; then what is left is cut off. The second signal cuts off at once. In all at most
    `drain_delay + drain_timeout + 2` s. The application's shutdown runs when all its tasks are done; if one outlives its cancellation, it
    does not run.
    The process is not killed by the signal again afterwards, as uvicorn does: `run` returns, and its caller sets the exit status. Signals that
    come later still are ignored: what is left to do is short, and to be done.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        drain_delay: float = 0,
        drain_timeout: float = 30,
        on_open: Callable[[], None] = _nothing,
        on_drain: Callable[[], None] = _nothing,
        on_cutoff: Callable[[], None] = _nothing,
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
        """Begin the drain, or end it if it has begun. From the loop's thread; `handle_exit` does the same for a signal."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._signalled.set()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():  # others cannot
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
            self.should_exit = True  # still starting: leave when that is done
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
        begun = loop.time()
        self._loop = loop  # a signal during the start leaves `main_loop` out
        self._call(self._on_drain)
        await self._until(begun + self._drain_delay, self._is_retiring)
        for server in self.servers:
            server.close()
        for listener in sockets or ():
            listener.close()
        await self._until(begun + self._drain_delay + self._drain_timeout, self._is_idle)
        if not self._is_idle() and not self.force_exit:
            self._call(self._on_cutoff)
            await self._until(loop.time() + _CUTOFF_SECONDS, self._is_idle)
        await self._cut_off()
        if self.server_state.tasks:
            _log.error("%d requests outlived their cancellation", len(self.server_state.tasks))
            return
        end = begun + self._drain_delay + self._drain_timeout + _TOTAL_SECONDS
        try:
            async with asyncio.timeout_at(end):
                await self.lifespan.shutdown()
        except TimeoutError:
            _log.error("the application's shutdown did not end in time")

    def _call(self, hook: Callable[[], None]) -> None:
        try:
            hook()
        except Exception:
            _log.exception("a hook of the drain failed; the drain goes on")

    def _is_retiring(self) -> bool:
        """During the delay, over and over since clients still come: no connection is kept for another request."""
        for connection in self.server_state.connections:
            if isinstance(connection, HttpProtocol):
                connection.retire()
        return False

    def _is_idle(self) -> bool:
        """Asked again and again, since a connection that was accepted late must be told too."""
        for connection in tuple(self.server_state.connections):
            connection.shutdown()
        return not (self.server_state.connections or self.server_state.tasks)

    async def _until(self, deadline: float, done: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while not (done() or self.force_exit or loop.time() >= deadline):  # noqa: ASYNC110 - uvicorn's sets tell of no change
            await asyncio.sleep(min(_POLL_SECONDS, max(0, deadline - loop.time())))

    async def _cut_off(self) -> None:
        for connection in tuple(self.server_state.connections):
            if isinstance(connection, HttpProtocol):
                connection.abort()
        tasks = set(self.server_state.tasks)
        if tasks:
            # The connections' loss is told to the applications first; cancelling is for those that do not listen.
            await asyncio.wait(tasks, timeout=0.1)
            for task in tasks:
                task.cancel()
            _, running = await asyncio.wait(tasks, timeout=_CANCEL_SECONDS)
            self.server_state.tasks.intersection_update(running)
