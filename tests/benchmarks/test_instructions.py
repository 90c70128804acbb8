"""The instruction counts: the process that is counted, without valgrind, and the arithmetic."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import requests
from benchmarks.in_memory import PIPE, PLAIN_TOKENS, Client, Request, Work
from benchmarks.instructions import Cost, Tally, drive, main, measure, read_count, table
from benchmarks.subjects import DidNotRun

ROOT = Path(__file__).resolve().parents[2]
WORK = Work(plain=5, streams=2, tokens=30)


@pytest.mark.parametrize("tree", [str(ROOT), PIPE])
def test_every_answer_arrives_whole_through_the_gateway_in_memory(tree: str, tmp_path: Path) -> None:
    assert drive(tree, WORK, tmp_path) == Tally(answers=7, tokens=5 * PLAIN_TOKENS + 2 * 30)


def test_a_process_that_fails_is_an_error_with_the_end_of_its_log(tmp_path: Path) -> None:
    package = tmp_path / "gateway"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("raise SystemExit('settings are wrong')")
    with pytest.raises(DidNotRun, match="status 1:\nsettings are wrong"):
        drive(str(tmp_path), WORK, tmp_path)


def test_a_directory_without_a_gateway_is_refused(tmp_path: Path) -> None:
    """Otherwise Python would find this tree's gateway and measure that one."""
    with pytest.raises(SystemExit, match="2"):
        main(["--tree", str(tmp_path)])


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 500 Internal Server Error\r\ncontent-length: 2\r\n\r\n~~",
        b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n~",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n~~~",
    ],
)
def test_client_refuses_an_answer_that_is_not_whole(answer: bytes) -> None:
    client = Client(iter([Request(b"GET / HTTP/1.1\r\n\r\n", 2, False)]))
    client.connection_made(Mock())
    with pytest.raises(RuntimeError, match="not the whole answer"):
        client.data_received(answer)


def test_client_refuses_a_stream_without_its_last_event() -> None:
    client = Client(iter([Request(requests.chat("standard", max_tokens=1, stream=True), 1, True)]))
    client.connection_made(Mock())
    with pytest.raises(RuntimeError, match="not the whole answer"):
        client.data_received(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\n~\n\n\r\n0\r\n\r\n")


def test_client_notices_a_connection_that_closes_early() -> None:
    client = Client(iter([Request(b"first", 0, False), Request(b"second", 0, False)]))
    client.connection_made(Mock())
    with pytest.raises(RuntimeError, match="before the last answer"):
        client.connection_lost(None)


def test_cost_is_the_difference_of_two_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def count(tree: str, work: Work, scratch: Path) -> int:
        return 9000 + 700 * work.plain + 30 * work.streams * work.tokens

    monkeypatch.setattr("benchmarks.instructions.count", count)
    assert measure("tree", tmp_path, WORK) == Cost(request=700, token=30)


def test_count_is_read_from_the_log_of_valgrind() -> None:
    assert read_count("==7== Cachegrind, a profiler\n==7== \n==7== I   refs:      2,623,092,230\n") == 2_623_092_230
    with pytest.raises(DidNotRun, match="counted nothing"):
        read_count("==7== Cachegrind, a profiler\n")


def test_table_leaves_out_the_harness() -> None:
    lines = table(Cost(100, 10), {"old": [Cost(490, 30), Cost(500, 30), Cost(510, 32)], "new": [Cost(900, 30)]})
    assert [line.split() for line in lines[1:]] == [
        ["harness", "100", "10"],
        ["old", "400", "×1.0000", "5.00%", "20", "×1.0000", "10.00%"],
        ["new", "800", "×2.0000", "0.00%", "20", "×1.0000", "0.00%"],
    ]
