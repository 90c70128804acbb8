"""A stand-in that speaks as Ollama 0.33 or 0.24 does, at both of its doors."""

import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from gateway.simulate.engine import Died, Engine, Failed, Generation, Refused, Truncated
from gateway.simulate.http import ClientLeft, Exchange, Receive, Scope, Send
from gateway.simulate.ollama_doors import (
    NATIVE_JSON,
    Door,
    Figures,
    NativeChat,
    NativeGenerate,
    V1Chat,
    V1Completion,
    dump,
    error_body,
    is_by_door,
)
from gateway.simulate.ollama_models import Busy, Catalog, full_name, keep_alive_seconds, stamp
from gateway.simulate.ollama_requests import (
    NATIVE_CHAT,
    NATIVE_GENERATE,
    V1_CHAT,
    V1_COMPLETION,
    ApiError,
    DoorError,
    Job,
    decode,
    is_picture,
    native_images,
    native_messages,
    schema_of,
    strings,
    v1_format,
    v1_messages,
    v1_think,
)
from gateway.simulate.options import Model, Options
from gateway.simulate.words import Answer, Piece, Prompt, count_tokens

BUSY = "server busy, please try again.  maximum pending requests exceeded"
CHUNKED_FROM = 2048  # bytes of an answer that Go's server keeps to learn its length
TURN_TOKENS = 4
_LOCAL_ORIGIN = re.compile(r"(https?://(localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(:\d+)?|(app|file|tauri)://.*|vscode-(webview|file)://.*)$")

Handler = Callable[[Exchange], Awaitable[None]]


class Ollama:
    """The ASGI app. `engine` has the counters and faults, `catalog` the models and what is loaded."""

    def __init__(self, options: Options) -> None:
        self.engine = Engine(options)
        self.catalog = Catalog(options)
        self._newer = options.generation == "0.33"
        self._routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self._root),
            "/api/version": ("GET", self._version),
            "/api/tags": ("GET", self._tags),
            "/api/ps": ("GET", self._ps),
            "/api/show": ("POST", self._show),
            "/api/chat": ("POST", self._chat),
            "/api/generate": ("POST", self._generate),
            "/api/embed": ("POST", self._embed),
            "/v1/chat/completions": ("POST", self._v1_chat),
            "/v1/completions": ("POST", self._v1_completion),
            "/v1/embeddings": ("POST", self._v1_embed),
            "/v1/models": ("GET", self._v1_models),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await exchange.read()
            await exchange.while_client_stays(self._answer(exchange), self.engine.count_cancelled)
        except ClientLeft:
            return
        except Died:
            await exchange.hang_up()

    async def _answer(self, exchange: Exchange) -> None:
        if exchange.path.startswith("/simulate/"):
            return await self.engine.debug_door(exchange)
        self.engine.remember(exchange)
        origin = exchange.headers.get("origin")
        if origin is not None and not _LOCAL_ORIGIN.match(origin):
            return await exchange.reply(403, {}, b"")
        method, handler = self._route(exchange.path)
        if handler is None:
            return await exchange.reply(404, {"content-type": "text/plain"}, b"404 page not found")
        if exchange.method not in (method, "HEAD" if method == "GET" else method):
            return await exchange.reply(405, {"allow": method, "content-type": "text/plain"}, b"405 method not allowed")
        try:
            await handler(exchange)
        except ApiError as error:
            await self._refuse(exchange, error)

    def _route(self, path: str) -> tuple[str, Handler | None]:
        if path.startswith("/v1/models/") and "/" not in path.removeprefix("/v1/models/"):
            return "GET", self._v1_model
        return self._routes.get(path, ("GET", None))

    async def _refuse(self, exchange: Exchange, error: ApiError) -> None:
        openai = exchange.path.startswith("/v1/")
        kind, body = error_body(openai, error.status, error.message, is_by_door(error))
        if error.late:
            await exchange.start(error.status, {"content-type": "application/json"})
            await exchange.end(body)
        else:
            await exchange.reply(error.status, {"content-type": kind}, body)

    async def _send(self, exchange: Exchange, kind: str, body: bytes) -> None:
        if len(body) > CHUNKED_FROM:
            await exchange.start(200, {"content-type": kind})
            await exchange.end(body)
        else:
            await exchange.reply(200, {"content-type": kind}, body)

    # Lists and small things.

    async def _root(self, exchange: Exchange) -> None:
        await exchange.reply(200, {"content-type": "text/plain; charset=utf-8"}, b"Ollama is running")

    async def _version(self, exchange: Exchange) -> None:
        await self._send(exchange, NATIVE_JSON, dump({"version": "0.33.0" if self._newer else "0.24.0"}))

    async def _tags(self, exchange: Exchange) -> None:
        await self._send(exchange, NATIVE_JSON, dump(self.catalog.tags()))

    async def _ps(self, exchange: Exchange) -> None:
        await self._send(exchange, NATIVE_JSON, dump(self.catalog.ps()))

    async def _show(self, exchange: Exchange) -> None:
        body = decode(exchange.body, "api.ShowRequest", {"model": "string"}, "missing request body")
        name = str(body.get("model") or body.get("name") or "")
        model = self.catalog.find(name)
        if model is None:
            shown = f"{name}:latest" if self._newer and ":" not in name else name
            raise ApiError(404, f"model '{shown}' not found")
        await self._send(exchange, NATIVE_JSON, dump(self.catalog.show(model)))

    async def _v1_models(self, exchange: Exchange) -> None:
        await self._send(exchange, "application/json", dump(self.catalog.v1_models()) + b"\n")

    async def _v1_model(self, exchange: Exchange) -> None:
        name = exchange.path.removeprefix("/v1/models/")
        await self._send(exchange, "application/json", dump(self.catalog.v1_model(self._model(name), name)) + b"\n")

    async def _embed(self, exchange: Exchange) -> None:
        self._no_embeddings(decode(exchange.body, "api.EmbedRequest", {"model": "string"}, "missing request body"))

    async def _v1_embed(self, exchange: Exchange) -> None:
        self._no_embeddings(decode(exchange.body, "openai.EmbedRequest", {"model": "string"}, "EOF"))

    def _no_embeddings(self, body: dict[str, Any]) -> None:
        self._model(str(body.get("model", "")))
        raise ApiError(
            501,
            "This server does not support embeddings. Start it with `--embeddings`" if self._newer else "this model does not support embeddings",
        )

    # Generation.

    async def _chat(self, exchange: Exchange) -> None:
        body = decode(exchange.body, "api.ChatRequest", NATIVE_CHAT, "missing request body")
        messages = native_messages(body)
        images = tuple(image for message in messages for image in native_images(message))
        model = self._model(str(body.get("model") or ""))
        turns = [(str(message.get("role", "")).lower(), str(message.get("content") or "")) for message in messages]
        prompt = self._prompt(body, model, turns, len(images), body.get("think"), body.get("format"))
        if not messages:
            await self._load_only(exchange, model, body, {"message": {"role": "assistant", "content": ""}})
            return
        job = self._native_job(body, model, prompt, images)
        await self._run(exchange, job, NativeChat(job))

    async def _generate(self, exchange: Exchange) -> None:
        body = decode(exchange.body, "api.GenerateRequest", NATIVE_GENERATE, "missing request body")
        images = tuple(native_images(body))
        model = self._model(str(body.get("model") or ""))
        system = [("system", str(body["system"]))] if body.get("system") else []
        turns = [*system, ("user", str(body.get("prompt") or ""))]
        prompt = self._prompt(body, model, turns, len(images), body.get("think"), body.get("format"))
        if not body.get("prompt"):
            await self._load_only(exchange, model, body, {"response": ""})
            return
        job = self._native_job(body, model, prompt, images)
        await self._run(exchange, job, NativeGenerate(job))

    async def _v1_chat(self, exchange: Exchange) -> None:
        body = decode(exchange.body, "openai.ChatCompletionRequest", V1_CHAT, "EOF")
        if not body.get("messages"):
            raise DoorError(400, "[] is too short - 'messages'")
        turns, images = v1_messages(body["messages"])
        think = v1_think(body)
        model = self._model(str(body.get("model") or ""))
        prompt = self._prompt(body, model, turns, len(images), think, v1_format(body.get("response_format")))
        job = self._v1_job(body, model, prompt, tuple(images))
        await self._run(exchange, job, V1Chat(job, self._newer))

    async def _v1_completion(self, exchange: Exchange) -> None:
        body = decode(exchange.body, "openai.CompletionRequest", V1_COMPLETION, "EOF")
        model = self._model(str(body.get("model") or ""))
        prompt = self._prompt({}, model, [("user", str(body.get("prompt") or ""))], 0, False, None)
        job = self._v1_job(body, model, prompt, ())
        await self._run(exchange, job, V1Completion(job))

    def _model(self, name: str) -> Model:
        if not name:
            raise ApiError(400, "model is required")
        model = self.catalog.find(name)
        if model is None:
            raise ApiError(404, f"model '{name}' not found")
        return model

    def _prompt(self, body: dict[str, Any], model: Model, turns: list[tuple[str, str]], images: int, think: Any, asked: Any) -> Prompt:
        if think and not model.thinking:
            raise ApiError(400, f'"{body.get("model")}" does not support thinking')
        if body.get("tools") and not model.tools:
            raise ApiError(400, f"{full_name(model)} does not support tools")
        if model.family.startswith("qwen3vl"):
            turns = [turn for turn in turns if turn[0] != "developer"]  # its renderer drops them without a word
        thinks = model.always_thinks or (model.thinking and think is not False)
        return Prompt(tuple(turns), images, tuple(body.get("tools") or ()), schema_of(asked), None, thinks)

    def _native_job(self, body: dict[str, Any], model: Model, prompt: Prompt, images: tuple[bytes, ...]) -> Job:
        options = body.get("options") or {}
        return Job(
            asked=str(body["model"]),
            model=model,
            prompt=prompt,
            images=images,
            tokens=int(options.get("num_predict") or -1),
            stop=strings(options.get("stop")),
            stream=body.get("stream") is not False,
            truncate=body.get("truncate") is not False,
            context_length=options.get("num_ctx"),
            keep_alive=keep_alive_seconds(body.get("keep_alive")),
            top_logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
        )

    def _v1_job(self, body: dict[str, Any], model: Model, prompt: Prompt, images: tuple[bytes, ...]) -> Job:
        return Job(
            asked=str(body["model"]),
            model=model,
            prompt=prompt,
            images=images,
            tokens=int(body.get("max_tokens") or -1),
            stop=strings(body.get("stop")),
            stream=body.get("stream") is True,
            top_logprobs=int(body.get("top_logprobs") or 0) if body.get("logprobs") else None,
            include_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )

    async def _load_only(self, exchange: Exchange, model: Model, body: dict[str, Any], empty: dict[str, Any]) -> None:
        keep_alive = keep_alive_seconds(body.get("keep_alive"))
        if keep_alive == 0:
            self.catalog.unload(model)
        else:
            await self._load(model, (body.get("options") or {}).get("num_ctx"), keep_alive)
        reason = "unload" if keep_alive == 0 else "load"
        line = {"model": body["model"], "created_at": stamp(), **empty, "done": True, "done_reason": reason}
        await self._send(exchange, NATIVE_JSON, dump(line))

    async def _load(self, model: Model, context_length: int | None, keep_alive: float | None) -> float:
        try:
            return await self.catalog.load(model, context_length, keep_alive)
        except Busy as exc:
            raise ApiError(503, BUSY) from exc

    async def _run(self, exchange: Exchange, job: Job, door: Door) -> None:
        try:
            generation = self.engine.begin()
        except Refused as exc:
            raise ApiError(exc.status, BUSY if exc.status == 503 else "model runner has unexpectedly stopped") from exc
        began = time.monotonic()
        with self.engine.queued():
            load = await self._load(job.model, job.context_length, job.keep_alive)
        async with self.engine.slot(self.catalog.lane(job.model)):
            await self._reply(exchange, job, door, generation, began, load)
        if job.keep_alive == 0:
            self.catalog.unload(job.model)

    async def _reply(self, exchange: Exchange, job: Job, door: Door, generation: Generation, began: float, load: float) -> None:
        self._check_images(job)
        context = job.context_length or job.model.context_length
        prompt, prompt_tokens, read_tokens = self._fitted(job, context)
        answer = self.engine.answer(prompt, job.limits(context), job.model.bare_json_calls)
        prefill = time.monotonic()
        await generation.prefill(read_tokens)
        first = time.monotonic()

        def figures() -> Figures:
            now = time.monotonic()
            return Figures(prompt_tokens, len(answer.pieces), _ns(now - began), _ns(load), _ns(first - prefill), _ns(now - first))

        try:
            if job.stream:
                await self._stream(exchange, job, door, generation, answer, figures)
            else:
                await self._plain(exchange, door, generation, answer, figures)
        except Failed as exc:
            self.catalog.unload(job.model)  # the runner is gone; the next request starts another
            if not exchange.started:
                raise ApiError(500, "an error was encountered while running the model: unexpected EOF") from exc
            await exchange.end(door.lost())

    async def _stream(self, exchange: Exchange, job: Job, door: Door, generation: Generation, answer: Answer, figures: Callable[[], Figures]) -> None:
        """Headers leave with the first token. A call is held back until it is whole; so is what might become one."""
        content = answer.joined("content")
        held = bool(answer.calls) or (bool(job.prompt.tools) and job.model.bare_json_calls and content.startswith("{"))
        try:
            for number, piece in enumerate(answer.pieces):
                await generation.token(number)
                if piece.kind == "thinking" or (piece.kind == "content" and not held):
                    await self._write(exchange, door, door.piece(piece))
            if answer.calls:
                await self._write(exchange, door, door.calls(answer.calls))
            elif held:
                await self._write(exchange, door, door.piece(_one_piece(content)))
            await generation.end(len(answer.pieces), "length" if answer.finish == "length" else "stop")
        except Truncated:
            await self._write(exchange, door, b"")
            await exchange.end()
            return
        await self._write(exchange, door, b"")
        await exchange.end(b"" if answer.broken else door.end(answer, figures()))

    async def _write(self, exchange: Exchange, door: Door, data: bytes) -> None:
        if not exchange.started:
            await exchange.start(200, {"content-type": door.stream_type})
        if data:
            await exchange.write(data)

    async def _plain(self, exchange: Exchange, door: Door, generation: Generation, answer: Answer, figures: Callable[[], Figures]) -> None:
        try:
            for number in range(len(answer.pieces)):
                await generation.token(number)
            await generation.end(len(answer.pieces), answer.finish)
        except Truncated:
            answer = Answer(answer.pieces, answer.finish, broken=True)
        await self._send(exchange, door.plain_type, door.whole(answer, figures()))

    def _check_images(self, job: Job) -> None:
        if job.images and not job.model.vision:
            if not self._newer:
                raise ApiError(500, "Failed to create new sequence: this model is missing data required for image input", job.stream)
            raise self._runner_refusal("Multimodal data provided, but model does not support multimodal requests.", job.stream)
        if not all(is_picture(image) for image in job.images):
            if not self._newer:
                raise ApiError(500, "Failed to create new sequence: failed to process inputs: image: unknown format", job.stream)
            raise self._runner_refusal("Failed to load image or audio file", job.stream)

    def _runner_refusal(self, message: str, late: bool, kind: str = "invalid_request_error", **more: int) -> ApiError:
        inner = {"error": {"code": 400, "message": message, "type": kind, **more}}
        return ApiError(400, dump(inner).decode(), late)

    def _fitted(self, job: Job, context: int) -> tuple[Prompt, int, int]:
        """The prompt cut to the context, its tokens, and the tokens that had to be read for that (the older runner reads all).

        Raises:
            ApiError: it is too long and `truncate` is false.
        """
        text = job.prompt.text
        around = len(job.prompt.turns) * TURN_TOKENS + job.prompt.images * (1024 if self._newer else 6)
        if job.prompt.tools:
            around += count_tokens(dump(list(job.prompt.tools)).decode())
        tokens = count_tokens(text) + around
        if tokens <= context:
            return job.prompt, tokens, tokens
        if not job.truncate:
            if not self._newer:
                raise ApiError(400, "the input length exceeds the context length", job.stream)
            message = f"request ({tokens} tokens) exceeds the available context size ({context} tokens), try increasing it"
            raise self._runner_refusal(message, job.stream, "exceed_context_size_error", n_prompt_tokens=tokens, n_ctx=context)
        kept = context // 2 + 2 if self._newer else context
        cut = Prompt((("user", text.encode()[-4 * kept :].decode(errors="ignore")),), job.prompt.images, thinks=job.prompt.thinks)
        return cut, kept, kept if self._newer else tokens


def _one_piece(content: str) -> Piece:
    return Piece("content", content, content)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
