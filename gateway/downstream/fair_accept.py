"""Server that accepts from sockets which other processes accept from as well, each its fair part.

The system wakes every process that listens, and the first one takes the connection. That is the one
that is idle, but it is also the one that is awake already: of a burst of connections one process would
take most. With SO_REUSEPORT chance decides, which is just as uneven for a few connections, and a
connection that waits for a process that dies or hangs is lost or hangs. Clients of a gateway keep their
connections, so an uneven start stays uneven.

So each process notes in shared memory how many connections it has, and steps back for a moment from a
connection while another one has fewer. If nobody takes it, it does after all: the other one is busy.
"""

import asyncio
import mmap
import socket
import struct
from collections.abc import Callable
from contextlib import suppress

import uvicorn

from gateway.downstream.server import GracefulServer

STEP_BACK_SECONDS = 0.001
MOST_STEPS_BACK = 5
"""Number of times that a process steps back from one connection."""
SLACK_SHARE = 16
"""A process steps back if it has more connections than another by over this part (1 / n) of its own."""
NOTE_SECONDS = 0.05
"""Interval at which a process notes that connections have ended."""

_COUNT = struct.Struct("=q")

MAX_PROCESSES = 64
MEMORY_BYTES = MAX_PROCESSES * _COUNT.size


class ConnectionCounts:
    """Connections of each process, by its number from 1 on, in the memory of `file`. Each notes its own.

    The file has `MEMORY_BYTES` bytes; it begins with zeros, which stand for processes that do not serve.
    """

    def __init__(self, file: int) -> None:
        self._memory = mmap.mmap(file, MEMORY_BYTES)

    def note(self, number: int, connections: int | None) -> None:
        """Note the connections of a process, None if it does not accept any."""
        _COUNT.pack_into(self._memory, (number - 1) * _COUNT.size, 0 if connections is None else connections + 1)

    def fewest(self, number: int) -> int | None:
        """Return the fewest connections of a process other than `number`, None if there is no other."""
        found = [
            count - 1 for place, (count,) in enumerate(_COUNT.iter_unpack(self._memory), 1) if count and place != number
        ]
        return min(found, default=None)

    def close(self) -> None:
        self._memory.close()


class FairServer(GracefulServer):
    """Graceful server of process `number` among those that note their connections in `counts`."""

    def __init__(
        self,
        config: uvicorn.Config,
        counts: ConnectionCounts,
        number: int,
        *,
        drain_delay: float,
        drain_timeout: float,
        on_open: Callable[[], None],
        on_drain: Callable[[], None],
        on_cutoff: Callable[[], None],
    ) -> None:
        super().__init__(
            config,
            drain_delay=drain_delay,
            drain_timeout=drain_timeout,
            on_open=on_open,
            on_drain=on_drain,
            on_cutoff=on_cutoff,
        )
        self._counts = counts
        self._number = number
        self._steps_back = 0
        self._stepped_back_at = 0.0
        self._listening: set[socket.socket] = set()
        self._accepting: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        # uvicorn gets no sockets, so that it accepts nothing by itself.
        self._listening = set(sockets or ())
        loop = self._loop = asyncio.get_running_loop()
        for listener in self._listening:
            listener.listen(self.config.backlog)
            loop.add_reader(listener, self._readable, listener)
        self._note_regularly()
        await super().startup([])

    def stop_listening(self, sockets: list[socket.socket]) -> None:
        """Accept what waits already, and nothing more."""
        if self._timer is not None:
            self._timer.cancel()
        self._counts.note(self._number, None)
        assert self._loop is not None
        for listener in self._listening:
            self._loop.remove_reader(listener)
            with suppress(OSError):
                while True:
                    self._accept(listener)
        self._listening.clear()
        super().stop_listening(sockets)

    def _is_idle(self) -> bool:
        return super()._is_idle() and not self._accepting

    @property
    def _connections(self) -> int:
        return len(self.server_state.connections) + len(self._accepting)

    def _note_regularly(self) -> None:
        assert self._loop is not None
        self._counts.note(self._number, self._connections)
        self._timer = self._loop.call_later(NOTE_SECONDS, self._note_regularly)

    def _readable(self, listener: socket.socket) -> None:
        assert self._loop is not None
        if self._has_more_than_others():
            now = self._loop.time()
            if now - self._stepped_back_at > 2 * MOST_STEPS_BACK * STEP_BACK_SECONDS:
                self._steps_back = 0
            if self._steps_back < MOST_STEPS_BACK:
                self._steps_back += 1
                self._stepped_back_at = now
                self._loop.remove_reader(listener)
                self._loop.call_later(STEP_BACK_SECONDS, self._return, listener)
                return
        self._steps_back = 0
        with suppress(OSError):  # another process was faster, or the client has left
            self._accept(listener)

    def _has_more_than_others(self) -> bool:
        own, fewest = self._connections, self._counts.fewest(self._number)
        return fewest is not None and own > fewest + own // SLACK_SHARE

    def _return(self, listener: socket.socket) -> None:
        if listener in self._listening and self._loop is not None:
            self._loop.add_reader(listener, self._readable, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept one connection.

        Raises:
            OSError: There is none, or no file for it.
        """
        assert self._loop is not None
        accepted, _ = listener.accept()
        accepted.setblocking(False)
        task: asyncio.Task[object] = self._loop.create_task(
            self._loop.connect_accepted_socket(self._protocol, accepted)
        )
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)
        self._counts.note(self._number, self._connections)

    def _protocol(self) -> asyncio.Protocol:
        """Return the protocol of a new connection, as uvicorn's `startup` builds it."""
        protocol: asyncio.Protocol = self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config, server_state=self.server_state, app_state=self.lifespan.state, _loop=self._loop
        )
        return protocol
