"""Addresses of host names: kept for seconds, shared, and never waited for longer than necessary."""

import asyncio
import logging
import socket
from collections.abc import Coroutine
from typing import Any

import pytest

from gateway.upstream import resolver as module
from gateway.upstream.resolver import CURRENT_SECONDS, Address, Resolver
from tests.fakes.networks import NAME, Names, names
from tests.fakes.running_gateway import until

pytestmark = pytest.mark.both_loops

ONE = Address(socket.AF_INET, "127.0.0.1")
TWO = Address(socket.AF_INET, "127.0.0.2")


def resolver(changes: list[frozenset[str]] | None = None) -> Resolver:
    return Resolver(NAME, lambda addresses: None if changes is None else changes.append(addresses))


def expire(resolver: Resolver) -> None:
    """Let the addresses be older than `CURRENT_SECONDS`."""
    assert resolver._current_until <= asyncio.get_running_loop().time() + CURRENT_SECONDS
    resolver._current_until = 0.0


def result_without_waiting(coroutine: Coroutine[Any, Any, list[Address]]) -> list[Address]:
    """Run a coroutine that does not wait for anything; return its result."""
    with pytest.raises(StopIteration) as ended:
        coroutine.send(None)
    result: list[Address] = ended.value.value
    return result


async def lookup_ended(resolver: Resolver) -> None:
    await until(lambda: resolver._lookup is None)


async def test_address_needs_no_lookup() -> None:
    for host in ("127.0.0.1", "::1", "fe80::1%lo"):
        assert Resolver(host, lambda addresses: None).is_literal
    assert not resolver().is_literal


async def test_addresses_keep_their_order_and_come_once() -> None:
    with names(backend=["127.0.0.2", "::1", "127.0.0.1", "127.0.0.2"]):
        assert await resolver().addresses() == [TWO, Address(socket.AF_INET6, "::1"), ONE]


async def test_scope_of_a_link_local_address_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("fe80::1", 0, 0, 3))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **named: found)
    assert await resolver().addresses() == [Address(socket.AF_INET6, "fe80::1%3")]


async def test_lookup_is_shared_and_its_result_kept_for_seconds() -> None:
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver()
        assert await asyncio.gather(*(found.addresses() for _ in range(50))) == [[ONE]] * 50
        await found.addresses()
        assert dns.lookups == [NAME]
        expire(found)
        await found.addresses()
        assert len(dns.lookups) == 2


async def test_new_addresses_are_reported_once() -> None:
    changes: list[frozenset[str]] = []
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver(changes)
        await found.addresses()
        for addresses in (["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"], ["127.0.0.2"]):
            dns.addresses[NAME] = addresses
            expire(found)
            await found.addresses()
    assert changes == [frozenset({"127.0.0.1", "127.0.0.2"}), frozenset({"127.0.0.2"})]


async def test_name_that_does_not_exist_has_no_address_even_if_it_had_one() -> None:
    changes: list[frozenset[str]] = []
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver(changes)
        await found.addresses()
        dns.addresses.clear()
        expire(found)
        for _ in range(2):
            with pytest.raises(socket.gaierror):
                await found.addresses()
        assert changes == [frozenset()]
        dns.addresses[NAME] = ["127.0.0.2"]
        assert await found.addresses() == [TWO]


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".test"])
async def test_name_that_cannot_exist_has_no_address(host: str) -> None:
    with pytest.raises(socket.gaierror):
        await Resolver(host, lambda addresses: None).addresses()


@pytest.mark.parametrize("failure", [socket.gaierror(socket.EAI_AGAIN, "try again"), OSError("no files left")])
async def test_last_addresses_are_used_while_lookups_fail(failure: Exception, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver()
        await found.addresses()
        dns.failure = failure
        for _ in range(3):
            expire(found)
            assert await found.addresses() == [ONE]
        dns.failure = None
        expire(found)
        await found.addresses()
    assert [message.partition(" (")[0] for message in caplog.messages] == [
        f"the host name {NAME} is not resolved",
        f"the host name {NAME} is resolved again",
    ]


async def test_failed_lookup_without_earlier_addresses_is_an_error_and_not_the_last_word() -> None:
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver()
        dns.failure = socket.gaierror(socket.EAI_AGAIN, "try again")
        with pytest.raises(socket.gaierror):
            await found.addresses()
        dns.failure = None
        assert await found.addresses() == [ONE]


async def test_lookup_that_hangs_delays_only_the_first_connection_and_occupies_one_thread(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(module, "SLOW_SECONDS", 0.01)
    with names(backend=["127.0.0.1"]) as dns:
        found = resolver()
        await found.addresses()
        expire(found)
        dns.answers.clear()
        loop = asyncio.get_running_loop()
        began = loop.time()
        assert await found.addresses() == [ONE]
        assert loop.time() - began >= 0.04
        monkeypatch.setattr(module, "PATIENCE_SECONDS", 0.03)  # over since the lookup began, however exact the timers
        for _ in range(100):
            assert result_without_waiting(found.addresses()) == [ONE]
        assert len(dns.lookups) == 2
        assert "its last addresses are used" in caplog.text
        dns.addresses[NAME] = ["127.0.0.2"]
        dns.answers.set()
        await lookup_ended(found)
        assert await found.addresses() == [TWO]


async def test_lookup_that_hangs_blocks_neither_the_loop_nor_a_caller_that_gives_up() -> None:
    with names(backend=["127.0.0.1"]) as dns:
        dns.answers.clear()
        found = resolver()
        for _ in range(20):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.005):
                    await found.addresses()
        assert found.is_waiting
        assert dns.lookups == [NAME]
        dns.answers.set()
        await lookup_ended(found)
        assert await found.addresses() == [ONE]
        assert not found.is_waiting


async def test_thread_that_cannot_be_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(module.threading.Thread, "start", refuse)
    with pytest.raises(socket.gaierror):
        await resolver().addresses()


async def test_lookups_run_in_threads_of_their_own() -> None:
    """The loop's threads are shared: lookups that hang there would hold up everybody."""
    with names(backend=["127.0.0.1"]) as dns:
        await resolver().addresses()
    assert dns.threads == {"resolver"}


def test_lookup_that_outlives_its_loop_does_no_harm() -> None:
    with names(backend=["127.0.0.1"]) as dns:
        dns.answers.clear()

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.01):
                    await resolver().addresses()

        asyncio.run(give_up())
        waiting: Names = dns
        waiting.answers.set()
