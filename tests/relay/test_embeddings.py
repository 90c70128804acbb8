"""`POST /v1/embeddings` through the whole gateway on real sockets, with both engines."""

import asyncio
import json
import struct
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings

from gateway import config
from gateway.chat.embedding import MAX_TEXTS
from gateway.engines.embeddings import OllamaEmbedder, OpenAiEmbedder
from gateway.simulate import Fault, Model, Options
from gateway.simulate import Running as StandIn
from tests.fakes.fault_backend import CANARY, FaultBackend
from tests.fakes.running_gateway import PATIENCE, TIMES, Raw, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in
from tests.fakes.virtual_time import is_virtual
from tests.real_engines.process import free_port

Kind = Literal["ollama", "vllm"]
KINDS = ["ollama", "vllm"]
WIDTH = 16
EMBEDDING = Model("their-model", embedding=WIDTH, context_length=512, matryoshka=True)
CHAT = Model("chat-model")


@asynccontextmanager
async def before(
    kind: str, base_url: str, chat_url: str | None = None, top: Mapping[str, Any] | None = None, **limits: Any
) -> AsyncIterator[Running]:
    """Start a gateway with the embedding model `ours` on backend `box`.

    The tier `standard` is on the backend at `chat_url`, or on the same one without.
    """
    patient = {**TIMES, "first_token_timeout": 30, "total_timeout": 30, **limits}
    backends = {"box": {"kind": kind, "base_url": base_url, **patient}}
    if chat_url is not None:
        backends["chats"] = {"kind": kind, "base_url": chat_url, **patient}
    chats = "box" if chat_url is None else "chats"
    document = {
        "llm_backend": chats,
        "backends": backends,
        "tiers": {"standard": {"models": {chats: CHAT.name}, "aliases": ["*"]}},
        "embeddings": {"ours": {"backend": "box", "model": EMBEDDING.name}},
        "state_file": "",
        "log_format": "json",
        **(top or {}),
    }
    async with running(config.build(document), shares_loop=is_virtual()) as gateway:
        yield gateway


@asynccontextmanager
async def serving(
    kind: Kind, *, top: Mapping[str, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[Running, StandIn]]:
    """Serve chats and embeddings from one Ollama, or from two vLLMs with one model each."""
    limits = {key: options.pop(key) for key in list(options) if key.endswith(("_timeout", "_queue", "_concurrency"))}
    async with AsyncExitStack() as stack:
        models = (EMBEDDING, CHAT) if kind == "ollama" else (EMBEDDING,)
        server = await stack.enter_async_context(stand_in(Options(kind, models, **options)))
        chats = (
            None if kind == "ollama" else (await stack.enter_async_context(stand_in(Options(kind, (CHAT,))))).base_url
        )
        yield await stack.enter_async_context(before(kind, server.base_url, chats, top, **limits)), server


@asynccontextmanager
async def sent(
    gateway: Running, body: Mapping[str, Any] | bytes, *headers: str, path: str = "/v1/embeddings"
) -> AsyncIterator[Raw]:
    data = body if isinstance(body, bytes) else json.dumps({"model": "ours", "input": "a text", **body}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**24)
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *headers,
        "",
        "",
    ]
    writer.write("\r\n".join(lines).encode() + data)
    try:
        yield Raw(reader, writer)
    finally:
        writer.close()


async def ask(
    gateway: Running,
    body: Mapping[str, Any] | bytes,
    *headers: str,
    path: str = "/v1/embeddings",
    patience: float = 2 * PATIENCE,
) -> Reply:
    async with asyncio.timeout(patience), sent(gateway, body, *headers, path=path) as raw:
        return await raw.reply()


def code(reply: Reply) -> tuple[int, str]:
    assert reply.error is not None
    assert list(reply.error) == ["message", "type", "param", "code"]
    return reply.status, reply.error["code"]


# The answer


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
@pytest.mark.parametrize("kind", KINDS)
async def test_answer_has_openais_shape_with_every_engine(kind: Kind, path: str) -> None:
    async with serving(kind) as (gateway, _):
        reply = await ask(gateway, {"input": ["a text", "another"], "user": "someone"}, path=path)
        body = json.loads(reply.body)
        assert list(body) == ["object", "data", "model", "usage"]
        assert (body["object"], body["model"]) == ("list", "ours")
        assert [(item["object"], item["index"], len(item["embedding"])) for item in body["data"]] == [
            ("embedding", 0, WIDTH),
            ("embedding", 1, WIDTH),
        ]
        assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0


@pytest.mark.parametrize("kind", KINDS)
async def test_base64_has_the_same_numbers(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        floats, packed = [
            json.loads((await ask(gateway, {"encoding_format": form})).body)["data"][0] for form in ("float", "base64")
        ]
        assert struct.unpack(f"<{WIDTH}f", b64decode(packed["embedding"])) == pytest.approx(
            floats["embedding"], abs=1e-7
        )


@pytest.mark.parametrize("kind", KINDS)
async def test_dimensions_are_passed_on(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        body = json.loads((await ask(gateway, {"dimensions": 4})).body)
        assert len(body["data"][0]["embedding"]) == 4
        reply = await ask(gateway, {"dimensions": WIDTH + 1})
        assert (*code(reply), reply.error and reply.error["param"]) == (400, "invalid_value", "dimensions")


@pytest.mark.parametrize("kind", KINDS)
async def test_exchange_has_the_usual_headers_metrics_and_log_line(kind: Kind) -> None:
    async with serving(kind) as (gateway, _):
        reply = await ask(gateway, {}, "X-Request-Id: mine")
        told = {
            name: reply.headers[name]
            for name in ("x-request-id", "x-gateway-tier", "x-gateway-backend", "x-gateway-model", "x-gateway-attempts")
        }
        assert list(told.values()) == ["mine", "ours", "box", EMBEDDING.name, "1"]
        assert int(reply.headers["x-gateway-queue-ms"]) >= 0
        labels = {"tier": "ours", "backend": "box"}
        assert gateway.metric("gateway_requests_total", endpoint="embeddings", outcome="ok", **labels) == 1
        assert gateway.metric("gateway_request_duration_seconds_count", **labels) == 1
        assert gateway.metric("gateway_time_to_first_token_seconds_count", **labels) == 0
        assert gateway.metric("gateway_tokens_total", type="prompt", **labels) > 0
        assert gateway.metric("gateway_queue_wait_seconds_count", lane="embedding", backend="box") == 1
        line = gateway.exchanges()[-1]
        assert [line[key] for key in ("request_id", "endpoint", "lane", "status", "model")] == [
            "mine",
            "embeddings",
            "embedding",
            200,
            EMBEDDING.name,
        ]


async def test_ollama_gets_keep_alive_and_context_from_the_settings() -> None:
    options = Options("ollama", (EMBEDDING, CHAT))
    async with stand_in(options) as server, before("ollama", server.base_url, keep_alive="5m", num_ctx=256) as gateway:
        assert (await ask(gateway, {})).status == 200
        body = server.engine.requests[-1]["body"]
        assert body == {
            "model": EMBEDDING.name,
            "input": ["a text"],
            "keep_alive": "5m",
            "truncate": False,
            "options": {"num_ctx": 256},
        }


async def test_large_batch_does_not_block_other_requests() -> None:
    patience = dict.fromkeys(("first_token_timeout", "idle_timeout", "total_timeout"), 6 * PATIENCE)
    async with serving("ollama", **patience) as (gateway, _):
        texts = [f"text {number} [{{" + "words " * 200 for number in range(MAX_TEXTS)]
        batch = asyncio.create_task(ask(gateway, {"input": texts}, patience=6 * PATIENCE))
        assert (await gateway.ask({"model": "standard"})).status == 200
        assert len(json.loads((await batch).body)["data"]) == MAX_TEXTS


@pytest.mark.parametrize("kind", KINDS)
async def test_long_texts_are_rendered_apart_from_their_request(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    rendered: list[int] = []
    embedder: Any = {"ollama": OllamaEmbedder, "vllm": OpenAiEmbedder}[kind]
    render = embedder.render

    def recorded(self: Any, *embedding: Any) -> Any:
        body = render(self, *embedding)
        rendered.append(len(body))
        return body

    monkeypatch.setattr(embedder, "render", recorded)
    texts = [f"{number}: \n\uac00" + " words" * 150 for number in range(300)]
    async with serving(kind) as (gateway, _):
        together = json.loads((await ask(gateway, {"input": texts})).body)["data"]
        assert len(rendered) == 1
        assert rendered[0] < len(texts) * 40
        for number in (0, 299):  # the backend got each text as it is
            alone = json.loads((await ask(gateway, {"input": texts[number]})).body)["data"][0]
            assert together[number]["embedding"] == alone["embedding"]
    assert together[0]["embedding"] != together[1]["embedding"]


# Clients


@pytest.mark.parametrize("kind", KINDS)
async def test_openai_python_embeds(kind: Kind) -> None:
    """The client asks for base64 unless told otherwise."""
    async with serving(kind) as (gateway, _), gateway.openai() as client:
        answer = await client.embeddings.create(model="ours", input=["a text", "another"])
        floats = await client.embeddings.create(model="ours", input="a text", encoding_format="float", dimensions=WIDTH)
        assert answer.data[0].embedding == pytest.approx(floats.data[0].embedding, abs=1e-7)
        assert [item.index for item in answer.data] == [0, 1]
        with pytest.raises(openai.NotFoundError):
            await client.embeddings.create(model="nobody", input="a text")


@pytest.fixture
def tokens_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace tiktoken's tables, which it would download: here a token is a byte."""
    table = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks={bytes([byte]): byte for byte in range(256)}, special_tokens={}
    )
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: table)


@pytest.mark.usefixtures("tokens_of_bytes")
@pytest.mark.parametrize("kind", KINDS)
async def test_langchain_embeds_text_and_gets_a_clear_error_for_token_numbers(kind: Kind) -> None:
    async with serving(kind) as (gateway, _), openai.DefaultAsyncHttpxClient(trust_env=False) as http:
        settings: dict[str, Any] = {
            "base_url": f"{gateway.base_url}/v1",
            "api_key": "any",
            "model": "ours",
            "http_async_client": http,
        }
        embeddings = OpenAIEmbeddings(check_embedding_ctx_length=False, **settings)
        documents = await embeddings.aembed_documents(["a text", "another"])
        assert [len(vector) for vector in documents] == [WIDTH, WIDTH]
        assert await embeddings.aembed_query("a text") == pytest.approx(documents[0])
        with pytest.raises(openai.BadRequestError, match="check_embedding_ctx_length=False"):
            await OpenAIEmbeddings(**settings).aembed_documents(["a text"])


# Refusals


@pytest.mark.parametrize("kind", KINDS)
async def test_model_names_of_one_endpoint_are_unknown_to_the_other(kind: Kind) -> None:
    """This holds even if an alias takes any name."""
    async with serving(kind) as (gateway, server):
        seen = len(server.engine.requests)
        for name in ("standard", "auto", CHAT.name, "nobody"):
            reply = await ask(gateway, {"model": name})
            assert code(reply) == (404, "model_not_found")
            assert reply.error is not None
            assert "'ours'" in reply.error["message"]
        for name in ("ours", "OURS", EMBEDDING.name):
            reply = await gateway.ask({"model": name})
            assert code(reply) == (404, "model_not_found")
            assert reply.error is not None
            assert "This is an embedding model." in reply.error["message"]
        assert [request["path"] for request in list(server.engine.requests)[seen:] if request["method"] == "POST"] == []


async def test_model_name_ignores_case_and_may_be_the_backends_own() -> None:
    async with serving("vllm") as (gateway, _):
        for name in ("Ours", EMBEDDING.name):
            assert json.loads((await ask(gateway, {"model": name})).body)["model"] == name


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'{"model":"ours"}',
        b'{"model":"ours","input":[1]}',
        b'{"model":"ours","input":""}',
        b'{"input":"a"}',
        b'{"model":"ours","input":"\xff"}',
    ],
    ids=["empty", "cut-off", "not-an-object", "no-input", "tokens", "empty-text", "no-model", "not-utf-8"],
)
@pytest.mark.parametrize("kind", KINDS)
async def test_invalid_request_is_a_400_and_reaches_no_backend(kind: Kind, body: bytes) -> None:
    async with serving(kind) as (gateway, server):
        assert (await ask(gateway, body)).status == 400
        assert all(request["method"] == "GET" or request["path"] == "/api/show" for request in server.engine.requests)
        assert gateway.metric("gateway_requests_total", endpoint="embeddings", tier="none", outcome="client_error") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_text_longer_than_the_context_is_the_same_error_with_every_engine(kind: Kind) -> None:
    """One text is short enough that only the backend can tell, one so long that it is not asked."""
    async with serving(kind) as (gateway, server):
        for words in (1000, 5000):
            seen = len(server.engine.requests)
            reply = await ask(gateway, {"input": ["short", "word " * words]})
            assert (*code(reply), reply.error and reply.error["param"]) == (400, "context_length_exceeded", "input")
            assert (len(server.engine.requests) == seen) is (words == 5000)


@pytest.mark.parametrize("kind", KINDS)
async def test_model_that_makes_no_embeddings_is_a_400(kind: Kind) -> None:
    async with stand_in(Options(kind, (Model(EMBEDDING.name),))) as server, before(kind, server.base_url) as gateway:
        reply = await ask(gateway, {})
        assert (*code(reply), reply.error and reply.error["param"]) == (400, "unsupported_parameter", "model")


async def test_key_is_required_and_other_methods_are_refused() -> None:
    async with serving("vllm", top={"api_keys": ["the-key"]}) as (gateway, _):
        assert code(await ask(gateway, {})) == (401, "invalid_api_key")
        assert (await ask(gateway, {}, "Authorization: Bearer the-key")).status == 200
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        writer.write(b"GET /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = await Raw(reader, writer).reply()
        writer.close()
        assert (reply.status, reply.headers["allow"]) == (405, "POST")


async def test_request_from_the_gateway_itself_is_a_loop() -> None:
    async with serving("vllm") as (gateway, _):
        own = gateway.gateway._context.gateway_id.decode()
        assert code(await ask(gateway, {}, f"X-Gateway-Via: {own}")) == (508, "loop_detected")


# Failures


@pytest.mark.parametrize(("fault", "status"), [("die", 502), ("error", 502), ("status", 502)])
@pytest.mark.parametrize("kind", KINDS)
async def test_failure_of_the_backend_is_a_502(kind: Kind, fault: Any, status: int) -> None:
    async with serving(kind) as (gateway, server):
        assert (await ask(gateway, {})).status == 200
        # A pooled connection may have died, so the request is sent once more on a new one.
        server.engine.inject(Fault(fault, times=2 if fault == "die" else 1))
        assert code(await ask(gateway, {})) == (status, "upstream_error")
        assert (await ask(gateway, {})).status == 200
        await until(gateway.is_idle)
        assert gateway.metric("gateway_requests_total", endpoint="embeddings", outcome="upstream_error") == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_backend_that_is_down_is_a_503_at_once(kind: Kind) -> None:
    async with before(kind, f"http://127.0.0.1:{free_port()}") as gateway:
        (server,) = gateway.gateway._backends["box"].servers
        await until(lambda: server.circuit.is_open)
        reply = await ask(gateway, {})
        assert (*code(reply), reply.headers["x-gateway-attempts"]) == (503, "backend_unavailable", "0")


async def test_embeddings_fail_over_to_another_server() -> None:
    async with AsyncExitStack() as stack:
        models = (EMBEDDING,)
        dying, other = [await stack.enter_async_context(stand_in(Options("vllm", models))) for _ in range(2)]
        dying.engine.inject(Fault("die"))
        document = {
            "llm_backend": "box",
            "backends": {
                "box": {
                    "kind": "vllm",
                    "servers": [{"base_url": server.base_url} for server in (dying, other)],
                    **TIMES,
                }
            },
            "tiers": {"standard": {"models": {"box": CHAT.name}}},
            "embeddings": {"ours": {"backend": "box", "model": EMBEDDING.name}},
            "state_file": "",
        }
        gateway = await stack.enter_async_context(running(config.build(document)))
        reply = await ask(gateway, {})
        assert (reply.status, reply.headers["x-gateway-attempts"]) == (200, "2")
        assert gateway.metric("gateway_retries_total", backend="box") == 1


@pytest.mark.parametrize(
    "mode", ["close", "rst", "garbage", "html", "redirect", "truncated", "invalid_json", "bomb", "healthy", "early_413"]
)
@pytest.mark.parametrize("kind", KINDS)
async def test_malformed_answer_is_never_passed_on(kind: Kind, mode: str) -> None:
    async with FaultBackend(kind, mode) as backend:
        servers = [{"base_url": backend.base_url, "models": [EMBEDDING.name, CHAT.name]}]
        document = {
            "llm_backend": kind,
            "backends": {kind: {"kind": kind, "servers": servers, **TIMES}},
            "tiers": {"standard": {"models": {kind: CHAT.name}}},
            "embeddings": {"ours": {"backend": kind, "model": EMBEDDING.name}},
            "state_file": "",
        }
        async with running(config.build(document)) as gateway:
            reply = await ask(gateway, {})
            assert code(reply) in ((502, "upstream_error"), (413, "request_too_large"))
            assert CANARY not in reply.body.decode()
            await until(gateway.is_idle)


@pytest.mark.parametrize(
    "answer",
    [[], [[0.5]] * 2, [[None]], [["a"]], [0.5]],
    ids=["none", "too-many", "null", "text", "not-a-vector"],
)
async def test_wrong_number_or_kind_of_vectors_is_a_502(answer: Any) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"POST"):
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        body = json.dumps(
            {"embeddings": answer} if head.startswith(b"POST /api/embed ") else {"models": [{"name": EMBEDDING.name}]}
        ).encode()
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            % len(body)
            + body
        )
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with before("ollama", f"http://127.0.0.1:{port}") as gateway:
            assert code(await ask(gateway, {})) == (502, "upstream_error")


@pytest.mark.virtual_time(only=True)
@pytest.mark.parametrize("kind", KINDS)
async def test_silent_backend_is_a_504(kind: Kind) -> None:
    async with serving(kind, first_token_timeout=0.3) as (gateway, server):
        server.engine.inject(Fault("stall"))
        reply = await ask(gateway, {})
        assert code(reply) == (504, "upstream_timeout")
        assert reply.headers["x-should-retry"] == "false"
        await until(lambda: server.engine.cancelled == 1 and gateway.is_idle())


@pytest.mark.parametrize("kind", KINDS)
async def test_client_that_leaves_ends_the_upstream_request(kind: Kind) -> None:
    async with serving(kind) as (gateway, server):
        server.engine.inject(Fault("stall"))
        async with sent(gateway, {}) as raw:
            await until(lambda: server.engine.running == 1)
            raw.leave()
            await until(lambda: server.engine.cancelled == 1 and gateway.is_idle())
        assert gateway.metric("gateway_client_disconnects_total", phase="waiting") == 1
        assert gateway.exchanges()[-1]["status"] == 499


@pytest.mark.parametrize("kind", KINDS)
async def test_answer_is_kept_alive_for_a_client_that_names_its_read_timeout(kind: Kind) -> None:
    async with serving(kind, top={"heartbeat": 0.1}, time_to_first_token=1.5) as (gateway, _):
        reply = await ask(gateway, {}, "X-Stainless-Read-Timeout: 1")
        assert reply.body.startswith(b" ")
        assert json.loads(reply.body)["data"]


# The lane


@pytest.mark.parametrize("crowd_is_chats", [True, False], ids=["chats", "embeddings"])
async def test_chats_and_embeddings_do_not_delay_each_other(crowd_is_chats: bool) -> None:
    async with (
        serving("ollama", max_concurrency=2, model_concurrency=2, parallel=8) as (gateway, server),
        AsyncExitStack() as crowd,
    ):
        server.engine.inject(Fault("stall", times=2))
        for _ in range(6):
            await crowd.enter_async_context(gateway.sent() if crowd_is_chats else sent(gateway, {}))
        await until(lambda: (gateway.running, gateway.waiting) == (2, 4))
        lane = "text" if crowd_is_chats else "embedding"
        admission = gateway.gateway._backends["box"].admission
        assert (admission.running(lane), admission.waiting(lane)) == (2, 4)
        reply = await (ask(gateway, {}) if crowd_is_chats else gateway.ask())
        assert reply.status == 200
        assert int(reply.headers["x-gateway-queue-ms"]) < 500  # its model is loaded first


async def test_queue_of_embeddings_is_bounded() -> None:
    async with serving("vllm", max_concurrency=1, max_queue=1) as (gateway, server), AsyncExitStack() as crowd:
        server.engine.inject(Fault("stall", times=0))
        for _ in range(2):
            await crowd.enter_async_context(sent(gateway, {}))
        await until(lambda: gateway.waiting == 1)
        reply = await ask(gateway, {})
        assert code(reply) == (503, "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
        assert gateway.metric("gateway_rejected_total", backend="box", reason="queue_full") == 1


async def test_shutdown_ends_running_requests_and_refuses_new_ones() -> None:
    async with serving("vllm") as (gateway, server), sent(gateway, {}) as raw:
        server.engine.inject(Fault("stall"))
        await until(lambda: server.engine.running == 1)
        gateway.gateway.cut_off()
        assert code(await raw.reply()) == (503, "shutting_down")
        assert code(await ask(gateway, {})) == (503, "shutting_down")


# Models


@pytest.mark.parametrize("kind", KINDS)
async def test_embedding_model_is_listed_with_its_context(kind: Kind) -> None:
    async with serving(kind) as (gateway, _), gateway.openai() as client:
        entry = (await client.models.retrieve("ours")).model_dump()
        assert (entry["id"], entry["context_length"], entry["max_model_len"]) == ("ours", 512, 512)


async def test_missing_embedding_model_is_logged_at_the_start(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "gateway.upstream")
    async with stand_in(Options("ollama", (CHAT,))) as server, before("ollama", server.base_url) as gateway:
        assert f"embedding ours needs the model '{EMBEDDING.name}'" in caplog.text
        assert code(await ask(gateway, {})) == (404, "model_not_found")
