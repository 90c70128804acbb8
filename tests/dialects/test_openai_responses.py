"""OpenAI's Responses API: requests become chats, answers have its items and events.

Covers: gateway/dialects/responses_request.py
Covers: gateway/dialects/responses_items.py
Covers: gateway/dialects/openai_responses.py
Covers: gateway/dialects/responses_objects.py
"""

import contextlib
import json
from typing import Any

import pytest
from openai.types.responses import Response

from gateway.chat import images
from gateway.chat.answer import (
    Answer,
    CallDelta,
    ChosenLogprob,
    Delta,
    Timings,
    TokenLogprob,
    Usage,
)
from gateway.chat.checks import check
from gateway.chat.request import Chat, JsonFormat, SchemaFormat
from gateway.chat.tools import Choice
from gateway.dialects.dialect import ChatCall
from gateway.dialects.openai_responses import OpenAiResponses
from gateway.errors import (
    GatewayError,
    InvalidJson,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedParameter,
    UpstreamError,
)

LIMIT = 1 << 20
USAGE = Usage(7, 3)
URL = "data:image/png;base64," + "A" * 4000
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def clock() -> Timings:
    return Timings(0, 0, 0, 0)


def call(**fields: Any) -> ChatCall:
    body = json.dumps({"model": "standard", "input": "Hi"} | fields).encode()
    return OpenAiResponses().parse(body, LIMIT)[0]


def parsed(**fields: Any) -> Chat:
    return call(**fields).chat


def events(body: bytes) -> list[dict[str, Any]]:
    found = []
    for event in body.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def streamed(*deltas: Delta, **fields: Any) -> list[dict[str, Any]]:
    stream = call(stream=True, **fields).form.stream("1", 10)
    found = events(b"".join([stream.opening(), *map(stream.render, deltas), stream.end(clock)]))
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def plain(answer: Answer, **fields: Any) -> Response:
    return Response.model_validate_json(call(**fields).form.answer("1", 10, answer, clock), strict=True)


# Requests


def test_vllms_sampling_parameters_mean_the_same_as_in_a_chat() -> None:
    fields: dict[str, Any] = {
        "presence_penalty": 0.5, "frequency_penalty": -0.5, "repetition_penalty": 1.1, "top_k": 3, "min_p": 0.1,
        "seed": 7, "stop": ["END"], "stop_token_ids": [1], "ignore_eos": True,
        "mm_processor_kwargs": {"max_pixels": 100}, "temperature": 0.2, "top_p": 0.9, "parallel_tool_calls": False,
    }  # fmt: skip
    chat = parsed(**fields)
    assert {name: getattr(chat, name) for name in fields} == fields
    assert parsed(chat_template_kwargs={"enable_thinking": False}).effort == "none"
    assert parsed(structured_outputs={"choice": ["a", "b"]}).output_format is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop": [""]}, "stop[0]"), ({"top_k": -2}, "top_k"), ({"seed": "x"}, "seed"), ({"min_p": 2}, "min_p")],
)
def test_a_sampling_parameter_that_an_engine_would_refuse_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        call(**fields)
    assert error.value.param == param


def test_null_counts_as_the_empty_text_of_the_model_and_of_a_function() -> None:
    items = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": None},
        {"type": "function_call_output", "call_id": "c", "output": None},
    ]
    messages = parsed(input=items).messages
    assert [(message.role, message.text) for message in messages] == [("user", "a"), ("assistant", ""), ("tool", "")]
    assert (messages[1].tool_calls or [])[0].function.whole_arguments == b"{}"
    for item in ({"role": "user", "content": None}, {"role": "system"}):
        with pytest.raises(InvalidRequest, match=r"'input\[0\].content'"):
            call(input=[item])


def test_the_images_are_named_by_their_paths_in_the_input() -> None:
    image = {"type": "input_image", "image_url": URL}
    text = {"type": "input_text", "text": "a"}
    items = [
        {"role": "user", "content": [text, image]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [text, image]},
    ]
    asked = call(instructions="Be brief.", input=items)
    assert list(asked.image_paths) == ["input[0].content[1].image_url", "input[2].output[1].image_url"]
    assert len(images.urls_of(asked.chat)) == 2


@pytest.mark.parametrize(
    ("param", "name"),
    [
        ("tools[3].function.name", "tools[3].name"),
        ("tools[0].function.parameters", "tools[0].parameters"),
        ("response_format.json_schema.schema", "text.format.schema"),
        ("response_format", "text.format"),
        ("messages", "input"),
        ("structured_outputs.choice", "structured_outputs.choice"),
        (None, None),
    ],
)
def test_an_error_names_the_fields_of_this_api(param: str | None, name: str | None) -> None:
    fault = InvalidRequest(f"'{param}' is wrong.", param=param)
    error = json.loads(call().form.error_body(fault))["error"]
    assert (error["param"], error["message"]) == (name, f"'{param if param == 'messages' else name}' is wrong.")
    assert OpenAiResponses.errors.error_body(fault) == call().form.error_body(fault)
    event = events(call(stream=True).form.stream("1", 10).error(fault))[0]
    assert (event["param"], event["message"]) == (error["param"], error["message"])


def test_a_text_is_one_message_after_the_instructions() -> None:
    messages = parsed(instructions="Be brief.").messages
    assert [(message.role, message.text) for message in messages] == [("system", "Be brief."), ("user", "Hi")]


def test_items_become_the_turns_that_they_were() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"},
                                                        {"type": "input_image", "image_url": URL, "detail": "auto"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
         "content": [{"type": "output_text", "text": "I call.", "annotations": []}]},
        {"type": "function_call", "call_id": "call_1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "call_2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "call_1", "output": "one"},
        {"type": "function_call_output", "call_id": "call_2", "output": [{"type": "input_text", "text": "two"},
                                                                         {"type": "input_image", "image_url": URL}]},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "more"},
    ]  # fmt: skip
    messages = parsed(input=items).messages
    assert [message.role for message in messages] == [
        "developer", "user", "assistant", "tool", "tool", "user", "assistant", "user",
    ]  # fmt: skip
    turn = messages[2]
    assert (turn.content, turn.reasoning_text) == ("I call.", "hm")
    assert [one.id for one in turn.tool_calls or ()] == ["call_1", "call_2"]
    assert [message.tool_call_id for message in messages[3:5]] == ["call_1", "call_2"]
    assert [message.text for message in messages[3:5]] == ["one", "two"]
    assert (messages[1].images, messages[5].images) == ([URL], [URL])


def test_options_keep_their_meaning() -> None:
    chat = parsed(
        max_output_tokens=9, temperature=0.5, top_p=0.9, reasoning={"effort": "low"}, parallel_tool_calls=False,
        include=["message.output_text.logprobs"], top_logprobs=2, tools=[TOOL],
        tool_choice={"type": "function", "name": "f"},
    )  # fmt: skip
    assert (chat.token_limit, chat.temperature, chat.top_p, chat.effort) == (9, 0.5, 0.9, "low")
    assert (chat.parallel_tool_calls, chat.logprobs, chat.top_logprobs) == (False, True, 2)
    assert isinstance(chat.tool_choice, Choice)
    assert chat.offered[0].function.name == "f"


def test_a_choice_among_some_tools_offers_only_these() -> None:
    other = TOOL | {"name": "g"}
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    chat = parsed(tools=[TOOL, other], tool_choice=choice)
    assert [tool.function.name for tool in chat.offered] == [function.name for function in chat.forced] == ["g"]
    response = plain(Answer("x", "", "stop", USAGE, [], None), tools=[TOOL, other], tool_choice=choice)
    assert response.model_dump(mode="json")["tool_choice"] == choice


@pytest.mark.parametrize("choice", ["auto", "none"])
def test_a_choice_that_needs_no_tool_may_come_without_any(choice: str) -> None:
    assert parsed(tool_choice=choice).offered == []


def test_fields_that_change_nothing_are_ignored() -> None:
    items = [
        {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "gAAA", "content": None},
        {"type": "item_reference", "id": plain(Answer("", "hm", "stop", USAGE, [], None)).output[0].id},
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "phase": "commentary",
         "content": [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "No."}]},
        {"type": "function_call", "id": "fc_1", "call_id": "c", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "id": "o", "call_id": "c", "output": "r", "status": "completed"},
    ]  # fmt: skip
    chat = parsed(
        input=items, include=["reasoning.encrypted_content", "file_search_call.results"], truncation="auto",
        max_tool_calls=3, stream_options={"include_obfuscation": False}, store=True, service_tier="flex",
        prompt_cache_key="k", prompt_cache_retention="24h", safety_identifier="s", reasoning={"summary": "auto"},
    )  # fmt: skip
    assert [(message.role, message.text) for message in chat.messages] == [("assistant", "a\nNo."), ("tool", "r")]
    assert (chat.logprobs, chat.effort) == (None, None)


def test_text_format_is_structured_output() -> None:
    wanted = parsed(text={"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}}).response_format
    assert isinstance(wanted, SchemaFormat)
    assert (wanted.json_schema.name, wanted.json_schema.schema) == ("n", SCHEMA)
    assert isinstance(parsed(text={"format": {"type": "json_object"}}).response_format, JsonFormat)
    assert parsed(text={"format": {"type": "text"}, "verbosity": "low"}).response_format is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice.type"),
        (
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp", "server_label": "x"}]}},
            "tool_choice.tools[0].type",
        ),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0]"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]}, "input[0].content[0]"),
    ],
)
def test_what_needs_stored_state_or_openais_tools_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(UnsupportedParameter) as error:
        parsed(**fields)
    assert error.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
    ],
)
def test_invalid_values_are_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        parsed(**fields)
    assert error.value.param == param


def test_images_do_not_count_as_text() -> None:
    items = [{"role": "user", "content": [{"type": "input_image", "image_url": URL}]}]
    body = json.dumps({"model": "m", "input": items}).encode()
    assert OpenAiResponses().parse(body, 1000)[1] < 300
    with pytest.raises(RequestTooLarge):
        OpenAiResponses().parse(json.dumps({"model": "m", "input": "x" * 2000}).encode(), 1000)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 50_000])
def test_bodies_that_are_not_json_objects_are_refused(body: bytes) -> None:
    with pytest.raises(GatewayError) as error:
        OpenAiResponses().parse(body, LIMIT)
    assert isinstance(error.value, InvalidJson)


# Answers


def test_a_plain_answer_has_openais_items_and_repeats_the_request() -> None:
    answer = Answer("Hello", "hm", "stop", USAGE, [], [ChosenLogprob("Hello", -0.5, [72])])
    response = plain(answer, instructions="Be brief.", metadata={"k": "v"}, tools=[TOOL], temperature=0.5)
    assert (response.id, response.status, response.output_text) == ("resp_1", "completed", "Hello")
    assert [item.type for item in response.output] == ["reasoning", "message"]
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"k": "v"}, 0.5)
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (7, 3, 10)
    assert len({item.id for item in response.output}) == 2


def test_an_answer_that_was_cut_is_incomplete() -> None:
    response = plain(Answer("Hel", "", "length", USAGE, [], None))
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    last = streamed(Delta("Hel"), Delta(finish="length"), Delta(usage=USAGE))[-1]
    assert (last["type"], last["response"]["status"]) == ("response.incomplete", "incomplete")


ENDINGS = [
    ("text", Answer("Hel", "", "length", USAGE, [], None), ["message"]),
    ("nothing", Answer("", "", "length", USAGE, [], None), ["message"]),
    ("thoughts", Answer("", "hm", "length", USAGE, [], None), ["reasoning"]),
    ("calls", Answer("", "", "length", USAGE, [CallDelta(0, "a", "f", "{}"), CallDelta(1, "b", "f", "{")], None),
     ["function_call", "function_call"]),
    ("a filter", Answer("Hel", "", "content_filter", USAGE, [], None), ["message"]),
    ("whole", Answer("", "hm", "stop", USAGE, [], None), ["reasoning", "message"]),
    ("empty", Answer("", "", "stop", USAGE, [], None), ["message"]),
    ("whole calls", Answer("", "hm", "tool_calls", USAGE, [CallDelta(0, "a", "f", "{}")], None),
     ["reasoning", "function_call"]),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "items"), [one[1:] for one in ENDINGS], ids=[one[0] for one in ENDINGS])
def test_the_status_is_the_same_in_both_forms_whatever_the_answer_ends_with(answer: Answer, items: list[str]) -> None:
    deltas = [Delta(answer.content, answer.reasoning, calls=answer.calls), Delta(finish=answer.finish)]
    last = streamed(*deltas, Delta(usage=USAGE), tools=[TOOL])[-1]
    is_cut = answer.finish in ("length", "content_filter")
    streamed_whole = Response.model_validate_json(json.dumps(last["response"]), strict=True)
    for response in (plain(answer, tools=[TOOL]), streamed_whole):
        assert [item.type for item in response.output] == items
        statuses: list[Any] = [getattr(item, "status", None) for item in response.output]
        assert statuses == ["completed"] * (len(items) - 1) + ["incomplete" if is_cut else "completed"]
        assert response.status == ("incomplete" if is_cut else "completed")
        assert (response.incomplete_details is not None) is is_cut
        assert response.usage is not None
    assert last["type"] == f"response.{streamed_whole.status}"


def test_calls_are_items_with_the_id_that_their_output_names() -> None:
    response = plain(Answer("", "", "tool_calls", USAGE, [CallDelta(0, "call_1", "f", '{"a":1}')], None), tools=[TOOL])
    (item,) = response.output
    assert item.type == "function_call"
    assert (item.call_id, item.name, item.arguments) == ("call_1", "f", '{"a":1}')


def test_a_stream_has_openais_events_in_their_order() -> None:
    found = streamed(
        Delta(reasoning="hm"),
        Delta("Hel"),
        Delta("lo"),
        Delta(calls=[CallDelta(0, "call_1", "f"), CallDelta(0, arguments='{"a":1}')]),
        Delta(finish="tool_calls"),
        Delta(usage=USAGE),
        tools=[TOOL],
    )
    assert [event["type"].removeprefix("response.") for event in found] == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done", "content_part.done",
        "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    whole = Response.model_validate_json(json.dumps(found[-1]["response"]), strict=True)
    assert whole.output_text == "Hello"
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    done = [event["item"]["id"] for event in found if event["type"] == "response.output_item.done"]
    assert [item.id for item in whole.output] == done
    assert [event["output_index"] for event in found if "output_index" in event] == [0] * 6 + [1] * 7 + [2] * 4
    assert whole.usage is not None
    assert whole.usage.total_tokens == 10


def test_an_answer_without_output_has_an_empty_message() -> None:
    whole = streamed(Delta(finish="stop"))[-1]["response"]
    assert [item["type"] for item in whole["output"]] == ["message"]


def test_a_stream_that_fails_never_says_completed() -> None:
    stream = call(stream=True).form.stream("1", 10)
    found = events(stream.opening() + stream.render(Delta("Hel")) + stream.error(UpstreamError("stream_error")))
    assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
    assert found[-1]["response"]["status"] == "failed"
    assert found[-1]["response"]["error"]["code"] == "server_error"


def test_line_ends_of_unicode_are_escaped() -> None:
    stream = call(stream=True).form.stream("1", 10)
    body = stream.opening() + stream.render(Delta("a\u2028b\u0085")) + stream.end(clock)
    assert not {"\u2028", "\u2029", "\u0085"} & set(body.decode())


def test_integral_number_of_tokens_is_an_integer() -> None:
    assert parsed(max_output_tokens=16.0).token_limit == 16
    with pytest.raises(InvalidRequest):
        parsed(max_output_tokens=16.5)


def test_log_probabilities_have_bytes_even_if_the_engine_gives_none() -> None:
    chosen = [ChosenLogprob("a", -0.5, None, [TokenLogprob('"bytes":null', -1.0)]), ChosenLogprob("b", -1.0, [98])]
    wanted = [
        {"token": "a", "bytes": [], "logprob": -0.5,
         "top_logprobs": [{"token": '"bytes":null', "bytes": [], "logprob": -1.0}]},
        {"token": "b", "bytes": [98], "logprob": -1.0, "top_logprobs": []},
    ]  # fmt: skip
    answer = plain(Answer("ab", "", "stop", USAGE, [], chosen))
    message: Any = answer.output[0].to_dict()
    assert message["content"][0]["logprobs"] == wanted
    found = streamed(Delta("ab", logprobs=chosen), Delta(finish="stop"))
    shown = [event["logprobs"] for event in found if "logprobs" in event]
    assert shown == [wanted, wanted]


@pytest.mark.parametrize("levels", range(240, 256))
def test_schema_that_is_accepted_can_be_repeated_in_the_answer(levels: int) -> None:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    schema = {"type": "object", "properties": {"a": {"type": "array", "default": value}}}
    for fields in (
        {"tools": [TOOL | {"parameters": schema}]},
        {"text": {"format": {"type": "json_schema", "name": "f", "schema": schema}}},
    ):
        asked = call(**fields)
        with contextlib.suppress(InvalidRequest) if levels > 242 else contextlib.nullcontext():
            check(asked.chat)
            assert b"default" in asked.form.answer("1", 10, Answer("x", "", "stop", USAGE, [], None), clock)
            assert b"default" in asked.form.stream("1", 10).opening()
