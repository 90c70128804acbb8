"""One client process of `chaos.py`, which can be killed, stopped and restarted as a whole.

It appends to its file one JSON line before each request, and one after it with what it saw. A
request without a second line was in flight when the process ended. It sends until its standard
input ends, then waits for what is in flight. On SIGTERM it closes its connections and ends at once.
"""

import argparse
import asyncio
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from benchmarks.clients import ClientRecord, Clients, Expected, Leave, Plan, head_of
from gateway.simulate.text import digest

FALLBACK_TIER, LONE_TIER = "standard", "alone"
LENGTHS = (20, 60, 150, 300, 1100)
"""Tokens of an answer. Above 1,024 the gateway asks a vLLM for a stream, whatever the client did."""
_LENGTH_WEIGHTS = (30, 30, 25, 12, 3)
TOPICS = 12
QUEUE_SECONDS, FIRST_TOKEN_SECONDS, TOTAL_SECONDS = 20.0, 15.0, 60.0
CONNECT_SECONDS = 2.0
CLIENT_TIMEOUT = 30.0
"""`x-gateway-timeout` of some requests."""
SCHEDULING_SECONDS = 6.0
"""Added to every deadline: the machine is busy."""
DEADLINE = 2 * (QUEUE_SECONDS + CONNECT_SECONDS) + FIRST_TOKEN_SECONDS + TOTAL_SECONDS + SCHEDULING_SECONDS
"""Longest time of a request without `x-gateway-timeout`: two queues, a first attempt without a
token, and a second one in full.
"""
_BURST_SECONDS, _BURST_REQUESTS = 12.0, 5


class Reference(NamedTuple):
    """Answer of the engine itself to a prompt: its count of the prompt, and the first words."""

    prompt_tokens: int
    beginning: str


def prompt_of(tokens: int, topic: int) -> str:
    """Return a prompt for an answer of `tokens`; each topic has another number of prompt tokens."""
    return f"{tokens} words about the sea" + " and the sky" * topic


def prompts() -> Iterator[str]:
    return (prompt_of(tokens, topic) for tokens in LENGTHS for topic in range(TOPICS))


class ChaosMixture:
    """Source of plans. `grace` is added to the deadlines of clients that are stopped at times."""

    def __init__(self, seed: int, prefix: str, references: dict[str, Reference], grace: float) -> None:
        self._dice = random.Random(seed)
        self._prefix = prefix
        self._references = references
        self._grace = grace
        self._numbers = itertools.count(1)

    def plan(self) -> Plan:
        dice = self._dice
        tokens = dice.choices(LENGTHS, _LENGTH_WEIGHTS)[0]
        prompt = prompt_of(tokens, dice.randrange(TOPICS))
        stream, tier = dice.random() < 0.6, dice.choices((FALLBACK_TIER, LONE_TIER), (7, 3))[0]
        body: dict[str, Any] = {
            "model": tier,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
        }
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        reference = self._references[prompt]
        expected = Expected(
            beginnings={"ollama": f"{digest(prompt)} saw 0 images", "vllm": reference.beginning},
            tokens=tokens,
            prompt_tokens={"vllm": reference.prompt_tokens},
        )
        leave = self._leave(tokens) if dice.random() < 0.25 else None
        data, request_id = json.dumps(body).encode(), f"{self._prefix}-{next(self._numbers):05}"
        is_kept = leave is None and dice.random() < 0.5
        is_timed = dice.random() < 0.4
        fields = {"x_gateway_timeout": f"{CLIENT_TIMEOUT:g}"} if is_timed else {}
        head = head_of(request_id, "/v1/chat/completions", len(data), kept=is_kept, **fields)
        deadline = (CLIENT_TIMEOUT + SCHEDULING_SECONDS if is_timed else DEADLINE) + self._grace
        return Plan(
            request_id, f"{'stream' if stream else 'plain'} {tier}", head, data, expected, deadline, leave, is_kept
        )

    def _leave(self, tokens: int) -> Leave:
        dice, resets = self._dice, self._dice.random() < 0.4
        moment = dice.choices(["uploading", "waiting", "streaming"], (0.15, 0.45, 0.4))[0]
        if moment == "uploading":
            return Leave("uploading", dice.uniform(0.0, 0.95), resets)
        if moment == "streaming":
            return Leave("streaming", dice.randrange(1, tokens // 2), resets)
        return Leave("waiting", dice.uniform(0.0, dice.choice((0.2, 2.0))), resets)


class Journal:
    """The file of a client process."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def sent(self, plan: Plan) -> None:
        self._write([plan.id, plan.kind, time.monotonic(), plan.deadline])

    def ended(self, record: ClientRecord) -> None:
        self._write(list(record))

    def _write(self, line: list[Any]) -> None:
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()


def read_journal(lines: Iterable[str], ended_at: float) -> list[ClientRecord]:
    """Return what a client process saw; what was in flight when it ended has left at `ended_at`."""
    open_requests: dict[str, ClientRecord] = {}
    records = []
    for text in lines:
        if not text.endswith("\n"):  # the process was killed while it wrote
            continue
        line = json.loads(text)
        if len(line) == 4:
            request_id, kind, sent, deadline = line
            open_requests[request_id] = ClientRecord(
                request_id, kind, "left", sent, max(0.0, ended_at - sent), note="process ended", deadline=deadline
            )
        else:
            record = ClientRecord(*line)
            open_requests.pop(record.id, None)
            records.append(record)
    return records + list(open_requests.values())


async def run(port: int, rate: float, mixture: ChaosMixture, journal: Journal) -> None:
    """Send requests until standard input ends, then wait for those in flight."""
    clients, over, dice = Clients(port), asyncio.Event(), random.Random(port)
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin.fileno(), over.set)
    running = asyncio.current_task()
    assert running is not None
    loop.add_signal_handler(signal.SIGTERM, running.cancel)

    async def send() -> None:
        plan = mixture.plan()
        journal.sent(plan)
        journal.ended(await clients.send(plan))

    next_burst = time.monotonic() + _BURST_SECONDS
    async with asyncio.TaskGroup() as group:
        while not over.is_set():
            is_burst = time.monotonic() >= next_burst
            next_burst += _BURST_SECONDS * is_burst
            for _ in range(_BURST_REQUESTS if is_burst else 1):
                group.create_task(send())
            with_timeout = asyncio.wait_for(over.wait(), dice.expovariate(rate))
            try:
                await with_timeout
            except TimeoutError:
                continue
    clients.close()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos_clients", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--prefix", required=True, help="beginning of the request ids")
    parser.add_argument("--grace", type=float, default=0.0)
    parser.add_argument("--references", type=Path, required=True, help="JSON file of the engine's own answers")
    parser.add_argument("--journal", type=Path, required=True)
    given = parser.parse_args(arguments)
    references = {prompt: Reference(*found) for prompt, found in json.loads(given.references.read_text()).items()}
    mixture = ChaosMixture(given.seed, given.prefix, references, given.grace)
    with given.journal.open("a") as out:
        try:
            asyncio.run(run(given.port, given.rate, mixture, Journal(out)))
        except asyncio.CancelledError:
            return 0
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
