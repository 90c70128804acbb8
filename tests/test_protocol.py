"""What is taken of a request, what is refused and in which words."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, InvalidImageUrl, InvalidJson, InvalidRequest, RequestTooLarge, UnsupportedParameter
from gateway.protocol import MAX_NESTING_MARKS, Chat, check_size, parse

MIB = 1024 * 1024
USER: list[dict[str, Any]] = [{"role": "user", "content": "Hello"}]
IMAGE = "data:image/png;base64,iVBORw0KGgo="


def request(**fields: Any) -> bytes:
    return json.dumps({"model": "standard", "messages": USER} | fields).encode()


def chat(**fields: Any) -> Chat:
    return parse(request(**fields))


def refused(body: bytes, max_text_body: int = MIB) -> GatewayError:
    def take() -> Chat:
        check_size(body, max_text_body)
        return parse(body)

    with pytest.raises(GatewayError) as caught:
        take()
    return caught.value


def outcome(body: bytes) -> GatewayError | None:
    """None for what is taken; whatever is no `GatewayError` is a failure of the test."""
    try:
        parse(body)
    except GatewayError as error:
        return error
    return None


# Taken


def test_smallest_request_is_taken() -> None:
    taken = chat()
    assert (taken.model, taken.messages[0].text, taken.stream, taken.has_images, taken.wants_usage) == ("standard", "Hello", None, False, False)


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant"])
def test_roles_are_taken(role: str) -> None:
    assert chat(messages=[{"role": role, "content": "x"}]).messages[0].role == role


def test_parts_of_a_turn_stay_in_one_turn() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": IMAGE, "detail": "high"}}, {"type": "text", "text": "b"}]
    taken = chat(messages=[{"role": "user", "content": parts}])
    assert len(taken.messages) == 1
    assert (taken.messages[0].text, taken.messages[0].images, taken.has_images) == ("a\nb", [IMAGE], True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("temperature", 2),
        ("top_p", 1.0),
        ("top_k", -1),
        ("min_p", 0.05),
        ("presence_penalty", -2),
        ("frequency_penalty", 2),
        ("repetition_penalty", 1.1),
        ("seed", -(2**63)),
        ("stop", "x"),
        ("stop", ["a", "b", "c", "d"]),
        ("max_tokens", 1),
        ("max_completion_tokens", 10_000_000),
        ("stream", True),
        ("n", 1),
        ("tools", []),
        ("tool_choice", "none"),
        ("response_format", {"type": "text"}),
        ("logprobs", False),
    ],
)
def test_field_is_taken(name: str, value: Any) -> None:
    assert getattr(chat(**{name: value}), name) == value


@pytest.mark.parametrize("name", [name for name in Chat.__struct_fields__ if name not in ("model", "messages")])
def test_null_is_as_good_as_absent(name: str) -> None:
    assert chat(**{name: None}) == chat()


@pytest.mark.parametrize(
    "name", ["user", "metadata", "store", "service_tier", "logit_bias", "keep_alive", "_debug_render_only", "prompt_logprobs", "x"]
)
def test_unknown_field_is_ignored(name: str) -> None:
    assert chat(**{name: {"a": [1]}}) == chat()


def test_newer_name_of_the_token_limit_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).token_limit == 7
    assert chat(max_tokens=5).token_limit == 5
    assert chat().token_limit is None


def test_one_stop_is_a_list_of_one() -> None:
    assert chat(stop="x").stops == ["x"]
    assert chat(stop=["x", "y"]).stops == ["x", "y"]
    assert chat().stops == []


@pytest.mark.parametrize(("options", "wants"), [(None, False), ({}, False), ({"include_usage": False}, False), ({"include_usage": True}, True)])
def test_usage_is_given_only_to_who_asks(options: Any, wants: bool) -> None:
    assert chat(stream=True, stream_options=options).wants_usage is wants


def test_tools_that_may_not_be_called_are_left_out() -> None:
    assert chat(tools=[{"type": "function"}], tool_choice="none").tools


# Refused


@pytest.mark.parametrize("body", [b"", b"{", b'{"model": ', b"\xff", request() + b"x", b'{"model":"\\ud800"}', b"\xef\xbb\xbf" + request(), b"NaN"])
def test_what_is_no_json_is_refused(body: bytes) -> None:
    error = refused(body)
    assert isinstance(error, InvalidJson)
    assert error.message == "The body is not valid JSON."


@pytest.mark.parametrize("body", [b"[]", b"1", b'"x"', b"null", b"true"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    assert isinstance(refused(body), InvalidJson)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"model":"m","tools":' + b'{"a":' * 100_000])
def test_deep_nesting_is_refused(body: bytes) -> None:
    assert isinstance(refused(body), InvalidJson)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": 5}, "model"),
        ({"model": ""}, "model"),
        ({"model": "x" * 257}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": USER * 2049}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [*USER, {"role": "user"}]}, "messages[1].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"text": "x"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages[0].content[0].image_url"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_completion_tokens": 10_000_001}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"n": 0}, "n"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ["a", 5]}, "stop[1]"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": 1}, "stream_options"),
    ],
)
def test_wrong_value_is_refused_by_its_path(fields: dict[str, Any], param: str) -> None:
    error = refused(request(**fields))
    assert type(error) is InvalidRequest
    assert error.param == param
    assert f"'{param}'" in error.message


@pytest.mark.parametrize("name", ["model", "messages"])
def test_missing_field_is_named(name: str) -> None:
    body = json.loads(request())
    del body[name]
    error = refused(json.dumps(body).encode())
    assert (error.code, error.param, error.message) == ("invalid_value", name, f"Missing required parameter: '{name}'.")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0]"),
        ({"messages": [*USER, {"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, "messages[0].content[0].type"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    error = refused(request(**fields))
    assert isinstance(error, UnsupportedParameter)
    assert error.param == param


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://10.0.0.1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "data:",
        "data:image/png,abc",
        "data:image/png;base64",
        "data:image/png;base64,",
        "iVBORw0KGgo=",
        "data:image/png" + ";a=b" * 40 + ";base64,AAAA",
    ],
)
def test_image_that_is_not_in_the_request_is_refused(url: str) -> None:
    """Nothing is ever fetched for a client."""
    parts = [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": url}}]
    error = refused(request(messages=[*USER, {"role": "user", "content": parts}]))
    assert isinstance(error, InvalidImageUrl)
    assert error.param == "messages[1].content[1].image_url.url"


@pytest.mark.parametrize("url", [IMAGE, "DATA:image/PNG;Base64,AAAA", "data:image/jpeg;charset=x;base64,AAAA"])
def test_image_in_the_request_is_taken_in_any_case(url: str) -> None:
    assert chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]).has_images


# Bounds


def test_long_body_without_an_image_is_refused() -> None:
    body = request(messages=[{"role": "user", "content": "x" * 1000}])
    error = refused(body, max_text_body=len(body) - 1)
    assert isinstance(error, RequestTooLarge)
    assert str(len(body) - 1) in error.message
    check_size(body, len(body))
    assert parse(body).messages[0].text


def test_long_body_with_an_image_is_taken() -> None:
    parts = [{"type": "image_url", "image_url": {"url": IMAGE + "A" * 2000}}]
    body = request(messages=[{"role": "user", "content": parts}])
    check_size(body, 1000)
    assert parse(body).has_images


def test_long_body_that_keeps_the_parser_busy_is_refused() -> None:
    body = request(tools=[[]] * (MAX_NESTING_MARKS + 1), metadata=IMAGE)
    assert isinstance(refused(body, max_text_body=1000), RequestTooLarge)


# Nothing of the client's text comes back

CANARY = "c4n4ry"
PLACES = (CANARY, f"x - at `$.{CANARY}", f"Expected `{CANARY}`", f"`{CANARY}` - at `$.messages[0].role`", f"Object missing required field `{CANARY}`")
strings = st.sampled_from((*PLACES, "", "user", "text", "image_url", "standard", f"data:image/png;base64,{CANARY}", f"http://{CANARY}/"))
keys = st.sampled_from((*Chat.__struct_fields__, "role", "content", "type", "text", "image_url", "url", "include_usage", *PLACES))
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | strings,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=12,
)
parts = st.fixed_dictionaries({"type": st.sampled_from(("text", "image_url")) | strings}, optional={"text": anything, "image_url": anything})
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "assistant", "tool")) | strings, "content": strings | st.lists(parts, max_size=2) | anything}
    ),
    max_size=2,
)
requests = st.fixed_dictionaries({"model": strings, "messages": messages | anything}, optional=dict.fromkeys(Chat.__struct_fields__[2:], anything))


@pytest.mark.parametrize("text", PLACES)
def test_text_that_looks_like_the_parsers_own_is_not_repeated(text: str) -> None:
    for message in ({"role": text, "content": "x"}, {"role": "user", "content": [{"type": text}]}):
        assert CANARY not in refused(request(messages=[message])).envelope().decode()


@given(requests | anything)
@settings(max_examples=150, suppress_health_check=list(HealthCheck), deadline=None)
def test_no_refusal_repeats_what_was_sent(body: Any) -> None:
    error = outcome(json.dumps(body).encode())
    assert error is None or (error.status == 400 and CANARY not in error.envelope().decode())


@given(st.binary(max_size=60) | st.text(st.sampled_from('{}[]":,\\ue0123model'), max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    error = outcome(body)
    assert error is None or error.status == 400
