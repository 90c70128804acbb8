"""Logs on standard error: one line for each exchange, and plain sentences for the operator.

No caller passes a prompt, a completion or a key to the log.
"""

import logging
import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from typing import BinaryIO, NamedTuple, Protocol, TextIO

import msgspec
import orjson

from gateway.telemetry.exchange import Exchange
from gateway.telemetry.trace_context import current_trace

MAX_PENDING = 1000
"""Maximum number of writes that wait while nothing reads the log."""

MAX_EVENT = 16 * 1024
"""Maximum number of characters of a line's text, whatever a backend put into it."""

CLOSE_SECONDS = 1.0

PLACE_WIDTH = 24
DETAIL_WIDTH = 34
"""Characters of the columns with the tier and backend, and with the times or the error, of a text line."""

_encode = msgspec.json.encode


class Palette(NamedTuple):
    """Escape sequences of a terminal for the parts of a text line; all empty without colours."""

    dim: str = ""
    green: str = ""
    yellow: str = ""
    red: str = ""
    reset: str = ""

    def of_level(self, level: str) -> str:
        return {"debug": self.dim, "warning": self.yellow, "error": self.red, "critical": self.red}.get(level, "")

    def of_status(self, status: int) -> str:
        if status >= 500:
            return self.red
        return self.green if status < 400 else self.yellow


PLAIN = Palette()
COLOURS = Palette("\x1b[2m", "\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[0m")


def palette_for(stream: TextIO, environ: Mapping[str, str]) -> Palette:
    """Return colours if `stream` is a terminal that shows them.

    It does not if NO_COLOR is set to anything (https://no-color.org), or TERM to `dumb`.
    """
    return COLOURS if stream.isatty() and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb" else PLAIN


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
        if (trace := current_trace.get()) is not None:
            line["trace_id"] = trace.trace_id
        return orjson.dumps(line).decode()


class TextFormatter(logging.Formatter):
    """Formatter for people at a terminal; of an exception it logs what `JsonFormatter` does."""

    def __init__(self, palette: Palette = PLAIN) -> None:
        super().__init__()
        self._palette = palette

    def format(self, record: logging.LogRecord) -> str:
        palette, level = self._palette, record.levelname.lower()
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        colour = palette.of_level(level)
        text = f"{palette.dim}{clock}{palette.reset} {colour}{level:7}{colour and palette.reset} {_message(record)}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" [{record.exc_info[0].__name__} at {', '.join(_places(record))}]"
        if (trace := current_trace.get()) is not None:
            text += f" {palette.dim}trace {trace.trace_id}{palette.reset}"
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


def configure(as_json: bool, out: Writable, level: str = "info", palette: Palette = PLAIN) -> None:
    """Send the gateway's logs from `level` on, and the libraries' from `warning` on, to `out`."""
    handler = SinkHandler(out)
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter(palette))
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

    def __init__(self, as_json: bool, out: Writable, level: str = "info", palette: Palette = PLAIN) -> None:
        self._lines = _json_lines if as_json else partial(_text_lines, palette)
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


def _text_lines(palette: Palette, exchanges: Sequence[Exchange]) -> bytes:
    now = time.strftime("%H:%M:%S")
    return "".join([_text_line(exchange, now, palette) for exchange in exchanges]).encode()


def _text_line(exchange: Exchange, now: str, palette: Palette) -> str:
    """Return the line of an exchange in columns, the request's id last."""
    dim, reset = palette.dim, palette.reset
    level = "warning" if _is_failure(exchange) else "info"
    level_colour, status_colour = palette.of_level(level), palette.of_status(exchange.status)
    trace = "" if exchange.trace_id is msgspec.UNSET else f" trace {exchange.trace_id}"
    return (
        f"{dim}{now}{reset} {level_colour}{level:7}{level_colour and reset} "
        f"{status_colour}{exchange.status}{reset} {f'{exchange.tier} on {exchange.backend}':{PLACE_WIDTH}} "
        f"{exchange.duration:9.3f} s  {_detail(exchange):{DETAIL_WIDTH}} {dim}{exchange.request_id}{trace}{reset}\n"
    )


def _detail(exchange: Exchange) -> str:
    """Return the error of an exchange, or the time to its first token and its tokens."""
    if exchange.code:
        why = exchange.reason or (exchange.phase if exchange.outcome == "cancelled" else "")
        return f"{exchange.code} ({why})" if why else exchange.code
    parts = []
    if exchange.time_to_first_token is not None:
        parts.append(f"first {exchange.time_to_first_token:.3f} s")
    if exchange.usage is not None:
        parts.append(f"{exchange.usage.prompt_tokens}+{exchange.usage.completion_tokens} tokens")
    if exchange.empty:
        parts.append("empty")
    return ", ".join(parts)
