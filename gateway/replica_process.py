"""Process of one replica among several: connects to its parent's hub, then serves as `serve` does."""

import asyncio
import pickle
import signal
import socket
import sys
from types import FrameType
from typing import NoReturn


def main(hub: int, counts: int, listeners: list[int | None]) -> None:
    """Serve until the parent or a signal says otherwise.

    `hub` is the file of the socket to the parent's hub, `counts` that of the memory in which replicas
    note their connections, and `listeners` those of the listening sockets: of the API, of the second
    port for Ollama's programs, of the metrics.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until the settings can be reread
    signal.signal(signal.SIGTERM, _exit)  # until the server handles it
    import uvloop

    from gateway.config import ConfigError

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(hub, counts, listeners))
    except ConfigError as error:
        _stop_with(error.lines)
    except ConnectionError:  # the parent has reported why it ended
        raise SystemExit(1) from None


async def _serve(hub: int, counts: int, listeners: list[int | None]) -> None:
    from gateway import config
    from gateway.downstream.fair_accept import ConnectionCounts
    from gateway.replicas.member import HubMember
    from gateway.serve import Listeners, ReplicaParts, serve

    member = HubMember()
    sock = socket.socket(fileno=hub)
    sock.set_inheritable(False)
    sock.setblocking(False)
    await asyncio.get_running_loop().create_unix_connection(lambda: member.channel, sock=sock)
    hello = await member.greeting()
    settings: config.Settings = pickle.loads(hello.settings)  # noqa: S301 - from the parent alone
    replica = ReplicaParts(Listeners.of_files(listeners), member, ConnectionCounts(counts))
    await serve(settings, reread=lambda: config.load(settings.file), replica=replica)


def _stop_with(lines: tuple[str, ...] | list[str]) -> NoReturn:
    for line in lines:
        print(line, file=sys.stderr)
    raise SystemExit(1)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(0)
