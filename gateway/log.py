"""Logs on standard error: one line for each exchange, and plain sentences for the operator. No prompt, completion or key is ever given to it."""

import logging
import sys
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import BinaryIO

import msgspec
import orjson

from gateway.metering import Exchange

_encode = msgspec.json.encode


class JsonFormatter(logging.Formatter):
    """One JSON object a line. Of an exception only its class and where it was raised: its text may hold what a client sent."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {"time": _timestamp(record.created), "level": record.levelname.lower(), "event": record.getMessage()}
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__
            line["at"] = _places(record)
        return orjson.dumps(line).decode()


class TextFormatter(logging.Formatter):
    """For people at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {record.levelname.lower():7} {record.getMessage()}"
        if record.exc_info and record.exc_info[0] is not None:
            text += f" [{record.exc_info[0].__name__} at {', '.join(_places(record))}]"
        return text


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


def configure(as_json: bool) -> None:
    """Send the logs of the gateway, and warnings of the libraries, to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("gateway").setLevel(logging.INFO)


class ExchangeLog:
    """Writes one line for each exchange."""

    def __init__(self, as_json: bool, out: BinaryIO | None = None) -> None:
        self._line = _json_line if as_json else _text_line
        self._out = out or sys.stderr.buffer

    def write(self, exchanges: Sequence[Exchange]) -> None:
        """Write the lines of `exchanges` together: one system call for many."""
        if exchanges:
            self._out.write(b"".join([self._line(exchange) for exchange in exchanges]))
            self._out.flush()


def _json_line(exchange: Exchange) -> bytes:
    return b'{"time":"%b","level":"info","event":"exchange",%b\n' % (_timestamp(time.time()).encode(), _encode(exchange)[1:])


def _text_line(exchange: Exchange) -> bytes:
    tokens = f", {exchange.usage.prompt_tokens}+{exchange.usage.completion_tokens} tokens" if exchange.usage else ""
    where = f"{exchange.tier} on {exchange.backend}"
    code = f" {exchange.code}" if exchange.code else ""
    text = f"{time.strftime('%H:%M:%S')} info    {exchange.status}{code} {where}, {exchange.duration:.3f} s{tokens} [{exchange.request_id}]\n"
    return text.encode()
