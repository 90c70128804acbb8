"""Tests of kind `ollama`: reading every recorded `/api/chat` answer, and probing models."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.chat.answer import Delta, Usage, assemble
from gateway.chat.request import Chat
from gateway.engines.engine import ModelFacts, Models
from gateway.engines.ollama import MAX_ASKED, MAX_UNANSWERED, REPETITION, Ollama
from gateway.engines.openai import OpenAi
from gateway.engines.vllm import Vllm
from gateway.errors import ContextLengthExceeded, InvalidRequest, UnsupportedParameter, UpstreamError
from tests.engines.recorded import CHATS, body_of, recorded_text, recording_id, unfold
from tests.fakes.chats import USER, chat
from tests.golden import Recording, load

ENGINE = Ollama()
STREAMS = [recording for recording in CHATS if recording.is_stream and recording.path == "/api/chat"]
COMPLETE = [recording for recording in STREAMS if unfold(recording)[-1]["done"]]
REPEATED = [recording for recording in STREAMS if recording not in COMPLETE]
OLLAMAS = ["ollama-0.33", "ollama-0.24"]


def read(body: bytes, size: int | None = None) -> list[Delta]:
    reader = ENGINE.reader()
    pieces = [body] if size is None else [body[start : start + size] for start in range(0, len(body), size)]
    deltas = [delta for piece in pieces if not reader.done for delta in reader.feed(piece)]
    if not reader.done:
        deltas += reader.end()
    assert reader.done
    return deltas


def line(content: str = "", done: bool = False, **fields: Any) -> bytes:
    return (
        json.dumps(
            {"model": "m", "message": {"role": "assistant", "content": content}, "done": done, **fields}
        ).encode()
        + b"\n"
    )


END = line(done=True, done_reason="stop", prompt_eval_count=7, eval_count=3)


# Recordings


@pytest.mark.parametrize("recording", COMPLETE, ids=recording_id)
@pytest.mark.parametrize("size", [None, 1, 777])
def test_recorded_stream_is_read_completely(recording: Recording, size: int | None) -> None:
    answer = assemble(read(body_of(recording), size))
    last = unfold(recording)[-1]
    assert (answer.content, answer.reasoning) == (
        recorded_text(recording, "content"),
        recorded_text(recording, "thinking"),
    )
    assert answer.finish == last["done_reason"]
    usage = answer.usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (last["prompt_eval_count"], last["eval_count"])
    nanoseconds = [seconds * 1e9 for seconds in (usage.load_seconds, usage.prompt_seconds, usage.completion_seconds)]
    assert nanoseconds == pytest.approx([last[f"{name}_duration"] for name in ("load", "prompt_eval", "eval")])


@pytest.mark.parametrize("duration", ["-1", "1e400", '"1"', "null", "9" * 30, "[]"])
def test_a_duration_that_cannot_be_is_ignored(duration: str) -> None:
    end = b'{"done":true,"prompt_eval_count":7,"eval_count":3,"eval_duration":%b}\n' % duration.encode()
    assert assemble(read(line("a") + end)).usage == Usage(7, 3)


@pytest.mark.parametrize("recording", REPEATED, ids=recording_id)
@pytest.mark.parametrize("size", [None, 777])
def test_recorded_repetition_stop_is_a_normal_end(recording: Recording, size: int | None) -> None:
    """Ollama ends it without a last line, so the reader counts the pieces itself."""
    assert "repetition" in recording.case
    answer = assemble(read(body_of(recording), size))
    assert (answer.content, answer.finish) == (recorded_text(recording, "content"), "stop")
    assert answer.usage == Usage(0, len(unfold(recording)))


# End of a stream


@pytest.mark.parametrize(("count", "is_whole"), [(REPETITION, True), (REPETITION - 1, False)])
def test_stream_may_end_after_thirty_equal_pieces(count: int, is_whole: bool) -> None:
    """Surrounding whitespace is ignored, as in Ollama."""
    body = line("other") + b"".join(line(" a" if number % 2 else "a ") for number in range(count))
    if is_whole:
        assert assemble(read(body)).usage == Usage(0, count + 1)
        return
    with pytest.raises(UpstreamError):
        read(body)


def test_equal_pieces_followed_by_another_are_not_an_end() -> None:
    with pytest.raises(UpstreamError):
        read(line("a") * 40 + line("b"))


@pytest.mark.parametrize("body", [b"", b"\n", line("a"), line("a") + line("b")])
def test_stream_that_ends_without_done_is_an_error(body: bytes) -> None:
    with pytest.raises(UpstreamError, match="failed while generating") as caught:
        read(body)
    assert caught.value.reason == "truncated"


def test_last_line_needs_no_line_end() -> None:
    assert assemble(read(line("a") + END.rstrip())).usage == Usage(7, 3)


def test_runner_crash_in_mid_stream_is_an_error_in_the_gateways_words() -> None:
    reader = ENGINE.reader()
    assert reader.feed(line("a")) == [Delta("a")]
    with pytest.raises(UpstreamError) as caught:
        reader.feed(b'{"error":"an error was encountered while running the model: unexpected EOF"}\n')
    assert caught.value.reason == "stream_error"
    assert caught.value.message == "The model backend failed while generating the response."


def test_client_error_in_the_stream_stays_a_client_error() -> None:
    with pytest.raises(ContextLengthExceeded):
        ENGINE.reader().feed(b'{"error":"the input length exceeds the context length"}\n')


@pytest.mark.parametrize(
    ("engine_reason", "expected"), [("stop", "stop"), ("length", "length"), ("load", "stop"), (None, "stop")]
)
def test_finish_reason_is_one_of_openais(engine_reason: str | None, expected: str) -> None:
    assert assemble(read(line("a") + line(done=True, done_reason=engine_reason))).finish == expected


def test_content_of_the_last_line_is_not_lost() -> None:
    assert assemble(read(line("a") + line("b", done=True, done_reason="stop"))).content == "ab"


def test_bytes_after_the_end_are_ignored() -> None:
    assert assemble(read(line("a") + END + line("b"))).content == "a"


@pytest.mark.parametrize("bad", [b"{", b"[]", b'{"message":7}', b"dat: x"])
def test_line_that_cannot_be_read_is_a_failure_after_what_precedes_it(bad: bytes) -> None:
    """What the line said is missing, so the answer may not look complete."""
    reader = ENGINE.reader()
    assert assemble(reader.feed(line("a") + bad + b"\n" + line("b") + END)).content == "a"
    assert isinstance(reader.failure, UpstreamError)
    assert (reader.failure.reason, reader.done) == ("malformed", False)


def test_half_pairs_become_replacement_characters() -> None:
    call = b'{"function":{"name":"f","arguments":{"\\ude00":"\\ud83d\\ude00"}}}'
    body = b'{"message":{"content":"a\\ud83d","tool_calls":[%b]},"done":false}\n' % call
    answer = assemble(read(body + END))
    assert (answer.content, json.loads(answer.calls[0].arguments)) == ("a\ufffd", {"\ufffd": "\U0001f600"})


def test_endless_line_is_an_error() -> None:
    reader = ENGINE.reader()
    with pytest.raises(UpstreamError) as caught:
        [reader.feed(b"x" * 100_000) for _ in range(20)]
    assert caught.value.reason == "line_too_long"


@given(st.lists(st.text(max_size=8), max_size=6), st.integers(1, 40))
def test_any_text_is_read_unchanged_however_the_body_is_split(texts: list[str], size: int) -> None:
    assert assemble(read(b"".join(map(line, texts)) + END, size)).content == "".join(texts)


# Tool calls and logprobs


@pytest.mark.parametrize("server", OLLAMAS)
@pytest.mark.parametrize("size", [None, 1])
def test_recorded_tool_call_is_read_with_its_arguments_as_text(server: str, size: int | None) -> None:
    answer = assemble(read(body_of(load(server)["api_chat_tool_call_stream"]), size))
    assert [(call.index, call.name, json.loads(call.arguments)) for call in answer.calls] == [
        (0, "get_weather", {"city": "Seoul"})
    ]
    assert answer.content == ""


@pytest.mark.parametrize("server", OLLAMAS)
def test_recorded_logprobs_are_read_with_their_bytes_and_alternatives(server: str) -> None:
    """The plain answer has all of them in one line, as the last line of a stream may have."""
    body = load(server)["api_chat_logprobs"].body
    answer = assemble(read(json.dumps(body).encode() + b"\n"))
    assert answer.logprobs is not None
    assert [chosen.token for chosen in answer.logprobs] == [entry["token"] for entry in body["logprobs"]]
    assert all(
        len(chosen.top_logprobs) == 2 and chosen.bytes == list(chosen.token.encode()) for chosen in answer.logprobs
    )


def test_calls_in_several_lines_are_numbered_consecutively() -> None:
    """Some of Ollama's parsers restart the indices with every line."""
    lines = [
        line(
            message={
                "content": "",
                "tool_calls": [{"function": {"index": 0, "name": name, "arguments": {"a": 1}}} for name in names],
            }
        )
        for names in ("ef", "g", "hi")
    ]
    answer = assemble(read(b"".join(lines) + END))
    assert [(call.index, call.name, call.arguments) for call in answer.calls] == [
        (index, name, '{"a": 1}') for index, name in enumerate("efghi")
    ]


def test_call_without_arguments_has_an_empty_object() -> None:
    answer = assemble(read(line(message={"content": "", "tool_calls": [{"function": {"name": "f"}}]}) + END))
    assert answer.calls[0].arguments == "{}"


def test_logprobs_of_a_line_without_text_are_not_lost() -> None:
    first, last = ([{"token": "", "logprob": -0.5, "bytes": [byte]}] for byte in "é".encode())
    answer = assemble(read(line("", logprobs=first) + line("é", logprobs=last) + END))
    assert answer.logprobs is not None
    assert b"".join(bytes(chosen.bytes or ()) for chosen in answer.logprobs).decode() == answer.content == "é"


# Features that Ollama lacks


def test_stop_token_ids_are_refused_by_name() -> None:
    """Without them, the answer would run on past its end."""
    for engine in (ENGINE, OpenAi()):
        with pytest.raises(UnsupportedParameter) as caught:
            engine.check(chat(stop_token_ids=[1]))
        assert (caught.value.param, "stop_token_ids" in caught.value.message) == ("stop_token_ids", True)
        engine.check(chat(stop_token_ids=[]))


def test_continuation_of_the_last_message_is_only_refused_where_the_server_may_not_do_it() -> None:
    request = chat(messages=[*USER, {"role": "assistant", "content": "The sum is"}], continue_final_message=True)
    ENGINE.check(request)
    Vllm().check(request)
    with pytest.raises(UnsupportedParameter) as caught:
        OpenAi().check(request)
    assert caught.value.param == "continue_final_message"


# Structured output of vLLM's kinds


def answer_of(request: Chat, body: bytes) -> tuple[str, str]:
    reader = ENGINE.reader(request)
    answer = assemble(reader.feed(body) + reader.end())
    return answer.content, answer.reasoning


@pytest.mark.parametrize("field", [{"guided_choice": ["yes", "no"]}, {"structured_outputs": {"regex": "yes|no"}}])
def test_chosen_word_comes_back_without_the_quotes_of_its_json(field: dict[str, Any]) -> None:
    body = line('"y') + line("es") + line('"') + END
    assert answer_of(chat(**field), body) == ("yes", "")
    assert answer_of(chat(), body) == ('"yes"', "")


def test_chosen_word_that_arrives_as_thinking_is_the_answer_if_thinking_is_off() -> None:
    def thoughts(*texts: str) -> bytes:
        messages = [{"role": "assistant", "content": "", "thinking": text} for text in texts]
        return b"".join(json.dumps({"message": message, "done": False}).encode() + b"\n" for message in messages)

    choice = {"guided_choice": ["yes", "no"]}
    assert answer_of(chat(think=False, **choice), thoughts('"y', 'es"') + END) == ("yes", "")
    assert answer_of(chat(**choice), thoughts('"hm"') + line('"yes"') + END) == ("yes", '"hm"')
    assert answer_of(chat(think=False, **choice), thoughts("hm") + line('"yes"') + END) == ("yes", "hm")


@pytest.mark.parametrize(
    "field", [{"guided_grammar": 'root ::= "yes"'}, {"guided_regex": ".*"}, {"structured_outputs": {"regex": "a(?=b)"}}]
)
def test_constraint_that_no_schema_expresses_is_refused_by_name(field: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        ENGINE.check(chat(**field))
    assert caught.value.param in ("guided_grammar", "guided_regex", "structured_outputs.regex")


@pytest.mark.parametrize("name", ["choice", "regex", "grammar"])
def test_servers_of_kind_openai_have_json_schemas_only(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        OpenAi().check(chat(**{f"guided_{name}": ["a"] if name == "choice" else "a"}))
    assert caught.value.param == f"guided_{name}"
    OpenAi().check(chat(guided_json={"type": "integer"}))


# Requests without thinking for a model that does not support it


@pytest.mark.parametrize(
    "wish",
    [
        {"reasoning_effort": "low"},
        {"reasoning": {"effort": "low"}},
        {"think": True},
        {"chat_template_kwargs": {"enable_thinking": True}},
        {"chat_template_kwargs": {"thinking": True}},
        {"enable_thinking": True},
        {"thinking": {"type": "enabled"}},
    ],
)
def test_relaxed_request_drops_thinking_if_the_model_does_not_support_it(wish: dict[str, Any]) -> None:
    request = chat(**wish)
    unable = UnsupportedParameter("This model cannot think.", param="reasoning_effort")
    assert ENGINE.relaxed(request, unable) == chat()
    assert ENGINE.relaxed(chat(), unable) is None


@pytest.mark.parametrize(
    "refusal", [UnsupportedParameter("x", param="tools"), InvalidRequest("x"), ContextLengthExceeded(4096)]
)
def test_other_errors_go_to_the_client(refusal: InvalidRequest) -> None:
    assert ENGINE.relaxed(chat(think=True, max_tokens=9), refusal) is None


# Models


@pytest.mark.parametrize("server", OLLAMAS)
def test_recorded_models_are_listed_with_and_without_the_tag(server: str) -> None:
    recording = load(server)["api_tags"]
    found = ENGINE.models(json.dumps(recording.body).encode())
    assert found is not None
    assert {"llama", "llama:latest", "qwen3-vl", "qwen3-vl:latest"} <= set(found)
    for entry in recording.body["models"]:
        assert found[entry["name"]].digest == entry["digest"]


@pytest.mark.parametrize("body", [b"", b"{}", b"<html>", b"[]", b'{"models":7}'])
def test_invalid_model_list_differs_from_an_empty_one(body: bytes) -> None:
    assert ENGINE.models(body) is None
    assert ENGINE.models(b'{"models":[]}') == ENGINE.models(b'{"models":null}') == {}


@pytest.mark.parametrize(
    "spelling", ["llama", "LLAMA", "llama:latest", "library/llama", "registry.ollama.ai/library/llama:latest"]
)
def test_spellings_of_a_model_have_one_canonical_name(spelling: str) -> None:
    assert ENGINE.canonical(spelling) == "llama"
    assert ENGINE.canonical("llama:8b") == "llama:8b"


class FakeOllama:
    """Fake of the probed endpoints that records the requests.

    It does not answer for None or unknown models.
    """

    def __init__(self, shown: dict[str, list[str]] | None = None, loaded: dict[str, int] | None = None) -> None:
        self.shown = shown or {}
        self.loaded = loaded
        self.requests: list[tuple[str, str]] = []

    async def ask(self, method: str, path: str, body: bytes | None) -> bytes | None:
        if path == "/api/ps":
            self.requests.append((method, path))
            running = (
                None
                if self.loaded is None
                else [{"name": name, "context_length": length} for name, length in self.loaded.items()]
            )
            return None if running is None else json.dumps({"models": running}).encode()
        assert (method, path) == ("POST", "/api/show")
        model = json.loads(body or b"")["model"]
        self.requests.append((path, model))
        return json.dumps({"capabilities": self.shown[model]}).encode() if model in self.shown else None


def listed(digest: str = "d1", capabilities: list[str] | None = None) -> Models:
    entry = {"name": "llama:latest", "digest": digest} | (
        {} if capabilities is None else {"capabilities": capabilities}
    )
    found = ENGINE.models(json.dumps({"models": [entry, {"name": "other:latest", "digest": "o"}]}).encode())
    assert found is not None
    return found


async def probed(
    server: FakeOllama, models: Models, before: Models | None = None, wanted: str = "llama", engine: Ollama = ENGINE
) -> ModelFacts:
    await engine.probe_models(models, before or {}, [wanted], server.ask)
    return next(facts for name, facts in models.items() if engine.canonical(name) == engine.canonical(wanted))


async def test_context_length_is_that_of_the_loaded_model() -> None:
    facts = await probed(FakeOllama({"llama": ["completion"]}, {"llama:latest": 8192}), listed())
    assert facts == ModelFacts(8192, frozenset({"completion"}), "d1")


async def test_context_length_is_kept_after_unloading_and_updated_by_the_next_load() -> None:
    server = FakeOllama({"llama": ["completion"]}, {"llama:latest": 8192})
    before = listed()
    await probed(server, before)
    server.loaded = {}
    after = listed()
    assert (await probed(server, after, before)).context_length == 8192
    server.loaded = {"llama:latest": 4096}
    assert (await probed(server, listed(), after)).context_length == 4096


async def test_operators_num_ctx_is_known_before_the_first_load() -> None:
    assert (await probed(FakeOllama(loaded={}), listed(), engine=Ollama(num_ctx=16384))).context_length == 16384


async def test_capabilities_missing_from_the_model_list_are_not_lacking() -> None:
    """Recorded on 0.33 for qwen3-vl: only `/api/show` has `vision`, the list does not."""
    models = listed(capabilities=["completion", "tools"])
    assert not (await probed(FakeOllama({"llama": ["completion", "vision", "tools"]}, {}), models)).lacks("vision")
    assert not (await probed(FakeOllama(), listed(capabilities=["completion", "tools"]))).lacks("vision")


async def test_context_that_the_model_is_loaded_with_counts_before_the_operators() -> None:
    server = FakeOllama({"llama": ["completion"]}, {"llama:latest": 8192})
    assert (await probed(server, listed(), engine=Ollama(num_ctx=16384))).context_length == 8192


async def test_capabilities_are_probed_again_only_if_the_model_changes() -> None:
    server = FakeOllama({"llama": ["completion"]}, {})
    before = listed()
    await probed(server, before)
    after = listed()
    assert (await probed(server, after, before)).capabilities == {"completion"}
    assert server.requests.count(("/api/show", "llama")) == 1
    server.shown["llama"] = ["completion", "thinking"]
    assert (await probed(server, listed("d2"), after)).capabilities == {"completion", "thinking"}
    assert server.requests.count(("/api/show", "llama")) == 2


async def test_only_wanted_models_are_probed() -> None:
    server = FakeOllama({"llama": ["completion"], "other": ["completion"]}, {})
    await probed(server, listed())
    assert ("/api/show", "other") not in server.requests


async def test_model_is_found_by_any_spelling() -> None:
    server = FakeOllama({"library/LLAMA": ["completion"]}, {"llama:latest": 8192})
    assert await probed(server, listed(), wanted="library/LLAMA") == ModelFacts(8192, frozenset({"completion"}), "d1")


async def test_silent_server_keeps_the_known_facts() -> None:
    before = listed()
    await probed(FakeOllama({"llama": ["completion"]}, {"llama:latest": 8192}), before)
    assert await probed(FakeOllama(), listed(), before) == ModelFacts(8192, frozenset({"completion"}), "d1")
    assert await probed(FakeOllama(), listed()) == ModelFacts(None, None, "d1")


async def test_missing_model_is_not_probed() -> None:
    server, models = FakeOllama({"away": ["completion"]}, {}), listed()
    await ENGINE.probe_models(models, {}, ["away"], server.ask)
    assert "away" not in models
    assert server.requests == [("GET", "/api/ps")]


@pytest.mark.parametrize("server", OLLAMAS)
async def test_recorded_answers_contain_context_and_capabilities(server: str) -> None:
    recorded = load(server)

    async def ask(method: str, path: str, body: bytes | None) -> bytes | None:
        return json.dumps(recorded["api_ps" if path == "/api/ps" else "api_show"].body).encode()

    models = ENGINE.models(json.dumps(recorded["api_tags"].body).encode())
    assert models is not None
    await ENGINE.probe_models(models, {}, ["qwen3-vl"], ask)
    assert models["qwen3-vl"].context_length == 4096
    assert not models["qwen3-vl"].lacks("vision")
    assert models["qwen3-vl"].lacks("thinking")


@pytest.mark.parametrize(("answers", "asked"), [(True, MAX_ASKED), (False, MAX_UNANSWERED)])
async def test_a_probe_asks_about_few_models_that_no_setting_names(answers: bool, asked: int) -> None:
    names = [f"model-{number}" for number in range(50)]
    server = FakeOllama({name: ["completion"] for name in ("wanted", *(names if answers else []))})
    models = {name: ModelFacts(digest=name) for name in (*names, "wanted")}
    await ENGINE.probe_models(models, {}, ["wanted"], server.ask, names)
    assert sum(path == "/api/show" for path, _ in server.requests) == asked + 1
    assert models["wanted"].capabilities == frozenset({"completion"})
    again = {name: ModelFacts(digest=name) for name in models}
    await ENGINE.probe_models(again, models, ["wanted"], server.ask, names)
    known = [name for name in names if again[name].capabilities]
    assert known == (names[: 2 * MAX_ASKED] if answers else [])
