"""The benchmark of the client APIs: its requests, its table, and a small run of each API."""

import json

import pytest

from benchmarks import client_apis, requests
from benchmarks.client_apis import PATHS, table
from benchmarks.subjects import DidNotRun
from gateway.dialects.anthropic_messages import AnthropicMessages
from gateway.dialects.dialect import ChatDialect
from gateway.dialects.ollama_chat import OllamaChat, OllamaGenerate
from gateway.dialects.openai_chat import OpenAiChat
from gateway.dialects.openai_responses import OpenAiResponses

DIALECTS: dict[str, ChatDialect] = {
    "/v1/chat/completions": OpenAiChat(),
    "/v1/responses": OpenAiResponses(),
    "/v1/messages": AnthropicMessages(),
    "/api/chat": OllamaChat(),
    "/api/generate": OllamaGenerate(),
}


@pytest.mark.parametrize("stream", [False, True])
def test_every_api_asks_the_same(stream: bool) -> None:
    asked = set()
    for path in PATHS:
        head, _, body = requests.of_client_api(path, "m", max_tokens=7, stream=stream).partition(b"\r\n\r\n")
        assert head.startswith(f"POST {path} HTTP/1.1\r\n".encode())
        assert f"Content-Length: {len(body)}".encode() in head
        call, _ = DIALECTS[path].parse(body, 1 << 20)
        chat = call.chat
        messages = [(message.role, message.text) for message in chat.messages]
        asked.add(json.dumps([messages, chat.token_limit, chat.temperature, call.form.is_stream]))
    assert len(asked) == 1


def test_unknown_path_has_no_request() -> None:
    with pytest.raises(ValueError, match="/v1/other"):
        requests.of_client_api("/v1/other", "m", max_tokens=1, stream=False)


def test_table_has_medians_and_ratios_to_the_first_api() -> None:
    lines = table({"/a": ([100, 90, 110], [10]), "/b": ([150], [5])})
    assert "100.00 µs ×1.00" in lines[1]
    assert "150.00 µs ×1.50" in lines[2]
    assert "5.00 µs ×0.50" in lines[2]


def test_every_api_is_measured_through_the_gateway(capsys: pytest.CaptureFixture[str]) -> None:
    assert client_apis.main(["--rounds", "1", "--seconds", "0.6"]) == 0
    printed = capsys.readouterr().out
    assert all(path in printed for path in PATHS)


def test_failure_exits_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(options: object) -> list[str]:
        raise DidNotRun("no upstream")

    monkeypatch.setattr(client_apis, "run", fail)
    assert client_apis.main([]) == 1
    assert "no upstream" in capsys.readouterr().err
