"""A model of vLLM servers with prefix caches, and of the traffic they get, in simulated time.

A server computes one prompt at a time, in chunks between two steps of decoding, and decodes all
running answers in one step. Its prefix cache holds blocks of 16 tokens and forgets those used
longest ago, from the end of a prompt. A token is 4 characters here.
"""

import heapq
import random
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from gateway.chat.message import Message
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat

BLOCK_TOKENS = 16
BLOCK = BLOCK_TOKENS * 4
PREFILL_TOKENS_PER_SECOND = 8000.0
STEP_SECONDS = 0.008
STEP_SECONDS_PER_REQUEST = 0.0004
SERVERS = 4
CACHE_BLOCKS = 6000
MODEL = "m"


@dataclass(eq=False)
class Request:
    """One request: its conversation, the length of its answer, and what became of it."""

    chat: Chat
    blocks: list[int]
    """Hashes of the blocks of its whole prompt, as the server's cache has them."""
    prompt: PromptBlocks
    answer_tokens: int
    on_end: Callable[["Request"], None] | None = None
    sent: float = 0.0
    ttft: float = 0.0
    hits: int = 0
    left: int = 0
    server: "ModelServer" = field(init=False)
    policy: "Policy" = field(init=False)


def request(messages: list[Message], answer_tokens: int, on_end: Callable[[Request], None] | None = None) -> Request:
    text = "".join(f"<{message.role}>{message.text}" for message in messages)
    blocks, current = [], 0
    for start in range(0, len(text) - BLOCK + 1, BLOCK):
        current = hash((current, text[start : start + BLOCK]))
        blocks.append(current)
    chat = Chat(model=MODEL, messages=messages)
    prompt = prompt_blocks(chat, MODEL)
    assert prompt is not None, "all prompts of the workloads are worth caching"
    return Request(chat, blocks, prompt, answer_tokens, on_end)


class Policy(Protocol):
    """The choice of a server, as one router makes it."""

    def choose(self, request: Request, servers: Sequence["ModelServer"]) -> "ModelServer": ...
    def began(self, request: Request) -> None: ...
    def first_token(self, request: Request) -> None: ...
    def ended(self, request: Request) -> None: ...
    def died(self, server: "ModelServer") -> None: ...
    def join(self, world: "World") -> None: ...


class ModelServer:
    """One server of the model."""

    def __init__(self, world: "World", number: int) -> None:
        self.number = number
        self.is_alive = True
        self._world = world
        self._cache: OrderedDict[int, None] = OrderedDict()
        self._waiting: list[Request] = []
        self._running: list[Request] = []
        self._is_busy = False
        self._life = 0

    def submit(self, request: Request) -> None:
        self._waiting.append(request)
        self._go_on()

    def kill(self) -> list[Request]:
        """End the server and empty its cache. Return the requests that it had."""
        lost = self._waiting + self._running
        self._waiting, self._running, self._is_busy, self.is_alive = [], [], False, False
        self._cache.clear()
        self._life += 1
        return lost

    def _go_on(self) -> None:
        if self._is_busy or not self.is_alive:
            return
        step = STEP_SECONDS + STEP_SECONDS_PER_REQUEST * len(self._running)
        if self._waiting:
            request = self._waiting.pop(0)
            known = next((i for i, block in enumerate(request.blocks) if block not in self._cache), len(request.blocks))
            request.hits = known
            seconds = max(1, len(request.blocks) - known) * BLOCK_TOKENS / PREFILL_TOKENS_PER_SECOND
            self._later(seconds + step, lambda: self._computed(request))
        elif self._running:
            self._later(step, self._decoded)

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        self._is_busy = True
        life = self._life

        def step() -> None:
            if life == self._life:
                self._is_busy = False
                then()
                self._go_on()

        self._world.later(seconds, step)

    def _computed(self, request: Request) -> None:
        for block in reversed(request.blocks):
            self._cache.pop(block, None)
            self._cache[block] = None
        while len(self._cache) > CACHE_BLOCKS:
            self._cache.popitem(last=False)
        self._decoded()
        request.ttft = self._world.now - request.sent
        request.left = request.answer_tokens
        self._running.append(request)
        request.policy.first_token(request)

    def _decoded(self) -> None:
        for request in list(self._running):
            request.left -= 1
            if request.left <= 0:
                self._running.remove(request)
                self._world.end(request)


class World:
    """The servers, the replicas of a router in front of them, and the time."""

    def __init__(self, build: Callable[[Sequence[ModelServer]], Policy], replicas: int, seed: int) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.servers = [ModelServer(self, number) for number in range(SERVERS)]
        self.policies = [build(self.servers) for _ in range(replicas)]
        self.ended: list[Request] = []
        self.given = [0] * SERVERS
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        for policy in self.policies:
            policy.join(self)

    @property
    def is_over(self) -> bool:
        """True if nothing is left but what the replicas of the router tell each other."""
        return self.now > Traffic.SECONDS

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now + seconds, self._count, call))

    def send(self, request: Request, *, is_new: bool = True) -> None:
        if is_new:
            request.sent = self.now
            request.policy = self.random.choice(self.policies)
        server = request.policy.choose(request, [server for server in self.servers if server.is_alive])
        request.server = server
        self.given[server.number] += 1
        request.policy.began(request)
        server.submit(request)

    def end(self, request: Request) -> None:
        request.policy.ended(request)
        self.ended.append(request)
        if request.on_end is not None:
            request.on_end(request)

    def kill(self, number: int) -> None:
        """End a server. Its requests are sent again, as the router's failover does."""
        server = self.servers[number]
        lost = server.kill()
        for policy in self.policies:
            policy.died(server)
        for request in lost:
            request.policy.ended(request)
            self.send(request, is_new=False)

    def revive(self, number: int) -> None:
        self.servers[number].is_alive = True

    def run(self) -> None:
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


class Traffic:
    """The five workloads. Their sizes are in tokens, their times in seconds."""

    SECONDS = 120.0

    def __init__(self, world: World, seed: int) -> None:
        self._world = world
        self._random = random.Random(seed)

    def _text(self, tokens: int) -> str:
        return "".join(f"{self._random.getrandbits(16):04x}" for _ in range(tokens))

    def _message(self, role: str, low: int, high: int) -> Message:
        return Message(role, self._text(self._random.randint(low, high)))  # type: ignore[arg-type]

    def _poisson(self, rate: float, send: Callable[[], None]) -> None:
        moment = 0.0
        while moment < self.SECONDS:
            moment += self._random.expovariate(rate)
            self._world.later(moment, send)

    def conversations(self) -> None:
        """60 people with a common system prompt, each in one growing conversation after the other."""
        system = self._message("system", 200, 200)

        def begin() -> None:
            messages = [system, self._message("user", 300, 1000)]
            turns = self._random.randint(4, 12)

            def ended(request: Request) -> None:
                pause = self._random.uniform(4, 12)
                if self._world.now > self.SECONDS:
                    return
                if len(messages) >= 2 * turns:
                    self._world.later(pause, begin)
                    return
                messages.append(self._message("assistant", request.answer_tokens, request.answer_tokens))
                messages.append(self._message("user", 100, 600))
                self._world.later(pause, turn)

            def turn() -> None:
                self._world.send(request(list(messages), self._random.randint(40, 120), ended))

            turn()

        for _ in range(60):
            self._world.later(self._random.uniform(0, 10), begin)

    def shared_prompts(self) -> None:
        """24 system prompts of 3,000 tokens, some more used than others, each with one question."""
        prompts = [self._message("system", 3000, 3000) for _ in range(24)]
        weights = [1 / (rank + 1) ** 0.8 for rank in range(len(prompts))]

        def send() -> None:
            (prompt,) = self._random.choices(prompts, weights)
            self._world.send(request([prompt, self._message("user", 100, 500)], self._random.randint(30, 90)))

        self._poisson(18, send)

    def nothing_in_common(self) -> None:
        """Prompts of 640 to 2,560 tokens that have nothing in common."""
        self._poisson(
            14, lambda: self._world.send(request([self._message("user", 640, 2560)], self._random.randint(30, 90)))
        )

    def hot_prompt(self) -> None:
        """One system prompt of 4,000 tokens in 70 % of the requests; the others have their own."""
        hot = self._message("system", 4000, 4000)

        def send() -> None:
            system = hot if self._random.random() < 0.7 else self._message("system", 1900, 1900)
            self._world.send(request([system, self._message("user", 60, 320)], self._random.randint(30, 90)))

        self._poisson(20, send)

    def killed_server(self) -> None:
        """The conversations, while one server is killed and is back half a minute later."""
        self.conversations()
        self._world.later(50, lambda: self._world.kill(1))
        self._world.later(80, lambda: self._world.revive(1))
