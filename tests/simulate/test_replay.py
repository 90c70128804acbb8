"""Replay of every recorded request: the stand-in returns the same status, headers and body shape.

The text of a recorded reply is a model's noise. The stand-in is made to produce that very text, so
everything that depends on it (stop strings, repetition, tool calls, reasoning, the finish reason)
must be as recorded.

Covers: gateway/simulate/ollama/
Covers: gateway/simulate/vllm/
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from gateway.simulate import Model, Options
from tests.golden import SERVERS, Recording, load
from tests.simulate.replaying import Replayer, compare_bodies, compare_errors, compare_heads, recorded, replayer

pytestmark = pytest.mark.asyncio(loop_scope="module")

VLLM_MODEL = Model("Qwen/Qwen3-VL-8B-Instruct", family="qwen3vl", vision=True, tools=True, context_length=2048)
EMBEDDING_MODELS = (Model("embed", embedding=64, context_length=256),)
OPTIONS = {
    "vllm-0.32.0": Options("vllm", models=(VLLM_MODEL,), reasoning_parser=True),
    "vllm": Options("vllm", models=(VLLM_MODEL,)),
    "vllm-text": Options("vllm", models=(Model("tiny-text", context_length=2048),), tool_parser=False),
    "vllm-embed": Options("vllm", models=(Model("tiny-embed", embedding=64, context_length=512),)),
    "ollama-0.33": Options("ollama", generation="0.33"),
    "ollama-0.24": Options("ollama", generation="0.24"),
    "ollama-0.33-embed": Options("ollama", models=EMBEDDING_MODELS, generation="0.33"),
    "ollama-0.24-embed": Options("ollama", models=EMBEDDING_MODELS, generation="0.24"),
}
StandIn = Callable[[str], Awaitable[Replayer]]
RECORDINGS = [recording for server in SERVERS for recording in load(server).values()]
UNUSUAL_REQUESTS = [
    recording for server in OPTIONS if server != "vllm-0.32.0" for recording in recorded(server).values()
]

# vLLM lists what each type of message, part, tool or format would have needed, the stand-in only
# one of them; some messages come from the grammar compiler.
OTHER_MESSAGE = {
    *(
        "messages_number_in",
        "messages_no_role",
        "messages_content_number",
        "messages_content_null",
        "call_arguments_object",
    ),
    *(
        "part_unknown",
        "part_no_type",
        "part_text_missing",
        "part_text_number",
        "part_string",
        "image_no_url",
        "image_url_string",
    ),
    *("format_schema_bad_type", "embeddings_number", "embeddings_missing"),
}
INTERLEAVED = {"n_two_stream"}  # the order of the chunks depends on which choice had a token
BEGUN_CALL = [*"<tool_call>", "\n"]  # the text of a forced call that was cut off that early
TOKENS = dict.fromkeys(
    ("forced_named_cut_stream", "forced_required_cut_stream", "forced_required_cut_early_stream"), BEGUN_CALL
)
TOKENS |= {
    "forced_named_strict_stream": [
        "<tool_call>\n",
        '{"name": "get_weather", ',
        '"arguments": {"',
        'city": "Rome"',
        "}}\n",
        "</tool_call>",
    ],
    "api_forced_by_format_two": ['{"name": "get_time", ', '"parameters": {"zone": "x"}, "more": '],
}


def recording_id(recording: Recording) -> str:
    return f"{recording.server}/{recording.case}"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand_in() -> AsyncIterator[StandIn]:
    """Return the stand-in of a recorded server, which all recordings of that server share."""
    async with AsyncExitStack() as stack:
        started: dict[str, Replayer] = {}

        async def stand_in_of(server: str) -> Replayer:
            if server not in started:
                started[server] = await stack.enter_async_context(replayer(OPTIONS[server]))
            return started[server]

        yield stand_in_of


@pytest.mark.parametrize("recording", RECORDINGS, ids=recording_id)
async def test_stand_in_answers_as_recorded(stand_in: StandIn, recording: Recording) -> None:
    if recording.case == "api_ps":  # lists all loaded models, so it needs a server of its own
        async with replayer(OPTIONS[recording.server]) as fresh:
            await fresh.load("qwen3-vl")
            response = await fresh.replay(recording)
    else:
        response = await (await stand_in(recording.server)).replay(recording)
    compare_heads(response, recording)
    compare_bodies(response, recording)


@pytest.mark.parametrize("recording", UNUSUAL_REQUESTS, ids=recording_id)
async def test_unusual_request_is_accepted_or_refused_as_recorded(stand_in: StandIn, recording: Recording) -> None:
    is_cut_off = recording.server == "ollama-0.33" and recording.case == "api_forced_by_format_two"
    tokens = None if is_cut_off else TOKENS.get(recording.case)
    response = await (await stand_in(recording.server)).replay(recording, tokens)
    compare_heads(response, recording)
    if recording.case in OTHER_MESSAGE and recording.server.startswith("vllm"):
        compare_errors(response, recording)
    else:
        compare_bodies(response, recording, in_order=recording.case not in INTERLEAVED)
