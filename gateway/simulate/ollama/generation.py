"""How Ollama makes a reply: a runner, a place at it, the prompt cut to its context, then the tokens, through whichever door they were asked."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from gateway.simulate.asgi import HttpExchange
from gateway.simulate.clock import Clock
from gateway.simulate.engine import Failed, Generation, Refused, SimulatedEngine, Truncated
from gateway.simulate.ollama.requests import Job, OllamaApiError, is_picture, runner_refusal
from gateway.simulate.ollama.responses import Figures, ResponseFormat, dump
from gateway.simulate.ollama.scheduler import Busy, Runner, Scheduler
from gateway.simulate.options import Model
from gateway.simulate.text import GeneratedAnswer, Piece, Prompt, count_tokens

BUSY = "server busy, please try again.  maximum pending requests exceeded"
CHUNKED_FROM = 2048  # bytes of an answer that Go's server keeps to learn its length
TURN_TOKENS = 4


async def send(exchange: HttpExchange, kind: str, body: bytes) -> None:
    """A whole answer as Go's server sends it: with its length when it is short."""
    if len(body) > CHUNKED_FROM:
        await exchange.start(200, {"content-type": kind})
        await exchange.end(body)
    else:
        await exchange.reply(200, {"content-type": kind}, body)


class Replies:
    """The generations of one server."""

    def __init__(self, engine: SimulatedEngine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        self._newer = engine.options.generation == "0.33"

    @asynccontextmanager
    async def loaded(
        self, model: Model, context_length: int | None, keep_alive: float | None
    ) -> AsyncIterator[tuple[Runner, float]]:
        """The runner of `model` while the block runs, and the seconds that it took. Raises ApiError when too many wait for a load."""
        runners = self._scheduler.runner(model, context_length, keep_alive)
        try:
            with self._engine.queued():
                found = await runners.__aenter__()
        except Busy as exc:
            raise OllamaApiError(503, BUSY) from exc
        try:
            yield found
        finally:
            await runners.__aexit__(None, None, None)

    async def run(self, exchange: HttpExchange, job: Job, door: ResponseFormat) -> None:
        """Answer `job`. Raises ApiError as long as nothing was sent."""
        try:
            generation = self._engine.begin()
        except Refused as exc:
            raise OllamaApiError(
                exc.status, BUSY if exc.status == 503 else "model runner has unexpectedly stopped"
            ) from exc
        began = self._engine.clock.now()
        async with (
            self.loaded(job.model, job.context_length, job.keep_alive) as (runner, load),
            self._engine.slot(runner.lane, len(job.images)) as clock,
        ):
            waited = self._engine.clock.now() - began - load
            try:
                await self._reply(
                    exchange, job, door, _Work(generation, clock, runner.context_length, load, load + waited)
                )
            except Failed as exc:
                self._scheduler.crash(runner)  # the next request starts another
                if not exchange.started:
                    raise OllamaApiError(
                        500, "an error was encountered while running the model: unexpected EOF"
                    ) from exc
                await exchange.end(door.lost())

    async def _reply(self, exchange: HttpExchange, job: Job, door: ResponseFormat, work: "_Work") -> None:
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
                tokens = 0.0  # counted from the first token's end
            return Figures(
                prompt_tokens,
                len(answer.pieces),
                _ns(work.before + prefill + tokens),
                _ns(work.load),
                _ns(prefill),
                _ns(tokens),
            )

        if job.stream:
            await self._stream(exchange, job, door, work.generation, answer, figures)
        else:
            await self._plain(exchange, door, work.generation, answer, figures)

    async def _stream(
        self,
        exchange: HttpExchange,
        job: Job,
        door: ResponseFormat,
        generation: Generation,
        answer: GeneratedAnswer,
        figures: Callable[[], Figures],
    ) -> None:
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
                await self._write(exchange, door, door.piece(Piece("content", content, content)))
            await generation.end(len(answer.pieces), "length" if answer.finish == "length" else "stop")
        except Truncated:
            await self._write(exchange, door, b"")
            await exchange.end()
            return
        await self._write(exchange, door, b"")
        await exchange.end(b"" if answer.broken else door.end(answer, figures()))

    async def _write(self, exchange: HttpExchange, door: ResponseFormat, data: bytes) -> None:
        if not exchange.started:
            await exchange.start(200, {"content-type": door.stream_type})
        if data:
            await exchange.write(data)

    async def _plain(
        self,
        exchange: HttpExchange,
        door: ResponseFormat,
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
        await send(exchange, door.plain_type, door.whole(answer, figures()))

    def _check_images(self, job: Job) -> None:
        """The older one leaves out pictures without a word when the model takes none."""
        if not job.images:
            return
        if not job.model.vision:
            if self._newer:
                raise runner_refusal(
                    "Multimodal data provided, but model does not support multimodal requests.", job.stream
                )
        elif not all(is_picture(image) for image in job.images):
            if not self._newer:
                raise OllamaApiError(
                    500, "Failed to create new sequence: failed to process inputs: image: unknown format", job.stream
                )
            raise runner_refusal("Failed to load image or audio file", job.stream)

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
    """A generation at a runner: its clock, the context, and the seconds that went before it, the load's among them."""

    def __init__(self, generation: Generation, clock: Clock, context_length: int, load: float, before: float) -> None:
        self.generation = generation
        self.clock = clock
        self.context_length = context_length
        self.load = load
        self.before = before


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
