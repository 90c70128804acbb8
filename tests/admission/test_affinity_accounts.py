"""Accounts of affinity over long random runs: sizes, blocks in order, and what servers have yet to compute.

Covers: gateway/admission/affinity.py, gateway/admission/prefix_cache.py, gateway/chat/prompt_blocks.py
"""

import random

import pytest

from gateway.admission.affinity import Affinity
from gateway.admission.prefix_cache import PrefixCache
from gateway.admission.shared_affinity import SharedAffinity
from gateway.chat import prompt_blocks as prompt_blocks_module
from gateway.chat.message import CalledFunction, ImagePart, ImageUrl, Message, RefusalPart, TextPart, ToolCall
from gateway.chat.prompt_blocks import PromptBlocks, prompt_blocks
from gateway.chat.request import Chat
from gateway.chat.tools import Function, Tool
from tests.fakes.admission import Request, Server, setup


class Clients:
    """Conversations that grow, branch, and are edited, shortened and begun anew, at random."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._systems = [Message("system", self._text()) for _ in range(3)]
        self._tools = [None, self._some_tools(0), self._some_tools(3), self._some_tools(3)]
        self._conversations = [self._new() for _ in range(5)]

    def prompt(self) -> PromptBlocks | None:
        rng, number = self._rng, self._rng.randrange(5)
        messages = self._conversations[number]
        place = rng.randrange(len(messages))
        match rng.choice(["grow"] * 6 + ["change", "drop", "cut", "branch", "new", "clear"]):
            case "grow":
                messages += [self._message() for _ in range(rng.randint(1, 3))]
            case "change":
                messages[place] = self._message()
            case "drop":
                del messages[place]
            case "cut":
                del messages[place + 1 :]
            case "branch":
                self._conversations[number] = messages = [*rng.choice(self._conversations), self._message()]
            case "new":
                self._conversations[number] = messages = self._new()
            case "clear":
                messages[:] = [Message("tool", "gone") if each.role == "tool" else each for each in messages]
        if not messages:
            messages.append(self._message())
        return prompt_blocks(Chat(model="m", messages=list(messages), tools=rng.choice(self._tools)), "m")

    def _new(self) -> list[Message]:
        return [self._rng.choice(self._systems), self._message()]

    def _text(self) -> str:
        return self._rng.choice("ab") * self._rng.randint(0, self._rng.choice([0, 5, 600, 3000, 70_000]))

    def _some_tools(self, between: int) -> list[Tool]:
        functions = [Function("t", "d" * self._rng.randrange(2000)) for _ in range(between)]
        return [Tool(function, "function") for function in (Function("a"), *functions, Function("z"))]

    def _message(self) -> Message:
        kind, text = self._rng.choice(["user", "user", "assistant", "assistant", "tool", "call", "parts"]), self._text()
        if kind == "call":
            return Message("assistant", tool_calls=[ToolCall("x", CalledFunction("f", text))] * self._rng.randint(0, 2))
        if kind == "parts":
            parts: list[TextPart | ImagePart | RefusalPart] = [ImagePart(ImageUrl(f"data:{text}")), TextPart(text)]
            return Message("user", parts[: self._rng.randint(0, 2)])
        return Message(kind, text)  # type: ignore[arg-type]


class Replica:
    """A gateway with three servers, whose requests begin and end in any way."""

    def __init__(self, name: str, rng: random.Random) -> None:
        self.servers = tuple(Server("m") for _ in range(3))
        for seed, server in enumerate(self.servers):
            server.place = f"place {seed}"
            server.prefixes = PrefixCache(seed, tokens=rng.choice([500, 20_000]))
        self.affinity: Affinity | None = Affinity()
        self.gateway = setup(*self.servers, affinity=self.affinity, slots=rng.choice([1, 50]), max_queue=10**6)
        self.shared = SharedAffinity(name, {"backend": self})
        self.requests: list[Request] = []
        self._rng = rng

    def step(self, prompt: PromptBlocks | None) -> None:
        rng, admission = self._rng, self.gateway.admission
        self.requests.append(self.gateway.arrive(prompt=prompt))
        for _ in range(min(rng.randint(0, 2), len(self.requests))):
            request = rng.choice(self.requests)
            match rng.choice(["token", "move", "end", "end"]):
                case "token":
                    admission.first_token(request)
                case "move" if request.placement is not None:
                    admission.reassign(request)
                case "end":
                    self.end(request, is_served=rng.random() < 0.7)
        cache = rng.choice(self.servers).prefixes
        match rng.randrange(50):
            case 0:
                cache.clear()
            case 1:
                cache.resize(rng.choice([0, 500, 20_000]))
            case 2 if prompt is not None:
                cache.learn(prompt.size, rng.randint(1, 10_000))

    def end(self, request: Request, *, is_served: bool) -> None:
        request.is_served = is_served and request.placement is not None
        self.gateway.leave(request)
        self.requests.remove(request)

    def check(self, prompt: PromptBlocks | None) -> None:
        for server in self.servers:
            cache = server.prefixes
            here = [each for each in self.requests if each.placement is not None and each.placement.server is server]
            assert cache.pending == sum(each.prefill for each in here)
            assert min((each.prefill for each in here), default=0) >= 0
            assert cache._size == sum(cache._known.values())
            assert min(cache._known.values(), default=0) >= 0
            assert prompt is None or 0 <= cache.known_blocks(prompt) <= len(prompt.hashes)


@pytest.mark.parametrize("seed", range(12))
def test_accounts_hold_whatever_clients_and_servers_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(prompt_blocks_module, "KEPT_ENDS", rng.choice([20, 20_000]))
    monkeypatch.setattr(prompt_blocks_module, "_known_ends", {})
    clients, replicas, now = Clients(rng), [Replica("one", rng), Replica("other", rng)], 0.0
    for number in range(250):
        prompt = clients.prompt()
        if prompt is not None:
            assert prompt.ends == sorted(prompt.ends)
            assert len(set(prompt.hashes)) == len(prompt.hashes) == len(prompt.ends)
        replica = rng.choice(replicas)
        replica.step(prompt)
        replica.check(prompt)
        if number % 5 == 0:
            now += 0.5
            _tell(replicas, now)
    for replica in replicas:
        while replica.requests:
            replica.end(replica.requests[-1], is_served=False)
        replica.check(None)
        assert [server.prefixes.pending for server in replica.servers] == [0, 0, 0]
    _tell(replicas, now + 1)
    assert [server.prefixes.elsewhere for replica in replicas for server in replica.servers] == [0] * 6


def _tell(replicas: list[Replica], now: float) -> None:
    messages = [message for replica in replicas if (message := replica.shared.step(now)) is not None]
    for replica in replicas:
        for message in messages:
            replica.shared.receive(message)
