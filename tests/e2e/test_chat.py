"""Chat completions through the gateway, on every engine: with openai-python, with LangChain's
ChatOpenAI, and byte by byte.
"""

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
from tests.e2e.gateway import KEY, OTHER_KEY, PLAIN_HTTP, Gateway

TIER = "standard"  # the only tier without a YAML file
HELLO: list[Any] = [{"role": "user", "content": "Say hello."}]
CONVERSATION: list[Any] = [
    {"role": "system", "content": "You answer in one sentence."},
    {"role": "user", "content": "Which animal is the largest?"},
    {"role": "assistant", "content": "The blue whale."},
    {"role": "user", "content": "And on land?"},
]
WITH_USAGE: Any = {"include_usage": True}


def ask_about(image_url: str) -> list[Any]:
    parts = [{"type": "text", "text": "Which colour is this?"}, {"type": "image_url", "image_url": {"url": image_url}}]
    return [{"role": "user", "content": parts}]


def overlong_prompt(engine: Engine) -> list[Message]:
    """Return a prompt of twice the engine's context, with so few bytes for each token that only the
    engine notices.
    """
    if engine.context > 40_000:
        pytest.skip(f"a prompt beyond {engine.context} tokens is a larger body than the gateway accepts")
    return [{"role": "user", "content": "hello " * (2 * engine.context)}]


def raw_stream(gateway: Gateway, body: dict[str, Any]) -> list[bytes]:
    """Return the raw events of a stream, without the blank lines between them."""
    headers = {"authorization": f"Bearer {KEY}"}
    url = f"{gateway.url}/v1/chat/completions"
    answer = httpx2.post(url, json=body | {"stream": True}, headers=headers, timeout=120.0, **PLAIN_HTTP)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.content.endswith(b"\n\n")
    return answer.content.removesuffix(b"\n\n").split(b"\n\n")


# Plain answers


def test_plain_answer_has_the_shape_of_the_openai_api(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    (choice,) = answer.choices
    assert re.fullmatch(r"chatcmpl-\S{8,}", answer.id)
    assert (answer.object, answer.model) == ("chat.completion", TIER)
    assert (choice.index, choice.message.role, choice.finish_reason) == (0, "assistant", "length")
    assert choice.message.content


def test_plain_answer_equals_the_engines_own(client: OpenAI, engine: Engine) -> None:
    direct = engine.ask(HELLO, max_tokens=8)
    answer = client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    assert answer.choices[0].message.content == direct.text


def test_usage_of_a_plain_answer_equals_the_engines_own(client: OpenAI, engine: Engine) -> None:
    direct = engine.ask(CONVERSATION, max_tokens=8)
    usage = client.chat.completions.create(model=TIER, messages=CONVERSATION, max_tokens=8, temperature=0).usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (direct.prompt_tokens, direct.completion_tokens)
    assert usage.total_tokens == direct.prompt_tokens + direct.completion_tokens


async def test_answers_have_distinct_ids(async_client: AsyncOpenAI) -> None:
    answers = await asyncio.gather(
        *(async_client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2) for _ in range(8))
    )
    assert len({answer.id for answer in answers}) == 8


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("length", [1, 5])
def test_both_names_of_the_token_limit_work(client: OpenAI, field: str, length: int) -> None:
    limit: Any = {field: length}
    answer = client.chat.completions.create(model=TIER, messages=HELLO, temperature=0, **limit)
    assert answer.usage is not None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", length)


def test_response_headers_describe_the_route(client: OpenAI, engine: Engine) -> None:
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


def test_request_id_of_the_client_is_returned(client: OpenAI) -> None:
    sent: Any = {"x-request-id": "order-66"}
    plain = client.chat.completions.with_raw_response.create(
        model=TIER, messages=HELLO, max_tokens=2, extra_headers=sent
    )
    stream = client.chat.completions.with_raw_response.create(
        model=TIER, messages=HELLO, max_tokens=2, extra_headers=sent, stream=True
    )
    stream.http_response.read()
    assert (plain.headers["x-request-id"], stream.headers["x-request-id"]) == ("order-66", "order-66")


# Streams


def test_stream_begins_with_the_role_and_has_one_finish_reason(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    assert (first.delta.role, first.delta.content or "", first.finish_reason) == ("assistant", "", None)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
    assert last.finish_reason == "length"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])


def test_all_chunks_have_the_requested_model_name_and_the_same_id(client: OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="auto", messages=HELLO, max_tokens=8, stream=True, stream_options=WITH_USAGE
        )
    )
    assert {(chunk.object, chunk.model) for chunk in chunks} == {("chat.completion.chunk", "auto")}
    (answer_id,) = {chunk.id for chunk in chunks}
    assert re.fullmatch(r"chatcmpl-\S{8,}", answer_id)
    assert len({chunk.created for chunk in chunks}) == 1


def test_stream_has_the_same_text_as_the_plain_answer(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=TIER, messages=CONVERSATION, max_tokens=12, temperature=0)
    chunks = client.chat.completions.create(
        model=TIER, messages=CONVERSATION, max_tokens=12, temperature=0, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content


def test_stream_has_no_usage_unless_requested(client: OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=4, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_usage_of_a_stream_comes_last_and_equals_the_engines_own(client: OpenAI, engine: Engine) -> None:
    direct = engine.ask(CONVERSATION, max_tokens=8)
    asked = client.chat.completions.create(
        model=TIER, messages=CONVERSATION, max_tokens=8, temperature=0, stream=True, stream_options=WITH_USAGE
    )
    *chunks, last = asked
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (direct.prompt_tokens, direct.completion_tokens)


def test_stream_ends_with_done_after_the_finish_reason(gateway: Gateway) -> None:
    events = raw_stream(gateway, {"model": TIER, "messages": HELLO, "max_tokens": 4})
    assert events[-1] == b"data: [DONE]"
    assert all(event.startswith(b"data: {") for event in events[:-1])
    assert json.loads(events[-2].removeprefix(b"data: "))["choices"][0]["finish_reason"] == "length"


def test_stream_has_the_same_headers(client: OpenAI, engine: Engine) -> None:
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
def test_both_names_of_the_token_limit_work_in_a_stream(client: OpenAI, field: str) -> None:
    limit: Any = {field: 5}
    chunks = client.chat.completions.create(
        model=TIER, messages=HELLO, temperature=0, stream=True, stream_options=WITH_USAGE, **limit
    )
    *_, finish, last = chunks
    assert last.usage is not None
    assert (finish.choices[0].finish_reason, last.usage.completion_tokens) == ("length", 5)


async def test_concurrent_streams_are_not_mixed_up(async_client: AsyncOpenAI, engine: Engine) -> None:
    questions = [f"Question number {number}." for number in range(8)]

    async def usage_of(question: str) -> tuple[int, int]:
        messages: Any = [{"role": "user", "content": question * (1 + int(question[-2]))}]
        stream = await async_client.chat.completions.create(
            model=TIER, messages=messages, max_tokens=4, temperature=0, stream=True, stream_options=WITH_USAGE
        )
        chunks = [chunk async for chunk in stream]
        assert len({chunk.id for chunk in chunks}) == 1
        assert chunks[-1].usage is not None
        return chunks[-1].usage.prompt_tokens, engine.ask(messages, 4).prompt_tokens

    counted = await asyncio.gather(*(usage_of(question) for question in questions))
    assert [through for through, _ in counted] == [direct for _, direct in counted]
    assert len({through for through, _ in counted}) == 8


# Contents of a request


def test_history_and_system_message_reach_the_engine_completely(client: OpenAI, engine: Engine) -> None:
    prompt_tokens = []
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[-1:]):
        usage = client.chat.completions.create(model=TIER, messages=messages, max_tokens=1).usage
        assert usage is not None
        assert usage.prompt_tokens == engine.ask(messages, 1).prompt_tokens
        prompt_tokens.append(usage.prompt_tokens)
    assert prompt_tokens == sorted(set(prompt_tokens), reverse=True)


def test_content_in_text_parts_is_one_message(client: OpenAI, engine: Engine) -> None:
    parts: Any = [{"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello."}]}]
    answer = client.chat.completions.create(model=TIER, messages=parts, max_tokens=4, temperature=0)
    assert answer.usage is not None
    difference = answer.usage.prompt_tokens - engine.ask(HELLO, 4).prompt_tokens
    assert abs(difference) <= 2  # vLLM joins the parts with a line break


def test_image_in_a_data_url_reaches_the_model(client: OpenAI, engine: Engine, image_url: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} does not accept images")
    direct = engine.ask(ask_about(image_url), max_tokens=4)
    blind = engine.ask([{"role": "user", "content": "Which colour is this?"}], max_tokens=4)
    usage = client.chat.completions.create(model=TIER, messages=ask_about(image_url), max_tokens=4, temperature=0).usage
    assert usage is not None
    assert usage.prompt_tokens == direct.prompt_tokens > blind.prompt_tokens


def test_image_can_be_streamed(client: OpenAI, engine: Engine, image_url: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} does not accept images")
    chunks = list(
        client.chat.completions.create(
            model=TIER, messages=ask_about(image_url), max_tokens=4, temperature=0, stream=True
        )
    )
    assert chunks[-1].choices[0].finish_reason == "length"


# Model names


@pytest.mark.parametrize("name", ["standard", "Standard", "auto"])
def test_tier_and_auto_are_model_names(client: OpenAI, name: str) -> None:
    assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).model == name


def test_engines_own_model_name_is_accepted(client: OpenAI, engine: Engine) -> None:
    assert client.chat.completions.create(model=engine.model, messages=HELLO, max_tokens=2).model == engine.model


def test_models_are_listed_and_can_be_retrieved_by_id(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert TIER in listed
    for name, model in listed.items():
        assert client.models.retrieve(name) == model
        assert model.object == "model"


def test_retrieving_an_unknown_model_is_404(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("unknown")
    assert caught.value.code == "model_not_found"


def test_paths_without_v1_work(gateway: Gateway) -> None:
    with gateway.openai(path="") as client:
        assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).model == TIER
        chunks = list(client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        assert TIER in {model.id for model in client.models.list()}
        assert client.models.retrieve(TIER).id == TIER


def test_second_key_works(gateway: Gateway) -> None:
    with gateway.openai(OTHER_KEY) as client:
        assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).choices


# Refusals


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_unknown_model_is_404_and_the_message_lists_the_tiers(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-99", messages=HELLO, max_tokens=2, stream=stream)
    assert (caught.value.code, caught.value.type) == ("model_not_found", "invalid_request_error")
    assert TIER in caught.value.message


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_wrong_key_is_401(gateway: Gateway, stream: bool) -> None:
    with (
        gateway.openai("wrong") as client,
        pytest.raises(openai.AuthenticationError) as caught,
    ):
        client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2, stream=stream)
    assert (caught.value.code, caught.value.type) == ("invalid_api_key", "authentication_error")


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_overlong_prompt_is_400_context_length_exceeded(client: OpenAI, engine: Engine, stream: bool) -> None:
    messages: Any = overlong_prompt(engine)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=TIER, messages=messages, max_tokens=4, stream=stream)
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "invalid_request_error")
    assert "context_length_exceeded" in caught.value.message


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_image_by_http_url_is_400(client: OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=TIER, messages=ask_about("http://127.0.0.1/cat.png"), max_tokens=2, stream=stream
        )
    assert (caught.value.code, caught.value.type) == ("invalid_image_url", "invalid_request_error")


def test_engine_still_serves_after_a_refusal(client: OpenAI, engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=TIER, messages=overlong_prompt(engine), max_tokens=4)  # type: ignore[arg-type]
    assert client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=2).choices


# openai-python's asynchronous client


async def test_asynchronous_client_gets_the_same_answers(async_client: AsyncOpenAI) -> None:
    plain = await async_client.chat.completions.create(model=TIER, messages=HELLO, max_tokens=8, temperature=0)
    stream = await async_client.chat.completions.create(
        model=TIER, messages=HELLO, max_tokens=8, temperature=0, stream=True
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert plain.choices[0].finish_reason == chunks[-1].choices[0].finish_reason == "length"


# LangChain's ChatOpenAI


@pytest.fixture
async def chat(gateway: Gateway) -> AsyncIterator[ChatOpenAI]:
    """A ChatOpenAI with HTTP clients that are closed at the end.

    The clients that ChatOpenAI creates itself would outlive the event loop of a test.
    """
    with httpx2.Client(timeout=120.0, **PLAIN_HTTP) as http:
        async with httpx2.AsyncClient(timeout=120.0, **PLAIN_HTTP) as async_http:
            yield ChatOpenAI(
                base_url=f"{gateway.url}/v1",
                api_key=KEY,  # type: ignore[arg-type]  # a str is accepted and wrapped
                model=TIER,
                temperature=0,
                max_tokens=8,  # type: ignore[call-arg]  # an alias, sent as max_completion_tokens
                stream_usage=True,
                max_retries=0,
                http_client=http,
                http_async_client=async_http,
            )


LANGCHAIN_CONVERSATION: list[BaseMessage] = [
    SystemMessage("You answer in one sentence."),
    HumanMessage("Which animal is the largest?"),
]


def check_usage(message: BaseMessage) -> int:
    """Check that the token counts add up, and return the prompt's."""
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
    answer = chat.invoke(LANGCHAIN_CONVERSATION)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert answer.response_metadata["finish_reason"] == "length"
    assert answer.response_metadata["model_name"] == TIER
    check_usage(answer)


def test_langchain_stream(chat: ChatOpenAI) -> None:
    chunks = list(chat.stream(LANGCHAIN_CONVERSATION))
    whole = joined(chunks)
    assert whole.content == chat.invoke(LANGCHAIN_CONVERSATION).content
    assert whole.response_metadata["finish_reason"] == "length"
    check_usage(whole)


async def test_langchain_astream(chat: ChatOpenAI) -> None:
    chunks = [chunk async for chunk in chat.astream(LANGCHAIN_CONVERSATION)]
    whole = joined(chunks)
    assert whole.content
    assert whole.response_metadata["finish_reason"] == "length"
    check_usage(whole)


async def test_langchain_abatch(chat: ChatOpenAI) -> None:
    answers = await chat.abatch([f"Say the number {number}." for number in range(6)])
    assert len({answer.id for answer in answers}) == 6
    for answer in answers:
        check_usage(answer)


def test_langchain_image(chat: ChatOpenAI, engine: Engine, image_url: str) -> None:
    if not engine.has_vision:
        pytest.skip(f"{engine.model} does not accept images")
    seen = chat.invoke([HumanMessage(ask_about(image_url)[0]["content"])])
    blind = chat.invoke("Which colour is this?")
    assert check_usage(seen) > check_usage(blind)


def test_langchain_raises_the_errors_of_openai_python(chat: ChatOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        chat.bind(model="gpt-99").invoke("Say hello.")
