"""Covers: gateway/cli/compare.py
Covers: gateway/cli/compare_options.py"""

import json
import shlex
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from typer.testing import Result

from gateway import simulate
from gateway.bench.compare import Written
from tests.bench.comparisons import comparison, side
from tests.cli.harness import ROOT, command, invoke
from tests.fakes.stand_ins import stand_in

OLLAMA = simulate.Options("ollama", (simulate.Model("qwen3:8b"),), parallel=4, tokens_per_second=50)
VLLM = simulate.Options("vllm")
LOAD = ("--rounds", "3", "--num-prompts", "4", "--output-len", "12", "--disable-tqdm")
QUALITY = """
tasks:
  - name: echo
    scenario: obedience
    prompt: Say the words one two three.
    checks: [{kind: mentions, required: [["one two three"]]}]
"""


@asynccontextmanager
async def engines() -> AsyncIterator[tuple[str, ...]]:
    """Run both engines, and yield the command's arguments for them."""
    async with stand_in(OLLAMA) as ollama, stand_in(VLLM) as vllm:
        yield (ollama.base_url, vllm.base_url, "--api-a", "ollama")


async def compare(*words: str, out: Path, **variables: str) -> Result:
    return await command("compare", *words, "--out", str(out), **variables)


async def test_two_engines_are_compared_with_their_quality_and_all_files_written(tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(QUALITY)
    async with engines() as sides:
        done = await compare(
            *sides, *LOAD, "--cold", "--quality", str(tasks), "--fail-if", "ratio_speed<1", out=tmp_path / "out"
        )
    assert done.exit_code == 0, done.output
    assert "Tokens per second, in sum: " in done.stdout
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names[0] == "compare_results.json"
    assert names[1].startswith("performance_report_20")
    assert names[2:] == ["report.html"]
    value = json.loads((tmp_path / "out" / "compare_results.json").read_text())
    by_key = {row["key"]: row for row in value["rows"]}
    assert by_key["speed"]["better"] in ("B", "same"), "as far as the machine is quiet"
    assert by_key["load_time"]["a"] is not None
    assert by_key["load_time"]["b"] is None
    assert [side["server"] for side in value["sides"]] == [{"ollama": "0.33.0"}, {"vllm": "0.32.0"}]
    assert value["recommendation"] == "quality_no_difference"
    written = "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert "one two three" not in written, "neither a prompt nor an answer is written"


async def test_a_condition_that_is_true_fails_the_command(tmp_path: Path) -> None:
    async with engines() as sides:
        done = await compare(*sides, *LOAD, "--fail-if", "ratio_speed>1", "--json", out=tmp_path)
    assert done.exit_code == 1
    assert "failed: ratio_speed is" in done.stderr
    assert json.loads(done.stdout)["figures"]["ratio_speed"] > 1


async def test_sides_measured_apart_are_compared_from_their_files(tmp_path: Path) -> None:
    async with engines() as (ollama, vllm, *_):
        first = await compare(ollama, "--api", "ollama", *LOAD, out=tmp_path / "a")
        second = await compare(vllm, *LOAD, "--lang", "ko", out=tmp_path / "b")
        other = await compare(vllm, *LOAD, "--seed", "1", out=tmp_path / "c")
    assert "Only one side was measured" in first.stdout
    assert "한쪽만 측정했으므로" in second.stdout
    assert other.exit_code == 0
    files = [str(tmp_path / name / "compare_results.json") for name in "abc"]
    done = await compare(*files[:2], out=tmp_path / "ab")
    assert done.exit_code == 0, done.output
    assert "not measured in turn" in done.stdout
    refused = await compare(files[0], files[2], out=tmp_path / "ac")
    assert refused.exit_code == 2
    assert "  seed: 0 in A, 1 in B" in refused.stderr
    assert not (tmp_path / "ac").exists()
    forced = await compare(files[0], files[2], "--force", out=tmp_path / "ac")
    assert forced.exit_code == 0


async def test_a_server_that_is_gone_fails_the_command(tmp_path: Path) -> None:
    done = await compare("http://127.0.0.1:1", "http://127.0.0.1:2", "--model", "m", *LOAD, out=tmp_path)
    assert done.exit_code == 1
    assert "A does not answer a first request: connect" in done.stderr


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("ftp://x", "http://127.0.0.1:1"), "A: 'ftp://x' is not an address"),
        (("http://u:p@127.0.0.1:1",), "credentials"),
        (("none.json", "http://127.0.0.1:1"), "two addresses or two result files"),
        (("none.json", "none.json"), "none.json: No such file"),
        (("http://127.0.0.1:1", "--request-rate", "0"), "--request-rate: 0: expected a positive number"),
        (("http://127.0.0.1:1", "--languages", "xx"), "--languages: 'xx'"),
        (("http://127.0.0.1:1", "--extra-body", "["), "--extra-body: not JSON"),
        (("http://127.0.0.1:1", "--extra-body", "[]"), "--extra-body: expected a JSON object"),
        (("http://127.0.0.1:1", "--timeout", "soon"), "--timeout: expected a duration"),
        (("http://127.0.0.1:1", "--quality", "none.yaml"), "--quality: none.yaml: No such file"),
        (("http://127.0.0.1:1", "--quality", "built-in", "--quality", "built-in"), "several tasks have the name"),
        (("http://127.0.0.1:1", "--judge", "http://127.0.0.1:1/m"), "--judge: it grades quality tasks; add --quality"),
        (("http://127.0.0.1:1", "--quality", "built-in", "--judge", "m"), "is not URL/MODEL"),
        (("http://127.0.0.1:1", "--fail-if", "x"), "expected a figure"),
        (("http://127.0.0.1:1", "--fail-if", "b_ttft>1"), "'b_ttft' is not a figure of this result; it has a_"),
        (("http://127.0.0.1:1", "http://127.0.0.1:2", "--fail-if", "a_quality<3"), "'a_quality' is not a figure"),
        (("none.json", "none.json", "--start-a", "vllm"), "--start-a, --start-b: they start the server"),
        (("http://127.0.0.1:1", "--start-b", "vllm"), "--start-a, --start-b: they start the server"),
        (("http://127.0.0.1:1", "--dataset-path", "none.jsonl"), "--dataset-path: none.jsonl"),
        (("http://127.0.0.1:1", "--api-key", "ключ"), "--api-key: only printable ASCII"),
    ],
)
def test_wrong_words_are_named_and_nothing_is_measured(
    words: tuple[str, ...], reason: str, empty_environment: None
) -> None:
    done = invoke("compare", *words)
    assert done.exit_code == 2
    assert reason in done.stderr
    assert not list(Path().iterdir())


def test_an_unknown_figure_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, name in zip(files, "AB", strict=True):
        file.write_text(Written(comparison(side(name)), {}).json_text(), encoding="utf-8")
    done = invoke("compare", *map(str, files), "--fail-if", "p99_ttft_ms>5", "--out", str(tmp_path))
    assert done.exit_code == 2
    assert "ratio_throughput" in done.stderr


async def test_a_server_is_started_and_its_load_time_measured(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    start = shlex.join([sys.executable, "-m", "gateway", "simulate", "--kind", "vllm", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    done = await compare(url, *LOAD, "--rounds", "1", "--cold", "--start-a", start, out=tmp_path, PYTHONPATH=str(ROOT))
    assert done.exit_code == 0, done.output
    value = json.loads((tmp_path / "compare_results.json").read_text())
    [cold] = value["sides"][0]["cold"]
    assert cold["load_seconds"] > 0
    assert cold["response_seconds"] > 0
    with pytest.raises(OSError, match=r".*"):
        socket.create_connection(("127.0.0.1", port), 1)


async def test_a_key_reaches_no_file(tmp_path: Path) -> None:
    key = "sk-a-key-that-nobody-may-see"
    async with stand_in(simulate.Options("vllm", api_key=key)) as vllm:
        done = await compare(vllm.base_url, *LOAD, GATEWAY_COMPARE_API_KEY_A=key, out=tmp_path)
    assert done.exit_code == 0, done.output
    assert key not in done.output + "".join(path.read_text() for path in tmp_path.iterdir())
