"""Hints of other replicas make this one look by itself, and decide nothing."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import msgspec
import pytest

from gateway.admission.fair_queue import Claim
from gateway.upstream.backend import Backend
from gateway.upstream.hints import PROBE_SECONDS, Event, Hint, Hints, address_of
from gateway.upstream.outlier_detection import IN_A_ROW, RELAPSES
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.running_gateway import Running, running, settings_for, until

A = Claim("a")


class Two:
    """A gateway with one server, and hints from another replica."""

    def __init__(self, gateway: Running, engine: FaultBackend) -> None:
        self.engine = engine
        self.backend: Backend = next(iter(gateway.gateway._backends.values()))
        (self.server,) = self.backend.servers
        self.now = 0.0
        self.sent: list[Hint] = []
        self.hints = Hints("me", gateway.gateway._backends, self._sent, lambda: self.now)

    def _sent(self, message: bytes) -> None:
        self.sent.append(msgspec.json.decode(message, type=Hint))

    def hear(self, event: Event, server: str | None = None, replica: str = "other", model: str = MODEL) -> None:
        hint = Hint(replica, address_of(self.server) if server is None else server, event, model)
        self.hints.receive(msgspec.json.encode(hint))


@pytest.fixture
async def two() -> AsyncIterator[Two]:
    async with AsyncExitStack() as stack:
        engine = await stack.enter_async_context(FaultBackend("vllm"))
        gateway = await stack.enter_async_context(running(settings_for(engine)))
        yield Two(gateway, engine)


async def test_server_that_another_replica_found_dead_is_probed_at_once_and_stays_if_it_answers(two: Two) -> None:
    probes = two.engine.probes
    two.hear("down")
    await until(lambda: two.engine.probes > probes)
    assert two.server.circuit.state == "closed"
    await until(lambda: not two.server.is_hinted)


async def test_dead_server_is_out_after_one_hint(two: Two) -> None:
    two.engine.die()
    two.hear("down")
    assert two.server.circuit.state == "closed"  # the hint itself opens nothing
    await until(lambda: two.server.circuit.state == "open", 30)
    assert not two.engine.requests


async def test_server_that_is_well_again_elsewhere_is_probed_at_once(two: Two) -> None:
    two.engine.die()
    two.hear("down")
    await until(lambda: two.server.circuit.state == "open", 30)
    await two.engine.revive()
    two.now += PROBE_SECONDS
    two.hear("up")
    await until(lambda: two.server.circuit.state in ("half_open", "closed"))


async def test_many_hints_cost_one_probe(two: Two) -> None:
    for _ in range(100):
        two.hear("down")
    await until(lambda: not two.server.is_hinted)
    two.hear("down")
    assert not two.server.is_hinted
    two.now += PROBE_SECONDS
    two.hear("down")
    assert two.server.is_hinted


async def test_hints_that_say_nothing_new_cost_nothing(two: Two) -> None:
    two.hear("up")
    two.hear("down", replica="me")
    two.hear("down", server="10.0.0.1:8000")
    two.hear("ejected", model="unknown")
    for message in (b"", b"\xff", b"[]", b'{"replica":"x","server":"y","event":"explode"}', b"[" * 100_000):
        two.hints.receive(message)
    assert not two.server.is_hinted
    assert not two.server.detectors


async def test_ejection_elsewhere_lowers_the_bar_and_ejects_nothing(two: Two) -> None:
    two.hear("ejected")
    gate = two.server.gate(MODEL, "text")
    assert gate.word == "in"
    assert RELAPSES < IN_A_ROW
    words = [gate.word]
    for _ in range(RELAPSES):
        gate.fail("status_5xx", gate._clock(), A, False)
        words.append(gate.word)
    assert words == ["in"] * RELAPSES + ["ejected"]


async def test_changes_of_a_server_are_told(two: Two) -> None:
    two.backend.restraints._on_event = two.hints.tell
    two.engine.die()
    two.server.doubted.set()
    two.server.is_hinted = True
    await until(lambda: two.server.circuit.state == "open", 30)
    gate = two.server.gate(MODEL, "vision")
    for _ in range(IN_A_ROW):
        gate.fail("status_5xx", gate._clock(), A, False)
    address = address_of(two.server)
    assert two.sent == [Hint("me", address, "down"), Hint("me", address, "ejected", MODEL, "vision")]
    two.sent.clear()
    await two.engine.revive()
    two.server.doubted.set()
    await until(lambda: two.server.circuit.state == "half_open")
    two.server.circuit.succeed()
    assert two.sent == [Hint("me", address, "up")]


async def test_servers_that_were_probed_are_forgotten(two: Two) -> None:
    """A host name may have had many addresses in the course of time."""
    for number in range(20):
        two.hints._probe(two.server, f"10.0.0.{number}:8000")
        two.now += PROBE_SECONDS
    assert len(two.hints._probed) == 1
