"""Health checks: what they find out about the servers, and what the log says about it.

Covers: gateway/upstream/probe.py
Covers: gateway/upstream/probe_report.py
"""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from gateway import config, simulate
from gateway.admission.prefix_cache import PrefixCache
from gateway.simulate.vllm.metrics import CACHE_BLOCKS
from gateway.upstream.backend import Backend
from gateway.upstream.health_checks import HealthChecks
from gateway.upstream.probe import MAX_MODEL_NAME
from gateway.upstream.probe_report import MAX_LISTED, SHOWN_NAME
from tests.fakes.fault_backend import MODEL, FaultBackend, Kind
from tests.fakes.running_gateway import until
from tests.fakes.stand_ins import stand_in
from tests.real_engines.process import free_port

PEM = Path(__file__).parents[1] / "fakes" / "self_signed.pem"
VLLM = simulate.Options("vllm", (simulate.Model("Qwen/A", context_length=2048),))
OLLAMA = simulate.Options("ollama", (simulate.Model("qwen:8b"), simulate.Model("llama")))


@pytest.fixture(autouse=True)
def _capture_info_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "gateway.upstream")


@asynccontextmanager
async def probed_backend(
    kind: str, url: str, model: str, changed: list[str] | None = None, **more: Any
) -> AsyncIterator[Backend]:
    """Yield a backend of `kind` at `url` after its first probe. It is probed while the block runs."""
    settings = config.build(
        {
            "llm_backend": "here",
            "backends": {
                "here": {"kind": kind, "base_url": url, **more},
                "unused": {"kind": "vllm", "base_url": "http://127.0.0.1:1"},
            },
            "tiers": {"standard": {"models": {"here": model}}},
        }
    )
    backends = {name: Backend(item) for name, item in settings.backends.items()}
    async with HealthChecks(
        settings, backends, b"this-gateway", lambda backend: None if changed is None else changed.append(backend.name)
    ) as health:
        assert not health.has_asked_all
        await until(lambda: health.has_asked_all)
        assert health.backends == [backends["here"]]
        yield backends["here"]


async def test_reachable_server_is_logged_with_its_models(caplog: pytest.LogCaptureFixture) -> None:
    async with stand_in(VLLM) as server, probed_backend("vllm", server.base_url, "Qwen/A") as backend:
        assert caplog.messages == [f"backend here (vllm) at 127.0.0.1:{server.port}: reachable, models there: Qwen/A"]
        assert backend.availability.is_up
        assert backend.context_length("Qwen/A") == 2048


async def test_probe_spends_no_token_and_carries_the_gateway_id() -> None:
    async with stand_in(VLLM) as server, probed_backend("vllm", server.base_url, "Qwen/A"):
        assert [(request["method"], request["path"]) for request in server.engine.requests] == [
            ("GET", "/health"),
            ("GET", "/v1/models"),
        ]
        assert {request["headers"]["x-gateway-via"] for request in server.engine.requests} == {"this-gateway"}


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_context_length_of_a_model_is_probed(kind: Kind) -> None:
    async with (
        FaultBackend(kind, context_length=512) as server,
        probed_backend(kind, server.base_url, MODEL) as backend,
    ):
        assert backend.context_length(MODEL) == 512
        assert backend.context_length("another") is None


async def test_capabilities_of_a_model_are_probed() -> None:
    async with (
        FaultBackend("ollama", capabilities=("completion", "tools")) as server,
        probed_backend("ollama", server.base_url, MODEL) as backend,
    ):
        assert (backend.lacks(MODEL, "vision"), backend.lacks(MODEL, "tools"), backend.lacks("another", "vision")) == (
            True,
            False,
            False,
        )


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_model_that_disappears_or_appears_later_is_logged(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    async with (
        FaultBackend(kind) as server,
        probed_backend(kind, server.base_url, MODEL, probe_interval=0.02) as backend,
    ):
        present, replaced = server.models(), server.models().replace(MODEL.encode(), b"another")
        seen = server.probes
        await until(lambda: server.probes > seen + 4)
        assert len(caplog.messages) == 1  # nothing has changed
        server.models = lambda: replaced  # type: ignore[method-assign]
        await until(lambda: len(caplog.messages) == 3)
        assert caplog.messages[1].endswith("reachable, models there: another")
        assert (
            caplog.messages[2]
            == f"tier standard needs the model {MODEL!r}, which backend here does not have; it has: another"
        )
        assert backend.availability.is_up
        server.models = lambda: present  # type: ignore[method-assign]
        await until(lambda: len(caplog.messages) == 4)
        assert caplog.messages[3].endswith(f"reachable, models there: {MODEL}")


async def test_facts_of_a_model_are_updated_when_it_changes() -> None:
    """The name may stand for another model, and a load may change the context length."""
    async with (
        FaultBackend("ollama", context_length=512) as server,
        probed_backend("ollama", server.base_url, MODEL, probe_interval=0.02) as backend,
    ):
        server.context_length = 1024
        await until(lambda: backend.context_length(MODEL) == 1024)
        server.context_length = None
        seen = server.probes
        await until(lambda: server.probes > seen + 4)
        assert backend.context_length(MODEL) == 1024


async def test_size_of_the_prefix_cache_is_asked_for_where_it_decides() -> None:
    async with stand_in(VLLM) as one, stand_in(VLLM) as two:
        servers = [{"base_url": server.base_url} for server in (one, two)]
        async with probed_backend("vllm", "", "Qwen/A", base_url=None, servers=servers) as backend:
            assert [server.prefixes.capacity for server in backend.servers] == [4 * 16 * CACHE_BLOCKS] * 2
        async with probed_backend("vllm", one.base_url, "Qwen/A") as backend:
            assert backend.servers[0].prefixes.capacity == PrefixCache().capacity


async def test_size_of_the_prefix_cache_is_asked_for_when_new_settings_make_it_decide() -> None:
    """The servers have been up all the time, and are asked once."""
    async with stand_in(VLLM) as one, stand_in(VLLM) as two:
        servers = [{"base_url": server.base_url} for server in (one, two)]
        more: dict[str, Any] = {"base_url": None, "servers": servers, "probe_interval": 0.02, "balance": "least_busy"}
        async with probed_backend("vllm", "", "Qwen/A", **more) as backend:
            assert [server.prefixes.is_sized for server in backend.servers] == [False, False]
            backend.change(backend.settings.model_copy(update={"balance": "affinity"}))
            await until(lambda: all(server.prefixes.is_sized for server in backend.servers))
            assert [server.prefixes.capacity for server in backend.servers] == [4 * 16 * CACHE_BLOCKS] * 2


async def test_model_is_listed_once_however_the_settings_spell_it(caplog: pytest.LogCaptureFixture) -> None:
    async with stand_in(OLLAMA) as server, probed_backend("ollama", server.base_url, "library/LLAMA"):
        assert caplog.messages[0].endswith("models there: llama, qwen:8b")


async def test_server_that_reports_nothing_but_its_models_is_up() -> None:
    async with stand_in(VLLM) as server, probed_backend("openai", server.base_url, "Qwen/A") as backend:
        assert backend.availability.is_up
        assert not backend.lacks("Qwen/A", "vision")


async def test_missing_model_is_logged_with_the_available_ones(caplog: pytest.LogCaptureFixture) -> None:
    async with stand_in(OLLAMA) as server, probed_backend("ollama", server.base_url, "qwen:14b") as backend:
        assert (
            caplog.messages[-1]
            == "tier standard needs the model 'qwen:14b', which backend here does not have; it has: llama, qwen:8b"
        )
        assert not backend.servers[0].serves("qwen:14b")
        assert backend.servers[0].serves("llama")
        assert all(
            backend.servers[0].serves(name)
            for name in ("llama:latest", "LLAMA", "library/llama", "registry.ollama.ai/library/llama")
        )


@asynccontextmanager
async def raw_server(head: bytes, piece: bytes, pause: float) -> AsyncIterator[str]:
    """Run a server that answers with `head` and then repeats `piece` every `pause` seconds."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers.append(asyncio.current_task())
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(head)
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause)
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
            with suppress(ConnectionError):
                await writer.wait_closed()

    answers: list[asyncio.Task[None] | None] = []
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        running = [task for task in answers if task is not None and not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def test_server_that_drips_its_answer_does_not_keep_the_gateway_from_being_ready(
    caplog: pytest.LogCaptureFixture,
) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1000000\r\n\r\n"
    async with raw_server(head, b" ", 0.05) as url, probed_backend("vllm", url, "Qwen/A"):
        pass  # `probed_backend` waits until the gateway is ready, for `PATIENCE` at most
    assert not any("reachable, models" in message for message in caplog.messages)


async def test_endless_answer_is_not_a_list_of_models(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_server(b"HTTP/1.1 200 OK\r\n\r\n", b"[" * 65536, 0) as url, probed_backend("vllm", url, "Qwen/A"):
        assert "not a server of kind vllm" in caplog.messages[0]


async def test_model_names_cannot_forge_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    forged = simulate.Options("vllm", (simulate.Model("m\nforged line"),))
    async with stand_in(forged) as server, probed_backend("vllm", server.base_url, "m"):
        assert len(caplog.messages) == 2
        assert all(message.isprintable() for message in caplog.messages)


async def test_long_list_of_models_is_shortened(caplog: pytest.LogCaptureFixture) -> None:
    many = simulate.Options("ollama", tuple(simulate.Model(f"model-{number:02}") for number in range(MAX_LISTED + 3)))
    async with stand_in(many) as server, probed_backend("ollama", server.base_url, "model-00"):
        assert caplog.messages[0].endswith("model-07 and 3 more")


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_models_with_names_of_absurd_length_are_ignored_in_one_line(
    kind: Kind, caplog: pytest.LogCaptureFixture
) -> None:
    key, listed = ("name", "models") if kind == "ollama" else ("id", "data")
    async with FaultBackend(kind) as server:
        names = [MODEL, "x" * MAX_MODEL_NAME, "y" * (MAX_MODEL_NAME + 1), "z" * 900_000]
        content = json.dumps({"object": "list", listed: [{key: name} for name in names]}).encode()
        probes: list[bytes] = []

        def models() -> bytes:
            probes.append(content)
            return content

        server.models = models  # type: ignore[method-assign]
        async with probed_backend(kind, server.base_url, "missing", probe_interval=0.01) as backend:
            await until(lambda: len(probes) > 3)
            assert {len(name) for name in backend.servers[0].discovered or {}} == {len(MODEL), MAX_MODEL_NAME}
    ignored = [message for message in caplog.messages if "ignored" in message]
    assert ignored == ["backend here: 2 models are ignored, because their names have more than 512 characters"]
    assert any("reachable" in message for message in caplog.messages)
    assert max(map(len, caplog.messages)) < 400


async def test_names_of_models_are_shortened_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    long, odd = simulate.Model("m" * MAX_MODEL_NAME), simulate.Model("\x00" * MAX_MODEL_NAME)
    async with (
        stand_in(simulate.Options("vllm", (long, odd))) as server,
        probed_backend("vllm", server.base_url, "m" * MAX_MODEL_NAME),
    ):
        assert caplog.messages[0].endswith(f"{'m' * SHOWN_NAME}…")
        assert len(caplog.messages[0]) < 400


async def test_unreachable_server_is_logged_and_found_when_it_comes_up(caplog: pytest.LogCaptureFixture) -> None:
    port, changed = free_port(), list[str]()
    async with probed_backend("vllm", f"http://127.0.0.1:{port}", "Qwen/A", changed, probe_interval=0.02) as backend:
        assert caplog.messages == [
            f"backend here (vllm) at 127.0.0.1:{port}: not reachable: no connection; requests to it fail until it is"
        ]
        assert not backend.availability.is_up
        async with stand_in(VLLM, port):
            await until(lambda: backend.availability.is_up and changed == ["here"])
            assert caplog.messages[-1].endswith("reachable, models there: Qwen/A")
        await until(lambda: not backend.availability.is_up)
        assert changed == ["here", "here"]
        assert "not reachable" in caplog.messages[-1]


async def test_untrusted_certificate_is_logged_and_accepted_with_its_ca_file(
    caplog: pytest.LogCaptureFixture,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(PEM)
    async with FaultBackend("vllm", tls=context) as server:
        url = f"https://127.0.0.1:{server.port}"
        async with probed_backend("vllm", url, MODEL):
            assert (
                "not reachable: its certificate is not trusted (self-signed certificate); set the backend's ca_file"
                in caplog.messages[0]
            )
        async with probed_backend("vllm", url, MODEL, ca_file=str(PEM)):
            assert "reachable, models there" in caplog.messages[1]


async def test_server_without_tls_and_an_unknown_host_name_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with stand_in(VLLM) as server, probed_backend("vllm", server.base_url.replace("http:", "https:"), "Qwen/A"):
        assert "not reachable: the TLS handshake failed; check that it serves https" in caplog.messages[0]
    async with probed_backend("vllm", "http://no-such-host.invalid:1", "Qwen/A"):
        assert "not reachable: its host name cannot be resolved" in caplog.messages[1]


async def test_unhealthy_server_is_logged_with_its_status(caplog: pytest.LogCaptureFixture) -> None:
    async with (
        raw_server(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", b"", 0.05) as url,
        probed_backend("vllm", url, "Qwen/A"),
    ):
        assert "not reachable: it answers with status 503" in caplog.messages[0]


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_wrong_kind_of_server_is_logged(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async with web_server() as url, probed_backend(kind, url, "m"):
        assert f"something answers there, but not a server of kind {kind}" in caplog.messages[0]


async def test_vllm_at_the_address_of_an_ollama_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with stand_in(VLLM) as server, probed_backend("ollama", server.base_url, "m"):
        assert "something answers there, but not a server of kind ollama" in caplog.messages[0]


async def test_refused_key_is_logged_without_the_key(caplog: pytest.LogCaptureFixture) -> None:
    locked = simulate.Options("vllm", VLLM.models, api_key="right")
    async with stand_in(locked) as server:
        async with probed_backend("vllm", server.base_url, "Qwen/A", api_key="wrong-key-of-here"):
            assert "reachable, but it refuses the key" in caplog.messages[0]
            assert "wrong-key" not in caplog.text
        async with probed_backend("vllm", server.base_url, "Qwen/A", api_key="right"):
            assert "reachable, models there" in caplog.messages[-1]


@asynccontextmanager
async def web_server() -> AsyncIterator[str]:
    """Run a web server that answers every path with a page."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 6\r\nconnection: close\r\n\r\n<html>"
        )
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_server_is_excluded_after_two_odd_answers_in_a_row_and_not_after_one() -> None:
    changed: list[str] = []
    async with (
        FaultBackend("vllm") as server,
        probed_backend("openai", server.base_url, MODEL, changed, probe_interval=0.01) as backend,
    ):
        present, probes = server.models(), 0

        def every_second_one() -> bytes:
            nonlocal probes
            probes += 1
            return b"<html>" if probes % 2 else present

        server.models = every_second_one  # type: ignore[method-assign]
        await until(lambda: probes >= 8)
        assert (backend.availability.is_up, changed) == (True, [])
        server.models = lambda: b"<html>"  # type: ignore[method-assign]
        await until(lambda: not backend.availability.is_up)
        assert changed == ["here"]
        server.models = lambda: present  # type: ignore[method-assign]
        await until(lambda: backend.availability.is_up)
        assert changed == ["here", "here"]
