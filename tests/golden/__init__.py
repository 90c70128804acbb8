"""What running engines answered, in a compact form: requests, statuses, headers and bodies, long runs folded.

In the files a request's `{"$repeat": [text, n]}` stands for that text n times. A stream's body is a list of runs: the first event of
consecutive events of one shape as it came, and in `pieces` the texts of all of them, `[text, n]` for n equal ones.
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
    """One exchange. `body` is text, a JSON value, or for a stream the list of its `Run`s (with `[DONE]` as a plain string)."""

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
        """The request's body as it was sent."""
        if self.request_body is None:
            return None
        return (
            self.request_body.encode() if isinstance(self.request_body, str) else json.dumps(self.request_body).encode()
        )

    @property
    def pieces(self) -> list[str]:
        """The texts of a stream, one for each event that had any."""
        texts: list[str] = []
        for run in self.body:
            for piece in run.get("pieces", ()) if isinstance(run, dict) else ():
                texts += [piece] if isinstance(piece, str) else [piece[0]] * piece[1]
        return texts


@cache
def picture() -> str:
    """A 64 by 64 PNG in base64."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(value for x in range(64) for value in (4 * x, 4 * y, 128)) for y in range(64))
    head = struct.pack(">IIBBBBB", 64, 64, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return base64.b64encode(data).decode()


def load(server: str) -> dict[str, Recording]:
    """All recordings of one of `SERVERS`, by case."""
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
    """What two answers of one kind have in common: keys in their order, types, emptiness, and the exact words of what is no free text.

    Numbers in error messages are `#`. The items of a list count as a set of shapes.
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
    """The events of an NDJSON or SSE body, parsed; `[DONE]` stays text."""
    if body.startswith("data: "):
        datas = [part.removeprefix("data: ") for part in body.split("\n\n") if part]
        return [data if data == "[DONE]" else json.loads(data) for data in datas]
    return [json.loads(line) for line in body.splitlines() if line]


def shapes_in_turn(found: list[Any]) -> list[Any]:
    """The shapes of events, equal neighbours once."""
    turns: list[Any] = []
    for event in found:
        one = event if isinstance(event, str) else shape(event)
        if not turns or turns[-1] != one:
            turns.append(one)
    return turns
