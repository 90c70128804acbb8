"""The cheap upstream: what it reads of requests, and its responses."""

import asyncio
import json

import pytest

from benchmarks import requests
from benchmarks.upstream import MARK, MODEL, WORDS, Pace, asked
from tests.benchmarks.serving import body_of, serving


def test_request_fields_are_found_on_both_sides_of_a_large_image() -> None:
    image = '"' + "A" * 100_000 + '"'
    found = asked(
        b'{"stream": true, "messages": [%b], "max_completion_tokens":12,"stream_options":{"include_usage":true}}'
        % image.encode()
    )
    assert (found.stream, found.usage, found.tokens) == (True, True, 12)
    assert asked(b'{"messages":[]}').stream is False


def test_pace_accepts_only_its_three_keys() -> None:
    pace = Pace()
    pace.update("interval_ms=2&hold=1&think_ms=30")
    assert (pace.interval, pace.hold, pace.think) == (0.002, 1, 0.03)
    with pytest.raises(ValueError, match="unknown key"):
        pace.update("speed=1")


async def test_stream_has_the_recorded_shape() -> None:
    async with serving() as (reader, writer, shared):
        shared.pace.interval = 0
        writer.write(requests.chat(MODEL, max_tokens=20, stream=True))
        events = (await body_of(reader)).decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    role, *tokens, finish, usage = chunks
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [chunk["choices"][0]["delta"]["content"] for chunk in tokens] == [WORDS[n % 16] + MARK for n in range(20)]
    assert finish["choices"][0]["finish_reason"] == "length"
    assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 20)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}


async def test_request_split_at_any_position_is_answered_once() -> None:
    async with serving() as (reader, writer, _):
        request = requests.chat(MODEL, max_tokens=3)
        ids = set()
        for cut in range(1, len(request), 37):
            writer.write(request[:cut])
            await writer.drain()
            await asyncio.sleep(0)
            writer.write(request[cut:])
            answer = json.loads(await body_of(reader))
            assert answer["choices"][0]["message"]["content"] == "".join(word + MARK for word in WORDS[:3])
            ids.add(answer["id"])
        assert len(ids) == len(range(1, len(request), 37))
