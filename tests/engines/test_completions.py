"""Text completions at each engine: requests, and answers in every form."""

import json
from typing import Any

import msgspec
import pytest

from gateway.chat.answer import Delta, TokenLogprob, Usage
from gateway.chat.completion import Completion, prompt_messages
from gateway.engines.completions import (
    MAX_DECODED_LOGPROBS,
    MAX_LOGPROB_VALUES,
    CompletionReader,
    GenerateReader,
    OllamaCompleter,
    OpenAiCompleter,
)
from gateway.engines.engine import MAX_OBJECTS, ModelFacts
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm
from gateway.errors import ContextLengthExceeded, GatewayError, InvalidRequest, UpstreamError

UNKNOWN = ModelFacts()
SEEING, THINKING = ModelFacts(8192, frozenset({"completion", "vision"})), ModelFacts(None, frozenset({"thinking"}))


def completion(prompt: str = "x", **fields: Any) -> Completion:
    return Completion(model="standard", messages=prompt_messages([prompt]), **fields)


def rendered(completer: OpenAiCompleter | OllamaCompleter, chat: Completion, facts: ModelFacts = UNKNOWN) -> Any:
    return json.loads(completer.render(chat, "m", facts, True))


def event(text: str, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish, **more}
    return b"data: " + json.dumps({"id": "c", "choices": [choice]}, separators=(",", ":")).encode() + b"\n\n"


def read_to_the_end(stream: bytes) -> None:
    reader = CompletionReader()
    reader.feed(stream)
    if reader.failure is not None:
        raise reader.failure
    reader.end()


def test_vllm_gets_all_sampling_parameters_and_an_explicit_limit() -> None:
    fields: dict[str, Any] = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "min_tokens": 2,
        "seed": 1,
    }
    sent = rendered(OpenAiCompleter(Vllm()), completion(max_tokens=9, stop="a", top_p=0, **fields))
    assert sent == {
        "model": "m",
        "prompt": "x",
        "max_tokens": 9,
        "stop": ["a"],
        "top_p": 1e-6,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }
    # without a limit of its own, vLLM generates 16 tokens; null is the rest of the context
    assert rendered(OpenAiCompleter(Vllm()), completion(max_tokens=9000), SEEING)["max_tokens"] is None


def test_servers_of_kind_openai_get_openai_fields_only() -> None:
    sent = rendered(OpenAiCompleter(OpenAi()), completion(max_tokens=9, top_k=5, ignore_eos=True, temperature=0))
    assert sorted(sent) == ["max_tokens", "model", "prompt", "stream", "stream_options", "temperature"]


@pytest.mark.parametrize("count", [0, 3])
def test_number_of_logprobs_is_sent_in_each_engines_form(count: int) -> None:
    chat = completion(logprobs=True, top_logprobs=count)
    assert rendered(OpenAiCompleter(Vllm()), chat)["logprobs"] == count
    sent = rendered(OllamaCompleter(), chat)
    assert (sent["logprobs"], sent.get("top_logprobs")) == (True, count or None)


def test_ollama_gets_the_raw_prompt_and_the_operators_settings() -> None:
    chat = completion("see [img-0]", max_tokens=9, stop=["a"], repetition_penalty=1.2)
    sent = rendered(OllamaCompleter("5m", 4096), chat, ModelFacts(8192, frozenset({"completion"})))
    assert sent == {
        "model": "m",
        "prompt": "see [img-0]",
        "raw": True,
        "stream": True,
        "options": {"num_predict": 9, "num_ctx": 4096, "repeat_penalty": 1.2, "stop": ["a"]},
        "keep_alive": "5m",
        "truncate": False,
    }
    assert rendered(OllamaCompleter(), completion(), THINKING)["think"] is False
    assert rendered(OllamaCompleter(), completion("see [img-0]"), SEEING)["prompt"] == "see [\u2060img-0]"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_stream_is_read_alike_however_it_is_split(size: int) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
    stream = event("a") + event("b") + event('"\ud83d') + event("c", "length") + usage + b"data: [DONE]\n\n"
    reader, deltas = CompletionReader(), list[Delta]()
    for at in range(0, len(stream), size):
        deltas += reader.feed(stream[at : at + size])
    assert "".join(delta.content for delta in deltas) == 'ab"\ufffdc'
    assert [delta.finish for delta in deltas if delta.finish] == ["length"]
    assert deltas[-1].usage == Usage(3, 4)
    assert reader.done


def test_plain_events_take_the_fast_path_once_their_form_is_known() -> None:
    reader = CompletionReader()
    assert reader.plain_tokens(event("a")) is None
    reader.feed(event("a"))
    assert reader.plain_tokens(event("b")) == [b"b"]
    assert reader.plain_tokens(event("b") + event("c")) == [b"b", b"c"]
    assert reader.plain_tokens(event("", "stop")) is None


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (event("a") + b'data: {"error": {"message": "no"}}\n\n', "stream_error"),
        (event("a") + b"data: {\n\n", "malformed"),
        (event("a") + b'{"error": "no"}\n', "malformed"),
        (event("a"), "truncated"),
        (event("a") + b"data: [DONE]\n\n", "truncated"),
        (event("a", "abort"), "aborted"),
    ],
)
def test_stream_that_breaks_is_an_error(stream: bytes, reason: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        read_to_the_end(stream)
    assert caught.value.reason == reason


def test_logprobs_of_vllm_and_of_llamacpp_are_read() -> None:
    older = {"text_offset": [0], "tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"a": -1.0, "b": -2.0}]}
    newer = {"content": [{"token": "a", "logprob": -1.0, "top_logprobs": [{"token": "b", "logprob": -2.0}]}]}
    short = {"tokens": ["a"], "token_logprobs": [None]}
    found = [CompletionReader().feed(event("a", logprobs=form))[0].logprobs for form in (older, newer, short)]
    assert [[(one.token, one.logprob) for one in each or ()] for each in found] == [
        [("a", -1.0)],
        [("a", -1.0)],
        [("a", 0)],
    ]
    assert found[0] is not None
    assert found[0][0].top_logprobs == [TokenLogprob("a", -1.0), TokenLogprob("b", -2.0)]


def test_recorded_plain_answer_of_vllm_is_read() -> None:
    body = (
        b'{"id":"cmpl-8","object":"text_completion","created":1795190302,"model":"m","choices":[{"index":0,'
        b'"text":"\\u001eTraineralphab","logprobs":null,"finish_reason":"length","stop_reason":null,"token_ids":null,'
        b'"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,'
        b'"usage":{"prompt_tokens":3,"total_tokens":7,"completion_tokens":4,"prompt_tokens_details":null}}'
    )
    found = OpenAiCompleter(Vllm()).parse_answer(body)
    assert found == Delta("\x1eTraineralphab", "", "length", Usage(3, 4))


@pytest.mark.parametrize("body", [b"", b"{}", b'{"choices": []}', b'{"choices": [{"text": "a"}]}', b'{"choices": 1}'])
def test_plain_answer_that_is_not_one_is_refused(body: bytes) -> None:
    with pytest.raises(UpstreamError) as caught:
        OpenAiCompleter(Vllm()).parse_answer(body)
    assert caught.value.reason == "malformed"


@pytest.mark.parametrize(
    "logprobs",
    [
        {"tokens": ["a"] * (MAX_DECODED_LOGPROBS + 1)},
        {"tokens": ["a"] * 2, "top_logprobs": [{str(n): -1.0 for n in range(MAX_DECODED_LOGPROBS // 2)}] * 2},
        {"token_logprobs": [0] * (MAX_LOGPROB_VALUES + 2)},
        {"content": [{"token": "a", "logprob": -1}] * (MAX_OBJECTS + 1)},
    ],
    ids=["tokens", "alternatives", "values", "objects"],
)
def test_logprobs_that_would_take_too_long_to_read_are_an_error(logprobs: dict[str, Any]) -> None:
    """Tokens are members of arrays here, so the bound on JSON objects does not count them."""
    choice = {"text": "a", "finish_reason": "stop", "logprobs": logprobs}
    body = msgspec.json.encode({"choices": [choice]})
    for read in (OpenAiCompleter(Vllm()).parse_answer, lambda text: CompletionReader().feed(b"data: %b\n" % text)):
        with pytest.raises(UpstreamError) as caught:
            read(body)
        assert caught.value.reason == "too_large"


def test_ollamas_lines_are_read_and_thinking_is_text() -> None:
    lines = [
        {"response": "a", "done": False},
        {"response": "", "thinking": "b", "done": False},
        {"response": "c", "done": False, "logprobs": [{"token": "c", "logprob": -1}]},
        {"response": "", "done": True, "done_reason": "length", "prompt_eval_count": 3, "eval_count": 4},
    ]
    deltas = GenerateReader().feed("".join(json.dumps(line) + "\n" for line in lines).encode())
    assert [delta.content for delta in deltas] == ["a", "b", "c", "", ""]
    assert (deltas[3].finish, deltas[4].usage) == ("length", Usage(3, 4))


def test_ollamas_errors_end_the_stream() -> None:
    reader = GenerateReader()
    with pytest.raises(UpstreamError):
        reader.feed(b'{"error": "runner died"}\n')
    with pytest.raises(UpstreamError):
        GenerateReader().feed(b"[]\n")
    with pytest.raises(UpstreamError):
        GenerateReader().end()


def test_limit_beside_a_long_prompt_is_dropped_and_nothing_else() -> None:
    completer, error = OpenAiCompleter(Vllm()), ContextLengthExceeded(10, "prompt")
    relaxed = completer.relaxed(completion(max_tokens=9), error)
    assert isinstance(relaxed, Completion)
    assert relaxed.token_limit is None
    assert completer.relaxed(relaxed, error) is None
    other: GatewayError = InvalidRequest("no")
    assert completer.relaxed(completion(max_tokens=9), other) is None
    assert OllamaCompleter().relaxed(completion(max_tokens=9), error) is None
