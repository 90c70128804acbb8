"""A real redis-server, and a way to it that can be cut."""

import asyncio
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path

from redis import Redis
from redis.exceptions import RedisError

from tests.programs import program

STARTUP_PATIENCE = 20.0
"""Seconds to wait for the server's first answer."""


class RedisServer:
    """A redis-server of its own, without persistence. It listens on a Unix socket, so it needs no free port."""

    def __init__(self, folder: Path, password: str | None = None) -> None:
        self.socket = folder / "redis.sock"
        self._folder = folder
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self.client = Redis(unix_socket_path=str(self.socket), password=password)

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start the server, empty, and wait until it answers."""
        options = ["--port", "0", "--unixsocket", str(self.socket), "--dir", str(self._folder), "--save", ""]
        if self._password is not None:
            options += ["--requirepass", self._password]
        self._process = subprocess.Popen(
            [program("redis-server"), *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + STARTUP_PATIENCE
        while True:
            with suppress(RedisError):
                if self.client.ping():
                    return
            assert self._process.poll() is None, "redis-server has ended"
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.005)

    def kill(self) -> None:
        """End the server with SIGKILL: all data is lost."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        """Make the server hang: it accepts connections and does not answer."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


@contextmanager
def redis_server(password: str | None = None) -> Iterator[RedisServer]:
    """Run a redis-server while the block runs."""
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:  # tmp_path is too long for a Unix socket
        server = RedisServer(Path(folder), password)
        try:
            server.start()
            yield server
        finally:
            server.client.close()
            server.kill()


class Way:
    """A TCP port that leads to a redis-server until it is cut."""

    def __init__(self, target: Path) -> None:
        self._target = target
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self.is_cut = False
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def cut(self) -> None:
        """Deliver nothing any more, and report no error: what a broken network looks like."""
        self.is_cut = True

    def heal(self) -> None:
        """Deliver again on new connections; those that were open are gone."""
        self.is_cut = False
        for writer in self._writers:
            writer.close()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with suppress(OSError):
            up_reader, up_writer = await asyncio.open_unix_connection(str(self._target))
            self._writers.add(up_writer)
            for source, sink in ((reader, up_writer), (up_reader, writer)):
                task = asyncio.create_task(self._carry(source, sink))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if not self.is_cut:
                    sink.write(data)
                    await sink.drain()
        if not self.is_cut:
            sink.close()

    async def close(self) -> None:
        for writer in self._writers:
            writer.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for writer in self._writers:
            with suppress(OSError):
                await writer.wait_closed()


@asynccontextmanager
async def way_to(server: RedisServer) -> AsyncIterator[Way]:
    """Open a way to `server` that can be cut."""
    way = Way(server.socket)
    listener = await asyncio.start_server(way.serve, "127.0.0.1", 0)
    way.port = listener.sockets[0].getsockname()[1]
    try:
        yield way
    finally:
        listener.close()
        await way.close()
