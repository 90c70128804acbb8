"""Parent of several gateway processes on one port: starts them, restarts them and ends them.

Theory of operation. The parent binds the ports and holds what the replicas share (`replicas/hub.py`),
but serves no request. Each replica is a process of its own, started anew rather than forked, with
the listening sockets and one end of a socket pair to the hub. All accept from the same sockets, so
a connection goes to a replica that is free to accept it, and none is lost with a replica that died
before it accepted.

The end of the socket pair tells each side that the other is gone: the parent restarts a replica, and
a replica whose parent was killed ends its requests and itself at once. Orders go over the socket
pair as well. A service manager may signal all processes of a group, and each replica then counts
that signal alone.

The first replica has to open before the others are started, so what keeps all of them from starting
is reported once.
"""

import asyncio
import json
import logging
import os
import pickle
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import uvloop
from msgspec import Struct

from gateway.api.named_keys import open_accounts
from gateway.config import ConfigError, Settings
from gateway.downstream.fair_accept import MEMORY_BYTES, ConnectionCounts
from gateway.replicas.hub import GRACE_SECONDS, KEYS, Hub, Member
from gateway.replicas.messages import Channel, Hello
from gateway.serve import (
    Listeners,
    admin_token,
    ignore_sighup,
    log_settings,
    logs_as_json,
    open_listeners,
    report_token,
    url_of,
)
from gateway.state_file import StateFile
from gateway.telemetry.log import Sink, configure, palette_for

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before a replica that died is started again; the time doubles with each death soon after the start."""
LONG_ENOUGH = 60.0
"""Seconds after which a death no longer counts as one soon after the start."""
FAILED_STARTS = 5
"""Number of starts in a row that may fail while no replica serves."""
EXTRA_SECONDS = 5.0
"""Time in which a replica has to end after the longest drain, before it is killed."""
POLL_SECONDS = 0.02

_CHILD = (
    "import json, sys; given = json.loads(sys.argv[1]); sys.path[:] = given.pop('path'); "
    "from gateway.replica_process import main; main(**given)"
)

_log = logging.getLogger(__name__)


class CannotStart(Exception):
    """No replica could start; the text says what to look at."""


def run(settings: Settings, replicas: int) -> int:
    """Serve with several replicas until SIGTERM or SIGINT; return the exit status.

    Raises:
        ConfigError: The file of keys cannot be used, or replicas cannot share a GPU.
        CannotListen: An address is in use or invalid.
        CannotStart: No replica could start.
    """
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings, replicas))


async def _run(settings: Settings, replicas: int) -> int:
    as_json = logs_as_json(settings)
    if settings.exclusive:
        raise ConfigError(["exclusive: true, but --replicas shares the roll-out; expected a single gateway"])
    open_accounts(settings)  # only to report a mistake once
    listeners = open_listeners(settings)
    sink = Sink(sys.stderr.buffer)
    try:
        configure(as_json, sink, settings.log_level, palette_for(sys.stderr, os.environ))
        with ExitStack() as stack:
            stack.callback(listeners.close)
            token = stack.enter_context(admin_token(settings, listeners.main.getsockname()[1]))
            log_settings(settings)
            for line in warnings(settings):
                _log.warning("%s", line)
            if token is not None:
                report_token(token)
            supervisor = Supervisor(settings, replicas, listeners, token.value if token else None)
            stack.enter_context(_signals(supervisor))
            try:
                status = await supervisor.run()
            finally:
                await supervisor.close()
        _log.info("stopped")
        return status
    finally:
        sink.close()


def warnings(settings: Settings) -> list[str]:
    """Return what the settings leave open that several replicas cannot find out."""
    if settings.ollama_num_parallel is not None or settings.redis_url is not None:
        return []
    return [
        f"backend {name}: several replicas do not learn how much an Ollama runs in parallel, and a model of which "
        "nothing was learned before has one slot; set OLLAMA_NUM_PARALLEL, or model_concurrency of the backend"
        for name, backend in settings.backends.items()
        if backend.kind == "ollama" and backend.limits.model_concurrency == "auto"
    ]


@contextmanager
def _signals(supervisor: "Supervisor") -> Generator[None, None, None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, supervisor.stop)
    loop.add_signal_handler(signal.SIGHUP, supervisor.reload)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        ignore_sighup()


class Replica:
    """One replica process, with its channel. It implements `hub.Member`."""

    def __init__(self, number: int, process: "subprocess.Popen[bytes]", on_message: Callable[[Member, bytes], None]):
        self.number = number
        self.name = f"{number}-{secrets.token_hex(8)}"
        self.process = process
        self.is_open = False
        self.started = time.monotonic()
        self.opened = asyncio.Event()
        """Set when the replica accepts connections, or has ended."""
        self.ended = asyncio.Event()
        self.channel = Channel(lambda content: on_message(self, content), self._lost)

    def __repr__(self) -> str:
        return f"<Replica {self.number}, process {self.process.pid}, open {self.is_open}>"

    def _lost(self) -> None:
        self.opened.set()
        self.ended.set()

    def send(self, message: Struct) -> None:
        self.channel.send(message)


class Supervisor:
    """Keeps `count` replicas running until `stop`."""

    def __init__(self, settings: Settings, count: int, listeners: Listeners, token: str | None) -> None:
        self._settings = settings
        self._count = count
        self._listeners = listeners
        self._token = token
        self._state = StateFile(settings.state_file)
        self._hub = Hub(count, self._state, self._opened)
        self._current: dict[int, Replica] = {}
        self._stopping = asyncio.Event()
        self._status = 0
        self._failed_starts = 0
        self._is_announced = False
        self._has_restored_keys = False
        self._count_file = tempfile.TemporaryFile()  # noqa: SIM115 - `close` closes it
        self._count_file.truncate(MEMORY_BYTES)
        self._counts = ConnectionCounts(self._count_file.fileno())

    # Orders of the operator

    def stop(self) -> None:
        """Begin the drain of all replicas; the second call cuts it short."""
        if self._stopping.is_set():
            self._hub.order("cut off")
            return
        self._stopping.set()
        self._hub.order("drain")
        # The replicas have the sockets too: new connections are refused once all have closed theirs.
        self._listeners.close()

    def reload(self) -> None:
        """Have all replicas reread the settings."""
        self._hub.order("reload")

    # The replicas

    async def run(self) -> int:
        """Run the replicas until `stop`; return the exit status: 0 if all of them ended well.

        Raises:
            CannotStart: No replica could start.
        """
        await self._start_all()
        async with asyncio.TaskGroup() as group:
            for number in range(1, self._count + 1):
                group.create_task(self._keep_running(number))
        return self._status

    async def close(self) -> None:
        """Write what is left. Call it when no replica runs."""
        await self._hub.close()
        self._counts.close()
        self._count_file.close()

    async def _start_all(self) -> None:
        """Start all replicas, and greet the others once the first one has opened.

        After `stop`, no further one is started or greeted.

        Raises:
            CannotStart: The first one ended before.
        """
        numbers = range(1, self._count + 1)
        started = [await self._start(number) for number in numbers if not self._stopping.is_set()]
        if self._stopping.is_set():
            await self._dismiss(started)
            return
        first, *others = started
        self._greet(first)
        await first.opened.wait()
        if self._stopping.is_set():
            await self._dismiss(others)
            return
        if first.is_open:
            for replica in others:
                self._greet(replica)
            return
        status = await self._end_of(first)
        self._hub.leave(first)
        await self._dismiss(others)
        raise CannotStart(f"the first replica ended with {_described(status)} before it accepted connections")

    async def _dismiss(self, replicas: Sequence[Replica]) -> None:
        """End replicas that were not greeted. They serve nothing yet."""
        for replica in replicas:
            replica.channel.close()
        for replica in replicas:
            await replica.ended.wait()
            await self._end_of(replica)
            del self._current[replica.number]

    async def _keep_running(self, number: int) -> None:
        pause = FIRST_PAUSE
        while True:
            replica = self._current.get(number)
            if replica is None:
                if self._stopping.is_set():
                    return
                replica = await self._start(number)
                if self._stopping.is_set():  # the order to drain has passed
                    await self._dismiss([replica])
                    return
                self._greet(replica)
            await self._until_ended(replica)
            status = await self._end_of(replica)
            self._hub.leave(replica)
            self._counts.note(number, None)
            del self._current[number]
            if self._stopping.is_set():
                if status != 0:
                    self._status = 1
                    _log.error("replica %d ended with %s", number, _described(status))
                return
            lived = time.monotonic() - replica.started
            pause = FIRST_PAUSE if lived >= LONG_ENOUGH else min(2 * pause, LONGEST_PAUSE)
            self._report_death(replica, status, pause)
            await asyncio.sleep(GRACE_SECONDS)
            self._hub.free_slots(number)
            with suppress(TimeoutError):
                async with asyncio.timeout(max(0, pause - GRACE_SECONDS)):
                    await self._stopping.wait()

    def _report_death(self, replica: Replica, status: int, pause: float) -> None:
        what = _described(status)
        if replica.is_open:
            self._failed_starts = 0
            _log.error("replica %d ended with %s; it is started again in %g s", replica.number, what, pause)
            return
        self._failed_starts += 1
        _log.error(
            "replica %d ended with %s before it accepted connections; the next try is in %g s",
            replica.number,
            what,
            pause,
        )
        if self._failed_starts >= FAILED_STARTS and not any(other.is_open for other in self._current.values()):
            _log.error("no replica serves, and %d starts in a row have failed; giving up", self._failed_starts)
            self._status = 1
            self.stop()

    async def _until_ended(self, replica: Replica) -> None:
        """Wait for the end of a replica; once it has to drain, no longer than that may take."""
        stopping = asyncio.ensure_future(self._stopping.wait())
        ended = asyncio.ensure_future(replica.ended.wait())
        try:
            await asyncio.wait({stopping, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                longest = self._settings.drain_delay + self._settings.drain_timeout + EXTRA_SECONDS
                await asyncio.wait({ended}, timeout=longest)
        finally:
            stopping.cancel()
            ended.cancel()

    async def _end_of(self, replica: Replica) -> int:
        """Return the exit status of a replica that has closed its channel, or is killed now."""
        deadline = time.monotonic() + EXTRA_SECONDS if replica.ended.is_set() else 0.0
        # A process has no event that works the same on all systems.
        while (status := replica.process.poll()) is None:
            if time.monotonic() >= deadline:
                replica.process.kill()
            await asyncio.sleep(POLL_SECONDS)
        replica.channel.close()
        return status

    async def _start(self, number: int) -> Replica:
        process, ours = _spawn(self._listeners, self._count_file.fileno())
        replica = Replica(number, process, self._hub.receive)
        await asyncio.get_running_loop().create_unix_connection(lambda: replica.channel, sock=ours)
        self._current[number] = replica
        return replica

    def _greet(self, replica: Replica) -> None:
        """Have a replica build its gateway and serve."""
        sections = self._state.sections()
        if self._has_restored_keys:
            sections.pop(KEYS, None)  # one replica goes on counting what was used before
        self._has_restored_keys = True
        settings = pickle.dumps(self._settings)
        self._hub.join(replica, Hello(replica.number, replica.name, self._count, settings, self._token, sections))

    def _opened(self, member: Member, active: str) -> None:
        replica = self._current[member.number]
        replica.opened.set()
        self._failed_starts = 0
        _log.info("replica %d serves, process %d", replica.number, replica.process.pid)
        if self._is_announced or not all(
            number in self._current and self._current[number].is_open for number in range(1, self._count + 1)
        ):
            return
        self._is_announced = True
        settings, listeners = self._settings, self._listeners
        _log.info(
            "serving %s with %d replicas; tiers %s; active backend %s",
            url_of(settings.host, listeners.main),
            self._count,
            ", ".join(settings.tiers),
            active,
        )
        if listeners.ollama is not None:
            _log.info("serving %s as well, for programs that expect Ollama", url_of(settings.host, listeners.ollama))
        if listeners.metrics is not None:
            _log.info("metrics at http://%s:%d/metrics, without authentication", *listeners.metrics.getsockname()[:2])


def _spawn(listeners: Listeners, counts: int) -> "tuple[subprocess.Popen[bytes], socket.socket]":
    """Start a process that runs `replica_process.main`; return it and the parent's end of its socket pair."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    given: dict[str, Any] = {"path": sys.path, "hub": theirs.fileno(), "counts": counts, "listeners": listeners.files()}
    command = [sys.executable, *_interpreter_options(), "-c", _CHILD, json.dumps(given)]
    files = [theirs.fileno(), counts, *(file for file in listeners.files() if file is not None)]
    with theirs:
        # A group of its own, so that Ctrl-C in a terminal reaches the parent alone.
        process = subprocess.Popen(  # noqa: S603 - this interpreter, and nothing from outside
            command, pass_fds=files, process_group=0, stdin=subprocess.DEVNULL
        )
    return process, ours


def _described(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"


def _interpreter_options() -> list[str]:
    """Return this interpreter's own options, such as `-X` and `-W`, as `multiprocessing` passes them on."""
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    return options
