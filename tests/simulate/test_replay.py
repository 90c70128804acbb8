"""Each recording's request, sent to the stand-in of its server: the same status, headers and shape of the body come back.

The words of a recorded reply were a model's noise; the stand-in is given those very words to say, so that all that follows from them
(stop strings, repetition, calls, reasoning, the finish) must come out as it did.
"""

import pytest

from gateway.simulate import Model, Options
from tests.golden import SERVERS, Recording, load
from tests.simulate.replaying import compare_bodies, compare_errors, compare_heads, play, recorded

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
RECORDINGS = [recording for server in SERVERS for recording in load(server).values()]
ODDITIES = [recording for server in OPTIONS if server != "vllm-0.32.0" for recording in recorded(server).values()]

# vLLM says what each kind of message, part, tool or format would have needed; the stand-in says it of one. Or the words are a grammar's.
IN_OTHER_WORDS = {
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
INTERLEAVED = {"n_two_stream"}  # by which choice had a token to show
BEGUN_CALL = [*"<tool_call>", "\n"]  # what a forced call cut off so early had said
SAID = dict.fromkeys(
    ("forced_named_cut_stream", "forced_required_cut_stream", "forced_required_cut_early_stream"), BEGUN_CALL
)
SAID |= {
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


def ids(recording: Recording) -> str:
    return f"{recording.server}/{recording.case}"


@pytest.mark.parametrize("recording", RECORDINGS, ids=ids)
async def test_stand_in_answers_as_the_recorded_server_did(recording: Recording) -> None:
    response = await play(recording, OPTIONS[recording.server])
    compare_heads(response, recording)
    compare_bodies(response, recording)


@pytest.mark.parametrize("recording", ODDITIES, ids=ids)
async def test_odd_request_is_taken_or_refused_as_by_the_recorded_server(recording: Recording) -> None:
    cut_short = recording.server == "ollama-0.33" and recording.case == "api_forced_by_format_two"
    response = await play(recording, OPTIONS[recording.server], None if cut_short else SAID.get(recording.case))
    compare_heads(response, recording)
    if recording.case in IN_OTHER_WORDS and recording.server.startswith("vllm"):
        compare_errors(response, recording)
    else:
        compare_bodies(response, recording, in_order=recording.case not in INTERLEAVED)
