"""The gateway records the sizes of its traffic, while the settings name a file for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from gateway import config
from gateway.relay.request_shape import shape_of
from gateway.relay.requests import RelayRequest
from gateway.telemetry.recording import RequestShape, TrafficRecording
from tests.fakes.fault_backend import MODEL, FaultBackend
from tests.fakes.images import png_data_url
from tests.fakes.running_gateway import Running, running, until

pytestmark = pytest.mark.uvloop

SYSTEM, QUESTION, KEY = "You are a secret assistant.", "What is my secret?", "sk-secret-key"


def document(backend: FaultBackend, **more: Any) -> dict[str, Any]:
    servers = [{"base_url": backend.base_url, "models": [MODEL]}]
    return {
        "backends": {"vllm": {"kind": "vllm", "servers": servers}},
        "llm_backend": "vllm",
        "tiers": {"standard": {"models": {"vllm": MODEL}}},
        "api_keys": [KEY],
        "state_file": "",
        **more,
    }


def turn(*texts: str, **fields: Any) -> dict[str, Any]:
    roles = ["system", "user", "assistant", "user"]
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)], **fields}


async def ask(gateway: Running, body: dict[str, Any], *headers: str) -> None:
    async with gateway.sent(body, f"Authorization: Bearer {KEY}", *headers) as raw:
        assert (await raw.reply()).status == 200


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()[1:]]


async def test_sizes_are_recorded_and_nothing_that_was_said(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    async with FaultBackend("vllm") as backend:
        async with running(config.build(document(backend, record=str(file)))) as gateway:
            await ask(gateway, turn(SYSTEM, QUESTION, stream=True, max_tokens=7))
            await ask(gateway, turn(SYSTEM, QUESTION, "It is 4.", "And now?"))
            await ask(gateway, turn(SYSTEM, "Another question."))
            parts = [{"type": "text", "text": "abc"}, {"type": "image_url", "image_url": {"url": png_data_url(40)}}]
            await ask(gateway, {"messages": [{"role": "user", "content": parts}]}, "x-gateway-session: s1")
            await ask(gateway, {"messages": [{"role": "user", "content": "x"}]}, "x-gateway-session: s1")
            assert gateway.gateway._context.recording is not None
        first, second, third, image, last = lines(file)
    assert (first["stream"], first["max_tokens"], first["messages"]) == (True, 7, 2)
    assert first["characters"] == len(SYSTEM) + len(QUESTION)
    assert (first["tier"], first["backend"], first["model"], first["endpoint"]) == ("standard", "vllm", MODEL, "chat")
    assert first["prompt_tokens"] > 0
    assert first["time_to_first_token"] <= first["duration"]
    assert first["conversation"] == second["conversation"] != third["conversation"]
    assert first["prefix"] == second["prefix"] == third["prefix"]
    assert first["prefix_characters"] == len(SYSTEM)
    assert image["images"][0][0] == 1600
    assert image["conversation"] == last["conversation"]
    assert first["at"] <= second["at"] <= third["at"]
    whole = file.read_text()
    assert not [word for word in ("secret", "question", "now?", "abc", "s1") if word in whole]


async def test_a_refused_request_is_recorded_with_its_status(tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    async with FaultBackend("vllm", "breaks") as backend:
        settings = config.build(document(backend, record=str(file)))
        async with (
            running(settings) as gateway,
            gateway.sent(turn(SYSTEM, QUESTION), f"Authorization: Bearer {KEY}") as raw,
        ):
            assert (await raw.reply()).status == 502
        (found,) = lines(file)
    assert (found["status"], found["outcome"], found.get("completion_tokens")) == (502, "upstream_error", None)


async def test_recording_begins_and_ends_with_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "traffic.jsonl"
    shapes: list[RequestShape] = []

    def counted(request: RelayRequest, recording: TrafficRecording) -> RequestShape:
        shapes.append(shape_of(request, recording))
        return shapes[-1]

    monkeypatch.setattr("gateway.relay.state.shape_of", counted)
    async with FaultBackend("vllm") as backend, running(config.build(document(backend))) as gateway:

        async def change(**more: Any) -> None:
            await gateway.gateway.reload.run(lambda: config.build(document(backend, **more)), "file")

        await ask(gateway, turn(SYSTEM, QUESTION))
        assert (shapes, gateway.gateway._context.recording) == ([], None)
        await change(record=str(file))
        await ask(gateway, turn(SYSTEM, QUESTION))
        await change()
        await ask(gateway, turn(SYSTEM, QUESTION))
        await until(lambda: file.exists() and len(lines(file)) == 1)
        assert len(shapes) == 1


async def test_a_recording_that_cannot_be_written_costs_no_request(tmp_path: Path) -> None:
    async with FaultBackend("vllm") as backend:
        settings = config.build(document(backend, record=str(tmp_path / "missing" / "file")))
        async with running(settings) as gateway:
            for _ in range(3):
                await ask(gateway, turn(SYSTEM, QUESTION))
