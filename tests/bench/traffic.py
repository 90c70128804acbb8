"""Recorded traffic for tests."""

from pathlib import Path
from typing import Any

import msgspec

from gateway.bench.recording import Recording, read_recording
from gateway.telemetry.recording import FORMAT, VERSION, RecordedExchange

HEAD = {"format": FORMAT, "version": VERSION, "started": 1000.0}


def recorded(at: float = 1000.0, **changes: Any) -> RecordedExchange:
    """Return a streamed chat of 100 prompt tokens in 400 characters, and 20 of the answer in 2 s."""
    values: dict[str, Any] = {
        "at": at, "endpoint": "chat", "tier": "standard", "backend": "ollama", "model": "m", "stream": True,
        "status": 200, "messages": 1, "characters": 400, "duration": 2.0, "prompt_tokens": 100,
        "completion_tokens": 20, "time_to_first_token": 0.5,
    }  # fmt: skip
    return RecordedExchange(**values | changes)


def write(file: Path, *exchanges: RecordedExchange, head: Any = HEAD, more: bytes = b"") -> Path:
    lines = [msgspec.json.encode(each) for each in (head, *exchanges)]
    file.write_bytes(b"\n".join(lines) + b"\n" + more)
    return file


def recording(*exchanges: RecordedExchange) -> Recording:
    return Recording(exchanges, {})


__all__ = ["HEAD", "read_recording", "recorded", "recording", "write"]
