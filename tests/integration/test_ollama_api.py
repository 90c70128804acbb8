"""Ollama's own API through the whole gateway, on both engines: equal to what a real Ollama answers."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Literal

import httpx2
import pytest

from gateway import config, simulate
from tests import golden
from tests.engines.recorded import unfold
from tests.fakes.fault_backend import CANARY, MODEL, TEXT, FaultBackend, Kind
from tests.fakes.running_gateway import PATIENCE, SHORT_TIMES, TIMES, Raw, Reply, Running, running, until
from tests.fakes.stand_ins import stand_in

Engine = Literal["vllm", "ollama-0.33", "ollama-0.24"]
ENGINES: list[Engine] = ["vllm", "ollama-0.33", "ollama-0.24"]
KINDS: list[Kind] = ["vllm", "ollama"]
MODELS = (
    simulate.Model("qwen3-vl", vision=True, tools=True),
    simulate.Model("llama"),
    simulate.Model("llama-tools", tools=True),
    simulate.Model("qwen3-vl-thinking", vision=True, tools=True, thinking=True),
)
EMBEDDER = simulate.Model("bge-m3", embedding=8)
LINES, OBJECT = "application/x-ndjson", "application/json; charset=utf-8"
COUNTS = ["total_duration", "load_duration", "prompt_eval_count", "prompt_eval_duration", "eval_count", "eval_duration"]
USER = [{"role": "user", "content": "Say hello."}]
WEATHER = [{"role": "user", "content": "How is the weather in Seoul?"}]


def options_of(engine: Engine, *models: simulate.Model) -> simulate.Options:
    if engine == "vllm":
        return simulate.Options("vllm", models)
    return simulate.Options("ollama", models, generation="0.24" if engine == "ollama-0.24" else "0.33")


@asynccontextmanager
async def in_front_of(engine: Engine, **top: Any) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of a gateway in front of a stand-in of `engine`, with a tier for each model."""
    name = engine.partition("-")[0]
    async with AsyncExitStack() as stack:
        # A vLLM serves one model.
        groups = [(model,) for model in (*MODELS, EMBEDDER)] if engine == "vllm" else [(*MODELS, EMBEDDER)]
        servers = [await stack.enter_async_context(stand_in(options_of(engine, *group))) for group in groups]
        document = {
            "llm_backend": name,
            "backends": {name: {"kind": name, "servers": [{"base_url": server.base_url} for server in servers]}},
            "tiers": {model.name: {"models": {name: model.name}} for model in MODELS},
            "embeddings": {"bge-m3": {"backend": name, "model": "bge-m3"}},
            "state_file": "",
            **top,
        }
        gateway = await stack.enter_async_context(running(config.build(document)))
        client = httpx2.AsyncClient(base_url=gateway.base_url, timeout=PATIENCE, trust_env=False, verify=False)
        yield await stack.enter_async_context(client)


@pytest.fixture(params=ENGINES)
async def client(request: pytest.FixtureRequest) -> AsyncIterator[httpx2.AsyncClient]:
    async with in_front_of(request.param) as client:
        yield client


@asynccontextmanager
async def before(backend: FaultBackend, times: Mapping[str, float] = TIMES, **more: Any) -> AsyncIterator[Running]:
    """Run a gateway in front of a backend that fails as it is told to."""
    kind = backend.kind
    backends = {kind: {"kind": kind, "servers": [{"base_url": backend.base_url, "models": [MODEL]}], **times}}
    tiers = {"standard": {"models": {kind: MODEL}}}
    document = {"llm_backend": kind, "backends": backends, "tiers": tiers, "state_file": "", **more}
    async with running(config.build(document)) as gateway:
        yield gateway


@asynccontextmanager
async def sent(gateway: Running, path: str, body: Mapping[str, Any] | bytes, *headers: str) -> AsyncIterator[Raw]:
    """Send a request with exactly these headers; leave at the end of the block."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port, limit=2**20)
    length = (
        () if any(header.startswith("Transfer-Encoding") for header in headers) else (f"Content-Length: {len(data)}",)
    )
    writer.write("\r\n".join([f"POST {path} HTTP/1.1", "Host: localhost", *headers, *length, "", ""]).encode() + data)
    raw = Raw(reader, writer)
    try:
        yield raw
    finally:
        raw.leave()


async def ask(gateway: Running, path: str, body: Mapping[str, Any] | bytes, *headers: str) -> Reply:
    async with asyncio.timeout(2 * PATIENCE), sent(gateway, path, body, *headers) as raw:
        return await raw.reply()


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "standard", "messages": USER, **fields}


def lines(body: bytes | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


def said(found: list[dict[str, Any]]) -> str:
    return "".join(line["message"]["content"] if "message" in line else line.get("response", "") for line in found)


# The form of a real Ollama


def fields(value: Any) -> Any:
    """Return the names of the fields in their order, of all levels but those that hold data."""
    if isinstance(value, dict):
        return [(name, None if name == "arguments" else fields(item)) for name, item in value.items()]
    return [fields(value[0])] if isinstance(value, list) and value else None


def distinct(found: list[dict[str, Any]]) -> list[Any]:
    """Return the fields of the lines, each run of equal ones once."""
    forms = [fields(line) for line in found]
    return [form for index, form in enumerate(forms) if index == 0 or form != forms[index - 1]]


CASES = (
    "api_chat",
    "api_chat_stream",
    "api_chat_format_schema",
    "api_chat_image",
    "api_chat_keep_alive",
    "api_chat_logprobs",
    "api_chat_messages_empty_loads",
    "api_chat_thinking",
    "api_chat_thinking_stream",
    "api_chat_tool_call",
    "api_chat_tool_call_stream",
    "api_chat_tool_result",
    "api_chat_tools",
    "api_generate_empty_loads",
    "api_generate_unload",
)


@pytest.mark.parametrize("version", ["ollama-0.33", "ollama-0.24"])
async def test_answers_have_the_fields_of_a_real_ollama(client: httpx2.AsyncClient, version: str) -> None:
    for case in CASES:
        recording = golden.load(version)[case]
        body = dict(recording.request_body)
        if "tool_call" in case:  # a stand-in calls a tool if the text names it
            body = {name: value for name, value in body.items() if name not in ("format", "options")}
            body["messages"] = WEATHER
        if "thinking" in case:  # and thinks a few words
            body["options"] = {"num_predict": 3}
        reply = await client.request(recording.method, recording.path, content=json.dumps(body))
        assert reply.status_code == recording.status, (case, reply.text)
        assert reply.headers["content-type"] == recording.headers["content-type"], case
        recorded = unfold(recording) if recording.is_stream else [recording.body]
        found = lines(reply.content) if recording.is_stream else [reply.json()]
        assert distinct(found) == distinct(recorded), case
        assert found[-1]["done"] is recorded[-1]["done"] is True, case


@pytest.mark.parametrize("case", ["api_chat_unknown", "api_show_unknown", "api_chat_bad_json"])
async def test_errors_have_the_form_of_a_real_ollama(client: httpx2.AsyncClient, case: str) -> None:
    recording = golden.load("ollama-0.33")[case]
    reply = await client.request(recording.method, recording.path, content=recording.content)
    assert (reply.status_code, reply.headers["content-type"]) == (recording.status, recording.headers["content-type"])
    assert list(reply.json()) == ["error"]
    if recording.status == 404:
        assert reply.json()["error"].startswith("model 'nope' not found")


async def test_generate_has_ollamas_fields(client: httpx2.AsyncClient) -> None:
    body = {"model": "qwen3-vl-thinking", "prompt": "Say hello.", "system": "Be brief."}
    found = lines((await client.post("/api/generate", json=body)).content)
    plain = (await client.post("/api/generate", json=body | {"stream": False})).json()
    head, tail = ["model", "created_at", "response"], ["done", "done_reason", *COUNTS]
    assert distinct(found) == [
        [(name, None) for name in names] for names in ([*head, "thinking", "done"], [*head, "done"], [*head, *tail])
    ]
    assert list(plain) == [*head, "thinking", *tail]
    assert said(found) == plain["response"] != ""


async def test_lists_have_the_fields_of_a_real_ollama(client: httpx2.AsyncClient) -> None:
    await client.post("/api/chat", json={"model": "llama", "messages": []})
    recorded = golden.load("ollama-0.33")
    tags = (await client.get("/api/tags")).json()
    assert list(tags) == ["models"]
    llama = next(model for model in tags["models"] if model["name"] == "llama:latest")
    assert fields(llama)[:5] == fields(recorded["api_tags"].body["models"][1])[:5]
    assert [name for name, _ in fields(llama)] == [name for name, _ in fields(recorded["api_tags"].body["models"][1])]
    running = (await client.get("/api/ps")).json()
    assert fields(running["models"][0]) == fields(recorded["api_ps"].body["models"][0])
    shown = (await client.post("/api/show", json={"model": "llama"})).json()
    known = [name for name in recorded["api_show"].body if name in shown]
    assert list(shown) == known
    assert {"modelfile", "template", "details", "model_info", "capabilities", "modified_at"} == set(known)


# Values


@pytest.mark.parametrize("stream", [True, False])
async def test_counts_and_durations_are_sound(client: httpx2.AsyncClient, stream: bool) -> None:
    body = {"model": "llama", "messages": USER, "stream": stream, "options": {"num_predict": 6}}
    last = lines((await client.post("/api/chat", json=body)).content)[-1]
    assert last["done_reason"] == "length"
    assert last["eval_count"] == 6
    assert all(last[name] > 0 for name in COUNTS)
    assert last["total_duration"] >= last["load_duration"] + last["prompt_eval_duration"] + last["eval_duration"]


async def test_values_give_the_same_status_on_each_engine() -> None:
    pixel = golden.png_base64()
    bodies: list[dict[str, Any]] = [
        {"options": None}, {"options": {"temperature": 5}}, {"options": {"temperature": -1}},
        {"options": {"num_predict": 0}}, {"options": {"num_predict": -2}}, {"options": {"num_predict": 2.5}},
        {"options": {"stop": [str(number) for number in range(20)]}}, {"options": {"stop": [""]}},
        {"options": {"top_k": 0, "top_p": 0, "min_p": 0, "seed": -1}}, {"options": {"repeat_penalty": 0}},
        {"options": {"top_p": 3}}, {"options": []}, {"format": ""}, {"format": {}}, {"format": "yaml"},
        {"format": {"type": "objekt"}}, {"think": True}, {"think": False}, {"think": "high"}, {"think": "extreme"},
        {"keep_alive": "soon"}, {"keep_alive": -1}, {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": None}]}, {"messages": [{"role": "USER", "content": "안녕하세요"}]},
        {"messages": [{"role": "robot", "content": "x"}]}, {"messages": [{"role": "user", "content": [1]}]},
        {"messages": [{"role": "user", "content": "x", "images": [pixel]}]},
        {"messages": [{"role": "user", "content": "x", "images": ["AAAA"]}]},
        {"messages": [{"role": "user", "content": "x", "images": ["%"]}]},
        {"messages": [*USER, {"role": "tool", "content": "x"}]}, {"tools": []}, {"tools": [{"type": "function"}]},
        {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 2}, {"model": None}, {"model": "qwen3-vl:latest"},
        {"messages": [*USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f",
         "arguments": {}}}]}, {"role": "tool", "content": "x", "tool_name": "f"}]},
        {"truncate": False, "shift": True, "nonsense": 1},
    ]  # fmt: skip
    outcomes: list[list[tuple[int, str]]] = []
    for engine in ENGINES:
        async with in_front_of(engine) as client:
            found = []
            for fields in bodies:
                base = {"model": "qwen3-vl", "messages": USER, "stream": False}
                reply = await client.post("/api/chat", json=base | fields)
                found.append((reply.status_code, reply.json().get("error", "")))
            outcomes.append(found)
    statuses = [status for status, _ in outcomes[0]]
    assert (statuses.count(200), statuses.count(400)) == (25, 14)
    assert outcomes[0] == outcomes[1] == outcomes[2]


async def test_a_model_that_cannot_think_answers_without_thoughts(client: httpx2.AsyncClient) -> None:
    body = {"model": "llama", "messages": USER, "think": True, "stream": False}
    reply = await client.post("/api/chat", json=body)
    assert list(reply.json()["message"]) == ["role", "content"]


async def test_korean_passes_unchanged(client: httpx2.AsyncClient) -> None:
    body = {"model": "llama", "messages": [{"role": "user", "content": "안녕하세요 여러분"}]}
    assert "안녕하세요 여러분" in said(lines((await client.post("/api/chat", json=body)).content))


async def test_embeddings_are_alike(client: httpx2.AsyncClient) -> None:
    many = (await client.post("/api/embed", json={"model": "bge-m3:latest", "input": ["a", "b"]})).json()
    assert list(many) == ["model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"]
    assert [len(vector) for vector in many["embeddings"]] == [8, 8]
    old = (await client.post("/api/embeddings", json={"model": "bge-m3", "prompt": "a"})).json()
    assert old == {"embedding": pytest.approx(many["embeddings"][0], abs=1e-4)}


# Bodies as programs send them


@pytest.mark.parametrize(
    "headers", [(), ("Content-Type: application/x-www-form-urlencoded",), ("Content-Type: text/plain",)]
)
@pytest.mark.parametrize("path", ["/api/chat", "//api/chat", "/api/chat/"])
async def test_a_body_needs_no_media_type(headers: tuple[str, ...], path: str) -> None:
    async with FaultBackend("vllm") as backend, before(backend) as gateway:
        reply = await ask(gateway, path, chat(), *headers)
        assert (reply.status, reply.headers["content-type"]) == (200, LINES)
        assert said(lines(reply.body)) == TEXT


async def test_a_body_may_come_in_chunks() -> None:
    data = json.dumps(chat(stream=False)).encode()
    pieces = [data[:20], data[20:21], data[21:]]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    async with FaultBackend("ollama") as backend, before(backend) as gateway:
        reply = await ask(gateway, "/api/chat", body, "Transfer-Encoding: chunked")
        assert json.loads(reply.body)["message"]["content"] == TEXT


# Streams that do not end well


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["killed", "cut", "bad_chunk", "malformed", "stall", "error_then_done"])
@pytest.mark.parametrize("path", ["/api/chat", "/api/generate"])
async def test_a_failure_in_mid_stream_is_a_last_line(kind: Kind, mode: str, path: str) -> None:
    times = SHORT_TIMES if mode == "stall" else TIMES
    async with FaultBackend(kind, mode) as backend, before(backend, times) as gateway:
        reply = await ask(gateway, path, chat(prompt="Say hello."))
        *pieces, last = lines(reply.body)
        assert reply.status == 200
        assert pieces
        assert list(last) == ["error"]
        assert not any(line["done"] for line in pieces)
        assert CANARY not in last["error"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_failure_before_the_first_byte_is_a_status(kind: Kind) -> None:
    async with FaultBackend(kind, "silent") as backend, before(backend, SHORT_TIMES) as gateway:
        reply = await ask(gateway, "/api/chat", chat())
        assert (reply.status, reply.headers["content-type"]) == (504, OBJECT)
        assert list(json.loads(reply.body)) == ["error"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_silent_stream_is_kept_alive_by_empty_lines(kind: Kind) -> None:
    options = simulate.Options(kind, (simulate.Model(MODEL),), time_to_first_token=0.4)
    async with stand_in(options) as server:
        backends = {kind: {"kind": kind, "base_url": server.base_url}}
        document = {
            "llm_backend": kind,
            "backends": backends,
            "tiers": {"standard": {"models": {kind: MODEL}}},
            "state_file": "",
            "commit_after": 0.05,
            "heartbeat": 0.05,
        }
        async with running(config.build(document)) as gateway:
            server.engine.say(["Good", " day"])
            found = lines((await ask(gateway, "/api/chat", chat())).body)
    assert found[-1]["done"] is True
    assert [line["done"] for line in found[:-1]] == [False] * (len(found) - 1)
    assert said(found[:2]) == ""
    assert said(found) == "Good day"


@pytest.mark.parametrize("kind", KINDS)
async def test_a_client_that_leaves_ends_its_answer(kind: Kind) -> None:
    async with FaultBackend(kind, "stall") as backend, before(backend) as gateway:
        async with sent(gateway, "/api/chat", chat()) as raw:
            await raw.head()
            await until(lambda: len(backend.open_peers) == 1)
        await until(gateway.is_idle)
        await until(lambda: not backend.open_peers)
        assert gateway.exchanges()[-1]["endpoint"] == "ollama_chat"
        assert gateway.metric("gateway_requests_total", endpoint="ollama_chat", outcome="cancelled") == 1


# Roll-out


@pytest.mark.parametrize("dead", KINDS)
async def test_another_engine_falls_back(dead: Kind) -> None:
    alive: Kind = "vllm" if dead == "ollama" else "ollama"
    async with FaultBackend(dead, "close") as broken, FaultBackend(alive) as whole:
        backends = {
            backend.kind: {
                "kind": backend.kind,
                "servers": [{"base_url": backend.base_url, "models": [MODEL]}],
                **TIMES,
            }
            for backend in (broken, whole)
        }
        tiers = {"standard": {"models": {dead: MODEL, alive: MODEL}, "fallback": alive}}
        document = {"llm_backend": dead, "backends": backends, "tiers": tiers, "state_file": ""}
        async with running(config.build(document)) as gateway:
            reply = await ask(gateway, "/api/chat", chat())
            assert reply.headers["x-gateway-backend"] == alive
            found = lines(reply.body)
            assert said(found) == TEXT
            assert found[-1]["done_reason"] == "stop"


async def test_a_queued_request_moves_with_its_tier() -> None:
    async with FaultBackend("ollama", "silent") as old, FaultBackend("vllm") as new:
        one = {"max_concurrency": 1, "model_concurrency": 1, **TIMES, "first_token_timeout": 60, "total_timeout": 60}
        backends = {
            backend.kind: {"kind": backend.kind, "servers": [{"base_url": backend.base_url, "models": [MODEL]}], **one}
            for backend in (old, new)
        }
        tiers = {"standard": {"models": {"ollama": MODEL, "vllm": MODEL}}}
        document = {"llm_backend": "ollama", "backends": backends, "tiers": tiers, "state_file": ""}
        async with running(config.build(document)) as gateway, sent(gateway, "/api/chat", chat()):
            await until(lambda: gateway.running == 1)
            async with sent(gateway, "/api/generate", {"model": "standard", "prompt": "Hi"}) as queued:
                await until(lambda: gateway.waiting == 1)
                async with httpx2.AsyncClient(base_url=gateway.base_url, trust_env=False, verify=False) as client:
                    moved = (await client.put("/ops/rollout", json={"backend": "vllm"})).json()
                assert moved["moved"] == 1
                reply = await queued.reply()
            assert reply.headers["x-gateway-backend"] == "vllm"
            assert said(lines(reply.body)) == TEXT
            old.die()
