"""Affinity: how often prompts meet a warm prefix cache, and how long they wait, by policy.

Run it with `make bench-affinity`. The servers and their traffic are a model in simulated time
(`affinity_model.py`); the gateway's choice is the one that it makes in service
(`gateway/admission/affinity.py`). Beside it stand the policies that other routers have: the least
busy server, two random servers of which the less busy is taken, a tree of prefixes for each server
with limits of imbalance (`cache_aware` of vllm-router 0.1.17 and of SMG, with their defaults), and
consistent hashing of the beginning with bounded loads.
"""

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence

import msgspec
from msgspec import structs
from rich.console import Console
from rich.table import Table

from benchmarks.affinity_model import BLOCK_TOKENS, CACHE_BLOCKS, ModelServer, Request, Traffic, World
from gateway.admission.affinity import Affinity
from gateway.admission.concurrency_limits import ConcurrencyLimit
from gateway.admission.prefix_cache import PrefixCache
from gateway.admission.server_slots import Gate, Placement, ServerSlots
from gateway.admission.shared_affinity import SharedAffinity
from gateway.chat.message import CalledFunction, Message, ToolCall
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat
from gateway.chat.tools import Function, Tool

SEEDS = (1, 2, 3)


class Counting:
    """Requests in flight by server, as one replica of a router knows them."""

    def __init__(self, servers: Sequence[ModelServer]) -> None:
        self.load = dict.fromkeys((server.number for server in servers), 0)
        self.random = random.Random(0)

    def choose(self, request: Request, servers: Sequence[ModelServer]) -> ModelServer:
        return min(servers, key=lambda server: self.load[server.number])

    def began(self, request: Request) -> None:
        self.load[request.server.number] += 1

    def first_token(self, request: Request) -> None:
        pass

    def ended(self, request: Request) -> None:
        self.load[request.server.number] -= 1

    def died(self, server: ModelServer) -> None:
        pass

    def join(self, world: World) -> None:
        pass


class TwoChoices(Counting):
    def choose(self, request: Request, servers: Sequence[ModelServer]) -> ModelServer:
        return super().choose(request, self.random.sample(list(servers), 2))


class PrefixTree(Counting):
    """A set of known prefixes for each server; the shortest queue if the load is too uneven."""

    def __init__(self, servers: Sequence[ModelServer], threshold: float, absolute: int, relative: float) -> None:
        super().__init__(servers)
        self._known: dict[int, dict[int, None]] = {server.number: {} for server in servers}
        self._threshold, self._absolute, self._relative = threshold, absolute, relative

    def choose(self, request: Request, servers: Sequence[ModelServer]) -> ModelServer:
        loads = [self.load[server.number] for server in servers]
        if max(loads) - min(loads) > self._absolute and max(loads) > self._relative * min(loads):
            chosen = super().choose(request, servers)
        else:
            matches = {server: self._match(request, server) for server in servers}
            chosen = max(servers, key=matches.__getitem__)
            if matches[chosen] <= self._threshold * len(request.blocks):
                chosen = min(servers, key=lambda server: len(self._known[server.number]))
        self._known[chosen.number].update(dict.fromkeys(request.blocks))
        return chosen

    def _match(self, request: Request, server: ModelServer) -> int:
        known = self._known[server.number]
        return next((i for i, block in enumerate(request.blocks) if block not in known), len(request.blocks))

    def died(self, server: ModelServer) -> None:
        self._known[server.number].clear()


class BoundedHashing(Counting):
    """The server that the first 256 tokens hash to, or the next one below 1.25 times the mean load."""

    def choose(self, request: Request, servers: Sequence[ModelServer]) -> ModelServer:
        beginning = tuple(request.blocks[:16])
        bound = 1.25 * sum(self.load[server.number] for server in servers) / len(servers) + 1
        order = sorted(servers, key=lambda server: hash((beginning, server.number)))
        return next((server for server in order if self.load[server.number] <= bound), order[0])


class Slots(ServerSlots):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.place = str(number)
        self.slots = ConcurrencyLimit(10_000)
        self.prefixes = PrefixCache(seed=number * 7919, tokens=CACHE_BLOCKS * BLOCK_TOKENS)

    def serves(self, model: str) -> bool:
        return True

    def is_up(self) -> bool:
        return True


class Gateway(Counting):
    """The gateway's own choice."""

    def __init__(self, servers: Sequence[ModelServer]) -> None:
        super().__init__(servers)
        self._affinity = Affinity()
        self._turn = 0
        self._placements: list[Placement] = []
        for server in servers:
            slots = Slots(server.number)
            self._placements.append(Placement(slots, (slots.slots,), Gate()))
        self._prefill: dict[Request, int] = {}

    def choose(self, request: Request, servers: Sequence[ModelServer]) -> ModelServer:
        possible = [self._placements[server.number] for server in servers]
        return servers[possible.index(self._affinity.choose(request.prompt, possible))]

    def began(self, request: Request) -> None:
        placement = self._placements[request.server.number]
        self._turn += 1
        placement.server.prefixes.turn = self._turn
        placement.limits[0].count += 1
        self._prefill[request] = self._affinity.begin(request.prompt, placement, self._placements)

    def first_token(self, request: Request) -> None:
        self._placements[request.server.number].server.prefixes.pending -= self._prefill.pop(request, 0)

    def ended(self, request: Request) -> None:
        self._placements[request.server.number].limits[0].count -= 1
        self.first_token(request)

    def died(self, server: ModelServer) -> None:
        self._placements[server.number].server.prefixes.clear()


class SharingGateway(Gateway):
    """The gateway's own choice as one of several replicas, which hear each other after `DELAY`."""

    DELAY = 0.002
    """Seconds for the way of a message through Redis."""

    def __init__(self, servers: Sequence[ModelServer]) -> None:
        super().__init__(servers)
        self.servers: list[ServerSlots] = [placement.server for placement in self._placements]
        self.affinity = self._affinity
        self.shared = SharedAffinity(f"{id(self):x}", {"backend": self})

    def join(self, world: World) -> None:
        self._world = world
        self._step()

    def _step(self) -> None:
        message = self.shared.step(self._world.now)
        if message is not None:
            self._world.later(self.DELAY, lambda: self._tell(message))
        if not self._world.is_over:
            self._world.later(self.shared.interval, self._step)

    def _tell(self, message: bytes) -> None:
        for policy in self._world.policies:
            assert isinstance(policy, SharingGateway)
            policy.shared.receive(message)


POLICIES: dict[str, tuple[Callable[[Sequence[ModelServer]], Counting], int]] = {
    "least busy": (Counting, 1),
    "two choices": (TwoChoices, 1),
    "bounded hashing": (BoundedHashing, 1),
    "tree, as vllm-router": (lambda servers: PrefixTree(servers, 0.5, 32, 1.1), 1),
    "tree, as SMG": (lambda servers: PrefixTree(servers, 0.3, 64, 1.5), 1),
    "gateway": (Gateway, 1),
    "tree, three replicas": (lambda servers: PrefixTree(servers, 0.3, 64, 1.5), 3),
    "gateway, three that share nothing": (Gateway, 3),
    "gateway, three that share": (SharingGateway, 3),
}
WORKLOADS: dict[str, Callable[[Traffic], None]] = {
    "growing conversations": Traffic.conversations,
    "shared system prompts": Traffic.shared_prompts,
    "nothing in common": Traffic.nothing_in_common,
    "one prompt with 70 %": Traffic.hot_prompt,
    "a server killed and back": Traffic.killed_server,
}


def measure(
    policy: Callable[[Sequence[ModelServer]], Counting], replicas: int, workload: Callable[[Traffic], None], seed: int
) -> tuple[float, float, float]:
    """Return the share of cached blocks, the 95th percentile of the TTFT in ms, and the top server's share."""
    world = World(policy, replicas, seed)
    workload(Traffic(world, seed))
    world.run()
    times = sorted(request.ttft for request in world.ended)
    hits = sum(request.hits for request in world.ended) / sum(len(request.blocks) for request in world.ended)
    return hits, 1000 * times[int(0.95 * len(times))], max(world.given) * len(world.given) / sum(world.given)


def cost_of_a_choice(servers: int = 4) -> dict[str, float]:
    """Return the microseconds that affinity adds to a request, by the kind of its prompt."""
    system = Message("system", "s" * 12_000)
    turns, steps = [], [Message("user", "u" * 400)]
    for turn in range(40):
        turns += [Message("user", f"{turn}" + "u" * 400), Message("assistant", "a" * 400)]
        calls = [ToolCall(f"{turn}", CalledFunction("f", json.dumps({"a": "a" * 100})))]
        steps += [
            Message("assistant", tool_calls=calls),
            Message("tool", f"{turn}" + "r" * 700, tool_call_id=f"{turn}"),
        ]
    tools = [Tool(Function(f"tool_{number}", "d" * 300), "function") for number in range(20)]
    prompts = {
        "a short question": Chat(model="m", messages=[Message("user", "What is the capital of France?")]),
        "a system prompt of 12,000 characters": Chat(model="m", messages=[system, Message("user", "q" * 200)]),
        "a question of 40,000 characters": Chat(model="m", messages=[Message("user", "q" * 40_000)]),
        "80 messages, 44,000 characters": Chat(model="m", messages=[system, *turns]),
        "an agent with 20 tools and 80 messages": Chat(model="m", messages=[system, *steps], tools=tools),
    }
    return {name: _cost(chat, servers) for name, chat in prompts.items()}


def _cost(request: Chat, servers: int, rounds: int = 1000) -> float:
    """Return the microseconds of a choice for this prompt: the median.

    Each request has another end. It is decoded before the clock starts, as its texts have no hash yet in service.
    All caches are full, as after some hours of it.
    """
    gateway = Gateway([ModelServer(None, number) for number in range(servers)])  # type: ignore[arg-type]
    for placement in gateway._placements:  # noqa: SLF001
        _fill(placement.server.prefixes)
    *earlier, last = request.messages
    seconds = []
    for number in range(rounds):
        end = structs.replace(last, content=f"{number} {last.content}")
        body = msgspec.json.encode(structs.replace(request, messages=[*earlier, end]))
        chat = msgspec.json.decode(body, type=Chat)
        assert chat.has_plain_messages == (request.tools is None)  # known before, as in service
        began = time.perf_counter()
        prompt = prompt_blocks(chat, "m")
        if prompt is not None:
            placement = gateway._affinity.choose(prompt, gateway._placements)  # noqa: SLF001
            gateway._affinity.begin(prompt, placement, gateway._placements)  # noqa: SLF001
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1e6


def _fill(cache: PrefixCache) -> None:
    hashes = [hash(("old", number)) for number in range(cache.capacity // 2000)]
    cache.add(PromptBlocks(hashes, [2000 * (number + 1) for number in range(len(hashes))], 0, 0, is_continued=False))


def main() -> None:
    console = Console(width=110)
    for name, workload in WORKLOADS.items():
        table = Table("policy", "cached", "TTFT p95 (ms)", "top server / mean", title=name, title_justify="left")
        for policy, (build, replicas) in POLICIES.items():
            results = [measure(build, replicas, workload, seed) for seed in SEEDS]
            hits, ttft, top = (statistics.mean(values) for values in zip(*results, strict=True))
            table.add_row(policy, f"{hits:.3f}", f"{ttft:,.0f}", f"{top:.2f}")
        console.print(table)
    for what, microseconds in cost_of_a_choice().items():
        console.print(f"{what}: {microseconds:.1f} µs a request")


if __name__ == "__main__":
    main()
