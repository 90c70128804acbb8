"""Programs on clients of Ollama's own API: ollama-python, ChatOllama and LlamaIndex's Ollama.

They need langchain-ollama, llama-index-llms-ollama and ollama, which only `make test-clients`
installs.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import ollama
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_ollama import ChatOllama
from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.ollama import Ollama

from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    HELLO,
    PET_QUESTION,
    SAMPLING,
    TIMEOUT_SECONDS,
    WEATHER_QUESTION,
    Animal,
    Program,
    Target,
    Weather,
    check_arguments,
)

# ollama-python uses httpx 0.28, as LlamaIndex and LangChain do.
PLAIN: dict[str, Any] = {"verify": False, "trust_env": False, "timeout": TIMEOUT_SECONDS}
SHORT: dict[str, Any] = {"num_predict": 8, "temperature": 0}
LONG: dict[str, Any] = {"num_predict": ENOUGH_TOKENS, **SAMPLING}
WEATHER: list[Any] = [{"role": "user", "content": WEATHER_QUESTION}]
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "Weather", "description": "Tells the weather.", "parameters": Weather.model_json_schema()},
}


def host_of(target: Target) -> str:
    return target.url.removesuffix("/v1")


def headers_of(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.key}"}


@contextmanager
def client_of(target: Target) -> Iterator[ollama.Client]:
    client = ollama.Client(host_of(target), headers=headers_of(target), **PLAIN)
    try:
        yield client
    finally:
        client._client.close()


@asynccontextmanager
async def async_client_of(target: Target) -> AsyncIterator[ollama.AsyncClient]:
    client = ollama.AsyncClient(host_of(target), headers=headers_of(target), **PLAIN)
    try:
        yield client
    finally:
        await client._client.aclose()


def check_counts(answer: ollama.ChatResponse | ollama.GenerateResponse, tokens: int) -> None:
    assert answer.done
    assert answer.done_reason == "length"
    assert answer.eval_count == tokens
    assert answer.prompt_eval_count
    parts = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
    assert all(parts)
    assert (answer.total_duration or 0) >= sum(part or 0 for part in parts)


def chat(target: Target) -> None:
    with client_of(target) as client:
        plain = client.chat(target.model, HELLO, options=SHORT)
        lines = list(client.chat(target.model, HELLO, options=SHORT, stream=True))
    check_counts(plain, 8)
    check_counts(lines[-1], 8)
    assert not any(line.done for line in lines[:-1])
    assert "".join(line.message.content or "" for line in lines) == (plain.message.content or "")


def generate(target: Target) -> None:
    with client_of(target) as client:
        plain = client.generate(target.model, "Say hello.", system="Be brief.", options=SHORT)
        lines = list(client.generate(target.model, "Say hello.", system="Be brief.", options=SHORT, stream=True))
    check_counts(plain, 8)
    check_counts(lines[-1], 8)
    assert "".join(line.response or "" for line in lines) == (plain.response or "")


async def async_stream(target: Target) -> None:
    async with async_client_of(target) as client:
        lines = [line async for line in await client.chat(target.model, HELLO, options=SHORT, stream=True)]
    check_counts(lines[-1], 8)


def load(target: Target) -> None:
    with client_of(target) as client:
        assert client.generate(target.model).done_reason == "load"


def schema(target: Target) -> None:
    with client_of(target) as client:
        answer = client.chat(
            target.model, [{"role": "user", "content": PET_QUESTION}], format=Animal.model_json_schema(), options=LONG
        )
    Animal.model_validate_json(answer.message.content or "")


def tools(target: Target) -> None:
    """Check a whole turn: the call, and the answer to its result. The call has no id."""
    with client_of(target) as client:
        called = client.chat(target.model, WEATHER, tools=[TOOL], options=LONG).message
        if target.has_random_weights:
            return
        assert called.tool_calls
        for call in called.tool_calls:
            check_arguments(call.function.name, dict(call.function.arguments))
        result = {"role": "tool", "tool_name": "Weather", "content": "Sun."}
        answer = client.chat(target.model, [*WEATHER, called, result], tools=[TOOL], options=SHORT)
        streamed = list(client.chat(target.model, WEATHER, tools=[TOOL], options=LONG, stream=True))
    assert answer.done
    assert [call for line in streamed for call in line.message.tool_calls or ()]


def image(target: Target) -> None:
    data = (target.image_url or "").partition(",")[2]
    with client_of(target) as client:
        blind = client.chat(target.model, [{"role": "user", "content": "Which?"}], options=SHORT)
        seen = client.chat(target.model, [{"role": "user", "content": "Which?", "images": [data]}], options=SHORT)
    assert (seen.prompt_eval_count or 0) > (blind.prompt_eval_count or 0)


def models(target: Target) -> None:
    with client_of(target) as client:
        listed = [model.model or "" for model in client.list().models]
        shown = client.show(target.model)
        client.ps()
    assert target.model in {name.removesuffix(":latest") for name in listed}
    assert "completion" in (shown.capabilities or ())
    assert any(name.endswith(".context_length") for name in shown.modelinfo or {})


def unknown_model(target: Target) -> None:
    with client_of(target) as client, pytest.raises(ollama.ResponseError, match="not found") as error:
        client.chat("no-such-model", HELLO)
    assert error.value.status_code == 404


@contextmanager
def chat_ollama(target: Target, options: dict[str, Any], **more: Any) -> Iterator[ChatOllama]:
    settings = {"headers": headers_of(target), **PLAIN}
    llm = ChatOllama(model=target.model, base_url=host_of(target), client_kwargs=settings, **options, **more)
    try:
        yield llm
    finally:
        assert llm._client is not None
        llm._client._client.close()


def langchain_invoke(target: Target) -> None:
    with chat_ollama(target, SHORT, validate_model_on_init=True) as llm:
        answer = llm.invoke("Say hello.")
        whole = None
        for chunk in llm.stream("Say hello."):
            whole = chunk if whole is None else whole + chunk
    for message in (answer, whole):
        assert isinstance(message, AIMessage)
        assert message.response_metadata["done_reason"] == "length"
        assert message.usage_metadata is not None
        assert message.usage_metadata["output_tokens"] == 8
        assert message.usage_metadata["input_tokens"] > 0


def langchain_tools(target: Target) -> None:
    with chat_ollama(target, LONG) as llm:
        bound = llm.bind_tools([Weather])
        called = bound.invoke(WEATHER_QUESTION)
        if target.has_random_weights:
            return
        assert called.tool_calls
        for call in called.tool_calls:
            check_arguments(call["name"], call["args"])
        results = [ToolMessage("Sun.", tool_call_id=call["id"]) for call in called.tool_calls]
        assert bound.invoke([HumanMessage(WEATHER_QUESTION), called, *results]).response_metadata["done"]


def langchain_schema(target: Target) -> None:
    with chat_ollama(target, LONG) as llm:
        animal = llm.with_structured_output(Animal, method="json_schema").invoke(PET_QUESTION)
    assert isinstance(animal, Animal)


@contextmanager
def llama_index_of(target: Target, options: dict[str, Any]) -> Iterator[Ollama]:
    with client_of(target) as client:
        yield Ollama(
            model=target.model,
            base_url=host_of(target),
            context_window=target.context,
            client=client,
            additional_kwargs=options,
        )


def llama_index_chat(target: Target) -> None:
    with llama_index_of(target, SHORT) as llm:
        messages = [ChatMessage(role="user", content="Say hello.")]
        answer = llm.chat(messages)
        pieces = [piece.delta or "" for piece in llm.stream_chat(messages)]
    assert answer.message.content
    assert "".join(pieces) == answer.message.content


def llama_index_schema(target: Target) -> None:
    with llama_index_of(target, LONG) as llm:
        assert isinstance(llm.structured_predict(Animal, PromptTemplate(PET_QUESTION)), Animal)


def llama_index_tools(target: Target) -> None:
    def weather(city: str, days: int) -> str:
        """Tell the weather of the coming days in a city."""
        return "Sun."

    tool = FunctionTool.from_defaults(weather, name="Weather", fn_schema=Weather)
    with llama_index_of(target, LONG) as llm:
        answer = llm.chat_with_tools([tool], user_msg=WEATHER_QUESTION)
        calls = llm.get_tool_calls_from_response(answer, error_on_no_tool_call=not target.has_random_weights)
    for call in calls:
        check_arguments(call.tool_name, call.tool_kwargs)


PROGRAMS = (
    Program("ollama-python", "chat, plain and streamed", chat),
    Program("ollama-python", "generate, plain and streamed", generate),
    Program("ollama-python", "asynchronous stream", async_stream),
    Program("ollama-python", "load a model", load),
    Program("ollama-python", "format with a schema", schema),
    Program("ollama-python", "tools and their results", tools),
    Program("ollama-python", "image", image, needs_vision=True),
    Program("ollama-python", "list, show and ps", models),
    Program("ollama-python", "an unknown model is a ResponseError", unknown_model),
    Program("ChatOllama", "invoke and stream with usage", langchain_invoke),
    Program("ChatOllama", "tools and their results", langchain_tools),
    Program("ChatOllama", "with_structured_output", langchain_schema),
    Program("LlamaIndex Ollama", "chat and stream_chat", llama_index_chat),
    Program("LlamaIndex Ollama", "structured_predict", llama_index_schema),
    Program("LlamaIndex Ollama", "chat_with_tools", llama_index_tools),
)
