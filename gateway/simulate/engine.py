"""The parts that both stand-ins share: request slots, generation timing, faults, counters and the
control endpoints under `/simulate/`.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import orjson

from gateway.simulate.asgi import HttpExchange
from gateway.simulate.clock import Clock
from gateway.simulate.gpu import SharedGpu
from gateway.simulate.options import Fault, Model, Options
from gateway.simulate.text import GeneratedAnswer, GenerationLimits, Prompt, answer, compose

MAX_RECORDED_REQUESTS = 64  # requests kept for /simulate/requests
MAX_RECORDED_STRING = 400  # characters; longer strings of a recorded request are shortened


class Died(Exception):
    """Fault: close the connection without another byte."""


class Reset(Died):
    """Fault: close the connection with a TCP reset."""


class Failed(Exception):
    """Fault: the model runner failed in the middle of a generation."""


class Truncated(Exception):
    """Fault: end the body cleanly, but without its final event."""


class Refused(Exception):
    """Fault: answer with `status` and nothing else."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Garbled(Exception):
    """Fault: answer 200 with a body that is not JSON."""


class SimulatedLane:
    """Slots for concurrent requests; the others wait in an unbounded FIFO queue."""

    def __init__(self, slots: int) -> None:
        self._slots = asyncio.Semaphore(slots)  # noqa: TID251  # a limit of the simulated engine, not of the gateway
        self.is_frozen = False
        """True if no further request gets a slot."""

    async def enter(self) -> None:
        if self.is_frozen:
            await asyncio.get_running_loop().create_future()
        await self._slots.acquire()
        if self.is_frozen:
            await asyncio.get_running_loop().create_future()

    def leave(self) -> None:
        self._slots.release()


class SimulatedEngine:
    """Counters, slots and faults of one stand-in.

    A single event loop uses it, so it needs no locks.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.clock = Clock(options.time_scale)
        self.image_clock = Clock(options.time_scale, options.image_slowdown) if options.image_slowdown else self.clock
        self.running = 0
        self.waiting = 0
        self.served = 0
        self.cancelled = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: dict[str, int] = {}
        self.faults: deque[Fault] = deque(options.faults)
        self.scripts: deque[list[str]] = deque()
        self.requests: deque[dict[str, Any]] = deque(maxlen=MAX_RECORDED_REQUESTS)
        self.out_of_memory = 0
        """Number of times that the memory did not suffice for the requests that ran, or all were aborted."""
        self.gpu = SharedGpu(options.gpu_file, options.gpu_memory)
        self.asked_asleep = 0
        """Number of requests that came while the engine slept."""
        self._fault_uses = 0
        self._spared = 0
        """Generations since the last one that the present fault applied to."""

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.state().items())
        return f"<SimulatedEngine {self.options.kind} {counts}>"

    def state(self) -> dict[str, int]:
        return {"running": self.running, "waiting": self.waiting, "served": self.served, "cancelled": self.cancelled}

    def inject(self, fault: Fault) -> None:
        """Apply `fault` to generations that start from now on, after the faults injected before."""
        self.faults.append(fault)

    def say(self, tokens: Sequence[str]) -> None:
        """Make the next generation emit exactly `tokens` and then end.

        A `</think>` token ends the reasoning of a thinking model.
        """
        self.scripts.append(list(tokens))

    def serve(self, *models: Model) -> None:
        """Serve these models from now on, as if the others had been deleted.

        A vLLM serves its first model under all names.
        """
        self.options = replace(self.options, models=models)

    def allocate(self) -> None:
        """Take the memory of one more running request; if there is none, all running requests fail."""
        limit = self.options.out_of_memory_above
        if limit and self.running > limit:
            self.out_of_memory += 1

    def abort(self) -> None:
        """Fail all running requests."""
        self.out_of_memory += 1

    def count_cancelled(self) -> None:
        self.cancelled += 1

    def begin(self) -> "Generation":
        """Start one generation with the next fault.

        Raises:
            Refused: the fault is a status.
            Garbled: the fault is garbage.
        """
        fault = self._next_fault()
        if fault is not None and fault.kind == "status":
            raise Refused(fault.status)
        if fault is not None and fault.kind == "garbage":
            raise Garbled
        return Generation(self, fault)

    def _next_fault(self) -> Fault | None:
        if not self.faults:
            return None
        fault = self.faults[0]
        self._spared += 1
        if self._spared < fault.every:
            return None
        self._spared = 0
        self._fault_uses += 1
        if fault.times and self._fault_uses >= fault.times:
            self.faults.popleft()
            self._fault_uses = 0
        return fault

    def answer(
        self, prompt: Prompt, limits: GenerationLimits, bare_json_calls: bool = False, variant: int = 0
    ) -> GeneratedAnswer:
        """Return the scripted answer if one was set, else an answer composed from the prompt."""
        tokens = self.scripts.popleft() if self.scripts else self._composed(prompt, variant, bare_json_calls)
        return answer(tokens, limits, prompt.thinks, bool(prompt.tools), bare_json_calls)

    def _composed(self, prompt: Prompt, variant: int, bare_json_calls: bool) -> list[str]:
        return compose(prompt, self.options.answer_tokens, variant, bare_json_calls, self.options.repeat_word)

    @contextmanager
    def queued(self) -> Iterator[None]:
        """Count a request as waiting."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    @asynccontextmanager
    async def slot(self, lane: SimulatedLane, images: int = 0) -> AsyncIterator[Clock]:
        """Hold a slot of `lane` and yield the clock that times the work there.

        With `image_slowdown`, requests with images take no slot and share a clock instead.
        """
        shares = bool(images and self.options.image_slowdown)
        if not shares:
            with self.queued():
                await lane.enter()
        self.running += 1
        try:
            with self.image_clock.sharing() if shares else nullcontext():
                yield self.image_clock if shares else self.clock
        finally:
            self.running -= 1
            if not shares:
                lane.leave()

    def record(self, exchange: HttpExchange) -> None:
        """Keep the request for `/simulate/requests`, with long strings shortened."""
        try:
            body = _shortened(orjson.loads(exchange.body)) if exchange.body else None
        except orjson.JSONDecodeError:
            body = None
        self.requests.append(
            {"method": exchange.method, "path": exchange.path, "headers": exchange.headers, "body": body}
        )

    async def debug_endpoint(self, exchange: HttpExchange) -> None:
        """Serve `GET /simulate/state` and `/simulate/requests`, `POST /simulate/fault`,
        `/simulate/answer` and `/simulate/models`.

        A fault of `{"kind": null}` clears all faults.
        """
        try:
            status, body = 200, self._debug(exchange.method, exchange.path, exchange.body)
        except ValueError as exc:
            status, body = 400, {"error": str(exc)}
        await exchange.reply(status, {"content-type": "application/json"}, orjson.dumps(body))

    def _debug(self, method: str, path: str, body: bytes) -> Any:
        match method, path:
            case "GET", "/simulate/state":
                return self.state()
            case "GET", "/simulate/requests":
                return list(self.requests)
            case "POST", "/simulate/fault":
                asked = orjson.loads(body)
                if asked.get("kind") is None:
                    self.faults.clear()
                    self._fault_uses = self._spared = 0
                else:
                    self.inject(Fault.from_json(asked))
                return {"faults": len(self.faults)}
            case "POST", "/simulate/answer":
                self.say(orjson.loads(body)["tokens"])
                return {"answers": len(self.scripts)}
            case "POST", "/simulate/models":
                names = orjson.loads(body)["models"]
                if not names:
                    raise ValueError("expected at least one model")
                self.serve(*(Model.parse(name) for name in names))
                return {"models": [model.name for model in self.options.served]}
        raise ValueError(f"unknown endpoint: {method} {path}")


class Generation:
    """Timing of one reply: when each token is due, and which fault interrupts it."""

    def __init__(self, engine: SimulatedEngine, fault: Fault | None) -> None:
        self._engine = engine
        self._fault = fault
        self._clock = engine.clock
        self._began = 0.0
        self._out_of_memory = 0

    async def prefill(self, tokens: int, images: int, clock: Clock) -> None:
        """Wait as long as the prefill of `tokens` tokens and `images` images takes.

        From here on `clock` times the generation.
        """
        options = self._engine.options
        self._clock = clock
        self._out_of_memory = self._engine.out_of_memory
        self._engine.allocate()
        seconds = options.time_to_first_token + images * options.image_seconds
        if options.prefill_tokens_per_second:
            seconds += tokens / options.prefill_tokens_per_second
        self._engine.prompt_tokens += tokens
        due = clock.now() + seconds
        await clock.until(due)
        self._began = due

    async def token(self, number: int) -> None:
        """Wait until token `number` (from 0) is due.

        Raises:
            Died, Failed, Truncated: the fault applies from this token on.
            Failed: the memory did not suffice.
        """
        if self._engine.out_of_memory != self._out_of_memory:
            raise Failed
        if self._fault is not None and number >= self._fault.after:
            await self._apply(self._fault)
        speed = self._engine.options.tokens_per_second
        await self._clock.until(self._began + number / speed if speed else 0.0)
        self._engine.generation_tokens += 1

    async def end(self, number: int, finish: str) -> None:
        """Finish the generation after its last token, and count it by its `finish` reason.

        Raises:
            Died, Failed, Truncated: the fault applies after all tokens.
        """
        if self._fault is not None:
            await self._apply(self._fault)
        self._engine.served += 1
        self._engine.finished[finish] = self._engine.finished.get(finish, 0) + 1

    async def _apply(self, fault: Fault) -> None:
        match fault.kind:
            case "die":
                raise Died
            case "reset":
                raise Reset
            case "error":
                raise Failed
            case "truncate":
                raise Truncated
            case "stall":
                await asyncio.get_running_loop().create_future()


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= MAX_RECORDED_STRING else f"{value[:60]}… {len(value)} characters"
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value
