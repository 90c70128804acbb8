"""A gateway that runs in memory: no byte passes through a socket, and time is virtual.

`instructions.py` counts what it executes. The program is `python -m gateway serve` itself. Only the
event loop that it asks uvloop for is replaced, so this module uses no name from inside the gateway
and runs any revision. One client sends requests over one keep-alive connection, one after the
other, checks every answer and then stops the gateway with SIGTERM.

Run it with `python -P -m benchmarks.in_memory TREE REQUESTS STREAMS TOKENS` in the environment that
`environment()` returns. TREE is the directory to take the gateway from, or `-` for a pipe in its
place. It prints one JSON line with the answers and the tokens that the client received.
"""

import asyncio
import json
import random
import re
import runpy
import selectors
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple, Protocol, cast

import uvloop

from benchmarks import requests, upstream
from benchmarks.subjects import gateway_environment

PIPE = "-"
"""In place of a directory: no gateway."""
HOP_SECONDS = 0.0001
"""Virtual time that bytes need to the other end of a connection. A plain request takes four hops and a
token one, which is about the time that a busy gateway spends on each, so its periodic work gets its
usual share."""
PLAIN_TOKENS = 16
"""Tokens of a plain answer, as in `cost.py`."""

_START_SECONDS = 1000.0
_PROBED_SECONDS = 5.0
"""Virtual time from the start to the first request. By then the gateway has finished everything that it
does once, such as its first probes."""
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LAST_CHUNK = b"0\r\n\r\n"


class Work(NamedTuple):
    """The client's requests: plain ones, then streams of `tokens` tokens each."""

    plain: int
    streams: int
    tokens: int

    def requests(self) -> Iterator["Request"]:
        """Yield the requests in their order."""
        request = Request(requests.chat("standard", max_tokens=PLAIN_TOKENS), PLAIN_TOKENS, False)
        for _ in range(self.plain):
            yield request
        request = Request(requests.chat("standard", max_tokens=self.tokens, stream=True), self.tokens, True)
        for _ in range(self.streams):
            yield request


class Request(NamedTuple):
    """The bytes of one request, and the answer to expect."""

    data: bytes
    tokens: int
    is_stream: bool


def environment() -> dict[str, str]:
    """Return the whole environment of the process.

    It contains nothing of the caller's, so that it is the same in every run.
    """
    gateway = gateway_environment(0, 1)
    names = [name for name in gateway if name.startswith(("GATEWAY", "LLM_", "VLLM_"))]
    # No probe falls into the time in which requests are counted.
    rarely = {f"GATEWAY__BACKENDS__{name}__PROBE_INTERVAL": "3600" for name in ("OLLAMA", "VLLM")}
    fixed = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    return {name: gateway[name] for name in [*names, "PYTHONPATH"]} | rarely | fixed


class Receiver(Protocol):
    """An object that bytes can be sent to."""

    receive: Callable[[bytes], object]


class Network(selectors.DefaultSelector):
    """The bytes in flight and the clock, in place of the operating system's.

    In each turn of the event loop it delivers what was sent before. When nothing is in flight and
    nothing is ready to run, it moves the clock to the next timer instead of waiting.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sent: deque[tuple[Receiver, bytes]] = deque()
        self._now = [_START_SECONDS]
        self.send = self._sent.append
        self.read_clock: Callable[[], float] = partial(self._now.__getitem__, 0)
        """A function in C, like the one that it replaces."""
        self.silent_socket = socket.create_server(("127.0.0.1", 0))
        """The `socket` of every transport, for code that polls it or sets its options. It never becomes
        readable."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Deliver what was sent. Look for signals and other threads only if there is nothing else."""
        if self._sent:
            self._now[0] += HOP_SECONDS
            for _ in range(len(self._sent)):
                receiver, data = self._sent.popleft()
                receiver.receive(data)
            return []
        if timeout is not None and timeout <= 0:
            return []
        events = super().select(None if timeout is None else 0)
        if not events and timeout is not None:
            self._now[0] += timeout
        return events


class Transport(asyncio.Transport):
    """One end of a connection in memory. `peer` is the other end."""

    peer: "Transport"

    def __init__(self, network: Network, protocol: asyncio.BaseProtocol) -> None:
        super().__init__({"socket": network.silent_socket})
        self._send = network.send
        self._protocol = protocol
        if isinstance(protocol, asyncio.BufferedProtocol):
            self._deliver = _into_buffer(protocol)
        else:
            self._deliver = cast("asyncio.Protocol", protocol).data_received
        self._held: list[bytes] | None = None
        self.receive: Callable[[bytes], object] = self._deliver
        self.closed = False

    def write(self, data: "bytes | bytearray | memoryview[int]") -> None:
        self._send((self.peer, bytes(data)))

    def pause_reading(self) -> None:
        if self._held is None:
            self._held = []
            self.receive = self._held.append

    def resume_reading(self) -> None:
        held, self._held, self.receive = self._held, None, self._deliver
        for data in held or ():
            self._send((self, data))

    def close(self) -> None:
        for end in (self, self.peer):
            if not end.closed:
                end.closed = True
                asyncio.get_running_loop().call_soon(end.lose)

    abort = close

    def lose(self) -> None:
        """Tell the protocol that the connection is closed."""
        self.receive = _drop
        self._protocol.connection_lost(None)

    def is_closing(self) -> bool:
        return self.closed

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def can_write_eof(self) -> bool:
        return False


def _into_buffer(protocol: asyncio.BufferedProtocol) -> Callable[[bytes], object]:
    get_buffer = cast("Callable[[int], memoryview]", protocol.get_buffer)
    buffer_updated = protocol.buffer_updated

    def receive(data: bytes) -> None:
        size = len(data)
        get_buffer(size)[:size] = data
        buffer_updated(size)

    return receive


def _drop(_: bytes) -> None:
    pass


class Upstream(upstream.UpstreamProtocol):
    """The upstream of `cost.py` with cheaper streams.

    It builds 16 tokens for a stream and repeats them, one in each turn of the event loop.
    """

    def __init__(self, network: Network, shared: upstream.Upstream) -> None:
        super().__init__(shared)
        self._network = network
        self.receive: Callable[[bytes], object] = _drop

    def _stream(self, what: upstream.Asked) -> None:
        send, write = self._network.send, self._transport.write
        shapes, answer_id = self._upstream.shapes, self._upstream.new_id()
        tokens = [shapes.token(answer_id, number) for number in range(len(upstream.WORDS))]
        chunks = islice(cycle(tokens), what.tokens)

        def step(_: bytes) -> None:
            chunk = next(chunks, None)
            if chunk is None:
                write(shapes.end(answer_id, what.tokens, usage=what.usage))
            else:
                write(chunk)
                send((self, b""))

        self.receive = step
        write(upstream.STREAM_HEAD + shapes.role(answer_id))
        send((self, b""))


class Client(asyncio.Protocol):
    """Sends the requests one after the other and checks each answer.

    After the last answer it prints its tally and sends SIGTERM to the process.
    """

    _transport: asyncio.Transport

    def __init__(self, work: Iterator[Request]) -> None:
        self._work = work
        self._request = Request(b"", 0, False)
        self._parts: list[bytes] = []
        self._answers = 0
        self._tokens = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._ask()

    def _ask(self) -> None:
        request = next(self._work, None)
        if request is not None:
            self._request = request
            self._transport.write(request.data)
            return
        print(json.dumps({"answers": self._answers, "tokens": self._tokens}), flush=True)
        self._transport.close()
        signal.raise_signal(signal.SIGTERM)

    def data_received(self, data: bytes) -> None:
        self._parts.append(data)
        if self._request.is_stream and data[-5:] != _LAST_CHUNK:
            return
        answer = b"".join(self._parts)
        head, _, body = answer.partition(b"\r\n\r\n")
        length = _LENGTH.search(head)
        if length is not None and len(body) < int(length[1]):
            return
        tokens = body.count(b"~")
        is_whole = head.startswith(b"HTTP/1.1 200 ") and tokens == self._request.tokens
        if not is_whole or (self._request.is_stream and b"data: [DONE]" not in body[-40:]):
            raise RuntimeError(f"not the whole answer that was asked for: {answer[:2000]!r}")
        self._parts.clear()
        self._answers += 1
        self._tokens += tokens
        self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if next(self._work, None) is not None:
            raise RuntimeError("the connection was closed before the last answer")


class Loop(asyncio.SelectorEventLoop):
    """An event loop with connections in memory.

    Each connection that the gateway opens leads to an `Upstream`; `Client` is its only client.
    """

    def __init__(self, network: Network, client: Client) -> None:
        super().__init__(network)
        self._network = network
        self._client = client
        self._shared = upstream.Upstream(upstream.MODEL)

    async def create_server(self, protocol_factory: Any, *words: Any, **options: Any) -> Any:
        server = await super().create_server(protocol_factory, *words, **options)  # nothing connects to it
        self.call_later(_PROBED_SECONDS, lambda: self.connect(self._client, protocol_factory()))
        return server

    async def create_connection(self, protocol_factory: Any, *words: Any, **options: Any) -> Any:
        protocol = protocol_factory()
        return self.connect(protocol, Upstream(self._network, self._shared)), protocol

    def connect(self, opener: asyncio.BaseProtocol, server: asyncio.BaseProtocol) -> Transport:
        """Connect two protocols and return the transport of the first."""
        end, other = Transport(self._network, opener), Transport(self._network, server)
        end.peer, other.peer = other, end
        server.connection_made(other)
        opener.connection_made(end)
        return end


class Pipe(asyncio.BufferedProtocol):
    """One end of the least that can stand in the gateway's place: `other` writes what it reads."""

    transport: asyncio.Transport
    other: "Pipe"

    def __init__(self) -> None:
        self._buffer = memoryview(bytearray(32 * 1024))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.other.transport.write(self._buffer[:nbytes].tobytes())


async def serve_pipe(client: Client) -> None:
    """Connect the client to the upstream by a pipe, until SIGTERM."""
    loop = cast("Loop", asyncio.get_running_loop())
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    client_side, upstream_side = Pipe(), Pipe()
    client_side.other, upstream_side.other = upstream_side, client_side
    await loop.create_connection(lambda: upstream_side)
    loop.connect(client, client_side)
    await stopped.wait()


def main(tree: str, work: Work) -> None:
    """Serve with the code in `tree` until the work is done. Exits as the gateway does."""
    network, client = Network(), Client(work.requests())
    for name in ("monotonic", "perf_counter"):
        setattr(time, name, network.read_clock)
    random.seed(0)
    if tree == PIPE:
        with asyncio.Runner(loop_factory=lambda: Loop(network, client)) as runner:
            runner.run(serve_pipe(client))
        return
    uvloop.new_event_loop = lambda: Loop(network, client)  # type: ignore[assignment,return-value]  # ours
    sys.path.insert(0, tree)
    sys.argv[1:] = ["serve"]
    runpy.run_module("gateway", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1], Work(*map(int, sys.argv[2:])))
