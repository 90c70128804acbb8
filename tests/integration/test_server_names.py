"""Servers at the addresses of a host name: they join, leave and come back while requests run.

Covers: gateway/upstream/server_names.py
"""

import asyncio
import json
import logging
import re
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gateway import config
from gateway.upstream import liveness
from gateway.upstream import server_names as module
from gateway.upstream.backend import Backend
from tests.fakes.fault_backend import MODEL, TEXT, FaultBackend, Kind
from tests.fakes.networks import NAME, Names, names
from tests.fakes.running_gateway import TIMES, Raw, Running, running, until

pytestmark = [
    pytest.mark.uvloop,
    pytest.mark.skipif(not Path("/proc").exists(), reason="needs the loopback network of Linux"),
]

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
SLOW = {"stream": True, "max_tokens": 2000}


class Pods:
    """Servers on addresses of loopback with one port, a name for them, and a gateway in front."""

    def __init__(self, dns: Names, stack: AsyncExitStack, kind: Kind, tls: ssl.SSLContext | None) -> None:
        self.dns = dns
        self._stack = stack
        self._kind: Kind = kind
        self._tls = tls
        self.port = 0
        self.gateway: Running

    async def start(self, number: int, **options: Any) -> FaultBackend:
        """Start the server at 127.0.5.`number`. The name does not have its address yet."""
        pod = FaultBackend(self._kind, host=f"127.0.5.{number}", port=self.port, tls=self._tls, **options)
        await self._stack.enter_async_context(pod)
        self.port = pod.port
        return pod

    def announce(self, *pods: FaultBackend | str, name: str = NAME) -> None:
        """Let the name have the addresses of `pods`, and no others."""
        self.dns.addresses[name] = [pod if isinstance(pod, str) else pod.host for pod in pods]

    async def serve(self, **more: Any) -> Running:
        """Start the gateway."""
        self.gateway = await self._stack.enter_async_context(running(self.settings(**more)))
        return self.gateway

    def settings(self, **more: Any) -> config.Settings:
        backend = {"servers": f"dns://{NAME}:{self.port}", "kind": self._kind, **TIMES, "probe_interval": 0.05}
        if self._kind != "ollama":
            backend["balance"] = "least_busy"
        return config.build(
            {
                "llm_backend": "pods",
                "backends": {"pods": backend | more},
                "tiers": {"standard": {"models": {"pods": MODEL}}},
                "log_format": "json",
                "state_file": "",
            }
        )

    @property
    def backend(self) -> Backend:
        return self.gateway.gateway._backends["pods"]

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.gateway.gateway._operations.status()["backends"]["pods"]
        return status

    async def metrics(self) -> str:
        async with httpx2.AsyncClient(base_url=self.gateway.base_url, verify=False, trust_env=False) as client:
            return (await client.get("/metrics")).text

    async def labels(self) -> set[str]:
        """Return the servers that the metrics name."""
        return set(re.findall(r'gateway_server_up{backend="pods",server="([^"]*)"}', await self.metrics()))

    def up(self) -> list[str]:
        """Return the addresses of the servers that get requests."""
        return sorted(
            server.pool.origin.address or ""
            for server in self.backend.servers
            if self.backend.availability.gives_requests(server)
        )

    async def has(self, *pods: FaultBackend) -> None:
        """Wait until requests go to `pods` and to no other."""
        await until(lambda: self.up() == sorted(pod.host for pod in pods))

    @asynccontextmanager
    async def stream(self) -> AsyncIterator[Raw]:
        """Send a request whose answer has begun when the block begins, and that runs until its end."""
        async with self.gateway.sent(SLOW) as raw:
            assert (await raw.head())[0] == 200
            yield raw


@asynccontextmanager
async def pods(kind: Kind = "vllm", tls: ssl.SSLContext | None = None) -> AsyncIterator[Pods]:
    with names() as dns:
        async with AsyncExitStack() as stack:
            yield Pods(dns, stack, kind, tls)


async def goes_on(raw: Raw) -> bool:
    """Return whether more of a stream arrives."""
    return bool(await asyncio.wait_for(raw.reader.read(1), 5))


# Join and leave


async def test_each_address_of_the_name_is_a_server_of_its_own() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2, mode="slow")
        setup.announce(two, one, two)
        await setup.serve()
        assert setup.up() == [one.host, two.host]
        async with setup.stream(), setup.stream():
            assert (len(one.requests), len(two.requests)) == (1, 1)
            assert all(f"Host: {NAME}:{setup.port}\r\n".encode() in pod.requests[0] for pod in (one, two))
            assert [(server["name"], server["running"]) for server in setup.status["servers"]] == [
                (f"pods#{one.host}:{setup.port}", 1),
                (f"pods#{two.host}:{setup.port}", 1),
            ]
        assert await setup.labels() == {f"{one.host}:{setup.port}", f"{two.host}:{setup.port}"}
        assert setup.status["names"] == [
            {"name": f"{NAME}:{setup.port}", "resolved": True, "failure": None, "servers": 2, "ignored": 0}
        ]


async def test_server_that_appears_gets_requests_once_it_has_answered_a_probe() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one)
        await setup.serve()
        two.die()
        setup.announce(one, two)
        await until(lambda: len(setup.backend.servers) == 2)
        assert setup.up() == [one.host]
        for _ in range(4):
            assert (await setup.gateway.ask()).status == 200
        assert not two.requests
        await two.revive()
        await setup.has(one, two)


async def test_order_of_the_addresses_does_not_matter() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one, two)
        await setup.serve()
        before = list(setup.backend.servers)
        lookups = len(setup.dns.lookups)
        setup.announce(two, one)
        await until(lambda: len(setup.dns.lookups) > lookups + 2)
        assert setup.backend.servers == before


async def test_server_that_leaves_ends_its_streams_and_gets_no_other_request() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2)
        setup.announce(one)
        await setup.serve()
        async with setup.stream() as stream:
            setup.announce(two)
            await setup.has(two)
            await until(lambda: not setup.backend.servers[0].is_joining)
            for _ in range(3):
                assert (await setup.gateway.ask()).text == TEXT
            assert await goes_on(stream)
            assert [server["name"] for server in setup.status["servers"]] == [f"pods#{two.host}:{setup.port}"]
            assert setup.status["leaving"] == [{"name": f"pods#{one.host}:{setup.port}", "running": 1}]
            assert await setup.labels() == {f"{two.host}:{setup.port}"}
            running_there = f'gateway_server_requests_running{{backend="pods",server="{one.host}:{setup.port}"}} 1.0'
            assert running_there in await setup.metrics()
        await until(lambda: not setup.backend.leaving)
        assert len(one.requests) == 1
        assert await setup.labels() == {f"{two.host}:{setup.port}"}
        assert len(setup.backend.admission._servers) == 1
        assert set(setup.gateway.gateway._health._joined) == set(setup.backend.servers)


async def test_idle_connections_to_a_server_that_leaves_are_closed() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2)
        setup.announce(one)
        await setup.serve()
        async with setup.stream() as stream:
            one.mode = "healthy"
            assert (await setup.gateway.ask({"stream": True})).status == 200
            (busy, idle) = one.open_peers
            setup.announce(two)
            await until(lambda: idle.closed_at is not None)
            assert await goes_on(stream)
            assert busy.closed_at is None


async def test_queued_requests_move_to_the_servers_that_are_left() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2)
        setup.announce(one)
        await setup.serve(max_concurrency=1, queue_timeout=30)
        async with setup.stream() as stream:
            waiting = [asyncio.create_task(setup.gateway.ask()) for _ in range(5)]
            await until(lambda: setup.gateway.waiting == 5)
            setup.announce(two)
            assert [(await answer).status for answer in waiting] == [200] * 5
            assert len(two.requests) == 5
            assert await goes_on(stream)


async def test_nothing_is_lost_while_all_servers_are_replaced_again_and_again() -> None:
    """Streams of 10 ms run all the time, at most two at a server."""
    async with pods() as setup:
        fleet = [await setup.start(number, mode="brief") for number in range(1, 7)]
        setup.announce(*fleet[:2])
        await setup.serve(max_concurrency=2, queue_timeout=30, probe_interval=0.02)
        is_over = False
        answers: list[tuple[int, str]] = []

        async def client() -> None:
            while not is_over:
                reply = await setup.gateway.ask({"stream": True})
                answers.append((reply.status, reply.text))

        clients = [asyncio.create_task(client()) for _ in range(8)]
        for turn in range(9):
            chosen = [fleet[(2 * turn + step) % 6] for step in range(2)]
            setup.announce(*chosen)
            await setup.has(*chosen)
            before = [len(pod.requests) for pod in chosen]
            await until(lambda: all(len(p.requests) > b for p, b in zip(chosen, before, strict=True)))  # noqa: B023
        is_over = True
        await asyncio.gather(*clients)
        assert len(answers) > 40
        assert set(answers) == {(200, TEXT)}
        assert max(pod.most_at_once for pod in fleet) <= 2


async def test_request_that_breaks_off_at_a_leaving_server_waits_for_another_one() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="silent"), await setup.start(2, mode="slow")
        setup.announce(two)
        await setup.serve(max_concurrency=1, queue_timeout=30, first_token_timeout=30, total_timeout=30)
        async with setup.stream():
            two.mode = "healthy"
            setup.announce(one, two)
            await setup.has(one, two)
            waiting = asyncio.create_task(setup.gateway.ask({"stream": True}))
            await until(lambda: len(one.requests) == 1)
            setup.announce(two)
            await until(lambda: bool(setup.backend.leaving))
            one.die()
            await until(lambda: setup.gateway.waiting == 1)
        assert (await waiting).text == TEXT
        assert len(two.requests) == 2


async def test_request_that_meets_a_server_that_is_gone_waits_for_one_that_is_busy() -> None:
    """The answer of the name is older than the end of the server."""
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2, mode="slow")
        setup.announce(two)
        await setup.serve(max_concurrency=1, queue_timeout=30)
        async with setup.stream():
            two.mode = "healthy"
            setup.announce(one, two)
            await setup.has(one, two)
            one.die()
            waiting = asyncio.create_task(setup.gateway.ask({"stream": True}))
            await until(lambda: setup.gateway.waiting == 1)
        assert (await waiting).text == TEXT


async def test_conversations_stay_where_they_are_cached_while_other_servers_come_and_go() -> None:
    async with pods() as setup:
        fleet = [await setup.start(number) for number in range(1, 5)]
        setup.announce(*fleet[:2])
        await setup.serve(balance="affinity")
        messages = [{"role": "user", "content": "question " * 300}]
        assert (await setup.gateway.ask({"messages": messages})).status == 200
        (kept,) = [pod for pod in fleet if pod.requests]
        for others in (fleet[2:], fleet[3:], fleet[2:3]):
            setup.announce(kept, *others)
            await setup.has(kept, *others)
            messages += [{"role": "assistant", "content": TEXT}, {"role": "user", "content": "and then? " * 50}]
            before = len(kept.requests)
            assert (await setup.gateway.ask({"messages": messages})).status == 200
            assert len(kept.requests) == before + 1


# Names that are not resolved


async def test_gateway_starts_without_resolution_and_serves_once_the_name_is_there(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SHORTEST_SECONDS", 0.05)
    async with pods() as setup:
        one = await setup.start(1)
        await setup.serve()
        refused = await setup.gateway.ask()
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert refused.error is not None
        assert refused.error["code"] == "backend_unavailable"
        assert "its host name is not resolved" in refused.error["message"]
        assert setup.gateway.gateway._operations.readiness()[1]["unserved_tiers"] == ["standard"]
        assert setup.status["names"][0]["failure"] == "Name or service not known"
        assert 'gateway_backend_up{backend="pods"} 0.0' in await setup.metrics()
        setup.announce(one)
        await setup.has(one)
        assert (await setup.gateway.ask()).text == TEXT
        assert setup.gateway.gateway._operations.readiness()[1]["unserved_tiers"] == []
    (message,) = [message for message in caplog.messages if "is not resolved" in message]
    assert message == (
        f"backend pods: the host name {NAME} is not resolved (Name or service not known); "
        "requests to it fail until it is"
    )


@pytest.mark.parametrize(
    "failure",
    [socket.gaierror(socket.EAI_AGAIN, "try again"), socket.gaierror(socket.EAI_NONAME, "unknown"), OSError("broken")],
    ids=["fails", "does not exist", "cannot be sent"],
)
async def test_last_servers_stay_while_the_name_cannot_be_resolved(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one, two)
        await setup.serve()
        servers = list(setup.backend.servers)
        setup.dns.failure = failure
        await until(lambda: not setup.status["names"][0]["resolved"])
        lookups = len(setup.dns.lookups)
        await until(lambda: len(setup.dns.lookups) > lookups + 3)
        assert (setup.backend.servers, setup.up()) == (servers, [one.host, two.host])
        assert (await setup.gateway.ask()).status == 200
        resolved = f'gateway_name_resolved{{backend="pods",name="{NAME}:{setup.port}"}}'
        assert f"{resolved} 0.0" in await setup.metrics()
        setup.dns.failure = None
        setup.announce(two)
        await setup.has(two)
        assert f"{resolved} 1.0" in await setup.metrics()
    assert len([message for message in caplog.messages if "is not resolved" in message]) == 1


async def test_last_servers_stay_when_the_answer_is_empty() -> None:
    async with pods() as setup:
        one = await setup.start(1)
        setup.announce(one)
        await setup.serve()
        setup.dns.answer = []
        await until(lambda: setup.status["names"][0]["failure"] == "the name has no address")
        assert (await setup.gateway.ask()).status == 200


async def test_lookup_that_hangs_keeps_the_servers_and_blocks_nothing() -> None:
    async with pods() as setup:
        one = await setup.start(1)
        setup.announce(one)
        await setup.serve()
        lookups = len(setup.dns.lookups)
        setup.dns.answers.clear()
        await until(lambda: setup.status["names"][0]["failure"] == "no answer in time")
        for _ in range(5):
            assert (await setup.gateway.ask()).status == 200
        assert len(setup.dns.lookups) <= lookups + 1


async def test_server_that_cannot_be_reached_causes_a_lookup_at_once() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one)
        await setup.serve(probe_interval=60)
        one.die()
        setup.announce(two)
        await setup.gateway.ask()
        await setup.has(two)
        assert (await setup.gateway.ask()).text == TEXT


# Servers that come back


async def test_server_that_comes_back_while_requests_run_there_is_the_same() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2, mode="slow")
        setup.announce(one)
        await setup.serve(max_concurrency=1)
        (server,) = setup.backend.servers
        async with setup.stream() as stream:
            setup.announce(two)
            await setup.has(two)
            setup.announce(one, two)
            await setup.has(one, two)
            assert server in setup.backend.servers
            assert server.load == 1
            async with setup.stream():
                waiting = asyncio.create_task(setup.gateway.ask({**SLOW, "stream": False}))
                await until(lambda: setup.gateway.waiting == 1)
                assert one.most_at_once == 1
                waiting.cancel()
                await asyncio.wait([waiting])
            assert await goes_on(stream)


async def test_server_that_comes_back_later_is_a_new_one() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one, two)
        await setup.serve()
        before = {server.pool.origin.address: server for server in setup.backend.servers}
        setup.announce(two)
        await until(lambda: len(setup.backend.servers) == 1 and not setup.backend.leaving)
        setup.announce(one, two)
        await setup.has(one, two)
        after = {server.pool.origin.address: server for server in setup.backend.servers}
        assert after[two.host] is before[two.host]
        assert after[one.host] is not before[one.host]


# Addresses, ports and TLS


async def test_ipv6_addresses_are_servers_too() -> None:
    async with pods() as setup:
        one = await setup.start(1)
        try:
            six = FaultBackend("vllm", host="::1", port=setup.port)
            async with six:
                setup.announce(one, six)
                await setup.serve()
                assert await setup.labels() == {f"{one.host}:{setup.port}", f"[::1]:{setup.port}"}
                setup.announce(six)
                await setup.has(six)
                assert (await setup.gateway.ask()).text == TEXT
                assert len(six.requests) == 1
                setup.announce(one)
                await setup.has(one)
        except OSError as error:
            pytest.skip(f"no IPv6: {error}")


async def test_two_ports_of_one_name_are_different_servers() -> None:
    async with pods() as setup:
        one = await setup.start(1, mode="slow")
        async with FaultBackend("vllm", mode="slow", host=one.host) as other:
            setup.announce(one)
            servers = [f"dns://{NAME}:{one.port}", {"base_url": f"dns://{NAME}:{other.port}", "models": [MODEL]}]
            await setup.serve(servers=servers)
            async with setup.stream(), setup.stream():
                assert (len(one.requests), len(other.requests)) == (1, 1)
            assert await setup.labels() == {f"{one.host}:{one.port}", f"{one.host}:{other.port}"}


async def test_two_names_of_one_server_are_one_server() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one)
        setup.announce(one, two, name="other.test")
        await setup.serve(servers=f"dns://{NAME}:{setup.port}, dns://other.test:{setup.port}".split(", "))
        assert setup.up() == [one.host, two.host]
        assert [name["servers"] for name in setup.status["names"]] == [1, 1]


async def test_names_and_plain_addresses_may_be_mixed() -> None:
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(two)
        await setup.serve(servers=[one.base_url, f"dns://{NAME}:{setup.port}"])
        assert await setup.labels() == {"1", f"{two.host}:{setup.port}"}
        assert [server["name"] for server in setup.status["servers"]] == ["pods#1", f"pods#{two.host}:{setup.port}"]


async def test_certificate_has_to_be_for_the_name_and_not_for_the_address() -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(PEM)
    sent: list[str | None] = []
    tls.sni_callback = lambda connection, name, context: sent.append(name)
    async with pods(tls=tls) as setup:
        one = await setup.start(1)  # the certificate is for localhost and 127.0.0.1
        setup.announce(one, name="localhost")
        setup.announce(one)
        await setup.serve(servers=f"dns+https://localhost:{setup.port}", ca_file=str(PEM))
        assert (await setup.gateway.ask()).text == TEXT
        assert set(sent) == {"localhost"}
        settings = setup.settings(servers=f"dns+https://{NAME}:{setup.port}", ca_file=str(PEM))
        await setup.gateway.gateway.reload.run(lambda: settings, "file")
        assert (await setup.gateway.ask()).status in (502, 503)


# Settings, and other kinds


async def test_servers_and_their_state_stay_when_settings_are_reread() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2)
        setup.announce(one)
        await setup.serve(max_concurrency=4)
        (server,) = setup.backend.servers
        async with setup.stream() as stream:
            await setup.gateway.gateway.reload.run(lambda: setup.settings(max_concurrency=2), "file")
            assert setup.backend.servers == [server]
            assert server.slots.limit == 2
            setup.announce(one, two)
            await setup.has(one, two)
            assert [server.slots.limit for server in setup.backend.servers] == [2, 2]
            assert await goes_on(stream)


async def test_reread_settings_with_another_name_build_the_backend_anew() -> None:
    async with pods() as setup:
        one, two = await setup.start(1, mode="slow"), await setup.start(2)
        setup.announce(one)
        setup.announce(two, name="other.test")
        await setup.serve()
        old = setup.backend
        async with setup.stream() as stream:
            settings = setup.settings(servers=f"dns://other.test:{setup.port}")
            await setup.gateway.gateway.reload.run(lambda: settings, "file")
            assert setup.backend is not old
            assert setup.up() == [two.host]
            assert (await setup.gateway.ask()).text == TEXT
            assert await goes_on(stream)
        await until(lambda: not setup.gateway.gateway._health.unused)
        assert set(setup.gateway.gateway._health._joined) == set(setup.backend.servers)
        lookups = setup.dns.lookups.count(NAME)
        await until(lambda: setup.dns.lookups.count("other.test") > 5)
        assert setup.dns.lookups.count(NAME) == lookups


async def test_several_ollamas_join_and_leave_with_their_model_loads() -> None:
    async with pods("ollama") as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one)
        await setup.serve()
        assert (await setup.gateway.ask()).text == TEXT
        setup.announce(two)
        await setup.has(two)
        assert (await setup.gateway.ask()).text == TEXT
        assert all(server.residency is not None for server in setup.backend.servers)
        assert len(two.requests) >= 1
        await until(lambda: not setup.backend.leaving)
        status = json.loads(json.dumps(setup.status))
        assert [server["loads"] is not None for server in status["servers"]] == [True]


async def test_server_with_requests_that_vanishes_after_it_left_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liveness, "GONE_SECONDS", 0.2)
    async with pods() as setup:
        one, two = await setup.start(1, mode="silent"), await setup.start(2)
        setup.announce(one)
        await setup.serve(first_token_timeout=60, total_timeout=60)
        async with setup.gateway.sent({"stream": True}) as raw:
            await until(lambda: len(one.requests) == 1)
            setup.announce(two)
            await setup.has(two)
            one._server.close()  # the connection stays, and nothing answers a probe
            assert (await asyncio.wait_for(raw.reply(), 10)).text == TEXT
        assert len(two.requests) == 1


async def test_logs_say_how_many_joined_and_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with pods() as setup:
        one, two = await setup.start(1), await setup.start(2)
        setup.announce(one)
        await setup.serve()
        setup.announce(two)
        await setup.has(two)
    found = [message for message in caplog.messages if "joined" in message]
    assert found == [
        f"backend pods: 1 servers joined and 0 left; {NAME}:{setup.port} has 1",
        f"backend pods: 1 servers joined and 1 left; {NAME}:{setup.port} has 1",
    ]
