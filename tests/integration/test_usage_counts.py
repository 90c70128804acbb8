"""Usage beside the clients' own counts: whatever ends well, breaks off, is left or refused, both are equal.

Covers: gateway/usage/recorder.py
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gateway.app import Gateway
from gateway.usage.recorder import UsageRecorder
from tests.fakes import running_gateway
from tests.fakes.fault_backend import WORDS, FaultBackend
from tests.fakes.keys import key_of, write_keys
from tests.fakes.running_gateway import Raw, Running, running, settings_for, until

pytestmark = pytest.mark.uvloop

KEYS = ("web", "ops", "night", "lab", "apps")
PERSONS = [f"person-{number}" for number in range(20)]
KINDS = ("plain", "stream", "left", "killed", "refused")
MODES = {"plain": "healthy", "stream": "healthy", "left": "stall", "killed": "killed"}
REQUESTS = 250


async def read_words(raw: Raw, wanted: int) -> int:
    """Read a stream until it has brought `wanted` words; return how many it brought."""
    received = b""
    while received.count(b'"content":"') < wanted + 1:  # the first event has the role and no text
        piece = await raw.reader.read(4096)
        if not piece:
            break
        received += piece
    return received.count(b'"content":"') - 1


async def send(gateway: Running, backend: FaultBackend, kind: str, key: str, person: str) -> Counter[str]:
    """Send one request of this kind, one at a time, and return the client's own counts."""
    backend.mode = MODES.get(kind, "healthy")
    headers = f"Authorization: Bearer {key_of(key)}", f"X-User: {person}"
    body: dict[str, Any] = {"stream": kind not in ("plain", "refused")}
    if kind == "refused":
        body["model"] = "not-there"
    if kind == "stream":
        body["stream_options"] = {"include_usage": True}
    async with gateway.sent(body, *headers) as raw:
        if kind == "left":
            await raw.head()
            return Counter(requests=1, completion_tokens=await read_words(raw, len(WORDS)))
        reply = await raw.reply()
    if kind == "refused":
        assert reply.status == 404
        return Counter(refused=1)
    if kind == "killed":
        assert reply.error is not None
        words = sum(1 for event in reply.events if "choices" in event and event["choices"][0]["delta"].get("content"))
        return Counter(requests=1, completion_tokens=words)
    usage = json.loads(reply.body)["usage"] if kind == "plain" else reply.events[-2]["usage"]
    return Counter(requests=1, **{name: usage[name] for name in ("prompt_tokens", "completion_tokens")})


async def test_usage_equals_what_the_clients_counted_to_the_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five keys, twenty persons; streams, plain answers, clients that leave, kills and refusals."""
    write_keys(tmp_path / "keys.yaml", **{name: {"trusted": True} for name in KEYS})
    usage = UsageRecorder(tmp_path / "usage.db", 400)
    monkeypatch.setattr(running_gateway, "Gateway", lambda *words, **options: Gateway(*words, usage=usage, **options))
    counted: dict[tuple[str, str], Counter[str]] = {}
    async with FaultBackend("vllm") as backend:
        settings = settings_for(backend, first_token_timeout=30, idle_timeout=30, total_timeout=60)
        changes = {"keys_file": tmp_path / "keys.yaml", "user_header": "x-user", "max_text_body": 1 << 20}
        async with running(settings.model_copy(update=changes)) as gateway:
            for number in range(REQUESTS):
                key, person = KEYS[number % 5], PERSONS[number % 20]
                kind = KINDS[(number * 7 + number // 5) % len(KINDS)]
                counts = counted.setdefault((key, person), Counter())
                counts.update(await send(gateway, backend, kind, key, person))
            await until(gateway.is_idle)
            rows = await usage.rows(["key", "person"], None, None)
    await usage.close()
    names = ("requests", "refused", "prompt_tokens", "completion_tokens")
    found = {(row["key"], row["person"]): {name: row[name] for name in names} for row in rows}
    assert found == {group: {name: counts[name] for name in names} for group, counts in counted.items()}
    assert sum(counts["requests"] for counts in counted.values()) == REQUESTS * 4 // 5
