"""W3C Trace Context: what is read from the client, and what is passed on to the engine."""

import pytest
from msgspec import UNSET

from gateway.telemetry.exchange import Exchange
from gateway.telemetry.trace_context import EndedExchange, RemoteSpan, Trace, header_lines, parse, pass_on
from tests.fakes.exchanges import exchange
from tests.fakes.fault_backend import FaultBackend
from tests.fakes.running_gateway import Running, running, settings_for

TRACE_ID, SPAN_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


def fields(traceparent: str, **more: str) -> dict[bytes, bytes]:
    return {b"traceparent": traceparent.encode()} | {name.encode(): value.encode() for name, value in more.items()}


def test_span_of_the_client_is_read() -> None:
    state = "vendor=t61rcWkgMzE,other=1"
    expected = RemoteSpan(TRACE_ID, SPAN_ID, True, state.encode())
    assert parse(fields(TRACEPARENT, tracestate=state)) == expected
    assert header_lines(*expected) == f"traceparent: {TRACEPARENT}\r\ntracestate: {state}\r\n".encode()


@pytest.mark.parametrize(("flags", "is_sampled"), [("00", False), ("01", True), ("02", False), ("ff", True)])
def test_flags_tell_whether_the_client_has_sampled(flags: str, is_sampled: bool) -> None:
    found = parse(fields(f"00-{TRACE_ID}-{SPAN_ID}-{flags}"))
    assert found == RemoteSpan(TRACE_ID, SPAN_ID, is_sampled, b"")


def test_later_version_with_more_fields_is_read() -> None:
    assert parse(fields(f"cc-{TRACE_ID}-{SPAN_ID}-01-what-the-future-brings")) == RemoteSpan(
        TRACE_ID, SPAN_ID, True, b""
    )


@pytest.mark.parametrize(
    "value",
    [
        "",
        TRACE_ID,
        TRACEPARENT.upper(),
        f"ff-{TRACE_ID}-{SPAN_ID}-01",
        f"00-{'0' * 32}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{'0' * 16}-01",
        f"00-{TRACE_ID[1:]}-{SPAN_ID}-01",
        f"00-{TRACE_ID}-{SPAN_ID}-1",
        f"{TRACEPARENT}-more",
        f"{TRACEPARENT}\r\nx: y",
        f"00-{TRACE_ID}-{SPAN_ID}-01é",
    ],
)
def test_malformed_traceparent_is_ignored(value: str) -> None:
    assert parse(fields(value)) is None
    assert pass_on(fields(value)) is None


@pytest.mark.parametrize("state", ["", "a=\tb", "é=1", "x" * 513])
def test_malformed_tracestate_is_dropped(state: str) -> None:
    assert parse(fields(TRACEPARENT, tracestate=state)) == RemoteSpan(TRACE_ID, SPAN_ID, True, b"")


def test_request_without_a_trace_has_none() -> None:
    assert pass_on({}) is None


def test_exchange_is_recorded_with_the_ids_of_its_trace() -> None:
    recorded: list[Exchange] = []
    Trace(TRACE_ID, b"").recorder(recorded.append, "vllm")(exchange())
    Trace(TRACE_ID, b"", span_id=SPAN_ID).recorder(recorded.append, "vllm")(exchange())
    assert [(one.trace_id, one.span_id) for one in recorded] == [(TRACE_ID, UNSET), (TRACE_ID, SPAN_ID)]


def test_second_exchange_of_a_request_is_marked() -> None:
    ended: list[EndedExchange] = []
    trace = Trace(TRACE_ID, b"", span_id=SPAN_ID, on_end=ended.append)
    for _ in range(2):
        trace.recorder(lambda *_: None, "vllm")(exchange())
    assert [one.is_further for one in ended] == [False, True]


def test_connection_that_is_opened_after_the_end_is_not_the_requests_own() -> None:
    trace = Trace(TRACE_ID, b"")
    trace.connected(1.0, 2.0)
    trace.recorder(lambda *_: None, "vllm")(exchange())
    trace.connected(3.0, 4.0)
    assert trace.connects == [(1.0, 2.0)]


# The whole gateway, with tracing off


async def ask(gateway: Running, *headers: str) -> None:
    async with gateway.sent({}, *headers) as raw:
        assert (await raw.reply()).status == 200


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_clients_trace_is_passed_on_to_the_engine_and_logged(kind: str) -> None:
    async with FaultBackend(kind) as backend, running(settings_for(backend)) as gateway:  # type: ignore[arg-type]
        await ask(gateway, f"traceparent: {TRACEPARENT}", "tracestate: a=1")
        await ask(gateway)
        await ask(gateway, "traceparent: nonsense", "tracestate: a=1")
        traced, *others = [request.partition(b"\r\n\r\n")[0].lower() for request in backend.requests]
        assert f"\r\ntraceparent: {TRACEPARENT}\r\ntracestate: a=1" in traced.decode()
        assert b"x-gateway-via: " in traced
        assert [other for other in others if b"trace" in other] == []
        logged = [line.get("trace_id") for line in gateway.exchanges()]
        assert logged == [TRACE_ID, None, None]


async def test_each_request_of_a_connection_has_its_own_trace() -> None:
    other = TRACEPARENT.replace(TRACE_ID, "1" * 32)
    async with FaultBackend("vllm") as backend, running(settings_for(backend)) as gateway, gateway.openai() as client:
        for headers in ({"traceparent": TRACEPARENT}, {"traceparent": other}, {}, {"traceparent": other}):
            await client.chat.completions.create(
                model="standard", messages=[{"role": "user", "content": "Hello?"}], extra_headers=headers
            )
        assert [line.get("trace_id") for line in gateway.exchanges()] == [TRACE_ID, "1" * 32, None, "1" * 32]


async def test_refused_request_is_logged_with_its_trace() -> None:
    async with FaultBackend("vllm") as backend, running(settings_for(backend)) as gateway:
        async with gateway.sent({"model": "unknown"}, f"traceparent: {TRACEPARENT}") as raw:
            assert (await raw.reply()).status == 404
        async with gateway.sent({}, f"traceparent: {TRACEPARENT}", "x-gateway-via: a b") as raw:  # before it is parsed
            assert (await raw.reply()).status == 400
        lines = gateway.exchanges()
        assert [line["trace_id"] for line in lines] == [TRACE_ID] * 2
        assert all("span_id" not in line for line in lines)
