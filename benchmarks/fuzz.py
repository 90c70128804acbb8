"""Search for the slowest input: what a client or a backend can send to keep the event loop busy.

`make fuzz` runs it. For each target, inputs are mutated and the slowest are kept. The cost of an
input is the CPU time of its longest step, since other requests get a turn between steps; for
decoding images it is the CPU time of the child processes. Exit status 1 when it exceeds the
target's bound. The slowest input of each target is kept in `slowest/`, where the next search
begins, and a test checks them.
"""

import argparse
import asyncio
import gc
import lzma
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import orjson
from uvicorn import Config
from uvicorn.server import ServerState

from benchmarks import fuzz_answers, fuzz_images, fuzz_requests, fuzz_schemas
from gateway.dialects import rerank
from gateway.dialects.anthropic_messages import AnthropicMessages
from gateway.dialects.ollama_chat import OllamaChat, OllamaGenerate
from gateway.dialects.ollama_embeddings import OllamaEmbed, OllamaEmbeddings
from gateway.dialects.openai_completions import OpenAiCompletions
from gateway.dialects.openai_responses import OpenAiResponses
from gateway.downstream.protocol import HttpProtocol
from gateway.engines.engine import MAX_PLAIN_ANSWER
from gateway.engines.grammar import regex
from gateway.engines.ollama import OllamaReader
from gateway.engines.openai_response import OpenAiReader
from gateway.errors import GatewayError

MOST_SECONDS = 0.05
MIB = 1024 * 1024
READ_FROM_CLIENT = 64 * 1024
"""Bytes that libuv reads from a socket at once."""
_KEPT = 12
"""Inputs of a target that are mutated on."""
_REPEATS = 5
"""Measurements of an input that seems to be slow. The least one counts."""
SLOWEST = Path(__file__).with_name("slowest")
_CLEARLY_SLOWER = 1.2
"""Ratio above which an input takes the place of the slowest one before."""
_MOST_KEPT_BYTES = 64 * 1024
"""Maximum size of a kept input, compressed."""

Input = TypeVar("Input")
Steps = Iterator[None]


@dataclass(frozen=True)
class Target(Generic[Input]):
    """Code under test: `run` does one step of the work on an input before each `yield`."""

    name: str
    run: Callable[[Input], Steps]
    seeds: Callable[[], list[Input]]
    mutated: Callable[[random.Random, list[Input]], Input]
    text: Callable[[Input], bytes]
    read: Callable[[bytes], Input]
    """The inverse of `text`."""
    cost: Callable[[Steps], float]
    most: float = MOST_SECONDS
    """Maximum cost in seconds."""
    repeats: int = _REPEATS


@dataclass(order=True)
class Found:
    """A measured input."""

    seconds: float
    number: int
    size: int
    """Bytes."""
    input: Any


def longest_step(steps: Steps) -> float:
    """Return the CPU time of the longest step in seconds. An input that is refused is one, too."""
    longest, is_running = 0.0, True
    while is_running:
        began = time.process_time()
        try:
            next(steps)
        except (StopIteration, GatewayError):
            is_running = False
        longest = max(longest, time.process_time() - began)
    return longest


def search(target: Target[Any], seconds: float, chance: random.Random, known: list[bytes] | None = None) -> Found:
    """Return the slowest input found in `seconds`, among `known` ones and new ones."""
    kept: list[Found] = []
    waiting = [*target.seeds(), *map(target.read, known or ())]
    end = time.monotonic() + seconds
    number = 0
    while waiting or time.monotonic() < end:
        found = waiting.pop() if waiting else target.mutated(chance, [other.input for other in kept])
        number += 1
        spent = target.cost(target.run(found))
        if len(kept) < _KEPT or spent > kept[-1].seconds:
            for _ in range(target.repeats):  # something else may have had the processor's caches
                spent = min(spent, target.cost(target.run(found)))
            kept = sorted([*kept, Found(spent, number, len(target.text(found)), found)], reverse=True)[:_KEPT]
    return kept[0]


# Bytes


def _mutator(pieces: list[bytes], most: int) -> Callable[[random.Random, list[bytes]], bytes]:
    def mutated(chance: random.Random, kept: list[bytes]) -> bytes:
        body = chance.choice(kept)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(body) + 1)
            how = chance.randrange(4)
            if how == 0:
                end = min(len(body), at + chance.choice([1, 8, 64, 4096]))
                room = max(0, most - len(body)) // max(1, end - at)
                body = body[:at] + body[at:end] * chance.randint(1, max(1, room)) + body[end:]
            elif how == 1:
                piece = chance.choice(pieces)
                room = max(0, most - len(body)) // len(piece)
                body = body[:at] + piece * chance.choice([1, chance.randint(0, room), room]) + body[at:]
            elif how == 2:
                body = body[:at] + body[at + chance.choice([1, 16, len(body) // 2]) :]
            else:
                other = chance.choice(kept)
                body = body[:at] + other[len(other) - max(0, min(len(other), most - at)) :]
        return body[:most]

    return mutated


def _read_pattern(pattern: bytes) -> Steps:
    regex.portable(pattern.decode("latin-1"))
    yield


_PATTERN_PIECES = [
    b"^", b"$", b"(", b")", b"(?:", b"|", b"[a-z]", b"[^a]", b"[", b"]", b"a", b"{1,128}", b"{2}", b"?", b"*", b"+",
    b"\\d", b"\\w", b"\\-", b"(?P<a>", b".", b"-", b"{999999", b"\xe9",
]  # fmt: skip


# HTTP


class _Transport:
    """Transport that takes everything and sends nothing."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments, **named: 0 if name == "get_write_buffer_size" else None

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return True


async def _app(scope: Any, receive: Any, send: Any) -> None:
    while (message := await receive())["type"] == "http.request" and message["more_body"]:
        pass
    scope["extensions"]["gateway.client"].answer(200, b"", b"")


class HttpServer:
    """HTTP server without a socket."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._config = Config(_app)
        self._config.load()

    def close(self) -> None:
        self._loop.close()

    def read(self, data: bytes) -> Steps:
        protocol = HttpProtocol(self._config, ServerState(), {}, self._loop)
        protocol.connection_made(cast("asyncio.Transport", _Transport()))
        for start in range(0, len(data), READ_FROM_CLIENT):
            protocol.data_received(data[start : start + READ_FROM_CLIENT])
            yield
            self._loop.call_soon(self._loop.stop)
            self._loop.run_forever()
            yield
        protocol.connection_lost(None)


_HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
_HEAD_PIECES = [
    b"\r\n", b"a:b\r\n", b"Host: a\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n", b"0",
    b" ", b"%41", b"&a=b", b"?", b"1\r\nx\r\n", b"5;a=b\r\nhello\r\n", b"0\r\n", b"Upgrade: h2c\r\n",
    b"Expect: 100-continue\r\n", b"/", b"X" * 64, b"\t", b"GET / HTTP/1.1\r\n", b"\xff",
]  # fmt: skip


def _head_seeds() -> list[bytes]:
    return [
        _HEAD + b"Content-Length: 2\r\n\r\n{}",
        _HEAD + b"Content-Length: " + b"0" * 5000 + b"2\r\n\r\n{}",
        _HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 40_000 + b"0\r\n\r\n",
        b"GET /" + b"%41" * 20_000 + b" HTTP/1.1\r\nHost: gateway\r\n\r\n",
        (_HEAD + b"Content-Length: 2\r\n\r\n{}") * 500,
    ]


def _of_schemas(name: str, run: Callable[[Any], Steps]) -> Target[Any]:
    return Target(
        name, run, fuzz_schemas.schema_seeds, fuzz_schemas.mutated_schema, orjson.dumps, orjson.loads, longest_step
    )


def _of_bytes(
    name: str, run: Callable[[bytes], Steps], seeds: Callable[[], list[bytes]], pieces: list[bytes], most: int
) -> Target[bytes]:
    return Target(name, run, seeds, _mutator(pieces, most), bytes, bytes, longest_step)


def _of_images(
    name: str, images: fuzz_images.ImageRequests, side: int, cost: Callable[[Steps], float], most: float, repeats: int
) -> Target[bytes]:
    def seeds() -> list[bytes]:
        return fuzz_images.body_seeds(side)

    return Target(name, images.read, seeds, fuzz_images.mutated_body, bytes, bytes, cost, most, repeats)


def _of_client_apis() -> list[Target[Any]]:
    """Return a target for the requests of each client API other than chat completions."""
    chats = fuzz_requests.parse_with
    embeddings = fuzz_requests.parse_embedding_with
    return [
        _of_bytes(name, run, seeds, pieces, most)
        for name, run, seeds, pieces, most in (
            (
                "responses",
                chats(OpenAiResponses()),
                fuzz_requests.response_seeds,
                fuzz_requests.RESPONSE_PIECES,
                2 * MIB,
            ),
            (
                "messages",
                chats(AnthropicMessages()),
                fuzz_requests.message_seeds,
                fuzz_requests.MESSAGE_PIECES,
                2 * MIB,
            ),
            ("ollama", chats(OllamaChat()), fuzz_requests.ollama_seeds, fuzz_requests.OLLAMA_PIECES, 2 * MIB),
            ("generate", chats(OllamaGenerate()), fuzz_requests.generate_seeds, fuzz_requests.OLLAMA_PIECES, 2 * MIB),
            ("completion", chats(OpenAiCompletions()), fuzz_requests.completion_seeds, fuzz_requests.PIECES, 2 * MIB),
            ("embedding", fuzz_requests.parse_embedding, fuzz_requests.embedding_seeds, fuzz_requests.PIECES, 20 * MIB),
            ("embed", embeddings(OllamaEmbed()), fuzz_requests.embedding_seeds, fuzz_requests.PIECES, 20 * MIB),
            ("prompt", embeddings(OllamaEmbeddings()), fuzz_requests.prompt_seeds, fuzz_requests.PIECES, 20 * MIB),
            (
                "rerank",
                fuzz_requests.parse_rerank,
                fuzz_requests.rerank_seeds,
                fuzz_requests.RERANK_PIECES,
                rerank.MAX_BODY,
            ),
        )
    ]


def targets(http: HttpServer, images: fuzz_images.ImageRequests) -> list[Target[Any]]:
    """Return all targets."""
    return [
        _of_schemas("schema", fuzz_schemas.check_and_convert),
        _of_schemas("tools", fuzz_schemas.convert_tools),
        _of_bytes("pattern", _read_pattern, lambda: [b"^a$", b"^(?:[a-z]{2,9}|\\d+)?$"], _PATTERN_PIECES, 32 * 1024),
        _of_bytes("chat", fuzz_requests.parse_chat, fuzz_requests.chat_seeds, fuzz_requests.PIECES, 2 * MIB),
        *_of_client_apis(),
        _of_bytes("http", http.read, _head_seeds, _HEAD_PIECES, MIB // 2),
        _of_bytes(
            "events",
            fuzz_answers.read_answer(OpenAiReader),
            fuzz_answers.event_seeds,
            fuzz_answers.ANSWER_PIECES,
            2 * MIB,
        ),
        _of_bytes(
            "streams", fuzz_answers.render_stream, fuzz_answers.stream_seeds, fuzz_answers.ANSWER_PIECES, 2 * MIB
        ),
        _of_bytes(
            "ndjson",
            fuzz_answers.read_answer(OllamaReader),
            fuzz_answers.line_seeds,
            fuzz_answers.ANSWER_PIECES,
            2 * MIB,
        ),
        _of_bytes(
            "answer", fuzz_answers.read_plain, fuzz_answers.answer_seeds, fuzz_answers.ANSWER_PIECES, MAX_PLAIN_ANSWER
        ),
        _of_bytes(
            "assembled", fuzz_answers.read_assembled, fuzz_answers.assembled_seeds, fuzz_answers.ANSWER_PIECES, 16 * MIB
        ),
        _of_bytes(
            "text",
            fuzz_answers.read_completion,
            fuzz_answers.completion_answer_seeds,
            fuzz_answers.COMPLETION_PIECES,
            MAX_PLAIN_ANSWER,
        ),
        _of_bytes("vectors", fuzz_answers.read_vectors, fuzz_answers.vector_seeds, fuzz_answers.VECTOR_PIECES, 2 * MIB),
        _of_images("images", images, fuzz_images.LARGE_SIDE, longest_step, MOST_SECONDS, repeats=2),
        _of_images(
            "decoding",
            images,
            fuzz_images.LARGEST_SIDE,
            fuzz_images.child_seconds,
            fuzz_images.MOST_CHILD_SECONDS,
            repeats=0,
        ),
    ]


def known_inputs(folder: Path, target: Target[Any]) -> list[bytes]:
    """Return the slowest input of earlier searches, if `folder` has one for the target."""
    file = folder / f"{target.name}.xz"
    return [lzma.decompress(file.read_bytes())] if file.exists() else []


def keep(folder: Path, target: Target[Any], worst: Found) -> None:
    """Keep the slowest input for later searches, if it is small when compressed."""
    data = lzma.compress(target.text(worst.input), preset=6)
    if len(data) <= _MOST_KEPT_BYTES:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{target.name}.xz").write_bytes(data)


def main() -> int:
    """Search for the slowest inputs, print them, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together (default: 60)")
    parser.add_argument("--seed", type=int, default=random.randrange(1_000_000), help="of the random numbers")
    parser.add_argument("--target", action="append", help="only this target; may be repeated")
    parser.add_argument("--slowest", type=Path, default=SLOWEST, help="folder with the slowest input of each target")
    options = parser.parse_args()
    with closing(HttpServer()) as http, closing(fuzz_images.ImageRequests()) as images:
        chosen = [target for target in targets(http, images) if not options.target or target.name in options.target]
        if not chosen:
            parser.error("no such target")
        gc.collect()
        gc.freeze()  # as the gateway does: a collection walks only the objects of the work
        return _search_all(chosen, options)


def _search_all(chosen: list[Target[Any]], options: argparse.Namespace) -> int:
    print(f"{'target':10} {'CPU ms':>8} {'bytes':>10} {'ms/KiB':>8} {'input':>8}   seed {options.seed}")
    slow = []
    for target in chosen:
        chance = random.Random(f"{options.seed} {target.name}")
        known = known_inputs(options.slowest, target)
        worst = search(target, options.seconds / len(chosen), chance, known)
        text, milliseconds = target.text(worst.input), worst.seconds * 1000
        print(
            f"{target.name:10} {milliseconds:8.1f} {worst.size:10} {milliseconds * 1024 / max(1, worst.size):8.2f} "
            f"{worst.number:8}   {text[:60]!r}",
            flush=True,
        )
        if text not in known and all(
            worst.seconds > _CLEARLY_SLOWER * target.cost(target.run(target.read(other))) for other in known
        ):
            keep(options.slowest, target, worst)
        if worst.seconds > target.most:
            slow.append(f"{target.name} ({target.most * 1000:g} ms)")
    if slow:
        print(f"Above the bound: {', '.join(slow)}")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
