"""Host names whose addresses are servers: which addresses are chosen, and in which steps servers change."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from gateway import config
from gateway.upstream import server_names as module
from gateway.upstream.backend import Backend
from gateway.upstream.server import Server
from gateway.upstream.server_names import BATCH, MAX_SERVERS, Membership, ServerName
from tests.fakes.networks import NAME, Names, names
from tests.fakes.running_gateway import until

MANY = [f"10.{number // 256}.{number % 256}.1" for number in range(1000)]


def backend(servers: Any = f"dns://{NAME}:8000", **keys: Any) -> Backend:
    settings = config.build(
        {
            "llm_backend": "pods",
            "backends": {"pods": {"kind": "vllm", "servers": servers, "probe_interval": 0.01, **keys}},
            "tiers": {"standard": {"models": {"pods": "llama"}}},
        }
    )
    return Backend(settings.backends["pods"])


class Follower:
    """A backend whose name is followed, with probes that end when the test says so."""

    def __init__(self, dns: Names, here: Backend) -> None:
        self.dns = dns
        self.backend = here
        self.probes: dict[Server, asyncio.Future[None]] = {}
        self.steps: list[tuple[str, int]] = []
        self.answers_at_once = True
        join, leave = here.join, here.leave

        def joined(servers: Collection[Server]) -> None:
            self.steps.append(("join", len(servers)))
            join(servers)

        def left(servers: Collection[Server]) -> None:
            self.steps.append(("leave", len(servers)))
            leave(servers)

        here.join, here.leave = joined, left  # type: ignore[method-assign]

    def start_probes(self, server: Server) -> "asyncio.Future[None]":
        probe = self.probes.setdefault(server, asyncio.get_running_loop().create_future())
        if self.answers_at_once:
            self.end_probe(server)
        return probe

    def end_probe(self, server: Server) -> None:
        if not self.probes[server].done():
            self.probes[server].set_result(None)
        server.is_joining = False
        self.backend.refresh()

    def announce(self, *addresses: str) -> None:
        self.dns.addresses[NAME] = list(addresses)

    @property
    def addresses(self) -> list[str]:
        return sorted(server.pool.origin.address or "" for server in self.backend.servers)

    @property
    def name(self) -> ServerName:
        return self.backend.names[0]


@asynccontextmanager
async def following(*addresses: str, here: Backend | None = None) -> AsyncIterator[Follower]:
    with names(backend=list(addresses)) as dns:
        follower = Follower(dns, here or backend())
        memberships = [
            Membership(follower.backend, name, follower.start_probes, lambda: None) for name in follower.backend.names
        ]
        tasks = [asyncio.create_task(membership.run()) for membership in memberships]
        try:
            await asyncio.wait([membership.has_begun for membership in memberships], timeout=5)
            yield follower
        finally:
            for task in tasks:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            follower.backend.close()


# Which addresses


async def test_more_addresses_than_the_limit_are_ignored_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    async with following(*MANY) as follower:
        assert len(follower.backend.servers) == MAX_SERVERS
        assert follower.name.ignored == 1000 - MAX_SERVERS
        lookups = len(follower.dns.lookups)
        await until(lambda: len(follower.dns.lookups) > lookups + 2)
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert warning == (
            f"backend pods: the host name {NAME} has {1000 - MAX_SERVERS} addresses more than the {MAX_SERVERS} "
            "that are used"
        )


async def test_servers_stay_when_more_addresses_than_the_limit_come_in_any_order() -> None:
    async with following(*MANY[500:]) as follower:
        before = follower.addresses
        steps = len(follower.steps)
        lookups = len(follower.dns.lookups)
        follower.announce(*reversed(MANY))
        await until(lambda: len(follower.dns.lookups) > lookups + 2)
        assert (follower.addresses, len(follower.steps)) == (before, steps)


async def test_scope_and_family_of_an_address_are_part_of_it() -> None:
    found: list[tuple[Any, ...]] = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 0, 0, 3)),
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_STREAM, 6, "", "/socket"),
    ]
    async with following() as follower:
        follower.dns.answer = found
        await until(lambda: follower.addresses == ["10.0.0.1", "fe80::1%3"])
        assert {server.label for server in follower.backend.servers} == {"10.0.0.1:8000", "[fe80::1%3]:8000"}


# Steps


async def test_a_thousand_changes_are_made_in_small_steps() -> None:
    async with following(*MANY[:MAX_SERVERS]) as follower:
        follower.announce(*MANY[MAX_SERVERS : 2 * MAX_SERVERS])
        await until(lambda: follower.addresses == sorted(MANY[MAX_SERVERS : 2 * MAX_SERVERS]))
        assert max(count for _, count in follower.steps) <= BATCH
        assert sum(count for step, count in follower.steps if step == "leave") == MAX_SERVERS
        await until(lambda: follower.backend.drop_drained() == [] and not follower.backend.leaving)
        assert len(follower.backend.admission._servers) == MAX_SERVERS


async def test_last_server_leaves_when_the_first_probe_of_its_successor_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STEP_SECONDS", 0.0)
    async with following("10.0.0.1") as follower:
        (old,) = follower.backend.servers
        follower.answers_at_once = False
        follower.announce("10.0.0.2")
        await until(lambda: len(follower.backend.servers) == 2)
        for _ in range(100):
            await asyncio.sleep(0)
        assert (old.is_up(), old.is_leaving) == (True, False)
        new = next(server for server in follower.backend.servers if server is not old)
        assert not new.is_up()
        follower.end_probe(new)
        await until(lambda: follower.backend.servers == [new])
        assert (new.is_up(), old.is_up(), old.serves("llama")) == (True, False, False)


async def test_last_server_leaves_at_last_when_its_successor_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PROBES_SECONDS", 0.02)
    async with following("10.0.0.1") as follower:
        follower.answers_at_once = False
        follower.announce("10.0.0.2")
        await until(lambda: follower.addresses == ["10.0.0.2"])


async def test_one_of_several_servers_leaves_without_waiting_for_its_successor() -> None:
    async with following("10.0.0.1", "10.0.0.3") as follower:
        follower.answers_at_once = False
        follower.announce("10.0.0.2", "10.0.0.3")
        await until(lambda: follower.addresses == ["10.0.0.2", "10.0.0.3"])
        assert not any(probe.done() for server, probe in follower.probes.items() if server.label == "10.0.0.2:8000")


async def test_first_lookup_is_over_when_the_first_probes_have_ended() -> None:
    with names(backend=["10.0.0.1"]) as dns:
        follower = Follower(dns, backend())
        follower.answers_at_once = False
        membership = Membership(follower.backend, follower.name, follower.start_probes, lambda: None)
        task = asyncio.create_task(membership.run())
        await until(lambda: len(follower.probes) == 1)
        assert not membership.has_begun.done()
        follower.end_probe(follower.backend.servers[0])
        await asyncio.wait_for(membership.has_begun, 5)
        task.cancel()
        await asyncio.wait([task])


# Time


async def test_doubt_brings_the_next_lookup_forward_but_not_below_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 0.1)
    async with following("10.0.0.1", here=backend(probe_interval=60)) as follower:
        loop = asyncio.get_running_loop()
        times = []
        for _ in range(3):
            lookups = len(follower.dns.lookups)
            began = loop.time()
            follower.backend.servers[0].doubt_name()
            await until(lambda: len(follower.dns.lookups) > lookups)  # noqa: B023
            times.append(loop.time() - began)
        assert len(follower.dns.lookups) == 4
        assert min(times[1:]) > 0.05


async def test_name_that_was_never_resolved_is_looked_up_every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 0.01)
    async with following(here=backend(probe_interval=60)) as follower:
        assert follower.name.failure == "Name or service not known"
        await until(lambda: len(follower.dns.lookups) > 3)
        follower.announce("10.0.0.1")
        await until(lambda: follower.addresses == ["10.0.0.1"])
        assert follower.name.failure is None


def test_name_that_was_not_looked_up_yet_says_so() -> None:
    assert backend().names[0].failure == "not looked up yet"


# State of a server


async def test_state_of_a_server_stays_as_long_as_its_address_does() -> None:
    async with following("10.0.0.1", "10.0.0.2") as follower:
        one = next(server for server in follower.backend.servers if server.label == "10.0.0.1:8000")
        one.circuit.fail("reset", 1e12)
        one.prefixes.pending = 17
        one.guesses = {"llama": 3}
        follower.announce("10.0.0.3", "10.0.0.1")
        await until(lambda: follower.addresses == ["10.0.0.1", "10.0.0.3"])
        assert one in follower.backend.servers
        assert (one.circuit.is_troubled, one.prefixes.pending, one.guesses) == (True, 17, {"llama": 3})


async def test_learned_limits_are_recalled_once_for_an_address() -> None:
    here = backend(servers=[f"dns://{NAME}:11434"], kind="ollama")
    here.recall({"pods#10.0.0.1:11434": {"llama": 4}})
    async with following("10.0.0.1", "10.0.0.2", here=here) as follower:
        assert {server.label: server.guesses for server in here.servers} == {
            "10.0.0.1:11434": {"llama": 4},
            "10.0.0.2:11434": {},
        }
        follower.announce("10.0.0.2")
        await until(lambda: follower.addresses == ["10.0.0.2"])
        here.drop_drained()
        follower.announce("10.0.0.1")
        await until(lambda: follower.addresses == ["10.0.0.1"])
        assert here.servers[0].guesses == {}
