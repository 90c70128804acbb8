"""One generation on the Ollama stand-in: get a runner, take one of its slots, truncate the prompt
to the context, then render the tokens in the format of the endpoint.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.simulate.asgi import HttpExchange
from gateway.simulate.clock import Clock
from gateway.simulate.engine import Failed, Generation, Refused, SimulatedEngine, Truncated
from gateway.simulate.ollama.requests import Job, OllamaApiError, is_image, runner_refusal
from gateway.simulate.ollama.responses import Figures, Renderer, dump
from gateway.simulate.ollama.scheduler import LoadFailed, Runner, Scheduler, TooManyPending
from gateway.simulate.options import Model
from gateway.simulate.text import GeneratedAnswer, Piece, Prompt, count_tokens

OUT_OF_MEMORY = "llama runner process has terminated: cudaMalloc failed: out of memory"
BUSY = "server busy, please try again.  maximum pending requests exceeded"
CHUNKED_FROM = 2048  # bytes; Go's server buffers up to this many to find out the content-length
TURN_TOKENS = 4


async def send(exchange: HttpExchange, kind: str, body: bytes) -> None:
    """Send a complete response as Go's server does: with a content-length only if it is short."""
    if len(body) > CHUNKED_FROM:
        await exchange.start(200, {"content-type": kind})
        await exchange.end(body)
    else:
        await exchange.reply(200, {"content-type": kind}, body)


class Generations:
    """Generations of one server."""

    def __init__(self, engine: SimulatedEngine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._newer = engine.options.generation == "0.33"

    @asynccontextmanager
    async def loaded(
        self, model: Model, context_length: int | None, keep_alive: float | None
    ) -> AsyncIterator[tuple[Runner, float]]:
        """Keep a runner of `model` loaded during the block; yield it and the seconds that the load
        took.

        Raises:
            OllamaApiError: too many requests wait for a load.
        """
        runners = self._scheduler.runner(model, context_length, keep_alive)
        try:
            with self._engine.queued():
                found = await runners.__aenter__()
        except TooManyPending as exc:
            raise OllamaApiError(503, BUSY) from exc
        except LoadFailed as exc:
            raise OllamaApiError(500, OUT_OF_MEMORY) from exc
        try:
            yield found
        finally:
            await runners.__aexit__(None, None, None)

    async def run(self, exchange: HttpExchange, job: Job, renderer: Renderer) -> None:
        """Answer `job`.

        Raises:
            OllamaApiError: it failed before anything was sent.
        """
        try:
            generation = self._engine.begin()
        except Refused as exc:
            raise OllamaApiError(
                exc.status, BUSY if exc.status == 503 else "model runner has unexpectedly stopped"
            ) from exc
        began = self._engine.clock.now()
        async with (
            self.loaded(job.model, job.context_length, job.keep_alive) as (runner, load),
            self._scheduler.served(runner),
            self._engine.slot(runner.lane, len(job.images)) as clock,
        ):
            waited = self._engine.clock.now() - began - load
            try:
                await self._reply(
                    exchange, job, renderer, _Work(generation, clock, runner.context_length, load, load + waited)
                )
            except Failed as exc:
                self._scheduler.crash(runner)  # the next request loads the model again
                if not exchange.started:
                    raise OllamaApiError(
                        500, "an error was encountered while running the model: unexpected EOF"
                    ) from exc
                await exchange.end(renderer.crash())

    async def _reply(self, exchange: HttpExchange, job: Job, renderer: Renderer, work: "_Work") -> None:
        self._check_images(job)
        if job.repeat_penalty == 0 and self._newer:
            raise runner_refusal(
                "Failed to initialize samplers: penalty_repeat must be finite and greater than 0", job.stream
            )
        prompt, prompt_tokens, read_tokens = self._fitted(job, work.context_length)
        answer = self._engine.answer(
            prompt, job.limits(work.context_length, self._engine.options), job.model.bare_json_calls
        )
        now = self._engine.clock.now
        before = now()
        await work.generation.prefill(read_tokens, len(job.images), work.clock)
        first = now()

        def figures() -> Figures:
            tokens, prefill = now() - first, first - before
            if not self._newer and len(answer.pieces) == 1:
                tokens = 0.0  # the older version counts from the end of the first token
            return Figures(
                prompt_tokens,
                len(answer.pieces),
                _ns(work.before + prefill + tokens),
                _ns(work.load),
                _ns(prefill),
                _ns(tokens),
            )

        if job.stream:
            await self._stream(exchange, job, renderer, work.generation, answer, figures)
        else:
            await self._plain(exchange, renderer, work.generation, answer, figures)

    async def _stream(
        self,
        exchange: HttpExchange,
        job: Job,
        renderer: Renderer,
        generation: Generation,
        answer: GeneratedAnswer,
        figures: Callable[[], Figures],
    ) -> None:
        """Stream the reply; the headers leave with the first token.

        A tool call, or content that may become one, is held back until it is complete.
        """
        content = answer.joined("content")
        held = bool(answer.calls) or (bool(job.prompt.tools) and job.model.bare_json_calls and content.startswith("{"))
        try:
            for number, piece in enumerate(answer.pieces):
                await generation.token(number)
                if piece.kind == "thinking" or (piece.kind == "content" and not held):
                    await self._write(exchange, renderer, renderer.piece(piece))
            if answer.calls:
                await self._write(exchange, renderer, renderer.calls(answer.calls))
            elif held:
                await self._write(exchange, renderer, renderer.piece(Piece("content", content, content)))
            await generation.end(len(answer.pieces), "length" if answer.finish == "length" else "stop")
        except Truncated:
            await self._write(exchange, renderer, b"")
            await exchange.end()
            return
        await self._write(exchange, renderer, b"")
        await exchange.end(b"" if answer.broken else renderer.end(answer, figures()))

    async def _write(self, exchange: HttpExchange, renderer: Renderer, data: bytes) -> None:
        if not exchange.started:
            await exchange.start(200, {"content-type": renderer.stream_type})
        if data:
            await exchange.write(data)

    async def _plain(
        self,
        exchange: HttpExchange,
        renderer: Renderer,
        generation: Generation,
        answer: GeneratedAnswer,
        figures: Callable[[], Figures],
    ) -> None:
        try:
            for number in range(len(answer.pieces)):
                await generation.token(number)
            await generation.end(len(answer.pieces), answer.finish)
        except Truncated:
            answer = GeneratedAnswer(answer.pieces, answer.finish, broken=True)
        await send(exchange, renderer.plain_type, renderer.body(answer, figures()))

    def _check_images(self, job: Job) -> None:
        """Reject images that the model cannot use; the older version silently ignores them for a
        text model.
        """
        if not job.images:
            return
        if not job.model.vision:
            if self._newer:
                raise runner_refusal(
                    "Multimodal data provided, but model does not support multimodal requests.", job.stream
                )
        elif not all(is_image(image) for image in job.images):
            if not self._newer:
                raise OllamaApiError(
                    500, "Failed to create new sequence: failed to process inputs: image: unknown format", job.stream
                )
            raise runner_refusal("Failed to load image or audio file", job.stream)

    def _fitted(self, job: Job, context: int) -> tuple[Prompt, int, int]:
        """Return the prompt truncated to the context, its tokens, and the tokens that were read.

        The older runner reads the whole prompt before it truncates.

        Raises:
            OllamaApiError: the prompt is too long, and `truncate` is false.
        """
        text = job.prompt.text
        overhead = (0 if job.raw else len(job.prompt.turns) * TURN_TOKENS) + job.prompt.images * (
            1024 if self._newer else 6
        )
        if job.prompt.tools:
            overhead += count_tokens(dump(list(job.prompt.tools)).decode())
        tokens = count_tokens(text) + overhead
        if tokens <= context:
            return job.prompt, tokens, tokens
        if not job.truncate:
            if not self._newer:
                raise OllamaApiError(400, "the input length exceeds the context length", job.stream)
            message = (
                f"request ({tokens} tokens) exceeds the available context size ({context} tokens), try increasing it"
            )
            raise runner_refusal(
                message, job.stream, "exceed_context_size_error", n_prompt_tokens=tokens, n_ctx=context
            )
        kept = context // 2 + 2 if self._newer else context
        cut = Prompt(
            (("user", text.encode()[-4 * kept :].decode(errors="ignore")),), job.prompt.images, thinks=job.prompt.thinks
        )
        return cut, kept, kept if self._newer else tokens


class _Work:
    """A generation on a runner: its clock, the context in tokens, and the seconds spent before it,
    of which `load` is the load.
    """

    def __init__(self, generation: Generation, clock: Clock, context_length: int, load: float, before: float) -> None:
        self.generation = generation
        self.clock = clock
        self.context_length = context_length
        self.load = load
        self.before = before


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
