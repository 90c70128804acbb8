"""Stand-in for the OpenAI server of vLLM 0.32."""

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import orjson

from gateway.simulate.asgi import ClientDisconnected, Headers, HttpExchange, Receive, Scope, Send
from gateway.simulate.engine import (
    Died,
    Failed,
    Garbled,
    Generation,
    Refused,
    Reset,
    SimulatedEngine,
    SimulatedLane,
    Truncated,
)
from gateway.simulate.options import Model, Options
from gateway.simulate.text import GeneratedAnswer, count_tokens
from gateway.simulate.vllm.embeddings import EmbeddingJob, embedding_job
from gateway.simulate.vllm.errors import VllmApiError, error_detail, validation_failed
from gateway.simulate.vllm.metrics import exposition
from gateway.simulate.vllm.requests import Job, chat_job, check_model, completion_job, decode
from gateway.simulate.vllm.rerank import RerankJob, rerank_job
from gateway.simulate.vllm.responses import DONE, ENGINE_ERROR, ChatRenderer, CompletionRenderer, event
from gateway.simulate.vllm.sleep import Sleeper

JSON = "application/json"
BUSY = "The engine is currently busy and cannot accept new requests. Please try again later or on a different instance."

Handler = Callable[[HttpExchange], Awaitable[None]]


class VllmApp:
    """ASGI app of the stand-in: one model under all names of `options.models`.

    `engine` has the counters and faults.
    """

    def __init__(self, options: Options) -> None:
        self.engine = SimulatedEngine(options)
        self._model: Model = options.served[0]
        self._lane = SimulatedLane(options.max_num_seqs)
        self._routes: dict[str, tuple[str, Handler]] = {
            "/health": ("GET", self._health),
            "/ping": ("GET", self._health),
            "/version": ("GET", self._version),
            "/load": ("GET", self._load),
            "/metrics": ("GET", self._metrics),
            "/tokenize": ("POST", self._tokenize),
            "/v1/models": ("GET", self._models),
        }
        self.sleeper = Sleeper(self.engine)
        if options.dev_mode:
            self._routes |= {
                "/sleep": ("POST", self._sleep),
                "/wake_up": ("POST", self._wake_up),
                "/is_sleeping": ("GET", self._is_sleeping),
                "/server_info": ("GET", self._server_info),
            }
        if self._model.reranks:
            self._routes |= dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), ("POST", self._rerank))
        elif self._model.embedding:
            self._routes["/v1/embeddings"] = ("POST", self._embed)
        else:
            self._routes |= {
                "/v1/chat/completions": ("POST", self._chat),
                "/v1/completions": ("POST", self._completion),
            }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = HttpExchange(scope, receive, send)
        try:
            await exchange.read()
            await exchange.run_until_disconnect(self._answer(exchange), self.engine.count_cancelled)
        except ClientDisconnected:
            return
        except Died as exc:
            await exchange.drop_connection(reset=isinstance(exc, Reset))
        except Garbled:
            await exchange.garble(_media_type(exchange))

    async def _answer(self, exchange: HttpExchange) -> None:
        if exchange.path.startswith("/simulate/"):
            return await self.engine.debug_endpoint(exchange)
        self.engine.record(exchange)
        key = self.engine.options.api_key
        if key and exchange.path.startswith("/v1") and exchange.headers.get("authorization") != f"Bearer {key}":
            return await self._send(exchange, 401, {"error": "Unauthorized"})
        method, handler = self._routes.get(exchange.path, ("GET", None))
        if handler is None:
            return await self._send(exchange, 404, {"detail": "Not Found"})
        if exchange.method != method:
            return await self._send(exchange, 405, {"detail": "Method Not Allowed"}, {"allow": method})
        try:
            await handler(exchange)
        except VllmApiError as error:
            await self._send(exchange, error.status, error.body)

    async def _send(self, exchange: HttpExchange, status: int, body: Any, headers: Headers | None = None) -> None:
        data = body if isinstance(body, bytes) else orjson.dumps(body)
        await exchange.reply(status, {**(headers or {}), "content-type": JSON, **_vary(status)}, data)

    # Liveness, version, metrics, models

    async def _health(self, exchange: HttpExchange) -> None:
        await exchange.reply(200, _vary(200), b"")

    async def _version(self, exchange: HttpExchange) -> None:
        await self._send(exchange, 200, {"version": "0.32.0"})

    async def _load(self, exchange: HttpExchange) -> None:
        await self._send(exchange, 200, {"server_load": 0})  # counts only with --enable-server-load-tracking

    async def _metrics(self, exchange: HttpExchange) -> None:
        kind = "text/plain; version=1.0.0; charset=utf-8"
        await exchange.reply(200, {"content-type": kind, **_vary(200)}, self._exposition())

    def _exposition(self) -> bytes:
        return exposition(self.engine, self._model.name, is_asleep=self.sleeper.is_sleeping)

    async def _sleep(self, exchange: HttpExchange) -> None:
        level = await self.sleeper.sleep(exchange.query)
        await self._send(exchange, 200, {"status": "sleeping", "level": level})

    async def _wake_up(self, exchange: HttpExchange) -> None:
        await self.sleeper.wake_up()
        await self._send(exchange, 200, {"status": "awake", "tags": None})

    async def _is_sleeping(self, exchange: HttpExchange) -> None:
        await self._send(exchange, 200, {"is_sleeping": self.sleeper.is_sleeping})

    async def _server_info(self, exchange: HttpExchange) -> None:
        config = {"model": self._model.name, "enable_sleep_mode": self.engine.options.sleep_mode}
        await self._send(exchange, 200, {"vllm_config": {"model_config": config}, "vllm_env": {}, "system_env": {}})

    async def _tokenize(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, exchange.headers.get("content-type", ""))
        if not {"prompt", "messages"} & set(body):
            missing = (
                error_detail("missing", f"body.{name}", "Field required", body) for name in ("prompt", "messages")
            )
            raise validation_failed(*missing)
        check_model(body, self.engine.options)
        messages = body.get("messages") or [{"content": body.get("prompt", "")}]
        count = count_tokens("\n".join(str(message.get("content") or "") for message in messages))
        answer = {
            "count": count,
            "max_model_len": self._model.context_length,
            "tokens": list(range(1, count + 1)),
            "token_strs": None,
        }
        await self._send(exchange, 200, answer)

    async def _models(self, exchange: HttpExchange) -> None:
        now = int(time.time())
        cards = [
            {
                "id": model.name,
                "object": "model",
                "created": now,
                "owned_by": "vllm",
                "root": f"/models/{self._model.name.rpartition('/')[2]}",
                "parent": None,
                "max_model_len": self._model.context_length,
                "permission": [_permission(now)],
            }
            for model in self.engine.options.served
        ]
        await self._send(exchange, 200, {"object": "list", "data": cards})

    # Generation

    async def _chat(self, exchange: HttpExchange) -> None:
        options = self.engine.options
        body = decode(exchange.body, exchange.headers.get("content-type", ""))
        job = chat_job(body, self._model, options)
        await self._run(
            exchange, job, ChatRenderer(job, exchange.headers.get("x-request-id"), options.reasoning_parser)
        )

    async def _completion(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, exchange.headers.get("content-type", ""))
        job = completion_job(body, self._model, self.engine.options)
        await self._run(exchange, job, CompletionRenderer(job, exchange.headers.get("x-request-id")))

    async def _embed(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, exchange.headers.get("content-type", ""))
        job = embedding_job(body, self._model, self.engine.options)
        await self._pool(exchange, job, str(body.get("model") or self._model.name))

    async def _rerank(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, exchange.headers.get("content-type", ""))
        job = rerank_job(body, self._model, self.engine.options)
        await self._pool(exchange, job, str(body.get("model") or self._model.name))

    async def _pool(self, exchange: HttpExchange, job: EmbeddingJob | RerankJob, name: str) -> None:
        generation = self._begin()
        await self.sleeper.until_awake()
        async with self.engine.slot(self._lane) as clock:
            await generation.prefill(job.tokens, 0, clock)
            try:
                await generation.end(0, "stop")
            except Failed as exc:
                raise VllmApiError(500, "Internal server error", "InternalServerError") from exc
        await self._send(exchange, 200, job.answer(name))

    def _begin(self) -> Generation:
        try:
            return self.engine.begin()
        except Refused as exc:
            message, kind = (
                (BUSY, "Service Unavailable") if exc.status == 503 else ("Internal server error", "InternalServerError")
            )
            raise VllmApiError(exc.status, message, kind) from exc

    async def _run(self, exchange: HttpExchange, job: Job, renderer: ChatRenderer | CompletionRenderer) -> None:
        generation = self._begin()
        if job.stream:  # vLLM sends the response headers before it queues the request
            await exchange.start(200, {"content-type": "text/event-stream; charset=utf-8", **_vary(200)})
        await self.sleeper.until_awake()
        async with self.engine.slot(self._lane) as clock:
            answers = [
                self.engine.answer(prompt, job.limits, variant=i % job.choices) for i, prompt in enumerate(job.replies)
            ]
            await generation.prefill(job.prompt_tokens, job.prompt.images, clock)
            if job.stream:
                await self._stream(exchange, job, renderer, generation, answers)
            else:
                await self._plain(exchange, renderer, generation, answers)

    async def _stream(
        self,
        exchange: HttpExchange,
        job: Job,
        renderer: ChatRenderer | CompletionRenderer,
        generation: Generation,
        answers: list[GeneratedAnswer],
    ) -> None:
        deltas = [renderer.deltas(i, answer) for i, answer in enumerate(answers)]
        longest = max(len(answer.pieces) for answer in answers)
        try:
            for number in range(longest):
                await generation.token(number)
                data = b"".join(next(delta, b"") for delta in deltas)
                if number == 0:
                    data = renderer.roles() + data
                if data:
                    await exchange.write(data)
            await generation.end(longest, answers[0].finish)
        except Failed:
            await exchange.end(event(ENGINE_ERROR) + DONE)
            return
        except Truncated:
            await exchange.end()
            return
        rest = b"".join(_rest(delta) for delta in deltas)
        await exchange.end(rest + (renderer.usage_chunk(answers) if job.include_usage else b"") + DONE)

    async def _plain(
        self,
        exchange: HttpExchange,
        renderer: ChatRenderer | CompletionRenderer,
        generation: Generation,
        answers: list[GeneratedAnswer],
    ) -> None:
        longest = max(len(answer.pieces) for answer in answers)
        try:
            for number in range(longest):
                await generation.token(number)
            await generation.end(longest, answers[0].finish)
        except Failed as exc:
            raise VllmApiError(500, "Internal server error", "InternalServerError") from exc
        except Truncated:  # half of the JSON, then a clean end
            body = renderer.body(answers)
            await exchange.start(200, {"content-type": JSON, **_vary(200)})
            await exchange.end(body[: len(body) // 2])
            return
        await self._send(exchange, 200, renderer.body(answers))


def _rest(deltas: Iterator[bytes]) -> bytes:
    return b"".join(deltas)


def _vary(status: int) -> Headers:
    """Return the CORS header, which only the outermost handler's errors lack."""
    return {} if status == 500 else {"vary": "Origin"}


def _permission(now: int) -> dict[str, Any]:
    return {
        "id": f"modelperm-{secrets.token_hex(8)}",
        "object": "model_permission",
        "created": now,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }


def _media_type(exchange: HttpExchange) -> str:
    """Return the type of the answer that the request asks for."""
    return "text/event-stream; charset=utf-8" if b'"stream":true' in exchange.body.replace(b" ", b"") else JSON
