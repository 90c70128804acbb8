"""Kind `vllm`: OpenAI's API with vLLM's own sampling fields."""

import json
from typing import Any

from gateway.backends.vllm import Vllm
from gateway.protocol import parse
from tests.golden import load

DIALECT = Vllm()


def rendered(**fields: Any) -> dict[str, Any]:
    body = json.dumps({"model": "standard", "messages": [{"role": "user", "content": "Hello"}]} | fields).encode()
    chat = parse(body)
    sent: dict[str, Any] = json.loads(DIALECT.render(chat, "Qwen/Qwen3-VL-8B-Instruct", bool(chat.stream)))
    return sent


def test_own_sampling_fields_are_sent_too() -> None:
    fields = {"temperature": 0.5, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1}
    assert {key: value for key, value in rendered(**fields).items() if key not in ("model", "messages")} == fields


def test_what_vllm_would_act_on_beside_them_is_not() -> None:
    """vLLM takes extra fields; some of them return the prompt or jump the line."""
    fields = dict.fromkeys(("priority", "prompt_logprobs", "return_prompt_text", "cache_salt", "mm_processor_kwargs", "ignore_eos"), 1)
    assert set(rendered(**fields)) == {"model", "messages"}


def test_recorded_models_are_read() -> None:
    recording = load("vllm-0.32.0")["models"]
    assert DIALECT.models(json.dumps(recording.body).encode()) == {entry["id"]: entry["max_model_len"] for entry in recording.body["data"]}
