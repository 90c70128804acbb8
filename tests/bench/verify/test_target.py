"""Reading of answers and of server-sent events."""

import pytest

from gateway.bench.verify.target import EventReader, Reply, ServerUnreachable, Target, shortened


def test_events_carry_the_time_and_the_read_that_ended_them() -> None:
    reader = EventReader()
    reader.feed(b'data: {"a": 1}\n\ndata: {"a"', 1.0)
    reader.feed(b": 2}\r\n\r\n: a comment\n\nevent: x\ndata: one\n", 2.0)
    reader.feed(b"data:two\n\ndata: [DONE]\n\n", 3.0)
    found = [(event.data, event.at, event.read) for event in reader.events]
    assert found == [
        (b'{"a": 1}', 1.0, 1), (b'{"a": 2}', 2.0, 2), (b"one\ntwo", 3.0, 3), (b"[DONE]", 3.0, 3),
    ]  # fmt: skip


def test_a_character_that_was_cut_apart_is_not_json() -> None:
    reader = EventReader()
    reader.feed(b'data: {"choices": [{"delta": {"content": "' + "람".encode()[:2] + b'"}}]}\n\n', 1.0)
    assert reader.events[0].body is None
    assert reader.events[0].text == ""


@pytest.mark.parametrize("body", [None, [], {"choices": []}, {"choices": [None]}, {"choices": {}}, {"error": "text"}])
def test_an_odd_answer_has_no_choice_no_text_and_no_error(body: object) -> None:
    reply = Reply(200, {}, b"", body, 0.0)
    assert (reply.choice, reply.text, reply.usage, reply.error) == ({}, "", {}, {})


async def test_a_server_that_is_not_there_is_unreachable_and_says_where() -> None:
    async with Target("http://127.0.0.1:1", model=None, key=None) as target:
        with pytest.raises(ServerUnreachable, match="/v1/models"):
            await target.get("/v1/models")


def test_long_messages_are_cut_to_one_line() -> None:
    assert shortened("a\n b  c") == "a b c"
    assert len(shortened("x" * 500)) == 160
