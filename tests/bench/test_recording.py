"""A recording is read as the gateway writes it."""

from pathlib import Path

import pytest

from gateway.bench.recording import InvalidRecording, read_recording
from tests.bench.traffic import HEAD, recorded, recording, write


def test_chats_are_read_in_the_order_of_their_arrival_and_others_are_counted(tmp_path: Path) -> None:
    file = write(
        tmp_path / "traffic.jsonl",
        recorded(1002.0),
        recorded(1001.0, endpoint="messages"),
        recorded(1000.0, endpoint="embeddings"),
        recorded(1000.5, endpoint="count_tokens"),
        recorded(1003.0, endpoint="ollama_generate", characters=0, prompt_tokens=None),
        more=b'{"at": 1004.0, "end',
    )
    found = read_recording(file)
    assert [item.at for item in found.exchanges] == [1001.0, 1002.0]
    assert found.skipped == {"embeddings": 1, "count_tokens": 1, "ollama_generate": 1}
    assert (found.unreadable, found.seconds) == (1, 1.0)


def test_the_file_before_is_read_first(tmp_path: Path) -> None:
    file = write(tmp_path / "traffic.jsonl", recorded(1002.0))
    write(tmp_path / "traffic.jsonl.1", recorded(1001.0))
    assert [item.at for item in read_recording(file).exchanges] == [1001.0, 1002.0]
    assert [item.at for item in read_recording(file, most=1).exchanges] == [1001.0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a recording"),
        ("{}\n", "not a recording"),
        ("prompt\n", "not a recording"),
        ('{"format": "llm-gateway-traffic", "version": 2}\n', "version 2; this program reads 1"),
        ('{"format": "llm-gateway-traffic", "version": 1}\n', "no request that can be sent again"),
    ],
)
def test_another_file_is_named(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "traffic.jsonl"
    file.write_text(text)
    with pytest.raises(InvalidRecording, match=words):
        read_recording(file)
    with pytest.raises(InvalidRecording, match="No such file"):
        read_recording(tmp_path / "missing")


def test_latencies_are_those_of_complete_answers() -> None:
    found = recording(
        recorded(duration=1.0, time_to_first_token=0.1),
        recorded(duration=3.0, stream=False, time_to_first_token=None),
        recorded(duration=9.0, status=503, outcome="rejected"),
        recorded(duration=9.0, outcome="cancelled"),
    )
    assert (found.milliseconds("e2el", 50), found.count("e2el")) == (2000.0, 2)
    assert (found.milliseconds("ttft", 50), found.count("ttft")) == (100.0, 1)
    assert found.failed == 1


def test_lengths_of_what_was_not_counted_are_the_usual_ones() -> None:
    found = recording(recorded(completion_tokens=10), recorded(completion_tokens=30), recorded(images=((9, 9),)))
    assert found.tokens_per_character == 0.25
    assert found.usual_completion == 20
    unknown = recording(recorded(prompt_tokens=None, completion_tokens=None))
    assert (unknown.tokens_per_character, unknown.usual_completion) == (0.25, 128)
    assert HEAD["version"] == 1
