"""Anthropic's Messages API: requests become chats, answers have its blocks and events.

Covers: gateway/dialects/anthropic_request.py
Covers: gateway/dialects/anthropic_messages.py
"""

import json
from typing import Any

import pytest

from gateway.chat.answer import Answer, CallDelta, Delta, FinishReason, Timings, Usage
from gateway.chat.images import urls_of
from gateway.chat.request import Chat, SchemaFormat
from gateway.chat.tools import Choice
from gateway.dialects.anthropic_messages import AnthropicCountTokens, AnthropicErrors, AnthropicMessages, MessageForm
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    InvalidApiKey,
    InvalidJson,
    InvalidRequest,
    ModelNotFound,
    QueueFull,
    RequestTooLarge,
    UnsupportedParameter,
    UpstreamError,
    UpstreamTimeout,
)

LIMIT = 1 << 20
USER = {"role": "user", "content": "Hi"}
USAGE = Usage(7, 3)
PIXELS = "iVBORw0KGgo" + "A" * 4000
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PIXELS}}
TOOL = {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}


def clock() -> Timings:
    return Timings(0, 0, 0, 0)


def parsed(**fields: Any) -> Chat:
    body = json.dumps({"model": "standard", "max_tokens": 5, "messages": [USER]} | fields).encode()
    return AnthropicMessages().parse(body, LIMIT)[0].chat


def events(body: bytes) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for event in body.decode().split("\n\n")[:-1]:
        name, data = event.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in found)
    return found


def streamed(*deltas: Delta) -> list[tuple[str, dict[str, Any]]]:
    stream = MessageForm("standard", True).stream("1", 0)
    return events(b"".join([stream.opening(), *map(stream.render, deltas), stream.end(clock)]))


def plain(answer: Answer) -> Any:
    return json.loads(MessageForm("standard", False).answer("1", 0, answer, clock))


# Requests


def test_system_comes_first_as_text_or_as_blocks() -> None:
    for system in ("a\nb", [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "cache_control": {}}]):
        messages = parsed(system=system).messages
        assert [(message.role, message.text) for message in messages] == [("system", "a\nb"), ("user", "Hi")]


def test_the_line_for_anthropics_accounting_is_left_out() -> None:
    """It differs with each request of Claude Code, so that no engine could reuse the prompt before."""
    line = "x-anthropic-billing-header: cc_version=2.1.197.ac8; cc_entrypoint=cli; cch=74943;"
    for system in (f"{line}\nBe brief.", [{"type": "text", "text": line}, {"type": "text", "text": "Be brief."}]):
        assert [message.text for message in parsed(system=system).messages] == ["Be brief.", "Hi"]
    assert [message.text for message in parsed(system=[{"type": "text", "text": line}]).messages] == ["Hi"]
    quoted = {"role": "user", "content": line}
    assert parsed(system="See " + line, messages=[quoted]).messages[1].text == line


def test_a_system_message_may_be_in_the_conversation() -> None:
    """Claude Code 2.1 sends its list of subagents so."""
    messages = parsed(messages=[USER, {"role": "system", "content": "Agents: none."}]).messages
    assert [(message.role, message.text) for message in messages] == [("user", "Hi"), ("system", "Agents: none.")]


def test_empty_texts_are_left_out() -> None:
    empty = {"type": "text", "text": ""}
    turn = {
        "role": "assistant",
        "content": [empty, {"type": "text", "text": "a"}, empty, {"type": "text", "text": "b"}],
    }
    result = {"type": "tool_result", "tool_use_id": "1", "content": [empty, {"type": "text", "text": "r"}]}
    messages = parsed(messages=[USER, turn, {"role": "user", "content": [result, empty]}]).messages
    assert [(message.role, message.text) for message in messages] == [
        ("user", "Hi"), ("assistant", "a\nb"), ("tool", "r"),
    ]  # fmt: skip


def test_a_result_of_an_image_alone_is_an_image_of_the_user() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}
    messages = parsed(messages=[USER, {"role": "user", "content": [result]}]).messages
    assert [(message.role, message.text, len(message.images)) for message in messages[1:]] == [
        ("tool", "", 0), ("user", "", 1),
    ]  # fmt: skip


def test_search_results_are_text() -> None:
    found = {"type": "search_result", "source": "s", "title": "t", "content": [{"type": "text", "text": "c"}]}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [found]}
    messages = parsed(messages=[{"role": "user", "content": [found]}, {"role": "user", "content": [result]}]).messages
    assert [message.text for message in messages] == ["t\ns\nc", "t\ns\nc"]


@pytest.mark.parametrize(
    ("last", "continues"),
    [
        ({"role": "assistant", "content": "The answer is"}, True),
        ({"role": "assistant", "content": [{"type": "text", "text": "{"}]}, True),
        ({"role": "assistant", "content": ""}, None),
        ({"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]}, None),
        (USER, None),
    ],
)
def test_the_answer_continues_what_was_begun_for_it(last: Any, continues: bool | None) -> None:
    assert parsed(messages=[USER, last]).continue_final_message is continues


def test_fields_that_change_nothing_are_ignored() -> None:
    cached = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
    content = [{"type": "text", "text": "Hi", "citations": None, **cached}, IMAGE | cached]
    chat = parsed(
        messages=[{"role": "user", "content": content}], tools=[TOOL | cached | {"eager_input_streaming": True}],
        metadata={"user_id": "x"}, thinking={"type": "enabled", "budget_tokens": 99_999, "display": "omitted"},
        context_management={"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}, service_tier="auto",
        betas=["x"], container=None, mcp_servers=[], inference_geo=None,
    )  # fmt: skip
    assert (chat.messages[0].text, chat.effort, chat.token_limit) == ("Hi", True, 5)


def test_results_of_tools_precede_the_text_of_the_user_and_their_images_follow() -> None:
    content = [
        {"type": "text", "text": "Look."},
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": [{"type": "text", "text": "seen"}, IMAGE]},
        {"type": "tool_result", "tool_use_id": "toolu_2", "content": "bad", "is_error": True},
        {"type": "tool_result", "tool_use_id": "toolu_3"},
    ]
    messages = parsed(messages=[USER, {"role": "user", "content": content}]).messages[1:]
    assert [(message.role, message.tool_call_id) for message in messages] == [
        ("tool", "toolu_1"), ("tool", "toolu_2"), ("tool", "toolu_3"), ("user", None),
    ]  # fmt: skip
    assert [message.text for message in messages] == ["seen", "Error: bad", "", "Look."]
    assert messages[3].images == [f"data:image/png;base64,{PIXELS}"]


def test_a_turn_of_the_model_keeps_its_thoughts_text_and_calls() -> None:
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "any"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I call."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
    ]
    (_, message) = parsed(messages=[USER, {"role": "assistant", "content": content}]).messages
    assert (message.content, message.reasoning_text) == ("I call.", "hm")
    (call,) = message.tool_calls or []
    assert (call.id, call.function.name, json.loads(call.function.arguments)) == ("toolu_1", "f", {"a": 1})


@pytest.mark.parametrize(
    ("choice", "expected"),
    [({"type": "auto"}, None), ({"type": "any"}, "required"), ({"type": "none"}, "none"), (None, None)],
)
def test_tool_choice_becomes_openais(choice: Any, expected: Any) -> None:
    assert parsed(tools=[TOOL], tool_choice=choice).tool_choice == expected


def test_a_named_tool_is_forced_and_parallel_calls_can_be_turned_off() -> None:
    chat = parsed(tools=[TOOL], tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True})
    assert isinstance(chat.tool_choice, Choice)
    assert (chat.tool_choice.function.name, chat.parallel_tool_calls) == ("f", False)
    assert chat.offered[0].function.parameters == TOOL["input_schema"]


@pytest.mark.parametrize(
    ("thinking", "config", "effort"),
    [
        (None, None, "none"),
        ({"type": "disabled"}, None, "none"),
        ({"type": "enabled", "budget_tokens": 1024}, None, True),
        ({"type": "adaptive"}, {"effort": "low"}, "low"),
        (None, {"effort": "high"}, "none"),
    ],
)
def test_a_model_thinks_only_if_asked(thinking: Any, config: Any, effort: Any) -> None:
    assert parsed(thinking=thinking, output_config=config).effort == effort


def test_an_output_format_is_a_schema() -> None:
    schema = {"type": "object", "properties": {}}
    for fields in (
        {"output_format": {"type": "json_schema", "schema": schema}},
        {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
    ):
        wanted = parsed(**fields).response_format
        assert isinstance(wanted, SchemaFormat)
        assert wanted.json_schema.schema == schema


def test_the_images_are_named_by_their_paths_in_the_request() -> None:
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "a"}, IMAGE]}
    messages = [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE, result]}]
    body = json.dumps({"model": "m", "max_tokens": 1, "system": "s", "messages": messages}).encode()
    for dialect in (AnthropicMessages(), AnthropicCountTokens()):
        asked = dialect.parse(body, LIMIT)[0]
        assert list(asked.image_paths) == [
            "messages[1].content[1].source", "messages[1].content[2].content[1].source",
        ]  # fmt: skip
        assert len(urls_of(asked.chat)) == 2


def test_the_model_is_told_the_title_and_the_context_of_a_document() -> None:
    source = {"type": "text", "media_type": "text/plain", "data": "the text"}
    for fields, text in (
        ({}, "the text"),
        ({"title": "A", "context": "from the wiki", "citations": {"enabled": True}}, "A\nfrom the wiki\nthe text"),
        ({"context": "from the wiki"}, "from the wiki\nthe text"),
    ):
        document = {"type": "document", "source": source, **fields}
        assert parsed(messages=[{"role": "user", "content": [document]}]).messages[0].text == text


def test_null_counts_as_the_empty_text_of_the_model() -> None:
    messages = parsed(messages=[USER, {"role": "assistant", "content": None}, USER]).messages
    assert [(message.role, message.text) for message in messages][1] == ("assistant", "")
    with pytest.raises(InvalidRequest, match=r"'messages\[0\].content'"):
        parsed(messages=[{"role": "user", "content": None}])


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("tools[3].function.name", "tools[3].name"),
        ("tools[0].function.parameters", "tools[0].input_schema"),
        ("response_format.json_schema.schema", "output_config.format.schema"),
        ("messages[0].content", "messages[0].content"),
    ],
)
def test_an_error_names_the_fields_of_this_api(field: str, name: str) -> None:
    error = json.loads(AnthropicMessages.errors.error_body(InvalidRequest(f"'{field}' is wrong.", param=field)))
    assert error["error"]["message"] == f"'{name}' is wrong."


@pytest.mark.parametrize("field", ["thinking", "tool_choice"])
def test_an_unknown_type_is_named_without_advice_about_content(field: str) -> None:
    with pytest.raises(UnsupportedParameter) as error:
        parsed(**{field: {"type": "x"}})
    assert error.value.message == f"The type of '{field}' is not supported."


def test_images_do_not_count_as_text() -> None:
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [{"role": "user", "content": [IMAGE]}]}).encode()
    assert AnthropicMessages().parse(body, 1000)[1] < 300
    with pytest.raises(RequestTooLarge):
        AnthropicMessages().parse(body.replace(b"base64", b"url"), 1000)


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"max_tokens": None}, InvalidRequest, "max_tokens"),
        ({"max_tokens": 0}, InvalidRequest, "max_tokens"),
        ({"messages": []}, InvalidRequest, "messages"),
        ({"mcp_servers": [{"type": "url", "url": "x", "name": "x"}]}, UnsupportedParameter, "mcp_servers"),
        ({"stop_sequences": [""]}, InvalidRequest, "stop_sequences[0]"),
        ({"stop_sequences": ["x" * 1025]}, InvalidRequest, "stop_sequences[0]"),
        ({"messages": [{"role": "robot", "content": ""}]}, InvalidRequest, "messages[0].role"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, UnsupportedParameter, "tools[0].type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "url", "url": "x"}}]}]},
            UnsupportedParameter,
            "messages[0].content[0].source.type",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "1", "name": "f"}]}]},
            InvalidRequest,
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "assistant", "content": [IMAGE]}]}, InvalidRequest, "messages[0].content[0]"),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f"}] * 129}]},
            InvalidRequest,
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "container_upload", "file_id": "x"}]}]},
            UnsupportedParameter,
            "messages[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "source": {"type": "file", "file_id": "x"}}]}
                ]
            },
            UnsupportedParameter,
            "messages[0].content[0].source.type",
        ),
    ],
)
def test_what_no_engine_serves_is_refused_by_name(fields: Any, kind: type[GatewayError], param: str) -> None:
    with pytest.raises(kind) as error:
        parsed(**fields)
    assert getattr(error.value, "param", None) == param
    assert "image_url" not in error.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 50_000])
def test_bodies_that_are_not_json_objects_are_refused(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        AnthropicMessages().parse(body, LIMIT)


# Answers


def test_a_stream_opens_and_closes_each_block_in_anthropics_order() -> None:
    found = streamed(
        Delta(reasoning="hm"),
        Delta("Hel"),
        Delta("lo"),
        Delta(calls=[CallDelta(0, "call_1", "f"), CallDelta(0, arguments='{"a"')]),
        Delta(calls=[CallDelta(0, arguments=":1}"), CallDelta(1, "call_2", "g")]),
        Delta(finish="tool_calls"),
        Delta(usage=USAGE),
    )
    shapes = [
        (name, data.get("index"), (data.get("delta") or data.get("content_block") or {}).get("type"))
        for name, data in found
    ]
    assert shapes == [
        ("message_start", None, None),
        ("ping", None, None),
        ("content_block_start", 0, "thinking"),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_delta", 0, "signature_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, "text"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, "tool_use"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("content_block_start", 3, "tool_use"),
        ("content_block_stop", 3, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    assert found[10][1]["content_block"] == {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {}}
    assert found[-2][1]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert found[-2][1]["usage"]["output_tokens"] == 3
    assert found[-2][1]["usage"]["input_tokens"] == 7
    message = found[0][1]["message"]
    assert (message["id"], message["model"], message["content"]) == ("msg_1", "standard", [])


def test_an_answer_without_output_has_an_empty_text_block() -> None:
    names = [name for name, _ in streamed(Delta(finish="stop"))]
    assert names[2:4] == ["content_block_start", "content_block_stop"]
    assert plain(Answer("", "", "stop", USAGE, [], None))["content"] == [{"type": "text", "text": ""}]


@pytest.mark.parametrize(
    ("finish", "reason"), [("stop", "end_turn"), ("length", "max_tokens"), ("content_filter", "refusal")]
)
def test_the_stop_reason_is_anthropics(finish: FinishReason, reason: str) -> None:
    assert plain(Answer("x", "", finish, USAGE, [], None))["stop_reason"] == reason
    assert streamed(Delta("x"), Delta(finish=finish))[-2][1]["delta"]["stop_reason"] == reason


def test_the_stop_sequence_is_named_in_both_forms() -> None:
    answer = plain(Answer("x", "", "stop", USAGE, [], None, "\u2028END"))
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "\u2028END")
    last = streamed(Delta("x"), Delta(finish="stop", stop_sequence="END"), Delta(usage=USAGE))[-2][1]
    assert last["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": "END"}
    assert last["usage"]["output_tokens"] == 3


def test_the_relay_looks_for_stop_sequences_only_if_there_are_any() -> None:
    for stops, expected in ((["a"], True), ([], False), (None, False)):
        body = json.dumps({"model": "m", "max_tokens": 1, "messages": [USER], "stop_sequences": stops}).encode()
        assert AnthropicMessages().parse(body, LIMIT)[0].names_stop is expected


def test_a_forced_call_stops_for_the_tool_too() -> None:
    """OpenAI's finish reason is `stop` where the client named the function; Anthropic's is `tool_use`."""
    calls = [CallDelta(0, "call_1", "f", '{"a":1}')]
    answer = plain(Answer("", "", "stop", USAGE, calls, None))
    assert answer["stop_reason"] == "tool_use"
    assert answer["content"] == [{"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}}]


def test_a_stream_that_fails_ends_with_an_error_event() -> None:
    stream = MessageForm("standard", True).stream("1", 0)
    ((name, data),) = events(stream.error(UpstreamError("stream_error")))
    assert (name, data["error"]["type"]) == ("error", "api_error")


def test_a_keepalive_is_a_ping() -> None:
    assert events(MessageForm("m", True).stream("1", 0).keepalive()) == [("ping", {"type": "ping"})]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (InvalidRequest("x"), "invalid_request_error"),
        (InvalidApiKey(), "authentication_error"),
        (ModelNotFound("x"), "not_found_error"),
        (RequestTooLarge("x"), "request_too_large"),
        (QueueFull("x", retry_after=1), "overloaded_error"),
        (UpstreamTimeout("x"), "timeout_error"),
        (UpstreamError("x"), "api_error"),
    ],
)
def test_errors_have_anthropics_types(error: GatewayError, kind: str) -> None:
    body = json.loads(AnthropicErrors().error_body(error))
    assert body == {"type": "error", "error": {"type": kind, "message": error.message}}


def test_a_prompt_that_is_too_long_has_the_words_that_agents_look_for() -> None:
    body = json.loads(AnthropicErrors().error_body(ContextLengthExceeded(4096)))
    assert body["error"]["message"].startswith("prompt is too long: ")


def test_tokens_are_counted_without_max_tokens_and_by_one_token_of_output() -> None:
    body = json.dumps({"model": "m", "messages": [USER], "tools": [TOOL], "tool_choice": {"type": "any"}}).encode()
    call, _ = AnthropicCountTokens().parse(body, LIMIT)
    assert (call.chat.token_limit, call.chat.stream, call.chat.forced, len(call.chat.offered)) == (1, False, [], 1)
    assert json.loads(call.form.answer("1", 0, Answer("x", "", "length", USAGE, [], None), clock)) == {
        "input_tokens": 7
    }


def test_integral_number_of_tokens_is_an_integer() -> None:
    assert parsed(max_tokens=16.0, top_k=2.0).token_limit == 16
    with pytest.raises(InvalidRequest):
        parsed(max_tokens=16.5)
