"""Log lines of exchanges and of the gateway, and what they must never contain.

Covers: gateway/telemetry/recorder.py
"""

import io
import json
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from gateway.chat.answer import Usage
from gateway.telemetry.log import (
    COLOURS,
    MAX_EVENT,
    MAX_PENDING,
    PLAIN,
    ExchangeLog,
    JsonFormatter,
    Palette,
    Sink,
    TextFormatter,
    configure,
    palette_for,
)
from gateway.telemetry.trace_context import Trace, current_trace
from tests.downstream.server_thread import eventually
from tests.fakes.fault_backend import ENGINE_REASON, FaultBackend
from tests.fakes.running_gateway import running, settings_for, until
from tests.telemetry.test_metrics import EXCHANGE

CANARY = "the-canary-of-this-test"


def failed_record(message: str = "it %s") -> logging.LogRecord:
    try:
        raise ValueError(CANARY)
    except ValueError:
        return logging.LogRecord("gateway.x", logging.ERROR, __file__, 1, message, ("broke",), sys.exc_info())


def test_text_of_a_line_is_bounded() -> None:
    """A backend's text may reach a line in ways that nobody thought of."""
    for text, shown in (("x" * MAX_EVENT, "x" * MAX_EVENT), ("x" * 900_000, f"{'x' * MAX_EVENT}… (900000 characters)")):
        record = logging.LogRecord("gateway.x", logging.INFO, __file__, 1, "%s", (text,), None)
        assert json.loads(JsonFormatter().format(record))["event"] == shown
        assert TextFormatter().format(record).endswith(f" info    {shown}")


# Exchanges


def test_exchange_is_one_line_of_json() -> None:
    out = io.BytesIO()
    log = ExchangeLog(True, out)
    log.write(
        [
            EXCHANGE,
            replace(
                EXCHANGE, status=404, code="model_not_found", usage=None, time_to_first_token=None, queue_wait=None
            ),
        ]
    )
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["event"], first["level"], first["request_id"], first["tier"], first["backend"]) == (
        "exchange",
        "info",
        "r",
        "standard",
        "vllm",
    )
    assert (first["duration"], first["queue_wait"], first["time_to_first_token"]) == (2.0, 0.5, 0.7)
    assert first["usage"] == {"prompt_tokens": 10, "completion_tokens": 4}
    assert first["time"].endswith("Z")
    assert (second["status"], second["code"], second["time_to_first_token"], second["usage"]) == (
        404,
        "model_not_found",
        None,
        None,
    )


def test_exchange_is_one_line_of_text() -> None:
    out = io.BytesIO()
    log = ExchangeLog(False, out)
    log.write(
        [
            replace(EXCHANGE, usage=Usage(10, 4), empty=True),
            replace(EXCHANGE, status=503, code="queue_full", usage=None),
            replace(EXCHANGE, status=502, code="upstream_error", reason="reset", tier="a-tier-with-a-long-name"),
            replace(EXCHANGE, status=499, code="client_left", outcome="cancelled", trace_id="0af7", duration=123.4567),
        ]
    )
    assert [line[9:] for line in out.getvalue().decode().splitlines()] == [
        "info    200 standard on vllm             2.000 s  first 0.700 s, 10+4 tokens, empty  r",
        "warning 503 standard on vllm             2.000 s  queue_full                         r",
        "warning 502 a-tier-with-a-long-name on vllm     2.000 s  upstream_error (reset)             r",
        "info    499 standard on vllm           123.457 s  client_left (streaming)            r trace 0af7",
    ]


def test_text_is_coloured_by_level_and_status() -> None:
    out = io.BytesIO()
    log = ExchangeLog(False, out, palette=COLOURS)
    log.write([replace(EXCHANGE, status=status, code=None) for status in (200, 404, 503)])
    ok, refused, failed = out.getvalue().decode().splitlines()
    assert ("\x1b[32m200\x1b[0m" in ok, "\x1b[33m404\x1b[0m" in refused, "\x1b[31m503\x1b[0m" in failed) == (
        True,
        True,
        True,
    )
    assert "\x1b[33mwarning\x1b[0m" in failed
    record = logging.LogRecord("gateway.x", logging.ERROR, __file__, 1, "broken", (), None)
    line = TextFormatter(COLOURS).format(record)
    assert line.endswith("\x1b[31merror  \x1b[0m broken")
    assert re.sub(r"\x1b\[\d+m", "", line) == TextFormatter().format(record)
    plain = io.BytesIO()
    ExchangeLog(False, plain).write([EXCHANGE])
    assert b"\x1b" not in plain.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "environ", "palette"),
    [
        (Terminal(), {}, COLOURS),
        (Terminal(), {"NO_COLOR": ""}, COLOURS),
        (Terminal(), {"NO_COLOR": "1"}, PLAIN),
        (Terminal(), {"NO_COLOR": "0"}, PLAIN),
        (Terminal(), {"TERM": "dumb"}, PLAIN),
        (io.StringIO(), {}, PLAIN),
    ],
)
def test_only_a_terminal_gets_colours_and_only_without_no_color(
    stream: io.StringIO, environ: dict[str, str], palette: Palette
) -> None:
    assert palette_for(stream, environ) is palette


def test_message_during_a_request_has_its_trace() -> None:
    record = logging.LogRecord("gateway.x", logging.INFO, __file__, 1, "hello", (), None)
    token = current_trace.set(Trace("0af7", b""))
    try:
        assert json.loads(JsonFormatter().format(record))["trace_id"] == "0af7"
        assert TextFormatter().format(record).endswith(" hello trace 0af7")
    finally:
        current_trace.reset(token)
    assert "trace_id" not in json.loads(JsonFormatter().format(record))


class Counting(io.BytesIO):
    writes = 0

    def write(self, data: Any) -> int:
        self.writes += 1
        return super().write(data)


def test_exchanges_that_ended_together_are_written_in_one_call() -> None:
    out = Counting()
    log = ExchangeLog(True, out)
    log.write([EXCHANGE] * 3)
    log.write([])
    assert (out.writes, out.getvalue().count(b"\n")) == (1, 3)


async def test_exchange_is_logged_soon_after_it_ends() -> None:
    async with FaultBackend("vllm") as backend, running(settings_for(backend)) as gateway:
        await gateway.ask()
        await until(lambda: gateway.log.getvalue().count(b"\n") == 1)


# Messages


@pytest.mark.parametrize("formatter", [JsonFormatter(), TextFormatter()], ids=["json", "text"])
def test_exception_is_logged_with_its_class_and_place_but_not_its_text(formatter: logging.Formatter) -> None:
    line = formatter.format(failed_record())
    assert "it broke" in line
    assert "ValueError" in line
    assert "failed_record" in line
    assert CANARY not in line
    assert "\n" not in line


def test_json_line_has_time_level_and_event() -> None:
    line = json.loads(JsonFormatter().format(failed_record("it\n%s")))
    assert list(line) == ["time", "level", "event", "exception", "at"]
    assert (line["level"], line["event"]) == ("error", "it\nbroke")
    assert line["time"].endswith("Z")


@pytest.fixture
def _restored() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("gateway")
    handlers, levels = root.handlers[:], (root.level, own.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    own.setLevel(levels[1])


@pytest.mark.usefixtures("_restored")
def test_messages_of_the_gateway_and_warnings_of_libraries_are_logged() -> None:
    out = BytesIO()
    configure(as_json=True, out=out)
    logging.getLogger("gateway.x").info("ours")
    logging.getLogger("httpx2").info("theirs")
    logging.getLogger("httpx2").warning("warned")
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events == ["ours", "warned"]


@pytest.mark.parametrize(
    ("level", "own", "theirs"),
    [
        ("debug", ["debug", "info", "warning", "error"], ["warning", "error"]),
        ("info", ["info", "warning", "error"], ["warning", "error"]),
        ("warning", ["warning", "error"], ["warning", "error"]),
        ("error", ["error"], ["error"]),
    ],
)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.usefixtures("_restored")
def test_level_applies_to_the_gateway_and_to_libraries(
    level: str, own: list[str], theirs: list[str], later: bool
) -> None:
    out = BytesIO()
    configure(True, out, "info" if later else level)
    if later:
        ExchangeLog(True, out).change_level(level)
    for name in ("gateway.x", "httpx2"):
        for each in ("debug", "info", "warning", "error"):
            logging.getLogger(name).log(logging.getLevelNamesMapping()[each.upper()], "%s of %s", each, name)
    events = [json.loads(line)["event"] for line in out.getvalue().splitlines()]
    assert events == [*(f"{each} of gateway.x" for each in own), *(f"{each} of httpx2" for each in theirs)]


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize(
    ("level", "statuses"),
    [("debug", [200, 499, 500, 504]), ("info", [200, 499, 500, 504]), ("warning", [500, 504]), ("error", [])],
)
@pytest.mark.parametrize("later", [False, True])
@pytest.mark.usefixtures("_restored")
def test_exchanges_are_logged_at_info_and_failures_at_warning(
    as_json: bool, level: str, statuses: list[int], later: bool
) -> None:
    out = BytesIO()
    log = ExchangeLog(as_json, out, "info" if later else level)
    if later:
        log.change_level(level)
    log.write([replace(EXCHANGE, status=status) for status in (200, 499, 500, 504)])
    lines = out.getvalue().decode().splitlines()
    words = [line["level"] for line in map(json.loads, lines)] if as_json else [line.split()[1] for line in lines]
    assert words == ["warning" if status >= 500 else "info" for status in statuses]


def fill(pipe: int) -> int:
    """Write to a pipe until it is full. Return the number of bytes, each of which is `f`."""
    filled = 0
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            filled += os.write(pipe, b"f" * 512)
    os.set_blocking(pipe, True)
    return filled


def test_log_that_nothing_reads_does_not_block_the_gateway() -> None:
    """A full pipe blocks only the sink's thread; further lines are dropped."""
    reader, writer = os.pipe()
    line = b"x" * 999 + b"\n"
    with os.fdopen(reader, "rb") as unread, os.fdopen(writer, "wb", buffering=0) as out:
        filled = fill(writer)
        sink = Sink(out)
        sink.write(line)
        eventually(sink._pending.empty)  # the thread has the line in its hands, and cannot write it
        for _ in range(2 * MAX_PENDING):
            sink.write(line)
        assert sink._pending.qsize() == MAX_PENDING
        reading = threading.Thread(target=lambda: lines.extend(unread), daemon=True)
        lines: list[bytes] = []
        reading.start()
        sink.close()
        out.close()
        reading.join(20)
        assert b"".join(lines) == b"f" * filled + line * (MAX_PENDING + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
def test_log_that_cannot_be_written_does_not_block_the_gateway() -> None:
    with Path("/dev/full").open("wb") as out:
        sink = Sink(out)
        for _ in range(3):
            sink.write(b"lost\n")
        sink.close()
        assert not sink._thread.is_alive()
        assert sink._pending.empty(), "the thread went on after the first error"
        with suppress(OSError):
            out.close()


def test_closing_the_sink_writes_the_pending_lines() -> None:
    out = BytesIO()
    sink = Sink(out)
    sink.write(b"first\n")
    sink.write(b"last\n")
    sink.close()
    assert out.getvalue() == b"first\nlast\n"


# The whole gateway

PATIENT = {"first_token_timeout": 10, "idle_timeout": 10, "total_timeout": 20}
"""Timeouts long enough for a busy machine, so that an exchange times out only if it hangs."""


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
async def test_no_log_line_contains_a_prompt_a_completion_or_a_key(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    prompt = [{"role": "user", "content": CANARY}]
    bodies: list[dict[str, object]] = [
        {"messages": prompt},
        {"messages": prompt, "stream": True},
        {"messages": prompt, "model": CANARY},
        {"messages": [{"role": CANARY, "content": CANARY}]},
        {"messages": prompt, "stream": True, "temperature": CANARY},
    ]
    async with FaultBackend(kind) as backend, running(settings_for(backend, **PATIENT)) as gateway:  # type: ignore[arg-type]
        broken = ("invalid_json", "error_then_done", "html", "close", "runner_dies", "runner_dies_midway")
        for mode in ("healthy", *broken):
            backend.mode = mode
            for body in bodies:
                await gateway.ask(body)
        exchanges = gateway.exchanges()
    assert len(exchanges) == 35
    assert {line["outcome"] for line in exchanges} == {"ok", "client_error", "upstream_error"}
    written = gateway.log.getvalue().decode() + "".join(map(TextFormatter().format, caplog.records))
    for secret in (CANARY, "Hello", "secret-of-the-backend"):
        assert secret not in written


@pytest.mark.parametrize("kind", ["ollama", "vllm"])
@pytest.mark.parametrize(
    ("mode", "stream"), [("runner_dies", False), ("runner_dies", True), ("runner_dies_midway", True)]
)
async def test_engines_reason_for_a_failure_is_logged_and_not_sent(
    kind: str, mode: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with FaultBackend(kind, mode) as backend, running(settings_for(backend, **PATIENT)) as gateway:  # type: ignore[arg-type]
        reply = await gateway.ask({"messages": [{"role": "user", "content": "Hello?"}], "stream": stream})
        (exchange,) = gateway.exchanges()
    assert exchange["outcome"] == "upstream_error"
    reasons = [record.getMessage() for record in caplog.records if "the engine reports" in record.getMessage()]
    assert reasons == [f"backend {kind}: the engine reports: {ENGINE_REASON}"]
    assert b"runner" not in reply.body
    assert "Hello" not in caplog.text
