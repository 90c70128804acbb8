"""Workloads of `affinity_vllm.py`: chains of requests whose prompts have beginnings in common. Pure.

The same seed gives the same requests. The answers in a conversation's history are made up, so that
what is sent does not depend on what a server said.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.bench.prompts import made_up_text

Message = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """One request, sent `pause` seconds after the end of the one before it in its chain."""

    messages: tuple[Message, ...]
    pause: float


Chain = list[Step]
"""Requests that follow each other, such as the turns of one person's conversations."""


def growing_conversations(seed: int, size: float = 1.0) -> list[Chain]:
    """Return the chains of 16 people with a common system prompt, each with two conversations.

    A conversation has three to seven turns. `size` multiplies the number of people.
    """
    rng = random.Random(f"conversations {seed}")
    system = {"role": "system", "content": _words(rng, 60, 60)}
    chains = []
    for _ in range(max(1, round(16 * size))):
        steps: Chain = []
        for _ in range(2):
            messages: list[Message] = [system, {"role": "user", "content": _words(rng, 150, 400)}]
            for _ in range(rng.randint(3, 7)):
                steps.append(Step(tuple(messages), rng.uniform(0.5, 3.0)))
                messages.append({"role": "assistant", "content": _words(rng, 20, 60)})
                messages.append({"role": "user", "content": _words(rng, 50, 200)})
        chains.append(steps)
    return chains


def shared_prompts(seed: int, size: float = 1.0) -> list[Chain]:
    """Return 140 single requests at random times, two a second, with 20 system prompts.

    The prompts are not used equally often. `size` multiplies the number of requests.
    """
    rng = random.Random(f"shared prompts {seed}")
    prompts = [{"role": "system", "content": _words(rng, 800, 800)} for _ in range(20)]
    weights = [1 / (rank + 1) ** 0.8 for rank in range(len(prompts))]
    chains, moment = [], 0.0
    for _ in range(max(1, round(140 * size))):
        moment += rng.expovariate(2.0)
        (system,) = rng.choices(prompts, weights)
        chains.append([Step((system, {"role": "user", "content": _words(rng, 20, 80)}), moment)])
    return chains


WORKLOADS: dict[str, Callable[[int, float], list[Chain]]] = {
    "growing conversations": growing_conversations,
    "shared system prompts": shared_prompts,
}


def _words(rng: random.Random, least: int, most: int) -> str:
    return made_up_text(rng.randint(least, most), rng)
