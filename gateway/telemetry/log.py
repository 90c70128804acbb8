"""Logs on standard error: one line for each exchange, and plain sentences for the operator.

No caller passes a prompt, a completion or a key to the log.
"""

import logging
import queue
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from typing import BinaryIO, Protocol

import msgspec
import orjson

from gateway.telemetry.exchange import Exchange

MAX_PENDING = 1000
"""Maximum number of writes that wait while nothing reads the log."""

MAX_EVENT = 16 * 1024
"""Maximum number of characters of a line's text, whatever a backend put into it."""

CLOSE_SECONDS = 1.0

_encode = msgspec.json.encode


class JsonFormatter(logging.Formatter):
    """Formatter that writes one JSON object per line.

    Of an exception it logs only the class and the place, because the text may contain client data.
    """

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _timestamp(record.created),
            "level": record.levelname.lower(),
            "event": _message(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = _places(record)
        return orjson.dumps(line).decode()


class TextFormatter(logging.Formatter):
    """Formatter for people at a terminal; of an exception it logs what `JsonFormatter` does."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        text = f"{clock} {record.levelname.lower():7} {_message(record)}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" [{record.exc_info[0].__name__} at {', '.join(_places(record))}]"
        return text


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    return text if len(text) <= MAX_EVENT else f"{text[:MAX_EVENT]}… ({len(text)} characters)"


def _places(record: logging.LogRecord) -> list[str]:
    places = []
    trace = record.exc_info[2] if record.exc_info else None
    while trace is not None:
        code = trace.tb_frame.f_code
        places.append(f"{code.co_qualname}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places[-5:]


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))


def _timestamp(seconds: float) -> str:
    return f"{_second(int(seconds))}.{int(seconds * 1000) % 1000:03d}Z"


class Writable(Protocol):
    """Destination of log lines."""

    def write(self, data: bytes, /) -> object: ...


class Sink:
    """Writer with its own thread, so that a stalled reader or a full disk does not block callers.

    Lines that do not fit into its queue are lost.
    """

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._pending: queue.Queue[bytes | None] = queue.Queue(MAX_PENDING)
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def write(self, data: bytes, /) -> None:
        with suppress(queue.Full):
            self._pending.put_nowait(data)

    def close(self) -> None:
        """Write the pending lines and stop the thread; each wait lasts at most `CLOSE_SECONDS`."""
        with suppress(queue.Full):
            self._pending.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        while (data := self._pending.get()) is not None:
            with suppress(OSError, ValueError):  # closed, or disk full: the next line may fit
                self._out.write(data)
                self._out.flush()


class SinkHandler(logging.Handler):
    """Logging handler that writes formatted records to a `Writable`."""

    def __init__(self, out: Writable) -> None:
        super().__init__()
        self._out = out

    def emit(self, record: logging.LogRecord) -> None:
        self._out.write((self.format(record) + "\n").encode())


def configure(as_json: bool, out: Writable, level: str = "info") -> None:
    """Send the gateway's logs from `level` on, and the libraries' from `warning` on, to `out`."""
    handler = SinkHandler(out)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    set_level(level)


def set_level(level: str) -> None:
    """Log lines from `level` on: debug, info, warning or error."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(max(logging.WARNING, number))
    logging.getLogger("gateway").setLevel(number)


class ExchangeLog:
    """Log of exchanges, one line each: at info, or at warning if the status is 500 or above."""

    def __init__(self, as_json: bool, out: Writable, level: str = "info") -> None:
        self._lines = _json_lines if as_json else _text_lines
        self._out = out
        self._level = level

    def change_level(self, level: str) -> None:
        """Log exchanges, and everything else, from `level` on."""
        self._level = level
        set_level(level)

    def write(self, exchanges: Sequence[Exchange]) -> None:
        """Write the lines of all `exchanges` in one system call."""
        if self._level == "error":
            return
        if self._level == "warning":
            exchanges = [exchange for exchange in exchanges if _is_failure(exchange)]
        if exchanges:
            self._out.write(self._lines(exchanges))


def _json_lines(exchanges: Sequence[Exchange]) -> bytes:
    now = _timestamp(time.time()).encode()
    info, warning = (b'{"time":"%b","level":"%b","event":"exchange",' % (now, level) for level in (b"info", b"warning"))
    return b"".join(
        [(info if exchange.status < 500 else warning) + _encode(exchange)[1:] + b"\n" for exchange in exchanges]
    )


def _is_failure(exchange: Exchange) -> bool:
    return exchange.status >= 500


def _text_lines(exchanges: Sequence[Exchange]) -> bytes:
    now = time.strftime("%H:%M:%S")
    return b"".join([_text_line(exchange, now) for exchange in exchanges])


def _text_line(exchange: Exchange, now: str) -> bytes:
    level = "warning" if _is_failure(exchange) else "info"
    tokens = f", {exchange.usage.prompt_tokens}+{exchange.usage.completion_tokens} tokens" if exchange.usage else ""
    code = f" {exchange.code}" if exchange.code else ""
    detail = exchange.reason or (exchange.phase if exchange.outcome == "cancelled" else "")
    why = f" ({detail})" if detail else ""
    return (
        f"{now} {level:7} {exchange.status}{code}{why} {exchange.tier} on {exchange.backend}, "
        f"{exchange.duration:.3f} s{tokens} [{exchange.request_id}]\n"
    ).encode()
