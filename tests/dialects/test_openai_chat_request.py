"""Tests of parsing chat requests: what is accepted, what is rejected, and the messages."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.chat.request import Chat
from gateway.dialects.openai_chat import OpenAiChat
from gateway.dialects.openai_chat_request import parse
from gateway.errors import GatewayError, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter
from tests.fakes.chats import MIB, USER, called, chat, named, request, schema_format, tool

IMAGE = "data:image/png;base64,iVBORw0KGgo="
# A body of this size and more is only accepted because of its image.
WITH_IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": IMAGE + "A" * 2000}}]}


def rejected(body: bytes, max_text_body: int = MIB) -> GatewayError:
    with pytest.raises(GatewayError) as caught:
        parse(body, max_text_body)
    return caught.value


def outcome(body: bytes) -> GatewayError | None:
    """Return the error, or None for an accepted body. Any other exception fails the test."""
    try:
        parse(body, MIB)
    except GatewayError as error:
        return error
    return None


# Accepted


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_role_is_accepted(role: str) -> None:
    assert chat(messages=[{"role": role, "content": "x"}]).messages[0].role == role


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 0),
        ("top_p", 1.0),
        ("top_k", -1),
        ("min_p", 0.05),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1.1),
        ("seed", -(2**63)),
        ("seed", 2**63 - 1),
        ("stop", "x"),
        ("stop", ["a", "b", "c", "d"]),
        ("max_tokens", 1),
        ("max_completion_tokens", 10_000_000),
        ("stream", True),
        ("n", 1),
        ("tools", []),
        ("tool_choice", "none"),
        ("logprobs", False),
        ("logprobs", True),
        ("top_logprobs", 0),
        ("parallel_tool_calls", False),
        ("reasoning_effort", "minimal"),
        ("think", False),
        ("think", "high"),
        ("logit_bias", {"50256": -100}),
        ("modalities", ["text"]),
        ("functions", []),
    ],
)
def test_field_is_accepted(name: str, value: Any) -> None:
    assert getattr(chat(**{name: value}), name) == value


@pytest.mark.parametrize(
    "name",
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "keep_alive",
        "format",
        "options",
        "_debug_render_only",
        "prompt_logprobs",
        "priority",
        "x",
    ],
)
def test_unknown_field_is_ignored(name: str) -> None:
    assert chat(**{name: {"a": [1]}}) == chat()


@pytest.mark.parametrize("where", ["message", "part", "tool", "function", "call"])
def test_unknown_nested_field_is_ignored(where: str) -> None:
    extra = {"x-extra": {"a": [1]}}
    extra_by_place: dict[str, dict[str, Any]] = {
        name: extra if name == where else {} for name in ("message", "part", "tool", "function", "call")
    }
    parsed = chat(
        messages=[
            {
                "role": "user",
                "content": [{"type": "text", "text": "x", **extra_by_place["part"]}],
                **extra_by_place["message"],
            },
            {"role": "assistant", "content": None, "tool_calls": [called() | extra_by_place["call"]]},
        ],
        tools=[tool(**extra_by_place["function"]) | extra_by_place["tool"]],
    )
    assert parsed.messages[0].text == "x"
    assert parsed.offered[0].function.name == "get_weather"


@pytest.mark.parametrize(
    "wanted", [{"type": "text"}, {"type": "json_object"}, schema_format(), schema_format(strict=True, description="d")]
)
def test_response_format_is_accepted(wanted: dict[str, Any]) -> None:
    assert chat(response_format=wanted).response_format is not None


@pytest.mark.parametrize("choice", [None, "none", "auto", "required", named()])
def test_tool_choice_is_accepted(choice: Any) -> None:
    assert chat(tools=[tool()], tool_choice=choice).tools


def test_function_without_parameters_is_accepted() -> None:
    assert chat(tools=[{"type": "function", "function": {"name": "f"}}]).offered[0].function.parameters is None


@pytest.mark.parametrize("arguments", ["", "{}", '{"a": [1, null, "\\u0000"]}'])
def test_tool_call_and_its_result_are_accepted(arguments: str) -> None:
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [called(arguments=arguments)]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "12 C"}]},
    ]
    parsed = chat(messages=[*USER, *messages])
    assert parsed.messages[1].tool_calls is not None
    assert (parsed.messages[1].tool_calls[0].function.arguments, parsed.messages[2].text) == (arguments, "12 C")


def test_last_of_duplicate_fields_wins() -> None:
    body = b'{"model":"first","model":"standard","messages":[{"role":"user","content":"a"}],"seed":1,"seed":2}'
    parsed = parse(body, MIB)
    assert (parsed.model, parsed.seed) == ("standard", 2)


# Rejected


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": ',
        b"\xff",
        request() + b"x",
        b'{"model":"\\ud800"}',
        b"\xef\xbb\xbf" + request(),
        b"NaN",
        request().decode().encode("utf-16"),
    ],
)
def test_body_that_is_not_json_is_rejected(body: bytes) -> None:
    error = rejected(body)
    assert isinstance(error, InvalidJson)
    assert error.message == "The body is not valid JSON."


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_body_that_is_not_an_object_is_rejected(body: bytes) -> None:
    assert isinstance(rejected(body), InvalidJson)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"model":"m","x":' + b'{"a":' * 100_000,
        request()[:-1] + b',"x":' + b"[" * 1100 + b"]" * 1100 + b"}",
    ],
)
def test_deep_nesting_is_rejected(body: bytes) -> None:
    assert isinstance(rejected(body), InvalidJson)


BAD_JSON = [b"NaN", b"Infinity", b"1e999", b"9" * 5000, b'"\\ud800"', b'"\xff"', b"[1,]", b"'x'", b"01"]


@pytest.mark.parametrize("value", BAD_JSON)
def test_invalid_json_in_an_ignored_field_is_rejected(value: bytes) -> None:
    assert isinstance(rejected(request()[:-1] + b',"x":%b}' % value), InvalidJson)


@pytest.mark.parametrize("value", BAD_JSON)
def test_invalid_json_after_a_large_image_is_rejected(value: bytes) -> None:
    body = request(messages=[WITH_IMAGE])[:-1] + b',"x":%b}' % value
    assert isinstance(rejected(body, max_text_body=len(body) - 1500), InvalidJson)


LONG = {"role": "user", "content": "x" * 3000}
"""A body with it is decoded in one pass, if it has nothing but known fields."""
PLACES = [
    b',"x":%b}',
    b',"user":%b}',
    b',"metadata":{"a":%b}}',
    b',"stop":%b}',
    b',"stream_options":{"include_usage":true,"x":%b}}',
    b',"chat_template_kwargs":{"thinking":true,"x":%b}}',
    b',"tools":[{"type":"function","function":{"name":"f"},"x":%b}]}',
    b',"messages":[{"role":"user","content":"a","x":%b}]}',
    b',"messages":[{"role":"user","content":[{"type":"text","text":"a","x":%b}]}]}',
    b',"messages":[{"role":"assistant","tool_calls":[{"id":"1","function":{"name":"f","arguments":""},"x":%b}]}]}',
]


@pytest.mark.parametrize("value", BAD_JSON)
@pytest.mark.parametrize("place", PLACES)
def test_invalid_json_anywhere_in_a_long_body_is_rejected(place: bytes, value: bytes) -> None:
    with pytest.raises(InvalidJson):
        OpenAiChat().parse(request(messages=[LONG])[:-1] + place % value, MIB)


@pytest.mark.parametrize("value", [b"1", b'"a"', b"null", b'{"y":[2.5]}', b"true", b"1e3", b'"\\u00e9"'])
@pytest.mark.parametrize("place", PLACES)
def test_long_body_is_read_like_a_short_one(place: bytes, value: bytes) -> None:
    found: list[bytes | str] = []
    for size in (1, 3000):
        body = request(messages=[{"role": "user", "content": "x" * size}])[:-1] + place % value
        try:
            call, _ = OpenAiChat().parse(body, MIB)
        except GatewayError as error:
            found.append(str(error))
        else:
            read = {name: getattr(call.chat, name) for name in Chat.__struct_fields__}
            found.append(msgspec.json.encode((read, call.chat.is_plain, call.chat.has_plain_messages)))
    short, long = found
    assert short == (long if isinstance(long, str) else long.replace(b"x" * 3000, b"x"))


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": USER * 2049}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": 5}]}]},
            "messages[0].content[0].image_url",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls[0].function"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_p": -0.1}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 2}, "min_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -2.5}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_completion_tokens": 10_000_001}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stop": ""}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"include_usage": "yes"}}, "stream_options.include_usage"),
        ({"logprobs": 5}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"1": 101}}, "logit_bias[...]"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"reasoning_effort": "hard"}, "reasoning_effort"),
        ({"think": "hard"}, "think"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"tools": {}}, "tools"),
        ({"tools": [tool()] * 129}, "tools"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [tool("")]}, "tools[0].function.name"),
        ({"tools": [tool("a b")]}, "tools[0].function.name"),
        ({"tools": [tool("x" * 65)]}, "tools[0].function.name"),
        ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
    ],
)
def test_invalid_value_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = rejected(request(**fields))
    assert type(error) is InvalidRequest
    assert error.param == param
    assert f"'{param}'" in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [tool()], "tool_choice": {"type": "custom"}}, "tool_choice.type"),
        (
            {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {}}]}]}, "messages[0].content[0].type"),
    ],
)
def test_unsupported_feature_is_named_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = rejected(request(**fields))
    assert isinstance(error, UnsupportedParameter)
    assert error.param == param
    assert f"'{param}'" in error.message


def test_parse_runs_the_checks() -> None:
    assert rejected(request(top_logprobs=2)).param == "top_logprobs"


# Limits


def test_long_body_without_an_image_is_rejected() -> None:
    body = request(messages=[{"role": "user", "content": "x" * 1000}])
    error = rejected(body, max_text_body=len(body) - 1)
    assert isinstance(error, RequestTooLarge)
    assert str(len(body) - 1) in error.message
    assert parse(body, len(body)).messages[0].text


def test_long_body_with_an_image_is_accepted() -> None:
    assert parse(request(messages=[WITH_IMAGE]), 1000).has_images


def test_image_does_not_make_room_for_text() -> None:
    for fields in (
        {"tools": [[]] * 1000},
        {"metadata": {"a": "x" * 2000}},
        {"messages": [WITH_IMAGE, {"role": "user", "content": "x" * 2000}]},
    ):
        assert isinstance(
            rejected(request(**({"messages": [WITH_IMAGE]} | fields)), max_text_body=1500), RequestTooLarge
        )


def test_text_that_looks_like_an_image_counts_as_text() -> None:
    body = request(messages=[{"role": "user", "content": "data:image/png;base64," + "x" * 5000}])
    assert isinstance(rejected(body, max_text_body=1000), RequestTooLarge)


# Messages that do not repeat the client's text

CANARY = "c4n4ry"
PLACES = (
    CANARY,
    f"x - at `$.{CANARY}",
    f"Expected `{CANARY}`",
    f"`{CANARY}` - at `$.messages[0].role`",
    f"Object missing required field `{CANARY}`",
)
strings = st.sampled_from(
    (*PLACES, "", "user", "text", "image_url", "standard", f"data:image/png;base64,{CANARY}", f"http://{CANARY}/")
)
keys = st.sampled_from(
    (
        *Chat.__struct_fields__,
        "role",
        "content",
        "type",
        "text",
        "image_url",
        "url",
        "include_usage",
        "function",
        "name",
        *PLACES,
    )
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
parts = st.fixed_dictionaries(
    {"type": st.sampled_from(("text", "image_url")) | strings}, optional={"text": anything, "image_url": anything}
)
messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(("user", "assistant", "tool")) | strings,
            "content": strings | st.lists(parts, max_size=2) | anything,
        },
        optional={"tool_calls": anything, "tool_call_id": anything},
    ),
    max_size=2,
)
schemas = st.dictionaries(
    st.sampled_from(("type", "properties", "$ref", "enum", "items", "anyOf", *PLACES)), anything, max_size=4
)
functions = st.fixed_dictionaries({"name": strings | st.just("f")}, optional={"parameters": schemas | anything})
tools = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": functions}), max_size=2)
formats = st.fixed_dictionaries(
    {"type": st.just("json_schema"), "json_schema": st.fixed_dictionaries({"name": strings, "schema": schemas})}
)
requests = st.fixed_dictionaries(
    {"model": strings, "messages": messages | anything},
    optional=dict.fromkeys(Chat.__struct_fields__[2:], anything)
    | {"tools": tools | anything, "response_format": formats | anything},
)


@pytest.mark.parametrize("text", PLACES)
def test_text_that_looks_like_the_parsers_own_is_not_repeated(text: str) -> None:
    for message in ({"role": text, "content": "x"}, {"role": "user", "content": [{"type": text}]}):
        assert CANARY not in rejected(request(messages=[message])).envelope().decode()
    for fields in (
        {"tools": [tool(f"{text} ")]},
        {"tool_choice": named(text)},
        {"reasoning_effort": text},
        {"response_format": {"type": text}},
    ):
        assert CANARY not in rejected(request(**fields)).envelope().decode()


@given(requests | anything)
@settings(max_examples=120, suppress_health_check=list(HealthCheck), deadline=None)
def test_no_error_repeats_the_request(body: Any) -> None:
    error = outcome(json.dumps(body).encode())
    assert error is None or (error.status == 400 and CANARY not in error.envelope().decode())


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]":,\\ue0123model'), max_size=60).map(str.encode))
def test_any_bytes_are_parsed_or_rejected(body: bytes) -> None:
    error = outcome(body)
    assert error is None or error.status == 400


@pytest.mark.parametrize(
    "name", ["max_tokens", "max_completion_tokens", "top_k", "seed", "n", "top_logprobs", "temperature"]
)
@pytest.mark.parametrize(("number", "value"), [("1.0", 1), ("10e-1", 1), ("1E0", 1)])
def test_integral_number_is_an_integer(name: str, number: str, value: int) -> None:
    body = request(logprobs=True)[:-1] + f',"{name}":{number}}}'.encode()
    assert getattr(parse(body, MIB), name) == value


@pytest.mark.parametrize("number", ["1.5", "-0.5", "1e30"])
def test_other_fraction_is_still_refused(number: str) -> None:
    assert rejected(request()[:-1] + f',"max_tokens":{number}}}'.encode()).param == "max_tokens"


def test_image_url_may_be_a_bare_string() -> None:
    url = "data:image/png;base64,AAAA"
    parts = [{"type": "image_url", "image_url": found} for found in (url, {"url": url})]
    chat = parse(request(messages=[{"role": "user", "content": parts}]), MIB)
    assert chat.messages[0].images == [url, url]
    assert msgspec.json.encode(chat.messages[0].content) == msgspec.json.encode([parts[1], parts[1]])
