"""Recorded responses of real engines, in a compact form.

In the files, `{"$repeat": [text, n]}` in a request stands for n times that text. The body of a
stream is a list of runs. A run is a sequence of events of one shape: it has the first event as
received, and in `pieces` the texts of all of them, with `[text, n]` for n equal texts.
"""

import base64
import json
import re
import struct
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

SERVERS = ("vllm-0.32.0", "ollama-0.33", "ollama-0.24")
PICTURE_MARK = "<base64 of a 64x64 png>"


@dataclass(frozen=True)
class Recording:
    """One exchange.

    `body` is text, a JSON value, or the list of runs of a stream, in which `[DONE]` is a string.
    """

    server: str
    case: str
    method: str
    path: str
    request_headers: dict[str, str]
    request_body: Any
    status: int
    headers: dict[str, str]
    body: Any
    is_stream: bool

    @property
    def content(self) -> bytes | None:
        """Request body as sent."""
        if self.request_body is None:
            return None
        return (
            self.request_body.encode() if isinstance(self.request_body, str) else json.dumps(self.request_body).encode()
        )

    @property
    def pieces(self) -> list[str]:
        """Texts of a stream, one for each event with a text."""
        texts: list[str] = []
        for run in self.body:
            for piece in run.get("pieces", ()) if isinstance(run, dict) else ():
                texts += [piece] if isinstance(piece, str) else [piece[0]] * piece[1]
        return texts


@cache
def picture() -> str:
    """Return a PNG of 64 by 64 pixels in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(value for x in range(64) for value in (4 * x, 4 * y, 128)) for y in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def load(server: str) -> dict[str, Recording]:
    """Load all recordings of one of `SERVERS`, by case."""
    source = json.loads((Path(__file__).parent / server / "recordings.json").read_text())
    return {
        case: Recording(
            server,
            case,
            entry["method"],
            entry["path"],
            entry.get("request_headers", {}),
            _unfold(entry.get("request")),
            entry["status"],
            entry["headers"],
            entry.get("events", entry.get("body")),
            "events" in entry,
        )
        for case, entry in source.items()
    }


def _unfold(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(PICTURE_MARK, picture())
    if isinstance(value, list):
        return [_unfold(item) for item in value]
    if isinstance(value, dict):
        if "$repeat" in value:
            text, times = value["$repeat"]
            return text * times
        return {key: _unfold(item) for key, item in value.items()}
    return value


def shape(value: Any, key: str = "") -> Any:
    """Return what two responses of one kind have in common.

    That is: the keys in their order, the types, whether values are empty or zero, and the exact
    strings of the keys in `EXACT`, in which numbers in error messages become `#`. The items of a
    list count as a set of shapes.
    """
    if isinstance(value, dict):
        return tuple((name, shape(item, name)) for name, item in value.items())
    if isinstance(value, list):
        return ("list", *sorted({repr(shape(item, key)) for item in value}))
    if isinstance(value, str):
        if key in EXACT:
            return re.sub(r"\d+", "#", value) if key in ("error", "message") else value
        return "text" if value else "empty"
    if value is None or isinstance(value, bool):
        return value
    return "number" if value else "zero"


EXACT = frozenset(
    {
        "finish_reason",
        "done_reason",
        "object",
        "role",
        "type",
        "code",
        "param",
        "error",
        "message",
        "detail",
        "owned_by",
        "system_fingerprint",
    }
    | {"capabilities", "family", "format", "stop_reason", "msg"}
)


def events(body: str) -> list[Any]:
    """Parse the events of an NDJSON or SSE body; `[DONE]` stays a string."""
    if body.startswith("data: "):
        datas = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]
    return [json.loads(line) for line in body.splitlines() if line]


def consecutive_shapes(found: list[Any]) -> list[Any]:
    """Return the shapes of events, each sequence of equal shapes once."""
    shapes: list[Any] = []
    for event in found:
        one = event if isinstance(event, str) else shape(event)
        if not shapes or shapes[-1] != one:
            shapes.append(one)
    return shapes
