"""What a chat program gets through the gateway, whichever engine serves: by openai-python, by LangChain's ChatOpenAI, and byte by byte."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import openai
import pytest
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai import AsyncOpenAI, OpenAI

from tests.e2e.engines import Engine, Message
from tests.e2e.gateway import KEY, OTHER_KEY, Gateway

TIER = "standard"  # the one tier that there is without a YAML file
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
TALK: list[Any] = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Which animal is the largest?"},
    {"role": "assistant", "content": "The blue whale."},
    {"role": "user", "content": "And on land?"},
]
USAGE_ASKED: Any = {"include_usage": True}


def ask_about(picture: str) -> list[Any]:
    parts = [{"type": "text", "text": "Which colour is this?"}, {"type": "image_url", "image_url": {"url": picture}}]
    return [{"role": "user", "content": parts}]


def too_long_for(engine: Engine) -> list[Message]:
    """Twice the engine's context: few enough bytes a token that only the engine can tell."""
    if engine.context > 40_000:
        pytest.skip(f"a prompt beyond {engine.context} tokens is a bigger body than the gateway takes")
    return [{"role": "user", "content": "hello " * (2 * engine.context)}]


def raw_stream(gateway: Gateway, body: dict[str, Any]) -> list[bytes]:
    """The events of a stream as they came, without the blank lines between."""
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{gateway.url}/v1/chat/completions"
    answer = httpx2.post(url, json=body | {"stream": True}, headers=headers, timeout=120.0, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.endswith(b"\n\n")
    return answer.content.removesuffix(b"\n\n").split(b"\n\n")


# A plain answer.


def test_plain_answer_has_the_shape_of_openais(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert re.fullmatch(r"chatcmpl-\S{8,}", answer.id)
    assert (answer.object, answer.model) == ("chat.completion", TIER)
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content


def test_plain_answer_is_what_the_engine_itself_says(client: OpenAI, engine: Engine) -> None:
    said = engine.ask(HELLO, max_tokens=8)
    answer = client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == said.text


def test_usage_of_a_plain_answer_is_what_the_engine_counts(client: OpenAI, engine: Engine) -> None:
    said = engine.ask(TALK, max_tokens=8)
    usage = client.chat.completions.create(model=TIER, messages=TALK, max_tokens=8, temperature=0).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (said.prompt_tokens, said.completion_tokens)
    assert usage.total_tokens == said.prompt_tokens + said.completion_tokens


async def test_every_answer_has_an_id_of_its_own(async_client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(async_client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2) for _ in range(8))
    )
    assert len({answer.id for answer in answers}) == 8


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("length", [1, 5])
def test_both_names_of_the_token_limit_bind(client: OpenAI, field: str, length: int) -> None:
    limit: Any = {field: length}
    answer = client.chat.completions.create(model=TIER, messages=HELLO, temperature=0, **limit)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", length)


def test_headers_tell_how_the_request_went(client: OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.with_raw_response.create(model="auto", messages=HELLO, max_tokens=2)
    headers = answer.headers
    assert (headers["x-gateway-tier"], headers["x-gateway-backend"], headers["x-gateway-model"]) == (
        TIER,
        engine.kind,
        engine.model,
    )
    assert headers["x-gateway-attempts"] == "1"
    assert float(headers["x-gateway-queue-ms"]) >= 0
    assert headers["x-request-id"]


def test_request_id_of_the_client_comes_back(client: OpenAI) -> None:
    sent: Any = {"x-request-id": "order-66"}
    plain = client.chat.completions.with_raw_response.create(
        model=TIER, messages=HELLO, max_tokens=2, extra_headers=sent
    )
    stream = client.chat.completions.with_raw_response.create(
        model=TIER, messages=HELLO, max_tokens=2, extra_headers=sent, stream=True
    )
    stream.http_response.read()
    assert (plain.headers["x-request-id"], stream.headers["x-request-id"]) == ("order-66", "order-66")


# A stream.


def test_stream_begins_with_the_role_and_has_one_finish(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content or "", first.finish_reason) == ("assistant", "", None)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert last.finish_reason == "length"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


def test_every_chunk_has_the_clients_model_name_and_one_id(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=HELLO, max_tokens=8, stream=True, stream_options=USAGE_ASKED
        )
    )
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", "auto")}
    (answer_id,) = {chunk.id for chunk in chunks}
    assert re.fullmatch(r"chatcmpl-\S{8,}", answer_id)
    assert len({chunk.created for chunk in chunks}) == 1


def test_stream_says_what_the_plain_answer_says(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=TIER, messages=TALK, max_tokens=12, temperature=0)
    chunks = client.chat.completions.create(model=TIER, messages=TALK, max_tokens=12, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content


def test_stream_tells_no_usage_unasked(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=4, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_usage_of_a_stream_comes_last_and_is_what_the_engine_counts(client: OpenAI, engine: Engine) -> None:
    said = engine.ask(TALK, max_tokens=8)
    asked = client.chat.completions.create(
        model=TIER, messages=TALK, max_tokens=8, temperature=0, stream=True, stream_options=USAGE_ASKED
    )
    *chunks, last = asked
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (said.prompt_tokens, said.completion_tokens)


def test_stream_ends_with_done_after_the_finish(gateway: Gateway) -> None:
    events = raw_stream(gateway, {"model": TIER, "messages": HELLO, "max_tokens": 4})
    assert events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: {") for event in events[:-1])
    assert json.loads(events[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"


def test_stream_has_the_headers_too(client: OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model=engine.model, messages=HELLO, max_tokens=2, stream=True
    )
    answer.http_response.read()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (answer.headers["x-gateway-tier"], answer.headers["x-gateway-backend"]) == (TIER, engine.kind)
    assert answer.headers["x-gateway-model"] == engine.model
    assert answer.headers["x-gateway-attempts"] == "1"
    assert float(answer.headers["x-gateway-queue-ms"]) >= 0
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit_bind_in_a_stream(client: OpenAI, field: str) -> None:
    limit: Any = {field: 5}
    chunks = client.chat.completions.create(
        model=TIER, messages=HELLO, temperature=0, stream=True, stream_options=USAGE_ASKED, **limit
    )
    *_, finish, last = chunks
    assert last.usage is not None
    assert (finish.choices[0].finish_reason, last.usage.completion_tokens) == ("length", 5)


async def test_concurrent_streams_do_not_mix(async_client: AsyncOpenAI, engine: Engine) -> None:
    questions = [f"Question number {number}." for number in range(8)]

    async def usage_of(question: str) -> tuple[int, int]:
        messages: Any = [{"role": "user", "content": question * (1 + int(question[-2]))}]
        stream = await async_client.chat.completions.create(
            model=TIER, messages=messages, max_tokens=4, temperature=0, stream=True, stream_options=USAGE_ASKED
        )
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].usage is not None
        return chunks[-1].usage.prompt_tokens, engine.ask(messages, 4).prompt_tokens

    counted = await asyncio.gather(*(usage_of(question) for question in questions))
    assert [through for through, _ in counted] == [direct for _, direct in counted]
    assert len({through for through, _ in counted}) == 8


# What may be in a request.


def test_history_and_system_message_reach_the_engine_whole(client: OpenAI, engine: Engine) -> None:
    prompt_tokens = []
    for messages in (TALK, TALK[1:], TALK[-1:]):
        usage = client.chat.completions.create(model=TIER, messages=messages, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens == engine.ask(messages, 1).prompt_tokens
        prompt_tokens.append(usage.prompt_tokens)
    assert prompt_tokens == sorted(set(prompt_tokens), reverse=True)


def test_content_in_text_parts_is_one_turn(client: OpenAI, engine: Engine) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}]
    answer = client.chat.completions.create(model=TIER, messages=parts, max_tokens=4, temperature=0)
    assert answer.usage is not None
    assert (
        abs(answer.usage.prompt_tokens - engine.ask(HELLO, 4).prompt_tokens) <= 2
    )  # vLLM joins the parts with a line break


def test_image_in_a_data_url_is_seen(client: OpenAI, engine: Engine, picture: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} takes no images")
    said = engine.ask(ask_about(picture), max_tokens=4)
    blind = engine.ask([{"role": "user", "content": "Which colour is this?"}], max_tokens=4)
    usage = client.chat.completions.create(model=TIER, messages=ask_about(picture), max_tokens=4, temperature=0).usage
    assert usage is not None
    assert usage.prompt_tokens == said.prompt_tokens > blind.prompt_tokens


def test_image_in_a_stream(client: OpenAI, engine: Engine, picture: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} takes no images")
    chunks = list(
        client.chat.completions.create(
            model=TIER, messages=ask_about(picture), max_tokens=4, temperature=0, stream=True
        )
    )
    assert chunks[-1].choices[0].finish_reason == "length"


# Names.


@pytest.mark.parametrize("name", ["standard", "Standard", "auto"])
def test_tier_and_auto_are_names(client: OpenAI, name: str) -> None:
    assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).model == name


def test_engines_own_model_name_is_a_name(client: OpenAI, engine: Engine) -> None:
    assert client.chat.completions.create(model=engine.model, messages=HELLO, max_tokens=2).model == engine.model


def test_models_are_listed_and_each_is_found_by_its_id(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert TIER in listed
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
        assert model.object == "model"


def test_unknown_model_in_the_list_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nobody")
    assert caught.value.code == "model_not_found"


def test_paths_without_v1_are_the_same(gateway: Gateway) -> None:
    with OpenAI(base_url=gateway.url, api_key=KEY, max_retries=0, timeout=120.0) as client:
        assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).model == TIER
        chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        assert TIER in {model.id for model in client.models.list()}
        assert client.models.retrieve(TIER).id == TIER


def test_second_key_is_as_good_as_the_first(gateway: Gateway) -> None:
    with OpenAI(base_url=f"{gateway.url}/v1", api_key=OTHER_KEY, max_retries=0, timeout=120.0) as client:
        assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).choices


# Refusals.


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_model_is_404_and_names_those_that_exist(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-99", messages=HELLO, max_tokens=2, stream=stream)
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")
    assert TIER in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_wrong_key_is_401(gateway: Gateway, stream: bool) -> None:
    with (
        OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2, stream=stream)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_prompt_is_400_and_says_the_word(client: OpenAI, engine: Engine, stream: bool) -> None:
    messages: Any = too_long_for(engine)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TIER, messages=messages, max_tokens=4, stream=stream)
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert "context_length_exceeded" in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
def test_image_at_an_address_is_400(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=TIER, messages=ask_about("http://127.0.0.1/cat.png"), max_tokens=2, stream=stream
        )
    assert (caught.value.code, caught.value.type) == ("invalid_image_url", "invalid_request_error")


def test_engine_serves_on_after_refusals(client: OpenAI, engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=TIER, messages=too_long_for(engine), max_tokens=4)  # type: ignore[arg-type]
    assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).choices


# openai-python's asynchronous client.


async def test_asynchronous_client_gets_the_same(async_client: AsyncOpenAI) -> None:
    plain = await async_client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    stream = await async_client.chat.completions.create(
        model=TIER, messages=HELLO, max_tokens=8, temperature=0, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


# LangChain's ChatOpenAI, with nothing but its address, key and model set.


@pytest.fixture
async def chat(gateway: Gateway) -> AsyncIterator[ChatOpenAI]:
    """Its HTTP clients are ours: those it makes itself are kept for the process and outlive the event loop of a test."""
    with httpx2.Client(timeout=120.0) as http:
        async with httpx2.AsyncClient(timeout=120.0) as async_http:
            yield ChatOpenAI(
                base_url=f"{gateway.url}/v1",
                api_key=KEY,  # type: ignore[arg-type]  # a str is taken and wrapped
                model=TIER,
                temperature=0,
                max_tokens=8,  # type: ignore[call-arg]  # an alias, sent as max_completion_tokens
                stream_usage=True,
                max_retries=0,
                http_client=http,
                http_async_client=async_http,
            )


LANGCHAIN_TALK: list[BaseMessage] = [
    SystemMessage("You answer in one sentence."),
    HumanMessage("Which animal is the largest?"),
]


def check_usage(message: BaseMessage) -> int:
    """The tokens of the prompt, once the figures have been found to fit."""
    assert isinstance(message, AIMessage)
    usage = message.usage_metadata
    assert usage is not None
    assert usage["output_tokens"] == 8
    assert usage["total_tokens"] == usage["input_tokens"] + 8
    return usage["input_tokens"]


def joined(chunks: list[AIMessageChunk]) -> AIMessageChunk:
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    return whole


def test_langchain_invoke(chat: ChatOpenAI) -> None:
    answer = chat.invoke(LANGCHAIN_TALK)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == TIER
    check_usage(answer)


def test_langchain_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(LANGCHAIN_TALK))
    whole = joined(chunks)
    assert whole.content == chat.invoke(LANGCHAIN_TALK).content
    assert whole.response_metadata["finish_reason"] == "length"
    check_usage(whole)


async def test_langchain_astream(chat: ChatOpenAI) -> None:
    chunks = [chunk async for chunk in chat.astream(LANGCHAIN_TALK)]
    whole = joined(chunks)
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    check_usage(whole)


async def test_langchain_abatch(chat: ChatOpenAI) -> None:
    answers = await chat.abatch([f"Say the number {number}." for number in range(6)])
    assert len({answer.id for answer in answers}) == 6
    for answer in answers:
        check_usage(answer)


def test_langchain_image(chat: ChatOpenAI, engine: Engine, picture: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} takes no images")
    seen = chat.invoke([HumanMessage(ask_about(picture)[0]["content"])])
    blind = chat.invoke("Which colour is this?")
    assert check_usage(seen) > check_usage(blind)


def test_langchain_sees_the_errors_of_openai_python(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat.bind(model="gpt-99").invoke("Say hello.")
