"""The search for the slowest input: a short run of it, what it calls slow, and the slowest known inputs.

It also tests `fuzz_answers.py`, `fuzz_images.py`, `fuzz_requests.py` and `fuzz_schemas.py`.
"""

import gc
import itertools
import random
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from benchmarks import fuzz, fuzz_images, fuzz_schemas
from gateway.chat.image_structure import kind_of
from gateway.chat.images import MAX_IMAGES
from gateway.chat.json_schema import MAX_SCHEMA
from tests.fakes.processor_time import assert_seconds_at_most

NAMES = [
    "schema", "tools", "pattern", "chat", "responses", "messages", "ollama", "generate", "completion",
    "embedding", "embed", "prompt", "rerank", "http", "events", "streams", "ndjson", "answer", "assembled",
    "text", "vectors", "images", "decoding",
]  # fmt: skip


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the largest seeds small, which take half a minute."""
    monkeypatch.setattr(fuzz_images, "LARGEST_SIDE", 64)
    monkeypatch.setattr(fuzz_images, "LARGE_SIDE", 64)
    monkeypatch.setattr(fuzz_images, "MAX_BODY", fuzz_images.MIB // 2)


@pytest.mark.usefixtures("small_images")
def test_short_run_names_every_target(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    every = fuzz.targets

    def with_few_seeds(target: fuzz.Target[Any]) -> fuzz.Target[Any]:
        return replace(target, seeds=lambda: target.seeds()[:2], repeats=0)

    def targets_with_few_seeds(http: Any, images: Any) -> list[fuzz.Target[Any]]:
        return [with_few_seeds(target) for target in every(http, images)]

    monkeypatch.setattr(fuzz, "targets", targets_with_few_seeds)
    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "0.1", "--seed", "1", "--slowest", str(tmp_path)])
    assert fuzz.main() in (0, 1)
    printed = capsys.readouterr().out
    assert [name for name in NAMES if f"\n{name} " not in printed] == []
    assert {file.stem for file in tmp_path.iterdir()} <= set(NAMES)
    assert "chat" in {file.stem for file in tmp_path.iterdir()}


def test_slowest_input_is_kept_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    inputs = itertools.count()  # a search of 0.2 s tries 2000, however slow the machine is
    monkeypatch.setattr(time, "monotonic", lambda: next(inputs) / 10_000)

    def run(size: int) -> Iterator[None]:
        for seconds in (size / 1000, 0.01):
            now[0] += seconds
            yield

    def mutated(chance: random.Random, kept: list[int]) -> int:
        return chance.choice(kept) + chance.choice([-1, 1])

    def target(most: float) -> fuzz.Target[int]:
        def text(size: int) -> bytes:
            return b"x" * size

        return fuzz.Target("any", run, lambda: [15], mutated, text, len, fuzz.longest_step, most)

    worst = fuzz.search(target(1), 0.2, random.Random(1))
    assert worst.input == worst.size > 20
    assert worst.seconds == pytest.approx(worst.size / 1000)

    monkeypatch.setattr(sys, "argv", ["fuzz", "--seconds", "0.2", "--seed", "1", "--slowest", str(tmp_path)])
    monkeypatch.setattr(fuzz, "targets", lambda http, images: [target(0.02)])
    assert fuzz.main() == 1
    (kept,) = fuzz.known_inputs(tmp_path, target(1))
    assert len(kept) > 20
    monkeypatch.setattr(fuzz, "targets", lambda http, images: [target(10**6)])
    assert fuzz.main() == 0
    (later,) = fuzz.known_inputs(tmp_path, target(1))
    assert len(later) >= len(kept)  # the next search begins with it
    fuzz.keep(tmp_path, target(1), fuzz.Found(1.0, 1, 9, 9))
    assert fuzz.known_inputs(tmp_path, target(1)) == [b"x" * 9]


def test_input_that_stays_large_when_compressed_is_not_kept(tmp_path: Path) -> None:
    def text(seed: int) -> bytes:
        return random.Random(seed).randbytes(100_000)

    target = fuzz.Target("any", lambda seed: iter(()), lambda: [1], lambda *_: 1, text, len, fuzz.longest_step)
    fuzz.keep(tmp_path, target, fuzz.Found(1.0, 1, 9, 9))
    assert fuzz.known_inputs(tmp_path, target) == []


def test_mutated_schema_is_small_enough_to_be_looked_at() -> None:
    chance = random.Random(1)
    kept = fuzz_schemas.schema_seeds()
    for _ in range(100):
        schema = fuzz_schemas.mutated_schema(chance, kept)
        assert len(orjson.dumps(schema)) <= MAX_SCHEMA


@pytest.mark.usefixtures("small_images")
def test_mutated_bodies_have_images_and_are_not_too_large() -> None:
    chance = random.Random(1)
    kept = fuzz_images.body_seeds(64)
    assert max(len(fuzz_images.images_of(body)) for body in kept) == MAX_IMAGES
    found = [fuzz_images.mutated_body(chance, kept) for _ in range(60)]
    assert max(map(len, found)) <= fuzz_images.MAX_BODY
    assert len({len(body) for body in found}) > 20
    kinds = {kind_of(image) for body in found for image in fuzz_images.images_of(body)[:1]}
    assert kinds == {"png", "jpeg", "gif", "webp", None}


@pytest.mark.usefixtures("small_images")
def test_cpu_time_of_child_processes_is_measured() -> None:
    bodies = fuzz_images.body_seeds(64)
    with closing(fuzz_images.ImageRequests()) as images:
        for body, most in ((bodies[2], 20.0), (bodies[1], 0.0)):  # a GIF is converted, a JPEG is not
            list(images.read(body))  # starts the child process
            spent = fuzz_images.child_seconds(images.read(body * 1))
            assert 0 < spent < most if most else spent < 0.05
        assert fuzz_images.child_seconds(images.read(b"{")) == pytest.approx(0, abs=0.05)


@pytest.fixture
def frozen_objects() -> Iterator[None]:
    """Leave the objects of earlier tests out of collections, as the gateway does with those of its start."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("frozen_objects")
@pytest.mark.parametrize("name", NAMES)
def test_slowest_known_input_stays_within_the_bound(name: str) -> None:
    with closing(fuzz.HttpServer()) as http, closing(fuzz_images.ImageRequests()) as images:
        (target,) = (target for target in fuzz.targets(http, images) if target.name == name)
        for text in fuzz.known_inputs(fuzz.SLOWEST, target):
            assert_seconds_at_most(target.most, lambda: target.cost(target.run(target.read(text))))  # noqa: B023
