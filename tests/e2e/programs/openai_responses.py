"""Programs on the Responses API of openai-python, and on LangChain's client of it."""

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from openai.types.responses import Response, ResponseFunctionToolCall

from tests.e2e.programs.openai_python import client_of
from tests.e2e.programs.target import (
    ENOUGH_TOKENS,
    OTHER_QUESTION,
    PET_QUESTION,
    TIMEOUT_SECONDS,
    TOOLS,
    Program,
    Target,
    check_arguments,
    pet_schema,
)

HELLO = "Say hello."
FUNCTIONS: list[Any] = [
    {"type": "function", "name": name, "description": tool.__doc__, "parameters": tool.model_json_schema()}
    for name, tool in TOOLS.items()
]
SAMPLING: dict[str, Any] = {"temperature": 1}  # this API has no seed
NO_THOUGHTS: Any = {"effort": "none"}


def plain(target: Target) -> None:
    with client_of(target) as client:
        answer = client.responses.create(
            model=target.model, input=HELLO, instructions="Be brief.", max_output_tokens=300, reasoning=NO_THOUGHTS
        )
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert (answer.model, answer.object, answer.instructions) == (target.model, "response", "Be brief.")


def cut(target: Target) -> None:
    """Check that an answer at its token limit is incomplete, plain and streamed."""
    request: dict[str, Any] = {
        "model": target.model, "input": "Count 500 words.", "max_output_tokens": 5, "reasoning": NO_THOUGHTS,
    }  # fmt: skip
    with client_of(target) as client:
        answer = client.responses.create(**request)
        with client.responses.stream(**request) as stream:
            events = list(stream)
    last: Any = events[-1]
    assert last.type == "response.incomplete"
    for response in (answer, last.response):
        assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert response.usage.output_tokens == 5


def stream_helper(target: Target) -> None:
    with (
        client_of(target) as client,
        client.responses.stream(
            model=target.model, input=HELLO, reasoning=NO_THOUGHTS, max_output_tokens=400
        ) as stream,
    ):
        events: list[Any] = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == text


def parse(target: Target) -> None:
    request: dict[str, Any] = {
        "model": target.model, "input": PET_QUESTION, "text_format": pet_schema(target),
        "max_output_tokens": ENOUGH_TOKENS, "reasoning": NO_THOUGHTS, **SAMPLING,
    }  # fmt: skip
    with client_of(target) as client:
        answer = client.responses.parse(**request)
        assert isinstance(answer.output_parsed, pet_schema(target))
        with client.responses.stream(**request) as stream:
            assert isinstance(stream.get_final_response().output_parsed, pet_schema(target))


def forced_tools(target: Target) -> None:
    """Check that forced calls hold their schema, and that their outputs can be sent back.

    Without a seed, random weights sometimes write hundreds of blanks between two tokens of a call.
    """
    choices: list[Any] = [
        "required",
        {"type": "function", "name": "Clock"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "Weather"}]},
    ]
    for choice, names in zip(choices, ({"Weather", "Clock"}, {"Clock"}, {"Weather"}), strict=True):
        request: dict[str, Any] = {
            "model": target.model, "tools": FUNCTIONS, "max_output_tokens": 4 * ENOUGH_TOKENS,
            "reasoning": NO_THOUGHTS, **SAMPLING,
        }  # fmt: skip
        with client_of(target) as client:
            answer = client.responses.create(input=OTHER_QUESTION, tool_choice=choice, **request)
            with client.responses.stream(input=OTHER_QUESTION, tool_choice=choice, **request) as stream:
                streamed = stream.get_final_response()
            for response in (answer, streamed):
                for call in calls_of(response):
                    assert call.name in names
                    check_arguments(call.name, call.arguments)
            items: list[Any] = [{"role": "user", "content": OTHER_QUESTION}]
            items += [item.model_dump(exclude_none=True) for item in answer.output]
            items += [
                {"type": "function_call_output", "call_id": call.call_id, "output": "It is sunny."}
                for call in calls_of(answer)
            ]
            after = client.responses.create(input=items, tool_choice="none", **request)
        assert not any(item.type == "function_call" for item in after.output)


def calls_of(response: Response) -> list[ResponseFunctionToolCall]:
    calls = [item for item in response.output if item.type == "function_call"]
    assert calls
    return calls


def image(target: Target) -> None:
    parts: Any = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": target.image_url},
    ]
    with client_of(target) as client:
        without = client.responses.create(model=target.model, input=[{"role": "user", "content": parts[:1]}])
        answer = client.responses.create(model=target.model, input=[{"role": "user", "content": parts}])
    assert answer.usage is not None
    assert without.usage is not None
    assert answer.usage.input_tokens > without.usage.input_tokens


def stored_state(target: Target) -> None:
    with client_of(target) as client, pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model=target.model, input=HELLO, previous_response_id="resp_1")
    assert (caught.value.param, caught.value.type) == ("previous_response_id", "invalid_request_error")


def unknown_model(target: Target) -> None:
    for is_stream in (False, True):
        with client_of(target) as client, pytest.raises(openai.NotFoundError) as caught:
            client.responses.create(model="gpt-99", input=HELLO, stream=is_stream)
        assert caught.value.code == "model_not_found"


def langchain(target: Target) -> None:
    model = ChatOpenAI(
        base_url=target.url, api_key=lambda: target.key, model=target.model, use_responses_api=True, max_retries=0,
        timeout=TIMEOUT_SECONDS, max_tokens=ENOUGH_TOKENS, temperature=1, reasoning=NO_THOUGHTS,
    )  # fmt: skip
    forced = model.bind_tools(FUNCTIONS, tool_choice="Weather")
    answer = forced.invoke(OTHER_QUESTION)
    assert isinstance(answer, AIMessage)
    for call in answer.tool_calls:
        check_arguments(call["name"], call["args"])
    results: list[BaseMessage] = [ToolMessage("Sunny.", tool_call_id=call["id"]) for call in answer.tool_calls]
    conversation: list[BaseMessage] = [HumanMessage(OTHER_QUESTION), answer, *results]
    assert sum(1 for _ in model.bind_tools(FUNCTIONS, tool_choice="none").stream(conversation)) > 1


CLIENT = "responses of openai-python"
PROGRAMS = (
    Program(CLIENT, "create", plain),
    Program(CLIENT, "an answer at its limit is incomplete", cut),
    Program(CLIENT, "stream helper", stream_helper),
    Program(CLIENT, "parse into a model, plain and streamed", parse),
    Program(CLIENT, "forced tools and their outputs", forced_tools),
    Program(CLIENT, "previous_response_id is BadRequestError", stored_state),
    Program(CLIENT, "an unknown model is NotFoundError", unknown_model),
    Program(CLIENT, "image", image, needs_vision=True),
    Program("responses of langchain-openai", "forced tool, its result, stream", langchain),
)
