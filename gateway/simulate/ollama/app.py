"""Stand-in for Ollama 0.33 or 0.24, with its native and its OpenAI-compatible API."""

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gateway.simulate.asgi import ClientDisconnected, HttpExchange, Receive, Scope, Send
from gateway.simulate.engine import Died, Garbled, Reset, SimulatedEngine
from gateway.simulate.ollama.catalog import Catalog, full_name, go_timestamp, is_name
from gateway.simulate.ollama.embeddings import Embeddings
from gateway.simulate.ollama.generation import Generations, send
from gateway.simulate.ollama.requests import (
    NATIVE_CHAT,
    NATIVE_GENERATE,
    V1_CHAT,
    V1_COMPLETION,
    EndpointError,
    Job,
    OllamaApiError,
    decode,
    keep_alive,
    native_images,
    native_messages,
    native_options,
    native_think,
    schema_of,
    strings,
    top_logprobs,
    v1_format,
    v1_messages,
    v1_think,
)
from gateway.simulate.ollama.responses import (
    NATIVE_JSON,
    NativeChat,
    NativeGenerate,
    V1Chat,
    V1Completion,
    dump,
    error_body,
    is_endpoint_error,
)
from gateway.simulate.ollama.scheduler import Scheduler
from gateway.simulate.options import Model, Options
from gateway.simulate.text import Prompt

_LOCAL_ORIGIN = re.compile(
    r"(https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|(app|file|tauri)://.*|vscode-(webview|file)://.*)$"
)

Handler = Callable[[HttpExchange], Awaitable[None]]


class OllamaApp:
    """ASGI app of the stand-in.

    `engine` has the counters and faults, `scheduler` the loaded models.
    """

    def __init__(self, options: Options) -> None:
        self.engine = SimulatedEngine(options)
        self.scheduler = Scheduler(options, self.engine.clock, self.engine.gpu)
        self._catalog = Catalog(self.engine, self.scheduler)
        self._generations = Generations(self.engine, self.scheduler)
        self._embeddings = Embeddings(self.engine, self._catalog, self._generations)
        self._newer = options.generation == "0.33"
        self._routes: dict[str, tuple[str, Handler]] = {
            "/": ("HEAD, GET", self._root),
            "/api/version": ("HEAD, GET", self._version),
            "/api/tags": ("HEAD, GET", self._tags),
            "/api/ps": ("GET", self._ps),
            "/api/show": ("POST", self._show),
            "/api/chat": ("POST", self._chat),
            "/api/generate": ("POST", self._generate),
            "/api/embed": ("POST", self._embeddings.native),
            "/v1/chat/completions": ("POST", self._v1_chat),
            "/v1/completions": ("POST", self._v1_completion),
            "/v1/embeddings": ("POST", self._embeddings.v1),
            "/v1/models": ("GET", self._v1_models),
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
        if exchange.path == "/simulate/freeze":
            return await self._freeze(exchange)
        if exchange.path.startswith("/simulate/"):
            return await self.engine.debug_endpoint(exchange)
        self.engine.record(exchange)
        origin = exchange.headers.get("origin")
        if origin is not None and not _LOCAL_ORIGIN.match(origin):
            return await exchange.reply(403, {}, b"")
        methods, handler = self._route(exchange.path)
        if handler is None:
            return await exchange.reply(404, {"content-type": "text/plain"}, b"404 page not found")
        if exchange.method not in methods.split(", "):
            return await exchange.reply(
                405, {"allow": methods, "content-type": "text/plain"}, b"405 method not allowed"
            )
        try:
            await handler(exchange)
        except OllamaApiError as error:
            await self._send_error(exchange, error)

    async def _freeze(self, exchange: HttpExchange) -> None:
        """Serve `POST /simulate/freeze`: the model of the body answers nothing until it is unloaded."""
        try:
            model = self._catalog.find(str(json.loads(exchange.body)["model"]))
        except (ValueError, KeyError, TypeError):
            model = None
        is_done = model is not None and self.scheduler.freeze(model)
        answer = {"frozen": True} if is_done else {"error": "expected the name of a loaded model"}
        await exchange.reply(200 if is_done else 400, {"content-type": "application/json"}, dump(answer))

    def _route(self, path: str) -> tuple[str, Handler | None]:
        if path.startswith("/v1/models/") and "/" not in path.removeprefix("/v1/models/"):
            return "GET", self._v1_model
        return self._routes.get(path, ("GET", None))

    async def _send_error(self, exchange: HttpExchange, error: OllamaApiError) -> None:
        openai = exchange.path.startswith("/v1/")
        kind, body = error_body(openai, error.status, error.message, is_endpoint_error(error))
        if error.late:
            await exchange.start(error.status, {"content-type": "application/json"})
            await exchange.end(body)
        else:
            await exchange.reply(error.status, {"content-type": kind}, body)

    # Model lists, version, liveness

    async def _root(self, exchange: HttpExchange) -> None:
        await exchange.reply(200, {"content-type": "text/plain; charset=utf-8"}, b"Ollama is running")

    async def _version(self, exchange: HttpExchange) -> None:
        await send(exchange, NATIVE_JSON, dump({"version": "0.33.0" if self._newer else "0.24.0"}))

    async def _tags(self, exchange: HttpExchange) -> None:
        await send(exchange, NATIVE_JSON, dump(self._catalog.tags()))

    async def _ps(self, exchange: HttpExchange) -> None:
        await send(exchange, NATIVE_JSON, dump(self._catalog.ps()))

    async def _show(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "api.ShowRequest", {"model": "string"}, "missing request body")
        name = str(body.get("model") or body.get("name") or "")
        if not name:
            raise OllamaApiError(400, "model is required")
        model = self._catalog.find(name)
        if model is None:
            shown = f"{name}:latest" if self._newer and ":" not in name else name
            raise OllamaApiError(404, f"model '{shown}' not found")
        await send(exchange, NATIVE_JSON, dump(self._catalog.show(model)))

    async def _v1_models(self, exchange: HttpExchange) -> None:
        await send(exchange, "application/json", dump(self._catalog.v1_models()) + b"\n")

    async def _v1_model(self, exchange: HttpExchange) -> None:
        name = exchange.path.removeprefix("/v1/models/")
        model = self._catalog.find(name)
        if model is None:
            raise OllamaApiError(
                404, f"model '{f'{name}:latest' if self._newer and ':' not in name else name}' not found"
            )
        await send(exchange, "application/json", dump(self._catalog.v1_model(model, name)) + b"\n")

    # Generation

    async def _chat(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "api.ChatRequest", NATIVE_CHAT, "missing request body")
        messages = native_messages(body)
        images = tuple(image for message in messages for image in native_images(message))
        think, keep_alive_seconds = native_think(body.get("think")), keep_alive(body)
        top_logprobs(body)
        model = self._model(str(body.get("model") or ""))
        turns = [(str(message.get("role", "")).lower(), str(message.get("content") or "")) for message in messages]
        prompt = self._prompt(
            body, model, turns, len(images), think, body.get("format"), body.get("stream") is not False
        )
        if not messages:
            await self._load_native(
                exchange, model, body, keep_alive_seconds, {"message": {"role": "assistant", "content": ""}}
            )
            return
        job = self._native_job(body, model, prompt, images, keep_alive_seconds)
        await self._generations.run(exchange, job, NativeChat(job))

    async def _generate(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "api.GenerateRequest", NATIVE_GENERATE, "missing request body")
        images = tuple(native_images(body))
        think, keep_alive_seconds = native_think(body.get("think")), keep_alive(body)
        top_logprobs(body)
        if not body.get("model"):
            raise OllamaApiError(404, "model '' not found")
        unloads = not body.get("prompt") and keep_alive_seconds == 0  # for every sort of model
        model = self._model(str(body["model"]), takes_embedding=unloads)
        if body.get("raw") and (body.get("template") or body.get("system") or body.get("context")):
            raise OllamaApiError(400, "raw mode does not support template, system, or context")
        if body.get("suffix"):
            raise OllamaApiError(400, f"{full_name(model)} does not support insert")
        system = [("system", str(body["system"]))] if body.get("system") else []
        turns = [*system, ("user", str(body.get("prompt") or ""))]
        prompt = self._prompt(
            body, model, turns, len(images), think, body.get("format"), body.get("stream") is not False
        )
        if not body.get("prompt"):
            await self._load_native(exchange, model, body, keep_alive_seconds, {"response": ""})
            return
        job = self._native_job(body, model, prompt, images, keep_alive_seconds)
        await self._generations.run(exchange, job, NativeGenerate(job))

    async def _v1_chat(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "openai.ChatCompletionRequest", V1_CHAT, "EOF")
        if not body.get("messages"):
            raise EndpointError(400, "[] is too short - 'messages'")
        turns, images = v1_messages(body["messages"])
        think = v1_think(body, self.engine.options.generation)
        top_logprobs(body)
        model = self._model(str(body.get("model") or ""))
        prompt = self._prompt(
            body, model, turns, len(images), think, v1_format(body.get("response_format")), body.get("stream") is True
        )
        job = self._v1_job(body, model, prompt, tuple(images))
        renderer = V1Chat(job, self._newer)
        if turns:
            await self._generations.run(exchange, job, renderer)
        else:
            await self._load_v1(exchange, job, renderer)

    async def _v1_completion(self, exchange: HttpExchange) -> None:
        body = decode(exchange.body, "openai.CompletionRequest", V1_COMPLETION, "EOF")
        model = self._model(str(body.get("model") or ""))
        if body.get("suffix"):
            raise OllamaApiError(400, f"{full_name(model)} does not support insert")
        prompt = self._prompt({}, model, [("user", str(body.get("prompt") or ""))], 0, False, None, False)
        job = self._v1_job({**body, "logprobs": None}, model, prompt, ())
        renderer = V1Completion(job)
        if body.get("prompt"):
            await self._generations.run(exchange, job, renderer)
        else:
            await self._load_v1(exchange, job, renderer)

    def _model(self, name: str, *, takes_embedding: bool = False) -> Model:
        if not name:
            raise OllamaApiError(400, "model is required")
        model = self._catalog.find(name)
        if model is None:
            if name.endswith((":cloud", "-cloud")):
                raise OllamaApiError(403, "ollama cloud is disabled: remote model is unavailable")
            raise (
                OllamaApiError(404, f"model '{name}' not found")
                if is_name(name)
                else OllamaApiError(400, "invalid model name")
            )
        if model.embedding and not takes_embedding:
            raise OllamaApiError(400, f'"{name}" does not support chat')
        return model

    def _prompt(
        self,
        body: Mapping[str, Any],
        model: Model,
        turns: list[tuple[str, str]],
        images: int,
        think: Any,
        output_format: Any,
        late: bool,
    ) -> Prompt:
        if think and not model.thinking:
            raise OllamaApiError(400, f'"{body.get("model")}" does not support thinking')
        if body.get("tools") and not model.tools:
            raise OllamaApiError(400, f"{full_name(model)} does not support tools")
        if model.family.startswith("qwen3vl"):
            turns = [turn for turn in turns if turn[0] != "developer"]  # its renderer drops them silently
        thinks = model.always_thinks or (model.thinking and think is not False)
        schema = schema_of(output_format, self.engine.options.generation, late)
        return Prompt(
            tuple(turns), images, tuple(body.get("tools") or ()), schema, None, thinks and not model.leaks, model.leaks
        )

    def _native_job(
        self,
        body: dict[str, Any],
        model: Model,
        prompt: Prompt,
        images: tuple[bytes, ...],
        keep_alive_seconds: float | None,
    ) -> Job:
        options = native_options(body)
        return Job(
            requested_model=str(body["model"]),
            model=model,
            prompt=prompt,
            images=images,
            tokens=options.get("num_predict") or -1,
            stop=strings(options.get("stop")),
            stream=body.get("stream") is not False,
            truncate=body.get("truncate") is not False,
            context_length=options.get("num_ctx"),
            keep_alive=keep_alive_seconds,
            top_logprobs=top_logprobs(body),
            raw=body.get("raw") is True,
            repeat_penalty=options.get("repeat_penalty", 1.0),
        )

    def _v1_job(self, body: dict[str, Any], model: Model, prompt: Prompt, images: tuple[bytes, ...]) -> Job:
        return Job(
            requested_model=str(body["model"]),
            model=model,
            prompt=prompt,
            images=images,
            tokens=int(body.get("max_tokens") or -1),
            stop=strings(body.get("stop")),
            stream=body.get("stream") is True,
            top_logprobs=top_logprobs(body),
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    async def _load_native(
        self,
        exchange: HttpExchange,
        model: Model,
        body: dict[str, Any],
        keep_alive_seconds: float | None,
        empty: dict[str, Any],
    ) -> None:
        if keep_alive_seconds == 0:
            self.scheduler.expire(model)
        else:
            async with self._generations.loaded(model, native_options(body).get("num_ctx"), keep_alive_seconds):
                pass
        reason = "unload" if keep_alive_seconds == 0 else "load"
        line = {"model": body["model"], "created_at": go_timestamp(), **empty, "done": True, "done_reason": reason}
        await send(exchange, NATIVE_JSON, dump(line))

    async def _load_v1(self, exchange: HttpExchange, job: Job, renderer: V1Chat) -> None:
        """Load the model and answer as the OpenAI API answers a request without any text."""
        async with self._generations.loaded(job.model, None, None):
            pass
        await send(exchange, renderer.plain_type, renderer.empty("load"))


def _media_type(exchange: HttpExchange) -> str:
    """Return the type of the answer that the request asks for: Ollama's own API streams by default."""
    body = exchange.body.replace(b" ", b"")
    if exchange.path.startswith("/api/"):
        return NATIVE_JSON if b'"stream":false' in body else "application/x-ndjson"
    return "text/event-stream" if b'"stream":true' in body else "application/json"
