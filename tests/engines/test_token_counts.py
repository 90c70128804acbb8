"""Token counts of a backend are checked like numbers of a client."""

import json

import pytest

from gateway.chat.answer import Usage
from gateway.dialects.json_body import completed
from gateway.engines.embeddings import OllamaEmbedder, OpenAiEmbedder
from gateway.engines.engine import MAX_TOKENS, ModelFacts, possible_tokens, token_count
from gateway.engines.ollama import Ollama
from gateway.engines.openai import OpenAi

HUGE, LONGER = "9" * 400, "9" * 5000
IMPOSSIBLE = ["-3", "-0", "1.5e300", HUGE, LONGER, f"-{HUGE}", "true", '"7"', "null", "[7]", '{"a":7}', "1000000001"]
VECTOR = [1.0]


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_number_of_tokens_is_ignored(text: str) -> None:
    assert token_count(text.encode()) == 0


@pytest.mark.parametrize(("text", "expected"), [("0", 0), ("7", 7), ("7.0", 7), (str(MAX_TOKENS), MAX_TOKENS)])
def test_possible_number_of_tokens_is_taken(text: str, expected: int) -> None:
    assert token_count(text.encode()) == expected


@pytest.mark.parametrize("value", [None, True, -1, 0, 10**400, float("nan"), float("inf"), "4096", [4096]])
def test_impossible_context_length_is_unknown(value: object) -> None:
    assert possible_tokens(value) is None
    if value == value and value != float("inf"):  # JSON has neither
        body = json.dumps({"data": [{"id": "m", "max_model_len": value}, {"id": "n"}]}).encode()
        assert OpenAi().models(body) == {"m": ModelFacts(None), "n": ModelFacts(None)}


@pytest.mark.parametrize("text", IMPOSSIBLE)
@pytest.mark.parametrize("whole", [False, True], ids=["a count", "the usage"])
def test_impossible_usage_does_not_break_the_answer_around_it(text: str, whole: bool) -> None:
    usage = text if whole else f'{{"prompt_tokens":5,"completion_tokens":{text}}}'
    choice = '"index":0,"finish_reason":"stop"'
    event = f'data: {{"choices":[{{{choice},"delta":{{"content":"a"}}}}],"usage":{usage}}}\n\ndata: [DONE]\n\n'
    deltas = OpenAi().reader().feed(event.encode())
    assert deltas[0].content == "a"
    plain = f'{{"choices":[{{{choice},"message":{{"content":"a"}}}}],"usage":{usage}}}'
    delta = OpenAi().parse_answer(plain.encode())
    assert (delta.content, delta.finish) == ("a", "stop")
    if not whole:
        assert delta.usage == deltas[-1].usage == Usage(5, 0)


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_counts_of_ollama_do_not_break_the_last_line(text: str) -> None:
    line = f'{{"message":{{"content":"a"}},"done":true,"prompt_eval_count":{text},"eval_count":5}}\n'
    reader = Ollama().reader()
    deltas = reader.feed(line.encode())
    assert (deltas[0].content, deltas[-1].usage, reader.done) == ("a", Usage(0, 5), True)


@pytest.mark.parametrize("text", IMPOSSIBLE)
def test_impossible_counts_of_embeddings_do_not_break_the_answer(text: str) -> None:
    ollama = completed(OllamaEmbedder().parse(f'{{"embeddings":[{VECTOR}],"prompt_eval_count":{text}}}'.encode()))
    assert ollama is not None
    assert ollama.prompt_tokens == 0
    for usage in (text, f'{{"prompt_tokens":{text}}}'):
        vllm = completed(
            OpenAiEmbedder().parse(f'{{"data":[{{"index":0,"embedding":{VECTOR}}}],"usage":{usage}}}'.encode())
        )
        assert vllm is not None
        assert (vllm.vectors, vllm.prompt_tokens) == ([b"[1.0]"], 0)
