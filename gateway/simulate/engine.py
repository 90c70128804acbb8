"""What both stand-ins share: lanes with a queue, the clock of a generation, faults, counters, and the doors under /simulate/."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import Any

import orjson

from gateway.simulate.asgi import HttpExchange
from gateway.simulate.clock import Clock
from gateway.simulate.options import Fault, Options
from gateway.simulate.text import GeneratedAnswer, GenerationLimits, Prompt, answer, compose

REMEMBERED = 64  # requests kept for /simulate/requests
LONGEST_KEPT = 400  # characters of a string in a kept request


class Died(Exception):
    """The connection is to be closed without another byte."""


class Failed(Exception):
    """The runner broke in mid-generation."""


class Truncated(Exception):
    """The body is to end cleanly without its last word."""


class Refused(Exception):
    """A fault asks for this status before anything else."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class SimulatedLane:
    """Places for requests that run at once; the others wait, first come first served, without a bound."""

    def __init__(self, places: int) -> None:
        self._places = asyncio.Semaphore(places)  # noqa: TID251  # the limit of the engine that is played, not one of the gateway's

    async def enter(self) -> None:
        await self._places.acquire()

    def leave(self) -> None:
        self._places.release()


class SimulatedEngine:
    """Counters, lanes and faults of one stand-in. Only one event loop touches it, so nothing here is locked."""

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
        self.requests: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self._fault_uses = 0

    def __repr__(self) -> str:
        return f"<Engine {self.options.kind} {self.running} running, {self.waiting} waiting, {self.served} served, {self.cancelled} cancelled>"

    def state(self) -> dict[str, int]:
        return {"running": self.running, "waiting": self.waiting, "served": self.served, "cancelled": self.cancelled}

    def inject(self, fault: Fault) -> None:
        """Let `fault` happen to the generations that start from now on, after those injected before."""
        self.faults.append(fault)

    def say(self, tokens: Sequence[str]) -> None:
        """Let the next generation say exactly `tokens` (then it would end by itself); `</think>` ends the reasoning of a model that thinks."""
        self.scripts.append(list(tokens))

    def count_cancelled(self) -> None:
        self.cancelled += 1

    def begin(self) -> "Generation":
        """The clock and fault of one generation. Raises Refused when the fault is a status."""
        fault = self._next_fault()
        if fault is not None and fault.kind == "status":
            raise Refused(fault.status)
        return Generation(self, fault)

    def _next_fault(self) -> Fault | None:
        if not self.faults:
            return None
        fault = self.faults[0]
        self._fault_uses += 1
        if fault.times and self._fault_uses >= fault.times:
            self.faults.popleft()
            self._fault_uses = 0
        return fault

    def answer(
        self, prompt: Prompt, limits: GenerationLimits, bare_json_calls: bool = False, variant: int = 0
    ) -> GeneratedAnswer:
        """The reply of this generation: the script, where one was set, else composed from the prompt."""
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
        """Hold a place in `lane`, and have the clock that goes there. With a slow-down, pictures need no place but share their clock."""
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

    def remember(self, exchange: HttpExchange) -> None:
        """Keep what came in, long strings cut, so that a test can look at it."""
        try:
            body = _shortened(orjson.loads(exchange.body)) if exchange.body else None
        except orjson.JSONDecodeError:
            body = None
        self.requests.append(
            {"method": exchange.method, "path": exchange.path, "headers": exchange.headers, "body": body}
        )

    async def debug_endpoint(self, exchange: HttpExchange) -> None:
        """`GET /simulate/state` and `/simulate/requests`; `POST /simulate/fault` ({"kind": null} clears) and `/simulate/answer`."""
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
                    self._fault_uses = 0
                else:
                    self.inject(Fault.from_json(asked))
                return {"faults": len(self.faults)}
            case "POST", "/simulate/answer":
                self.say(orjson.loads(body)["tokens"])
                return {"answers": len(self.scripts)}
        raise ValueError(f"there is no {method} {path}")


class Generation:
    """The clock of one reply: when each token is due, and the fault that strikes on the way."""

    def __init__(self, engine: SimulatedEngine, fault: Fault | None) -> None:
        self._engine = engine
        self._fault = fault
        self._clock = engine.clock
        self._began = 0.0

    async def prefill(self, tokens: int, images: int, clock: Clock) -> None:
        """Read the prompt of `tokens` tokens and `images` pictures; from here on `clock` goes."""
        options = self._engine.options
        self._clock = clock
        seconds = options.time_to_first_token + images * options.image_seconds
        if options.prefill_tokens_per_second:
            seconds += tokens / options.prefill_tokens_per_second
        self._engine.prompt_tokens += tokens
        due = clock.now() + seconds
        await clock.until(due)
        self._began = due

    async def token(self, number: int) -> None:
        """Wait until token `number` (from 0) is due. Raises Died, Failed or Truncated where the fault strikes."""
        if self._fault is not None and number >= self._fault.after:
            await self._strike(self._fault)
        speed = self._engine.options.tokens_per_second
        await self._clock.until(self._began + number / speed if speed else 0.0)
        self._engine.generation_tokens += 1

    async def end(self, number: int, finish: str) -> None:
        """After the last of `number` tokens."""
        if self._fault is not None:
            await self._strike(self._fault)
        self._engine.served += 1
        self._engine.finished[finish] = self._engine.finished.get(finish, 0) + 1

    async def _strike(self, fault: Fault) -> None:
        match fault.kind:
            case "die":
                raise Died
            case "error":
                raise Failed
            case "truncate":
                raise Truncated
            case "stall":
                await asyncio.get_running_loop().create_future()


def _shortened(value: Any) -> Any:
    if isinstance(value, str):
        return value if len(value) <= LONGEST_KEPT else f"{value[:60]}… {len(value)} characters"
    if isinstance(value, list):
        return [_shortened(item) for item in value]
    if isinstance(value, dict):
        return {key: _shortened(item) for key, item in value.items()}
    return value
