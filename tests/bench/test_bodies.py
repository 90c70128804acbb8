import json
from typing import Any

from gateway.bench.bodies import render
from gateway.bench.target import Api, BenchImage, BenchRequest

MESSAGES = ({"role": "system", "content": "s"}, {"role": "user", "content": "질문"})


def body(api: Api, path: str, **changes: Any) -> Any:
    return json.loads(render(BenchRequest(MESSAGES, 8, **changes), "m", api, path))


def test_a_stream_in_openais_form_asks_for_the_usage() -> None:
    sent = body("openai", "/v1/chat/completions", parameters={"temperature": 0})
    assert sent == {
        "model": "m", "messages": list(MESSAGES), "stream": True, "stream_options": {"include_usage": True},
        "max_tokens": 8, "temperature": 0,
    }  # fmt: skip


def test_a_plain_request_has_no_stream_options() -> None:
    assert "stream_options" not in body("openai", "/v1/chat/completions", stream=False)


def test_an_image_goes_with_the_last_message() -> None:
    images = (BenchImage(b"abc", "image/jpeg"),)
    parts = body("openai", "/v1/chat/completions", images=images)["messages"][-1]["content"]
    assert parts[0] == {"type": "text", "text": "질문"}
    assert parts[1]["image_url"]["url"] == "data:image/jpeg;base64,YWJj"
    assert body("ollama", "/api/chat", images=images)["messages"][-1] == {**MESSAGES[1], "images": ["YWJj"]}
    assert body("ollama", "/api/generate", images=images)["images"] == ["YWJj"]


def test_completions_take_the_last_message_as_their_prompt() -> None:
    assert body("openai", "/v1/completions")["prompt"] == "질문"
    assert body("ollama", "/api/generate")["prompt"] == "질문"


def test_the_model_of_a_request_takes_precedence() -> None:
    assert body("ollama", "/api/chat", model="other")["model"] == "other"


def test_options_of_ollama_are_merged() -> None:
    sent = body("ollama", "/api/chat", parameters={"options": {"num_ctx": 4096}, "seed": 1})
    assert sent["options"] == {"num_predict": 8, "num_ctx": 4096, "seed": 1}
