"""Requests of Ollama's own API become canonical chats."""

import base64
import json
import re
from typing import Any

import pytest

from gateway.chat.message import ImagePart, ImageUrl, TextPart
from gateway.chat.request import JsonFormat, SchemaFormat
from gateway.chat.tool_names import with_engine_names
from gateway.dialects.json_body import completed
from gateway.dialects.ollama_request import ParsedRequest, parse_chat, parse_generate
from gateway.errors import (
    GatewayError,
    InvalidImage,
    InvalidJson,
    InvalidRequest,
    RequestTooLarge,
    UnsupportedParameter,
)

USER = {"role": "user", "content": "Hi"}
LIMIT = 1 << 20
PIXELS = base64.b64encode(b"\x89PNG" + bytes(3000)).decode()


def chat(**fields: Any) -> ParsedRequest:
    body = json.dumps({"model": "standard", "messages": [USER]} | fields).encode()
    return completed(parse_chat(body, LIMIT))


def generate(**fields: Any) -> ParsedRequest:
    return completed(parse_generate(json.dumps({"model": "standard", "prompt": "Hi"} | fields).encode(), LIMIT))


def test_a_request_streams_unless_it_says_otherwise() -> None:
    assert chat().chat.stream is True
    assert chat(stream=None).chat.stream is True
    assert chat(stream=False).chat.stream is False


def test_options_become_sampling_parameters() -> None:
    options = {
        "num_predict": 7, "temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "seed": 3,
        "repeat_penalty": 1.2, "presence_penalty": 0.1, "frequency_penalty": -0.1, "stop": ["a", "b"],
        "num_ctx": 4096, "mirostat": 1,
    }  # fmt: skip
    parsed = chat(options=options).chat
    assert (parsed.token_limit, parsed.temperature, parsed.top_k, parsed.top_p, parsed.min_p) == (7, 0.5, 20, 0.9, 0.05)
    assert (parsed.seed, parsed.repetition_penalty, parsed.stops) == (3, 1.2, ["a", "b"])
    assert (parsed.presence_penalty, parsed.frequency_penalty) == (0.1, -0.1)


def test_a_negative_temperature_is_zero_as_at_ollama() -> None:
    assert chat(options={"temperature": -1}).chat.temperature == 0


def test_a_tool_needs_no_type() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}
    typed = chat(tools=[{"type": "function", "function": function}]).chat.tools
    assert typed is not None
    for kind in ("", None, "Function", 0):
        assert chat(tools=[{"type": kind, "function": function}]).chat.tools == typed
    assert chat(tools=[{"function": function}]).chat.tools == typed


@pytest.mark.parametrize("name", ["server:tool", "mcp/list files", "a\nb", "x" * 128])
def test_a_tool_may_have_any_name_that_ollama_takes(name: str) -> None:
    """The engines get another one: see `chat/tool_names.py`."""
    asked = chat(tools=[{"function": {"name": name, "strict": True}}]).chat
    assert [(tool.function.name, tool.function.strict) for tool in asked.tools or ()] == [(name, True)]
    sent = (with_engine_names(asked).tools or [])[0]
    assert re.fullmatch(r"[a-zA-Z0-9_.-]{1,64}", sent.function.name)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({}, "Missing required parameter: 'tools[1].function.name'."),
        ({"name": ""}, "Invalid value for 'tools[1].function.name'. Expected a string of length >= 1."),
        ({"name": "x" * 129}, "Invalid value for 'tools[1].function.name'. Expected a string of length <= 128."),
    ],
)
def test_the_message_about_a_tool_has_the_place_once(function: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(tools=[{"function": {"name": "f"}}, {"function": function}])
    assert error.value.message == message


@pytest.mark.parametrize("tool", [{}, {"type": "function"}, {"type": "web_search"}, {"function": {}}, 1, None])
def test_an_invalid_tool_is_named(tool: Any) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(tools=[{"function": {"name": "f"}}, tool])
    assert (error.value.param or "").startswith("tools[1]")


@pytest.mark.parametrize("limit", [0, -1, -2])
def test_num_predict_without_a_limit_sets_none(limit: int) -> None:
    assert chat(options={"num_predict": limit}).chat.token_limit is None


def test_whole_numbers_may_be_written_with_a_point() -> None:
    parsed = chat(options={"num_predict": 16.0, "top_k": 40.0, "seed": 1.0}).chat
    assert (parsed.token_limit, parsed.top_k, parsed.seed) == (16, 40, 1)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"repeat_penalty": 0}, "options.repeat_penalty"),
        ({"temperature": 2.5}, "options.temperature"),
        ({"stop": ["a"] * 17}, "options.stop"),
        ({"stop": "a" * 1025}, "options.stop"),
        ({"presence_penalty": 3}, "options.presence_penalty"),
        ({"seed": 1e30}, "options.seed"),
        ({"num_predict": "many"}, "options.num_predict"),
    ],
)
def test_an_option_that_an_engine_would_refuse_is_named(options: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        chat(options=options)
    assert error.value.param == param


def test_format_is_json_or_a_schema() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    wanted = chat(format=schema).chat.response_format
    assert isinstance(wanted, SchemaFormat)
    assert wanted.json_schema.schema == schema
    assert isinstance(chat(format="json").chat.response_format, JsonFormat)
    empty: tuple[Any, ...] = ("", None, {})
    for nothing in empty:
        assert chat(format=nothing).chat.response_format is None
    with pytest.raises(InvalidRequest, match="'format'"):
        chat(format="yaml")


@pytest.mark.parametrize(
    ("think", "effort"), [(None, None), (False, "none"), (True, True), ("low", "low"), ("max", "high"), ("", None)]
)
def test_think_becomes_the_effort(think: Any, effort: Any) -> None:
    assert chat(think=think).chat.effort == effort


def test_images_follow_the_text_of_their_message_as_data_urls() -> None:
    parsed = chat(messages=[{"role": "User", "content": "What?", "images": [PIXELS]}])
    (message,) = parsed.chat.messages
    assert isinstance(message.content, list)
    image, text = message.content
    assert isinstance(image, ImagePart)
    assert isinstance(image.image_url, ImageUrl)
    assert image.image_url.url.endswith(";base64," + PIXELS)
    assert text == TextPart("What?")
    assert message.role == "user"


def test_images_do_not_count_as_text() -> None:
    size = chat(messages=[{"role": "user", "content": "What?", "images": [PIXELS]}]).text_size
    assert size < 200
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    with pytest.raises(RequestTooLarge):
        completed(parse_chat(body, 1000))


def test_too_many_images_are_refused_before_they_are_read() -> None:
    many = {"role": "user", "content": "x", "images": [1] * 251}
    with pytest.raises(InvalidImage, match="at most 500 images; this one has 502"):
        chat(messages=[many, many])
    with pytest.raises(InvalidImage, match="at most 500 images; this one has 502"):
        generate(images=[1] * 502)


@pytest.mark.parametrize("role", ["system", "assistant", "tool"])
def test_only_a_user_sends_images(role: str) -> None:
    with pytest.raises(UnsupportedParameter) as error:
        chat(messages=[USER, {"role": role, "content": "x", "images": [PIXELS]}])
    assert error.value.param == "messages[1].images"


def test_results_find_the_call_that_they_answer() -> None:
    """Older programs name the tool, or nothing, and newer ones the call."""
    calls = [{"function": {"name": name, "arguments": {"n": 1}}} for name in ("f", "g", "f")]
    turn = [USER, {"role": "assistant", "content": "", "tool_calls": calls}]
    results = [
        {"role": "tool", "content": "a", "tool_name": "g"},
        {"role": "tool", "content": "b"},
        {"role": "tool", "content": "c", "tool_name": "f"},
        {"role": "tool", "content": "d", "tool_call_id": "call_of_client"},
        {"role": "tool", "content": "e"},
    ]
    messages = chat(messages=[*turn, *results]).chat.messages
    ids = [call.id for call in messages[1].tool_calls or ()]
    assert len(set(ids)) == 3
    assert [message.tool_call_id for message in messages[2:]] == [ids[1], ids[0], ids[2], "call_of_client", "call_6"]
    assert (messages[1].tool_calls or [])[0].function.arguments == '{"n": 1}'


def test_a_request_without_messages_only_loads() -> None:
    assert chat(messages=[]).chat.messages == []
    assert completed(parse_chat(b'{"model":"m"}', LIMIT)).chat.messages == []
    assert generate(prompt="").chat.messages == []


@pytest.mark.parametrize(
    ("keep_alive", "unloads"),
    [(0, True), ("0", True), ("0s", True), ("0m", True), (0.0, True), (-1, False), ("5m", False), ("10s", False)],
)
def test_keep_alive_of_zero_unloads(keep_alive: Any, unloads: bool) -> None:
    assert chat(messages=[], keep_alive=keep_alive).unloads is unloads
    assert chat(messages=[]).unloads is False


def test_generate_has_a_system_message_and_a_prompt() -> None:
    messages = generate(system="Be brief.", images=[PIXELS]).chat.messages
    assert [message.role for message in messages] == ["system", "user"]
    assert messages[0].content == "Be brief."
    assert len(messages[1].images) == 1


@pytest.mark.parametrize("prompt", [None, ""])
def test_an_image_without_a_prompt_only_loads_the_model_as_at_ollama(prompt: str | None) -> None:
    assert generate(prompt=prompt, images=[PIXELS]).chat.messages == []


@pytest.mark.parametrize(
    ("name", "value"), [("suffix", "x"), ("template", "{{ .Prompt }}"), ("raw", True), ("context", [1, 2])]
)
def test_generate_refuses_by_name_what_needs_no_chat_template(name: str, value: Any) -> None:
    with pytest.raises(UnsupportedParameter) as error:
        generate(**{name: value})
    assert error.value.param == name


@pytest.mark.parametrize(("name", "value"), [("suffix", ""), ("template", ""), ("raw", False), ("context", [])])
def test_generate_accepts_the_empty_values_that_clients_write(name: str, value: Any) -> None:
    assert generate(**{name: value}).chat.messages[0].content == "Hi"


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", InvalidJson),
        (b'{"model": ', InvalidJson),
        (b"[]", InvalidJson),
        (b'{"messages": []}', InvalidRequest),
        (b'{"model": null, "messages": []}', InvalidRequest),
        (b'{"model": "", "messages": []}', InvalidRequest),
        (b'{"model": "m", "messages": [{"role": "robot", "content": "x"}]}', InvalidRequest),
        (b'{"model": "m", "messages": [{"role": "user", "content": 1}]}', InvalidRequest),
        (b'{"model": "m", "messages": [{"role": "user", "images": [1]}]}', InvalidRequest),
        (b'{"model": "m", "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": ""}}]}]}',
         InvalidRequest),
        (b'{"model": "m", "messages": [], "tools": [1]}', InvalidRequest),
        (b"[" * 50_000, InvalidJson),
    ],
)  # fmt: skip
def test_bad_bodies_are_refused(body: bytes, kind: type[GatewayError]) -> None:
    with pytest.raises(kind):
        completed(parse_chat(body, LIMIT))
