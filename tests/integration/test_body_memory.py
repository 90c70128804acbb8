"""Memory of request bodies, through the whole gateway on real sockets.

Covers: gateway/body_memory.py
Covers: gateway/errors.py
Covers: gateway/relay/base.py
Covers: gateway/relay/cancel_scope.py
"""

import asyncio
import gc
import json
import threading
import time
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest

import gateway as package
from gateway import config
from gateway.chat.images import Checked
from gateway.downstream.limits import ServerLimits
from gateway.errors import ShuttingDown
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import TIMES, Raw, Reply, Running, running, until

pytestmark = pytest.mark.uvloop

MIB = 1024 * 1024
FREED = 200_000
"""Bytes that may stay allocated after requests with bodies of 1 MiB: caches, the log and the metrics."""
PATIENT = {"first_token_timeout": 30, "idle_timeout": 30, "total_timeout": 30, "queue_timeout": 30}
CHAT_PATH, EMBEDDINGS_PATH = "/v1/chat/completions", "/v1/embeddings"


def settings(*backends: FaultBackend, top: dict[str, Any] | None = None, **limits: Any) -> config.Settings:
    """Return settings with one tier and one embedding model on one backend with these servers."""
    kind = backends[0].kind
    servers = [{"base_url": backend.base_url, "models": [MODEL]} for backend in backends]
    return config.build(
        {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "servers": servers, **TIMES, **PATIENT, "max_concurrency": 1, **limits}},
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "embeddings": {"ours": {"backend": kind, "model": MODEL}},
            "max_text_body": "2MiB",
            "state_file": "",
            "log_format": "json",
            **(top or {}),
        }
    )


def chat(size: int = MIB, **fields: Any) -> bytes:
    """Return the body of a chat request with a text of `size` bytes."""
    return json.dumps(
        {"model": "standard", "messages": [{"role": "user", "content": "x" * size}], "max_tokens": 64, **fields}
    ).encode()


def with_image(url: str, size: int = MIB) -> bytes:
    content = [{"type": "text", "text": "x" * size}, {"type": "image_url", "image_url": {"url": url}}]
    return json.dumps({"model": "standard", "messages": [{"role": "user", "content": content}]}).encode()


def texts(size: int = MIB) -> bytes:
    return json.dumps({"model": "ours", "input": ["x" * size]}).encode()


def head(path: str, length: int | None, *lines: str) -> bytes:
    """Return a request head; without a length the body is chunked."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return "\r\n".join(
        [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", framing, *lines, "", ""]
    ).encode()


@asynccontextmanager
async def sent(gateway: Running, body: bytes, path: str = CHAT_PATH, *lines: str) -> AsyncIterator[Raw]:
    """Send a request; at the end of the block the client leaves."""
    async with connected(gateway, head(path, len(body), *lines) + body) as raw:
        yield raw


@asynccontextmanager
async def connected(gateway: Running, data: bytes) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**22)
    try:
        writer.write(data)
        yield Raw(reader, writer)
    finally:
        writer.transport.abort()


def code(error: dict[str, Any] | None) -> Any:
    return None if error is None else error["code"]


def used(gateway: Running) -> int:
    return gateway.gateway.body_memory.used


# What is freed when a request ends


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextmanager
def traced() -> Iterator[Callable[[], int]]:
    """Give the number of bytes that the code of the gateway has allocated in the block and not freed."""
    ours = tracemalloc.Filter(True, f"{Path(package.__file__).parent}/*")
    tracemalloc.start()
    try:
        yield lambda: sum(
            item.size for item in tracemalloc.take_snapshot().filter_traces([ours]).statistics("filename")
        )
    finally:
        tracemalloc.stop()


Ending = Callable[[Running, FaultBackend], Awaitable[None]]
ENDINGS: dict[str, tuple[str, Ending]] = {}


def ending(mode: str = "slow") -> Callable[[Ending], Ending]:
    """Register a way in which a request ends, in front of a backend in `mode`."""

    def register(function: Ending) -> Ending:
        ENDINGS[function.__name__] = mode, function
        return function

    return register


@asynccontextmanager
async def behind_another(gateway: Running) -> AsyncIterator[None]:
    """Occupy the only slot."""
    async with sent(gateway, chat(10, stream=True)) as first:
        await first.head()
        yield
    await until(lambda: gateway.running == 0)


@ending()
async def client_leaves_while_it_sends(gateway: Running, backend: FaultBackend) -> None:
    async with connected(gateway, head(CHAT_PATH, 2 * MIB) + b"x" * MIB):
        await until(lambda: used(gateway) == MIB)


@ending()
async def client_leaves_while_it_sends_chunks(gateway: Running, backend: FaultBackend) -> None:
    async with connected(gateway, head(CHAT_PATH, None) + b"100000\r\n" + b"x" * MIB):
        await until(lambda: used(gateway) == MIB)


@ending()
async def body_is_not_json(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, b"{" + b"x" * MIB) as raw:
        assert code((await raw.reply()).error) == "invalid_json"


@ending()
async def model_is_unknown(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(model="another")) as raw:
        assert (await raw.reply()).status == 404


@ending()
async def body_grows_too_large(gateway: Running, backend: FaultBackend) -> None:
    chunk = b"100000\r\n" + b"x" * MIB + b"\r\n"
    async with connected(gateway, head(CHAT_PATH, None) + chunk * 3) as raw:
        assert code((await raw.reply()).error) == "request_too_large"


@ending()
async def client_leaves_the_queue(gateway: Running, backend: FaultBackend) -> None:
    async with behind_another(gateway):
        async with sent(gateway, chat()):
            await until(lambda: gateway.waiting == 1)
        await until(lambda: gateway.waiting == 0)


@ending()
async def queue_timeout_passes(gateway: Running, backend: FaultBackend) -> None:
    async with behind_another(gateway), sent(gateway, chat(), CHAT_PATH, "x-gateway-timeout: 0.05") as raw:
        assert code((await raw.reply()).error) == "queue_timeout"


@ending()
async def queue_is_full(gateway: Running, backend: FaultBackend) -> None:
    async with behind_another(gateway), sent(gateway, chat(10)):
        await until(lambda: gateway.waiting == 1)
        async with sent(gateway, chat()) as raw:
            assert code((await raw.reply()).error) == "queue_full"


@ending("silent")
async def client_leaves_before_the_first_token(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(stream=True)):
        await until(lambda: len(backend.requests) == 1)


@ending()
async def client_leaves_the_stream(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(stream=True)) as raw:
        await raw.head()


@ending("silent")
async def no_token_comes_in_time(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(), CHAT_PATH, "x-gateway-timeout: 0.1") as raw:
        assert (await raw.reply()).status == 504


@ending("close")
async def backend_closes(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat()) as raw:
        assert (await raw.reply()).status == 502


@ending("killed")
async def backend_dies_in_the_stream(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(stream=True)) as raw:
        assert code((await raw.reply()).error) == "upstream_error"


@ending("breaks")
async def backend_fails(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat()) as raw:
        assert (await raw.reply()).status == 502


@ending("full")
async def backend_is_full(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat()) as raw:
        assert (await raw.reply()).status == 503


@ending("garbage")
async def backend_answers_garbage(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(stream=True)) as raw:
        assert (await raw.reply()).status == 502


@ending("too_long")
async def prompt_is_too_long(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, chat(stream=True)) as raw:
        assert (await raw.reply()).status == 400


@ending()
async def backend_is_gone(gateway: Running, backend: FaultBackend) -> None:
    backend.die()
    async with sent(gateway, chat()) as raw:
        assert (await raw.reply()).status == 502
    await backend.revive()


@ending("stale")
async def kept_connection_is_stale(gateway: Running, backend: FaultBackend) -> None:
    for _ in range(2):
        async with sent(gateway, chat()) as raw:
            assert (await raw.reply()).status == 200


@ending("healthy")
async def relay_crashes(gateway: Running, backend: FaultBackend) -> None:
    """The frame that raises the error also holds it."""

    def render(*args: Any) -> bytes:
        error = RuntimeError("a defect")
        raise error

    engine = gateway.gateway._backends["vllm"].engine
    engine.render = render  # type: ignore[assignment, method-assign]
    async with sent(gateway, chat()) as raw:
        assert (await raw.reply()).status == 500
    del engine.render


@ending("healthy")
async def request_is_served(gateway: Running, backend: FaultBackend) -> None:
    for stream in (False, True):
        async with sent(gateway, chat(stream=stream)) as raw:
            assert (await raw.reply()).status == 200


@ending()
async def gateway_cuts_off(gateway: Running, backend: FaultBackend) -> None:
    """As at the end of the drain: the running request and the queued one."""
    async with sent(gateway, chat(stream=True)) as running_one, sent(gateway, chat()) as queued_one:
        await running_one.head()
        await until(lambda: gateway.waiting == 1)
        for relay in list(gateway.live):
            relay.cut_off(ShuttingDown())
        assert (await queued_one.reply()).status == 503


@ending()
async def task_is_cancelled(gateway: Running, backend: FaultBackend) -> None:
    """As when a request outlives the cut-off."""
    async with behind_another(gateway), sent(gateway, chat()):
        await until(lambda: gateway.waiting == 1)
        (relay,) = [relay for relay in gateway.live if relay.is_queued]
        relay._cancel_scope._task.cancel()
        del relay
        await until(lambda: gateway.waiting == 0)


@ending()
async def image_is_broken(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, with_image(png_data_url()[:-20])) as raw:
        assert code((await raw.reply()).error) == "invalid_image"


@ending()
async def client_leaves_while_its_image_is_checked(gateway: Running, backend: FaultBackend) -> None:
    images, began, may_end = gateway.gateway._images, threading.Event(), threading.Event()

    def check(url: str, *args: Any, **options: Any) -> Checked:
        began.set()
        assert may_end.wait(20)
        return Checked(url, 1)

    images.check = check  # type: ignore[method-assign]
    try:
        async with sent(gateway, with_image(png_data_url())):
            await until(began.is_set)
            assert used(gateway) >= MIB
        await until(lambda: not gateway.server.server_state.tasks)
        assert used(gateway) == 0
    finally:
        may_end.set()
        del images.check


@ending()
async def client_leaves_while_it_sends_texts(gateway: Running, backend: FaultBackend) -> None:
    async with connected(gateway, head(EMBEDDINGS_PATH, 2 * MIB) + b"x" * MIB):
        await until(lambda: used(gateway) == MIB)


@ending("silent")
async def client_leaves_the_queue_for_embeddings(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, texts(10), EMBEDDINGS_PATH):
        await until(lambda: len(backend.requests) == 1)
        async with sent(gateway, texts(), EMBEDDINGS_PATH):
            await until(lambda: gateway.waiting == 1)
        await until(lambda: gateway.waiting == 0)


@ending("silent")
async def client_leaves_before_its_embeddings_come(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, texts(), EMBEDDINGS_PATH):
        await until(lambda: len(backend.requests) == 1)


@ending("breaks")
async def backend_fails_to_embed(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, texts(), EMBEDDINGS_PATH) as raw:
        assert (await raw.reply()).status == 502


@ending()
async def texts_are_not_json(gateway: Running, backend: FaultBackend) -> None:
    async with sent(gateway, texts()[:-1], EMBEDDINGS_PATH) as raw:
        assert code((await raw.reply()).error) == "invalid_json"


@pytest.mark.parametrize("way", ENDINGS)
async def test_body_is_freed_when_its_request_ends(way: str, without_collector: None) -> None:
    """No error, task or future refers back to the frames of the request, which hold the body."""
    mode, end = ENDINGS[way]
    top = {"max_body": "2560KiB"}
    async with FaultBackend("vllm", mode) as backend, running(settings(backend, top=top, max_queue=1)) as gateway:
        with traced() as allocated:
            for _ in range(2):
                await end(gateway, backend)
                await until(lambda: gateway.is_idle() and not gateway.server.server_state.connections)
                assert used(gateway) == 0
                backend.requests.clear()
                backend.peers.clear()
            assert allocated() < FREED


@pytest.mark.parametrize("modes", [("breaks", "breaks"), ("close", "healthy"), ("close", "close")])
async def test_body_is_freed_after_a_retry_elsewhere(modes: tuple[str, str], without_collector: None) -> None:
    one, two = (FaultBackend("vllm", mode) for mode in modes)
    async with one, two, running(settings(one, two)) as gateway:
        with traced() as allocated:
            for _ in range(2):
                async with sent(gateway, chat()) as raw:
                    await raw.reply()
                await until(gateway.is_idle)
                one.requests.clear()
                two.requests.clear()
            assert allocated() < FREED


@pytest.mark.parametrize("modes", [("breaks", "healthy"), ("close", "healthy"), ("close", "breaks"), ("full", "slow")])
async def test_body_is_freed_after_a_fallback(modes: tuple[str, str], without_collector: None) -> None:
    one, two = FaultBackend("vllm", modes[0]), FaultBackend("ollama", modes[1])
    async with one, two:
        backends = {
            backend.kind: {"kind": backend.kind, "base_url": backend.base_url, **TIMES, **PATIENT}
            for backend in (one, two)
        }
        tier = {"models": {"vllm": MODEL, "ollama": MODEL}, "fallback": True}
        document = {"llm_backend": "vllm", "backends": backends, "tiers": {"standard": tier}, "state_file": ""}
        async with running(config.build({**document, "max_text_body": "2MiB"})) as gateway:
            with traced() as allocated:
                for _ in range(2):
                    async with sent(gateway, chat(stream=True)) as raw:
                        await raw.head()
                        assert len(two.requests) == 1
                    await until(gateway.is_idle)
                    for backend in (one, two):
                        backend.requests.clear()
                        backend.peers.clear()
                assert allocated() < FREED


async def test_one_copy_of_a_body_is_held_while_its_request_waits(without_collector: None) -> None:
    """Neither the bytes as they arrived, nor the image from before its conversion."""
    async with FaultBackend("vllm", "slow") as backend, running(settings(backend)) as gateway:
        images = gateway.gateway._images

        def check(url: str, *args: Any, **options: Any) -> Checked:
            return Checked(url.replace("A", "B"), 1)

        images.check = check  # type: ignore[method-assign]
        async with behind_another(gateway):
            with traced() as allocated:
                # The converted image is made by this test, so the gateway itself has allocated nothing.
                for body, copies in ((chat(), 1), (with_image("data:image/png;base64," + "A" * MIB, 10), 0)):
                    async with sent(gateway, body):
                        await until(lambda: gateway.waiting == 1)
                        assert copies * MIB <= allocated() < copies * MIB + FREED
                        assert MIB < used(gateway) < MIB + 10_000
                    await until(lambda: gateway.waiting == 0)


async def test_client_that_sent_a_head_alone_takes_no_memory(without_collector: None) -> None:
    async with FaultBackend("vllm") as backend, running(settings(backend)) as gateway:
        with traced() as allocated:
            async with connected(gateway, head(CHAT_PATH, 17 * MIB)):
                await until(lambda: len(gateway.server.server_state.tasks) == 1)
                assert allocated() < FREED
                assert used(gateway) == 0


# The limit


@asynccontextmanager
async def serving(
    mode: str = "healthy",
    *,
    limit: str = "1MiB",
    keys: tuple[str, ...] = (),
    times: ServerLimits | None = None,
    **limits: Any,
) -> AsyncIterator[tuple[Running, FaultBackend]]:
    top: dict[str, Any] = {"max_waiting_bytes": limit} | ({"api_keys": list(keys)} if keys else {})
    async with FaultBackend("vllm", mode) as backend, running(settings(backend, top=top, **limits), times) as gateway:
        yield gateway, backend


def key(name: str) -> str:
    return f"Authorization: Bearer {name}"


def assert_refused(reply: Reply) -> None:
    assert (reply.status, code(reply.error)) == (503, "queue_full")
    assert 4 <= int(reply.headers["retry-after"]) <= 6


async def test_announced_body_that_does_not_fit_is_refused_before_it_is_read() -> None:
    async with serving() as (gateway, backend):
        async with connected(gateway, head(CHAT_PATH, MIB + 1, "Expect: 100-continue")) as raw:
            assert_refused(await raw.reply())  # and not 100
        assert used(gateway) == 0
        assert not backend.requests
        assert gateway.metric("gateway_rejected_total", reason="queue_full") == 1


async def test_body_of_unknown_size_is_refused_as_soon_as_it_does_not_fit() -> None:
    async with serving() as (gateway, _), connected(gateway, head(CHAT_PATH, None)) as raw:
        raw.writer.write(b"100000\r\n" + b"x" * MIB + b"\r\n")
        await until(lambda: used(gateway) == MIB)
        raw.writer.write(b"1\r\nx\r\n")
        assert_refused(await raw.reply())
        assert used(gateway) == 0


async def test_body_longer_than_announced_counts_with_what_was_announced() -> None:
    """What follows is another request, and is dropped."""
    async with serving("slow") as (gateway, _):
        body = chat(100_000, stream=True)
        async with connected(gateway, head(CHAT_PATH, len(body)) + body + b"x" * 100_000) as raw:
            assert (await raw.head())[0] == 200
            assert used(gateway) == 0
        await until(gateway.is_idle)
        assert used(gateway) == 0


async def test_announcements_take_no_room_from_others() -> None:
    async with serving() as (gateway, _), AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(connected(gateway, head(CHAT_PATH, 900_000) + b"{"))
        await until(lambda: used(gateway) == 20)
        async with sent(gateway, chat(900_000)) as raw:
            assert (await raw.reply()).status == 200


async def test_bodies_that_are_almost_complete_are_bounded_together() -> None:
    async with serving() as (gateway, _), AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(connected(gateway, head(CHAT_PATH, 300_000) + b"x" * 299_999))
            for _ in range(10)
        ]
        await until(lambda: sum(bool(client.reader._buffer) for client in clients) >= 7)  # type: ignore[attr-defined]
        assert used(gateway) <= MIB
    await until(lambda: used(gateway) == 0)


async def test_queued_bodies_count_until_their_request_runs() -> None:
    async with serving("slow") as (gateway, backend), sent(gateway, chat(10, stream=True)) as first:
        await first.head()
        body = chat(100_000, stream=True)
        async with sent(gateway, body) as second, sent(gateway, chat(10)):
            await until(lambda: gateway.waiting == 2)
            assert len(body) < used(gateway) < len(body) + 2000
            assert gateway.metric("gateway_waiting_bytes") == used(gateway)
            first.leave()
            await second.head()
            await until(lambda: used(gateway) < 1000)
            assert used(gateway) == len(chat(10))
            assert len(backend.requests) == 2
        await until(gateway.is_idle)
        assert used(gateway) == 0


async def test_body_counts_while_one_of_its_choices_waits() -> None:
    """Another choice of the request runs already."""
    async with serving("slow") as (gateway, backend), sent(gateway, chat(100_000, stream=True, n=3)) as client:
        await client.head()
        assert (gateway.running, gateway.waiting) == (1, 2)
        assert 100_000 < used(gateway) < 103_000
        client.leave()
        await until(gateway.is_idle)
        assert used(gateway) == 0
        assert len(backend.requests) == 1


async def test_request_that_would_wait_without_room_is_refused_and_one_that_runs_is_served() -> None:
    async with serving("slow", limit="300KiB", max_concurrency=2) as (gateway, _), AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(sent(gateway, chat(200_000, stream=True))) for _ in range(2)]
        for client in clients:
            await client.head()
        waiting = await stack.enter_async_context(sent(gateway, chat(200_000)))
        await until(lambda: gateway.waiting == 1)
        late = await stack.enter_async_context(sent(gateway, chat(200_000)))
        assert_refused(await late.reply())
        clients[0].leave()
        await until(lambda: gateway.waiting == 0)
        assert used(gateway) == 0
        waiting.leave()


async def test_text_that_takes_more_memory_than_its_body_counts_with_that() -> None:
    """One character outside of the Basic Multilingual Plane makes all of them four bytes long."""
    async with serving("slow") as (gateway, _), sent(gateway, chat(10, stream=True)) as first:
        await first.head()
        text = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "x" * 200_000 + "😀"}]})
        async with sent(gateway, text.encode()):
            await until(lambda: gateway.waiting == 1)
            assert 4 * 200_000 < used(gateway) < 4 * 200_000 + 3000
            async with sent(gateway, text.encode()) as raw:
                assert_refused(await raw.reply())


async def test_one_key_leaves_room_for_another() -> None:
    async with serving(keys=("first-key-of-two", "other-key-of-two")) as (gateway, _), AsyncExitStack() as stack:
        part = b"x" * 200_000
        for _ in range(2):
            greedy = head(CHAT_PATH, 200_001, key("first-key-of-two")) + part
            await stack.enter_async_context(connected(gateway, greedy))
        await until(lambda: used(gateway) == 400_000)
        async with sent(gateway, chat(200_000), CHAT_PATH, key("first-key-of-two")) as raw:
            assert_refused(await raw.reply())
        async with sent(gateway, chat(500_000), CHAT_PATH, key("other-key-of-two")) as raw:
            assert (await raw.reply()).status == 200


async def test_single_body_of_a_key_may_take_all_that_is_free() -> None:
    keys = "first-key-of-two", "other-key-of-two"
    async with serving(keys=keys) as (gateway, _), sent(gateway, chat(1_000_000), CHAT_PATH, key(keys[0])) as raw:
        assert (await raw.reply()).status == 200


@pytest.mark.parametrize("keys", [(), ("the-only-key",)], ids=["open", "one key"])
async def test_only_key_may_take_all(keys: tuple[str, ...]) -> None:
    async with serving(keys=keys) as (gateway, _), AsyncExitStack() as stack:
        for _ in range(5):
            request = head(CHAT_PATH, 200_001, *map(key, keys)) + b"x" * 200_000
            await stack.enter_async_context(connected(gateway, request))
        await until(lambda: used(gateway) == 1_000_000)


async def test_changed_limit_counts_for_later_bodies() -> None:
    async with serving("slow", limit="2MiB") as (gateway, backend), sent(gateway, chat(10, stream=True)) as first:
        await first.head()
        async with sent(gateway, chat(500_000, stream=True)) as second:
            await until(lambda: gateway.waiting == 1)
            lowered = settings(backend, top={"max_waiting_bytes": "100KiB"})
            await gateway.gateway.reload.run(lambda: lowered, "file")
            assert used(gateway) > 500_000
            async with sent(gateway, chat(50_000)) as raw:
                assert_refused(await raw.reply())
            first.leave()
            assert (await second.head())[0] == 200
            assert used(gateway) == 0


async def test_refused_requests_leave_nothing_counted() -> None:
    top = {"api_keys": ["a-key-of-a-client"], "max_body": "100KiB", "max_text_body": "50KiB"}
    async with FaultBackend("vllm") as backend, running(settings(backend, top=top)) as gateway:
        for body, path, lines, status in (
            (chat(90_000), CHAT_PATH, [key("another")], 401),
            (chat(90_000), CHAT_PATH, [key("a-key-of-a-client")], 413),
            (chat(110_000), CHAT_PATH, [key("a-key-of-a-client")], 413),
            (chat(40_000, model="another"), CHAT_PATH, [key("a-key-of-a-client")], 404),
            (chat(40_000), "/v1/nothing", [key("a-key-of-a-client")], 404),
            (chat(40_000), CHAT_PATH, [key("a-key-of-a-client"), "Content-Encoding: gzip"], 415),
        ):
            async with sent(gateway, body, path, *lines) as raw:
                assert (await raw.reply()).status == status
            assert used(gateway) == 0


async def test_request_that_waits_again_counts_again_and_is_not_refused() -> None:
    """It had waited, then met a server that was gone."""
    async with serving("slow", limit="300KiB") as (gateway, backend), AsyncExitStack() as stack:
        first = await stack.enter_async_context(sent(gateway, chat(10, stream=True)))
        await first.head()
        second = await stack.enter_async_context(sent(gateway, chat(200_000, stream=True)))
        await until(lambda: gateway.waiting == 1)
        backend.die()
        await until(lambda: gateway.waiting == 1 and gateway.running == 0)
        assert 200_000 < used(gateway) < 203_000
        await backend.revive()
        gateway.gateway._backends["vllm"].servers[0].circuit.probe_answered()
        assert (await second.head())[0] == 200
        assert used(gateway) == 0


async def test_converted_images_count_beside_the_originals() -> None:
    async with serving(limit="100KiB") as (gateway, _):
        images, sizes = gateway.gateway._images, []

        def check(url: str, *args: Any, **options: Any) -> Checked:
            sizes.append(used(gateway))
            return Checked(url + "A" * 50_000, 1)

        images.check = check  # type: ignore[method-assign]
        content = [{"type": "image_url", "image_url": {"url": png_data_url()}}] * 4
        body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": content}]}).encode()
        async with sent(gateway, body) as raw:
            assert_refused(await raw.reply())
        assert [size // 50_000 for size in sizes] == [0, 1, 2]
        assert used(gateway) == 0


async def test_body_behind_a_repeated_head_counts_while_it_arrives() -> None:
    """The HTTP server buffers it before it calls the application."""
    body = chat(30_000)
    request = head(CHAT_PATH, len(body)) + body
    async with serving() as (gateway, _), connected(gateway, request) as raw:
        assert (await raw.reply()).status == 200
        for served in (True, False):
            raw.writer.write(request[:-1])
            await until(lambda: used(gateway) == len(request))
            if served:
                raw.writer.write(request[-1:])
                assert (await raw.reply()).status == 200
                assert used(gateway) == 0
        raw.leave()
        await until(lambda: used(gateway) == 0)


async def test_body_behind_a_repeated_head_is_not_buffered_while_much_memory_is_used() -> None:
    body = chat(30_000)
    request = head(CHAT_PATH, len(body)) + body
    async with serving() as (gateway, _), connected(gateway, request) as raw:
        assert (await raw.reply()).status == 200
        async with connected(gateway, head(CHAT_PATH, 600_000) + b"x" * 599_999):
            await until(lambda: used(gateway) == 599_999)
            raw.writer.write(request[:-10])
            await until(lambda: used(gateway) == 599_999 + len(body) - 10)
            raw.writer.write(request[-10:])
            assert (await raw.reply()).status == 200


TIGHT = ServerLimits(tight_seconds=0.05)


async def test_body_that_does_not_grow_gives_way_while_much_memory_is_used() -> None:
    """Otherwise clients that send all but the last byte would hold all memory for minutes."""
    async with serving(times=TIGHT) as (gateway, _):
        async with connected(gateway, head(CHAT_PATH, 600_000) + b"x" * 599_999) as raw:
            assert code((await raw.reply()).error) == "request_timeout"
        assert used(gateway) == 0
        assert gateway.is_idle()


@pytest.mark.virtual_time(only=True)
async def test_body_that_does_not_grow_may_take_its_time_while_little_memory_is_used() -> None:
    async with serving(times=TIGHT) as (gateway, _):
        body = chat(400_000)
        async with connected(gateway, head(CHAT_PATH, len(body)) + body[:-1]) as raw:
            await until(lambda: used(gateway) == len(body) - 1)
            await asyncio.sleep(4 * TIGHT.tight_seconds)  # a slow client is what the test is about
            raw.writer.write(body[-1:])
            assert (await raw.reply()).status == 200


@pytest.mark.virtual_time(only=True)
async def test_body_that_grows_is_read_while_much_memory_is_used() -> None:
    async with serving(times=TIGHT) as (gateway, _):
        body = chat(800_000)
        async with connected(gateway, head(CHAT_PATH, len(body)) + body[:600_000]) as raw:
            for start in range(600_000, len(body), 10_000):
                await asyncio.sleep(TIGHT.tight_seconds / 4)  # a slow client is what the test is about
                raw.writer.write(body[start : start + 10_000])
            assert (await raw.reply()).status == 200


async def test_bytes_that_a_busy_gateway_has_not_read_yet_are_not_the_clients_delay() -> None:
    times = ServerLimits(tight_seconds=1)
    async with serving(times=times) as (gateway, _):
        body = chat(600_000)
        async with connected(gateway, head(CHAT_PATH, len(body)) + body[:-10]) as raw:
            await until(lambda: used(gateway) == len(body) - 10)
            (connection,) = gateway.server.server_state.connections
            timeout = connection._body_timeout  # type: ignore[union-attr]
            await until(lambda: timeout._received == connection._received)  # type: ignore[union-attr]
            raw.writer.write(body[-10:])
            time.sleep(1.1 * times.tight_seconds)  # the loop is busy until after the next check
            assert (await raw.reply()).status == 200
